"""Gradient of a float mask."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E, at_head, inner_products, load_rows, program_indices
from vlmfast.kernels.flash_attention.gradients import (
    Statistics,
    load_row_statistics,
    weights_and_gradient,
)
from vlmfast.kernels.flash_attention.problem import Problem
from vlmfast.kernels.flash_attention.scores import FLOAT_MASK, VARYING, locate, masked_scores
from vlmfast.kernels.launch import Launch, Saved, ceil_div, start, strided

# Programs that the mask gradient is spread over where the mask has fewer tiles than this. With
# 64 x 64 tiles the float32 partial sums then stay within 4 MiB, whatever the sizes.
MASK_GRADIENT_PROGRAMS = 256


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_mask_kernel(
    query,
    key,
    value,
    attn_mask,
    grad_out,
    grad_mask,
    statistics,
    dropout,
    num_heads,
    num_queries,
    num_keys,
    mask_batches,
    mask_heads,
    mask_rows,
    mask_columns,
    num_splits,
    num_steps,
    head_steps,
    row_steps,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    SUM_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of one tile of a float mask, summed over whatever the mask broadcasts over.

    The program owns its tile of grad_mask (num_splits, mask batches, heads, rows, columns) and
    walks, in a fixed order, its share of the num_steps score tiles that the mask tile was added to:
    those of every batch entry, head and row block along which the mask has size 1.
    """
    mask_row_blocks = tl.cdiv(mask_rows, BLOCK_M)
    mask_column_blocks = tl.cdiv(mask_columns, BLOCK_N)
    mask_column_block, mask_row_block, mask_index = program_indices(
        mask_column_blocks, mask_row_blocks
    )
    # mask_index is that of split, batch and head.
    mask_head = mask_index % mask_heads
    mask_batch = mask_index // mask_heads % mask_batches
    split = mask_index // mask_heads // mask_batches

    # But for its number, every step's batch entry is like this one.
    segment = locate(mask_batch, num_queries, num_keys, CAUSAL)
    first_column = mask_column_block * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    share = tl.cdiv(num_steps, num_splits)
    grad_tile = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # What depends on the columns alone is not kept across steps: registers would spill on sm_90.
    for step in tl.range(
        split * share, tl.minimum((split + 1) * share, num_steps), disable_licm=True
    ):
        first_row = (mask_row_block + step % row_steps) * BLOCK_M
        head = mask_head + step // row_steps % head_steps
        batch = mask_batch + step // row_steps // head_steps
        rows = first_row + tl.arange(0, BLOCK_M)
        stream = batch * num_heads + head
        offset = tl.cast(stream, tl.int64) * num_queries
        head_query = at_head(query, batch, head, row=0, UNIT=UNIT)
        query_tiles = load_rows(head_query, rows, num_queries, D, PIECES, UNIT)
        head_key = at_head(key, batch, head // GROUP, row=0, UNIT=UNIT)
        key_tiles = load_rows(head_key, columns, num_keys, D, PIECES, UNIT)
        head_value = at_head(value, batch, head // GROUP, row=0, UNIT=UNIT)
        value_tiles = load_rows(head_value, columns, num_keys, DV, VALUE_PIECES, UNIT)
        head_grad_out = at_head(grad_out, batch, head, row=0, UNIT=UNIT)
        grad_out_tiles = load_rows(head_grad_out, rows, num_queries, DV, VALUE_PIECES, UNIT)
        row_statistics = load_row_statistics(statistics, offset, rows, num_queries)
        head_mask = at_head(attn_mask, batch, head, row=0, UNIT=1)
        scores = masked_scores(
            query_tiles,
            key_tiles,
            rows[:, None],
            columns[None, :],
            segment=segment,
            attn_mask=head_mask,
            scale=scale,
            MASK=FLOAT_MASK,
            MASK_HAS_ROWS=True,
            CAUSAL=CAUSAL,
            CHECK_COLUMNS=True,
            PRECISION=PRECISION,
        )
        _, grad_scores = weights_and_gradient(
            scores,
            inner_products(grad_out_tiles, value_tiles, PRECISION),
            row_statistics,
            factor=LOG2E,
            dropout=dropout,
            stream=stream,
            first_row_index=first_row,
            first_column_index=first_column,
            SCALED=True,
            DROPOUT=DROPOUT,
            VARLEN=False,
            TRANSPOSED=False,
        )
        grad_tile += grad_scores

    rows = mask_row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    if SUM_ROWS:
        grad_tile = tl.where((rows == 0)[:, None], tl.sum(grad_tile, 0)[None, :], 0.0)
    row_offsets = tl.cast(mask_index, tl.int64) * mask_rows + rows
    tl.store(
        grad_mask + (row_offsets * mask_columns)[:, None] + columns[None, :],
        grad_tile.to(grad_mask.dtype.element_ty),
        mask=(rows < mask_rows)[:, None] & (columns < mask_columns)[None, :],
    )


def row_mask_gradient(mask: torch.Tensor, saved: Saved) -> torch.Tensor:
    """Gradient of a mask that all keys share.

    What it adds to a row of logits changes no weight but the log-sum-exp alone, and only that of
    rows that see a key.
    """
    gradient = torch.zeros_like(mask, memory_format=torch.contiguous_format)
    if saved.grad_logsumexp is not None:
        visible = saved.grad_logsumexp.masked_fill(saved.logsumexp == -torch.inf, 0.0)
        gradient.copy_(visible.unsqueeze(3).sum_to_size(mask.shape))
    return gradient


def mask_gradient(problem: Problem, saved: Saved, statistics: Statistics) -> torch.Tensor:
    """Gradient of the float mask, in the mask's shape and dtype.

    A mask with few tiles is summed by several programs a tile, each into its own float32 partial;
    the partials are then added in order.
    """
    batch, heads, num_queries, _ = problem.query.shape
    mask = problem.attn_mask
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    unit = problem.stride_unit(saved.grad_out)
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)

    def run(launch: Launch) -> None:
        row_blocks = ceil_div(mask_rows, launch.block_m)
        column_blocks = ceil_div(mask_columns, launch.block_n)
        tiles = mask_batches * mask_heads * row_blocks * column_blocks
        head_steps = heads if mask_heads == 1 else 1
        row_steps = ceil_div(num_queries, launch.block_m) if mask_rows == 1 else 1
        steps = (batch if mask_batches == 1 else 1) * head_steps * row_steps
        splits = max(1, min(steps, MASK_GRADIENT_PROGRAMS // max(tiles, 1)))
        partials = result
        if splits > 1:
            partials = mask.new_empty((splits, *mask.shape), dtype=torch.float32)
        start(
            flash_attention_bwd_mask_kernel,
            splits * tiles,
            launch,
            **problem.inputs(unit),
            **problem.constants(unit),
            grad_out=strided(saved.grad_out, unit),
            grad_mask=partials,
            statistics=statistics,
            mask_batches=mask_batches,
            mask_heads=mask_heads,
            mask_rows=mask_rows,
            mask_columns=mask_columns,
            num_splits=splits,
            num_steps=steps,
            head_steps=head_steps,
            row_steps=row_steps,
            SUM_ROWS=mask_rows == 1,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )
        if splits > 1:
            result.copy_(partials.sum(0))

    problem.launch("flash_attention_bwd_mask", num_queries, run)
    return result
