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
    store_rows,
    zero_tiles,
)
from vlmfast.kernels.flash_attention.gradients import (
    Statistics,
    load_row_statistics,
    weights_and_gradient,
)
from vlmfast.kernels.flash_attention.problem import Problem
from vlmfast.kernels.flash_attention.scores import (
    FLOAT_MASK,
    NO_MASK,
    VARYING,
    locate,
    masked_scores,
    visible_columns,
)
from vlmfast.kernels.launch import Launch, Saved, ceil_div, start, strided


@triton.jit
def add_gradients(
    grad_query_tiles,
    query_tiles,
    grad_out_tiles,
    row_statistics,
    rows,
    first_column,
    end,
    segment,
    stream,
    key,
    value,
    attn_mask,
    dropout,
    scale,
    factor,
    first_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    """Adds what the keys from first_column to end give to the gradient of a block of queries.

    A loop that may run zero times would let each product wait for the one before it, where tensor
    cores compute them; elsewhere nothing is gained, and registers would spill.
    """
    if not TENSOR_CORES or end > first_column:
        if TENSOR_CORES:
            tl.assume(end > first_column)
        for column in range(first_column, end, STEP):
            columns = column + tl.arange(0, STEP)
            key_tiles = load_rows(key, columns, segment.num_keys, D, PIECES, UNIT, CHECK)
            value_tiles = load_rows(value, columns, segment.num_keys, DV, VALUE_PIECES, UNIT, CHECK)
            scores = masked_scores(
                query_tiles,
                key_tiles,
                rows[:, None],
                columns[None, :],
                segment=segment,
                attn_mask=attn_mask,
                scale=scale,
                MASK=MASK,
                MASK_HAS_ROWS=MASK_HAS_ROWS,
                CAUSAL=CAUSAL,
                CHECK_COLUMNS=CHECK,
                PRECISION=PRECISION,
            )
            _, grad_scores = weights_and_gradient(
                scores,
                inner_products(grad_out_tiles, value_tiles, PRECISION),
                row_statistics,
                factor=factor,
                dropout=dropout,
                stream=stream,
                first_row_index=segment.first_query + first_row,
                first_column_index=segment.first_key + column,
                SCALED=MASK == FLOAT_MASK,
                DROPOUT=DROPOUT,
                VARLEN=VARLEN,
                TRANSPOSED=False,
            )
            grad_query_tiles = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)
    return grad_query_tiles


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_query_kernel(
    query,
    key,
    value,
    attn_mask,
    grad_out,
    grad_query,
    statistics,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
):
    """Gradient of one block of BLOCK_M queries of one head, in a loop over the keys it sees."""
    block, head, entry = program_indices(num_blocks, num_heads)
    if CAUSAL:
        block = num_blocks - 1 - block  # the blocks that see most keys start first
    segment = locate(entry, num_queries, num_keys, CAUSAL, cu_seqlens_q, cu_seqlens_k)
    first_row = block * BLOCK_M
    if first_row >= segment.num_queries:
        return
    stream = segment.batch * num_heads + head
    offset = tl.cast(stream, tl.int64) * num_queries + segment.first_query

    query = at_head(query, segment.batch, head, segment.first_query, UNIT)
    key = at_head(key, segment.batch, head // GROUP, segment.first_key, UNIT)
    value = at_head(value, segment.batch, head // GROUP, segment.first_key, UNIT)
    grad_out = at_head(grad_out, segment.batch, head, segment.first_query, UNIT)
    if MASK != NO_MASK:
        attn_mask = at_head(attn_mask, segment.batch, head, row=0, UNIT=1)

    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, rows, segment.num_queries, D, PIECES, UNIT)
    grad_out_tiles = load_rows(grad_out, rows, segment.num_queries, DV, VALUE_PIECES, UNIT)
    row_statistics = load_row_statistics(statistics, offset, rows, segment.num_queries)
    grad_query_tiles = zero_tiles(BLOCK_M, PIECES)

    end, checked_from = visible_columns(segment, first_row, CAUSAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(2):  # 0: whole blocks, nothing to check; 1: the rest
        grad_query_tiles = add_gradients(
            grad_query_tiles,
            query_tiles,
            grad_out_tiles,
            row_statistics,
            rows,
            first_column=checked_from if phase == 1 else 0,
            end=end if phase == 1 else checked_from,
            segment=segment,
            stream=stream,
            key=key,
            value=value,
            attn_mask=attn_mask,
            dropout=dropout,
            scale=scale,
            factor=factor,
            first_row=first_row,
            D=D,
            DV=DV,
            PIECES=PIECES,
            VALUE_PIECES=VALUE_PIECES,
            MASK=MASK,
            MASK_HAS_ROWS=MASK_HAS_ROWS,
            CAUSAL=CAUSAL and phase == 1,
            VARLEN=VARLEN,
            DROPOUT=DROPOUT,
            CHECK=phase == 1,
            PRECISION=PRECISION,
            UNIT=UNIT,
            STEP=BLOCK_N if phase == 0 or CAUSAL else (REST or BLOCK_N),
            TENSOR_CORES=REST > 0,
        )

    grad_query = at_head(grad_query, segment.batch, head, segment.first_query, UNIT)
    grad_query_tiles = scale_tiles(grad_query_tiles, scale)
    store_rows(grad_query, rows, segment.num_queries, grad_query_tiles, D, PIECES, UNIT)


def query_gradient(
    problem: Problem, saved: Saved, statistics: Statistics, grad_query: torch.Tensor
) -> None:
    unit = problem.stride_unit(saved.grad_out, grad_query)

    def run(launch: Launch) -> None:
        blocks = ceil_div(problem.longest_query, launch.block_m)
        start(
            flash_attention_bwd_query_kernel,
            problem.batch_entries * problem.heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.variant(),
            **problem.constants(unit),
            grad_out=strided(saved.grad_out, unit),
            grad_query=strided(grad_query, unit),
            statistics=statistics,
            num_blocks=blocks,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            REST=problem.rest,
        )

    problem.launch("flash_attention_bwd_query", problem.longest_query, run)
