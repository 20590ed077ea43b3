"""Gradients of keys and values."""

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
)
from vlmfast.kernels.launch import Launch, Saved, ceil_div, start, strided


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_key_value_kernel(
    query,
    key,
    value,
    attn_mask,
    grad_out,
    grad_key,
    grad_value,
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
):
    """Gradients of one block of BLOCK_N keys and values of one key head.

    The loop runs over the query heads that share the key head and over their queries, so nothing
    is left to sum between programs. Tiles are transposed, keys by queries. Rows past either end
    need no masking: a query's weights are 0 there, a key's gradient is not stored.
    """
    block, key_head, entry = program_indices(num_blocks, num_heads // GROUP)
    segment = locate(entry, num_queries, num_keys, CAUSAL, cu_seqlens_q, cu_seqlens_k)
    first_column = block * BLOCK_N
    if first_column >= segment.num_keys:
        return

    key = at_head(key, segment.batch, key_head, segment.first_key, UNIT)
    value = at_head(value, segment.batch, key_head, segment.first_key, UNIT)
    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    columns = first_column + tl.arange(0, BLOCK_N)
    key_tiles = load_rows(key, columns, segment.num_keys, D, PIECES, UNIT)
    value_tiles = load_rows(value, columns, segment.num_keys, DV, VALUE_PIECES, UNIT)
    grad_key_tiles = zero_tiles(BLOCK_N, PIECES)
    grad_value_tiles = zero_tiles(BLOCK_N, VALUE_PIECES)

    start_row = 0
    if CAUSAL:
        start_row = tl.maximum(first_column - segment.causal_offset, 0) // BLOCK_M * BLOCK_M
    if segment.num_queries > start_row:
        # A loop that may run zero times would let products wait for one another.
        tl.assume(segment.num_queries > start_row)
        for member in range(GROUP):
            head = key_head * GROUP + member
            stream = segment.batch * num_heads + head
            head_query = at_head(query, segment.batch, head, segment.first_query, UNIT)
            head_grad_out = at_head(grad_out, segment.batch, head, segment.first_query, UNIT)
            offset = tl.cast(stream, tl.int64) * num_queries + segment.first_query
            head_mask = attn_mask
            if MASK != NO_MASK:
                head_mask = at_head(attn_mask, segment.batch, head, row=0, UNIT=1)
            for first_row in range(start_row, segment.num_queries, BLOCK_M):
                rows = first_row + tl.arange(0, BLOCK_M)
                query_tiles = load_rows(head_query, rows, segment.num_queries, D, PIECES, UNIT)
                scores = masked_scores(
                    key_tiles,
                    query_tiles,
                    rows[None, :],
                    columns[:, None],
                    segment=segment,
                    attn_mask=head_mask,
                    scale=scale,
                    MASK=MASK,
                    MASK_HAS_ROWS=MASK_HAS_ROWS,
                    CAUSAL=CAUSAL,
                    CHECK_COLUMNS=False,
                    PRECISION=PRECISION,
                )
                grad_out_tiles = load_rows(
                    head_grad_out, rows, segment.num_queries, DV, VALUE_PIECES, UNIT
                )
                row_statistics = load_row_statistics(statistics, offset, rows, segment.num_queries)
                weights, grad_scores = weights_and_gradient(
                    scores,
                    inner_products(value_tiles, grad_out_tiles, PRECISION),
                    row_statistics,
                    factor=factor,
                    dropout=dropout,
                    stream=stream,
                    first_row_index=segment.first_query + first_row,
                    first_column_index=segment.first_key + first_column,
                    SCALED=MASK == FLOAT_MASK,
                    DROPOUT=DROPOUT,
                    VARLEN=VARLEN,
                    TRANSPOSED=True,
                )
                grad_value_tiles = add_products(
                    grad_value_tiles, weights, grad_out_tiles, PRECISION
                )
                grad_key_tiles = add_products(grad_key_tiles, grad_scores, query_tiles, PRECISION)

    grad_key = at_head(grad_key, segment.batch, key_head, segment.first_key, UNIT)
    grad_value = at_head(grad_value, segment.batch, key_head, segment.first_key, UNIT)
    grad_key_tiles = scale_tiles(grad_key_tiles, scale)
    store_rows(grad_key, columns, segment.num_keys, grad_key_tiles, D, PIECES, UNIT)
    store_rows(grad_value, columns, segment.num_keys, grad_value_tiles, DV, VALUE_PIECES, UNIT)


def key_value_gradients(
    problem: Problem,
    saved: Saved,
    statistics: Statistics,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    unit = problem.stride_unit(saved.grad_out, grad_key, grad_value)

    def run(launch: Launch) -> None:
        blocks = ceil_div(problem.longest_key, launch.block_n)
        start(
            flash_attention_bwd_key_value_kernel,
            problem.batch_entries * problem.key_heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.variant(),
            **problem.constants(unit),
            grad_out=strided(saved.grad_out, unit),
            grad_key=strided(grad_key, unit),
            grad_value=strided(grad_value, unit),
            statistics=statistics,
            num_blocks=blocks,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )

    problem.launch("flash_attention_bwd_key_value", problem.longest_key, run)
