"""Gradient of queries."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    add_products,
    at_head,
    inner_products,
    load_rows,
    program_indices,
    scale_tiles,
    shifted_exp2,
    store_rows,
    zero_tiles,
)
from vlmfast.kernels.cross_attention.images import VARYING, at_image, locate_tokens, seen_latents
from vlmfast.kernels.cross_attention.problem import Problem
from vlmfast.kernels.cross_attention.tiles import row_statistics, select_tiles
from vlmfast.kernels.launch import Launch, Saved, start, strided


@triton.jit
def add_query_gradient(
    query_tiles,
    grad_out_tiles,
    grad_query_tiles,
    shift,
    delta,
    sees,
    key,
    value,
    num_latents,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One image's share of the gradient of a block of queries, of which `sees` see it."""
    for first in range(0, num_latents, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        key_tiles = load_rows(key, columns, num_latents, D, PIECES, UNIT)
        value_tiles = load_rows(value, columns, num_latents, DV, VALUE_PIECES, UNIT)
        scores = inner_products(query_tiles, key_tiles, PRECISION)
        weights = shifted_exp2(scores, shift[:, None], scale * LOG2E)
        weights = tl.where((columns < num_latents)[None, :], weights, 0.0)
        grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        if SEVERAL:
            grad_scores = tl.where(sees[:, None], grad_scores, 0.0)
        after = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)
        if SEVERAL:
            after = select_tiles(sees, after, grad_query_tiles)
        grad_query_tiles = after
    return grad_query_tiles


@triton.jit(do_not_specialize=VARYING)
def cross_attention_bwd_query_kernel(
    query,
    key,
    value,
    out,
    grad_out,
    grad_query,
    logsumexp,
    grad_logsumexp,
    plan,
    num_heads,
    num_blocks,
    num_tokens,
    num_images,
    num_latents,
    order_size,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    PARTS: tl.constexpr,
    IMAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of one block of BLOCK_M tokens' queries of one head; blocks as in the forward."""
    block, head, batch = program_indices(num_blocks, num_heads)
    tokens = locate_tokens(
        plan, batch, block, num_tokens, num_images, order_size, SEVERAL, IMAGES, BLOCK_M
    )
    if not SEVERAL and tokens.first_image >= num_images:
        return
    rows = tokens.rows

    query = at_head(query, batch, head, 0, UNIT)
    out = at_head(out, batch, head, 0, UNIT)
    grad_out = at_head(grad_out, batch, head, 0, UNIT)
    query_tiles = load_rows(query, rows, num_tokens, D, PIECES, UNIT)
    grad_out_tiles = load_rows(grad_out, rows, num_tokens, DV, VALUE_PIECES, UNIT)
    out_tiles = load_rows(out, rows, num_tokens, DV, VALUE_PIECES, UNIT)
    statistics_offset = tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    if grad_logsumexp is not None:
        grad_logsumexp += statistics_offset
    shift, delta = row_statistics(
        grad_out_tiles, out_tiles, logsumexp + statistics_offset, grad_logsumexp, rows, num_tokens
    )
    grad_query_tiles = zero_tiles(BLOCK_M, PIECES)
    for image in range(tokens.first_image, tokens.end_image):
        image_key = at_image(key, batch, head // GROUP, image, UNIT)
        image_value = at_image(value, batch, head // GROUP, image, UNIT)
        for part in tl.static_range(PARTS):
            sees, length = seen_latents(
                tokens,
                plan,
                batch,
                image,
                part=part,
                num_tokens=num_tokens,
                num_images=num_images,
                num_latents=num_latents,
                SEVERAL=SEVERAL,
                PARTS=PARTS,
            )
            grad_query_tiles = add_query_gradient(
                query_tiles,
                grad_out_tiles,
                grad_query_tiles,
                shift,
                delta,
                sees,
                image_key,
                image_value,
                num_latents=length,
                scale=scale,
                D=D,
                DV=DV,
                PIECES=PIECES,
                VALUE_PIECES=VALUE_PIECES,
                SEVERAL=SEVERAL,
                PRECISION=PRECISION,
                UNIT=UNIT,
                BLOCK_N=BLOCK_N,
            )
    grad_query = at_head(grad_query, batch, head, 0, UNIT)
    grad_query_tiles = scale_tiles(grad_query_tiles, scale)
    store_rows(grad_query, rows, num_tokens, grad_query_tiles, D, PIECES, UNIT)


def query_gradient(problem: Problem, saved: Saved, grad_query: torch.Tensor) -> None:
    unit = problem.stride_unit(saved.out, saved.grad_out, grad_query)

    def run(launch: Launch) -> None:
        blocks = problem.blocks(launch.block_m)
        start(
            cross_attention_bwd_query_kernel,
            problem.batch * problem.heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.sizes(blocks),
            **problem.constants(unit),
            **problem.token_constants(),
            plan=problem.kernel_plan(),
            out=strided(saved.out, unit),
            grad_out=strided(saved.grad_out, unit),
            grad_query=strided(grad_query, unit),
            logsumexp=saved.logsumexp,
            grad_logsumexp=saved.grad_logsumexp,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )

    problem.launch("cross_attention_bwd_query", problem.latents, run)
