"""The share of rows that average all values in the gradients of these."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import Strided, at_head, load_rows, scale_tiles, store_rows, zero_tiles
from vlmfast.kernels.cross_attention.images import UNIFORM_ROW, VARYING
from vlmfast.kernels.cross_attention.problem import Problem
from vlmfast.kernels.cross_attention.tiles import add_tiles, sum_of_rows
from vlmfast.kernels.launch import Launch, Saved, start, stride_unit, strided

# Tokens that are looked at together for rows to add up. Mostly there are none, and a load waits for
# the one before: of 2,048 tokens in blocks of 32 there would be 64.
SCAN = tl.constexpr(1024)


@triton.jit
def has_uniform(kinds):
    """Whether one of the tokens averages all values."""
    return tl.max((kinds == UNIFORM_ROW).to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=VARYING)
def cross_attention_bwd_uniform_kernel(
    grad_out,
    uniform_gradient,
    image_index,
    num_heads,
    num_tokens,
    num_values,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What the rows that average all values add to the gradient of each value of a key head."""
    key_heads = num_heads // GROUP
    key_head = tl.program_id(0) % key_heads
    batch = tl.program_id(0) // key_heads
    image_index += tl.cast(batch, tl.int64) * num_tokens
    total = zero_tiles(1, VALUE_PIECES)
    for scanned in range(0, num_tokens, SCAN):
        tokens = scanned + tl.arange(0, SCAN)
        all_kinds = tl.load(image_index + tokens, mask=tokens < num_tokens, other=0)
        end = tl.where(has_uniform(all_kinds), tl.minimum(scanned + SCAN, num_tokens), scanned)
        for first in range(scanned, end, BLOCK_M):
            rows = first + tl.arange(0, BLOCK_M)
            kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=0)
            members = tl.where(has_uniform(kinds), GROUP, 0)
            rows = tl.where(kinds == UNIFORM_ROW, rows, num_tokens)
            for member in range(members):
                head_grad_out = at_head(grad_out, batch, key_head * GROUP + member, 0, UNIT)
                tiles = load_rows(head_grad_out, rows, num_tokens, DV, VALUE_PIECES, UNIT)
                total = add_tiles(total, sum_of_rows(tiles))
    result = Strided(uniform_gradient + tl.cast(tl.program_id(0), tl.int64) * DV, (0, 0, 0, 1))
    total = scale_tiles(total, 1.0 / tl.maximum(num_values, 1))
    store_rows(result, tl.zeros([1], tl.int32), 1, total, DV, VALUE_PIECES, UNIT=1)


def uniform_gradient(problem: Problem, saved: Saved) -> torch.Tensor:
    """What rows that average all values add to the gradient of each, float32 (B, Hkv, Dv)."""
    value_size = problem.value.shape[4]
    shape = (problem.batch, problem.key_heads, value_size)
    result = problem.query.new_empty(shape, dtype=torch.float32)
    unit = stride_unit(saved.grad_out)

    def run(launch: Launch) -> None:
        start(
            cross_attention_bwd_uniform_kernel,
            problem.batch * problem.key_heads,
            launch,
            grad_out=strided(saved.grad_out, unit),
            uniform_gradient=result,
            image_index=problem.plan.image_index,
            num_heads=problem.heads,
            num_tokens=problem.tokens,
            num_values=problem.images * problem.latents,
            GROUP=problem.heads // problem.key_heads,
            DV=value_size,
            VALUE_PIECES=problem.pieces(value_size),
            UNIT=unit,
            BLOCK_M=launch.block_m,
        )

    problem.launch("cross_attention_bwd_uniform", problem.latents, run)
    return result
