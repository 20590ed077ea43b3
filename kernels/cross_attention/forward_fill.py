"""Rows that see no image: 0, or the mean of all values."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LN2,
    at_head,
    load_rows,
    program_indices,
    scale_tiles,
    store_rows,
    zero_tiles,
)
from vlmfast.kernels.cross_attention.images import UNIFORM_ROW, VARYING, at_image
from vlmfast.kernels.cross_attention.problem import Problem, strided_images
from vlmfast.kernels.cross_attention.tiles import add_tiles, sum_of_rows
from vlmfast.kernels.launch import Launch, ceil_div, start, stride_unit, strided


@triton.jit
def value_count(num_images, num_latents):
    """How many values a key head has, in float32: of stride 0 there may be more than 2**31."""
    return tl.cast(num_images, tl.float32) * num_latents


@triton.jit
def mean_value(
    value,
    batch,
    key_head,
    num_images,
    num_latents,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean of all values of a key head, a split tile (1, DV)."""
    total = zero_tiles(1, VALUE_PIECES)
    for image in range(num_images):
        latents = at_image(value, batch, key_head, image, UNIT)
        for first in range(0, num_latents, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            tiles = load_rows(latents, columns, num_latents, DV, VALUE_PIECES, UNIT)
            total = add_tiles(total, sum_of_rows(tiles))
    return scale_tiles(total, 1.0 / tl.maximum(value_count(num_images, num_latents), 1.0))


@triton.jit(do_not_specialize=VARYING)
def cross_attention_fill_kernel(
    value,
    out,
    logsumexp,
    image_index,
    num_heads,
    num_blocks,
    num_tokens,
    num_images,
    num_latents,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of one block of tokens of one head that see no image: 0, or the mean of all values."""
    block, head, batch = program_indices(num_blocks, num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    image_index += tl.cast(batch, tl.int64) * num_tokens
    kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=1)
    uniform = kinds == UNIFORM_ROW
    filled = uniform if SEVERAL else (uniform | (kinds == 0))
    if tl.max(filled.to(tl.int32), 0) == 0:
        return
    count = tl.where(tl.max(uniform.to(tl.int32), 0) == 0, 0, num_images)
    mean = mean_value(
        value,
        batch=batch,
        key_head=head // GROUP,
        num_images=count,
        num_latents=num_latents,
        DV=DV,
        VALUE_PIECES=VALUE_PIECES,
        UNIT=UNIT,
        BLOCK_N=BLOCK_N,
    )
    tiles = ()
    zeros = zero_tiles(BLOCK_M, VALUE_PIECES)
    for i in tl.static_range(len(mean)):
        tiles = tiles + (tl.where(uniform[:, None], mean[i], zeros[i]),)
    keep = tl.where(filled, rows, num_tokens)
    out = at_head(out, batch, head, 0, UNIT)
    store_rows(out, keep, num_tokens, tiles, DV, VALUE_PIECES, UNIT)
    values = value_count(count, num_latents)  # 0 gives the log-sum-exp of nothing, -inf
    lse = tl.where(uniform, tl.math.log2(values) * LN2, float("-inf"))
    logsumexp += tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    tl.store(logsumexp + keep, lse, mask=keep < num_tokens)


def fill_rows(problem: Problem, out: torch.Tensor, logsumexp: torch.Tensor) -> None:
    unit = stride_unit(problem.value, out)

    def run(launch: Launch) -> None:
        blocks = ceil_div(problem.tokens, launch.block_m)
        start(
            cross_attention_fill_kernel,
            problem.batch * problem.heads * blocks,
            launch,
            value=strided_images(problem.value, unit),
            out=strided(out, unit),
            logsumexp=logsumexp,
            image_index=problem.plan.image_index,
            num_heads=problem.heads,
            num_blocks=blocks,
            num_tokens=problem.tokens,
            num_images=problem.images,
            num_latents=problem.latents,
            GROUP=problem.heads // problem.key_heads,
            DV=problem.value.shape[4],
            VALUE_PIECES=problem.pieces(problem.value.shape[4]),
            SEVERAL=problem.several,
            UNIT=unit,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )

    problem.launch("cross_attention_fill", problem.latents, run)
