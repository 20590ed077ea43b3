"""All gradients of heads whose keys fit on chip."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    add_products,
    add_transposed_products,
    at_head,
    inner_products,
    load_rows,
    scale_tiles,
    store_rows,
    transpose_tiles,
    zero_tiles,
    zero_transposed_tiles,
)
from vlmfast.kernels.flash_attention.gradients import (
    RowStatistics,
    load_shift,
    row_delta,
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
def flash_attention_bwd_whole_kernel(
    query,
    key,
    value,
    attn_mask,
    out,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
    logsumexp,
    grad_logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout,
    num_heads,
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
    KEY_BLOCKS: tl.constexpr,
):
    """All gradients of one key head: its keys stay on chip, the queries pass by once.

    KEY_BLOCKS blocks of BLOCK_N cover the keys and keep their gradients in registers. A block of
    queries meets all keys in one step, so that its own gradient is complete, and delta needs no
    kernel of its own. Tiles are transposed, the gradient of the queries too: the wider side then
    fills the rows of the matrix instructions. Float masks go the other way (see
    `flash_attention_bwd_statistics_kernel`).
    """
    tl.static_assert(MASK != FLOAT_MASK)
    key_heads = num_heads // GROUP
    key_head = tl.program_id(0) % key_heads
    entry = tl.program_id(0) // key_heads
    segment = locate(entry, num_queries, num_keys, CAUSAL, cu_seqlens_q, cu_seqlens_k)
    key = at_head(key, segment.batch, key_head, segment.first_key, UNIT)
    value = at_head(value, segment.batch, key_head, segment.first_key, UNIT)
    factor = scale * LOG2E
    key_tiles = ()
    value_tiles = ()
    grad_key_tiles = ()
    grad_value_tiles = ()
    for n in tl.static_range(KEY_BLOCKS):
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        # Only the last block can reach past the keys, unless a shorter segment comes by.
        key_block = load_rows(
            key,
            columns,
            segment.num_keys,
            D,
            PIECES,
            UNIT,
            CHECK_ROWS=VARLEN or n == KEY_BLOCKS - 1,
        )
        value_block = load_rows(
            value,
            columns,
            segment.num_keys,
            DV,
            VALUE_PIECES,
            UNIT,
            CHECK_ROWS=VARLEN or n == KEY_BLOCKS - 1,
        )
        key_tiles = key_tiles + (key_block,)
        value_tiles = value_tiles + (value_block,)
        grad_key_tiles = grad_key_tiles + (zero_tiles(BLOCK_N, PIECES),)
        grad_value_tiles = grad_value_tiles + (zero_tiles(BLOCK_N, VALUE_PIECES),)

    num_blocks = tl.cdiv(segment.num_queries, BLOCK_M)
    num_steps = GROUP * num_blocks
    if num_steps > 0:  # a loop that may run zero times would let products wait for one another
        tl.assume(num_steps > 0)
        for step in tl.range(0, num_steps, disable_licm=True):
            head = key_head * GROUP + step // num_blocks
            first_row = step % num_blocks * BLOCK_M
            rows = first_row + tl.arange(0, BLOCK_M)
            stream = segment.batch * num_heads + head
            offset = tl.cast(stream, tl.int64) * num_queries + segment.first_query
            head_query = at_head(query, segment.batch, head, segment.first_query, UNIT)
            query_tiles = load_rows(head_query, rows, segment.num_queries, D, PIECES, UNIT)
            head_grad_out = at_head(grad_out, segment.batch, head, segment.first_query, UNIT)
            grad_out_tiles = load_rows(
                head_grad_out, rows, segment.num_queries, DV, VALUE_PIECES, UNIT
            )
            head_out = at_head(out, segment.batch, head, segment.first_query, UNIT)
            out_tiles = load_rows(head_out, rows, segment.num_queries, DV, VALUE_PIECES, UNIT)
            head_grad_logsumexp = grad_logsumexp
            if grad_logsumexp is not None:
                head_grad_logsumexp = grad_logsumexp + offset
            head_mask = attn_mask
            if MASK != NO_MASK:
                head_mask = at_head(attn_mask, segment.batch, head, row=0, UNIT=1)
            head_logsumexp = logsumexp + offset
            row_deltas = row_delta(
                grad_out_tiles,
                out_tiles,
                head_logsumexp,
                head_grad_logsumexp,
                rows,
                segment.num_queries,
            )
            shift = load_shift(head_logsumexp, rows, segment.num_queries)
            grad_query_tiles = zero_transposed_tiles(BLOCK_M, PIECES)
            summed_grad_key_tiles = ()
            summed_grad_value_tiles = ()
            for n in tl.static_range(KEY_BLOCKS):
                columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
                scores = masked_scores(
                    key_tiles[n],
                    query_tiles,
                    rows[None, :],
                    columns[:, None],
                    segment=segment,
                    attn_mask=head_mask,
                    scale=scale,
                    MASK=MASK,
                    MASK_HAS_ROWS=MASK_HAS_ROWS,
                    CAUSAL=CAUSAL,
                    CHECK_COLUMNS=VARLEN or n == KEY_BLOCKS - 1,
                    PRECISION=PRECISION,
                )
                weights, grad_scores = weights_and_gradient(
                    scores,
                    inner_products(value_tiles[n], grad_out_tiles, PRECISION),
                    RowStatistics(shift, tl.zeros_like(shift), row_deltas),
                    factor=factor,
                    dropout=dropout,
                    stream=stream,
                    first_row_index=segment.first_query + first_row,
                    first_column_index=segment.first_key + n * BLOCK_N,
                    SCALED=False,
                    DROPOUT=DROPOUT,
                    VARLEN=VARLEN,
                    TRANSPOSED=True,
                )
                grad_scores = grad_scores.to(query.pointer.dtype.element_ty)
                grad_query_tiles = add_transposed_products(
                    grad_query_tiles, key_tiles[n], grad_scores, PRECISION
                )
                summed_grad_value_tiles = summed_grad_value_tiles + (
                    add_products(grad_value_tiles[n], weights, grad_out_tiles, PRECISION),
                )
                summed_grad_key_tiles = summed_grad_key_tiles + (
                    add_products(grad_key_tiles[n], grad_scores, query_tiles, PRECISION),
                )
            grad_key_tiles = summed_grad_key_tiles
            grad_value_tiles = summed_grad_value_tiles
            row_tiles = transpose_tiles(scale_tiles(grad_query_tiles, scale))
            head_grad_query = at_head(grad_query, segment.batch, head, segment.first_query, UNIT)
            store_rows(head_grad_query, rows, segment.num_queries, row_tiles, D, PIECES, UNIT)

    grad_key = at_head(grad_key, segment.batch, key_head, segment.first_key, UNIT)
    grad_value = at_head(grad_value, segment.batch, key_head, segment.first_key, UNIT)
    for n in tl.static_range(KEY_BLOCKS):
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        key_block = scale_tiles(grad_key_tiles[n], scale)
        value_block = grad_value_tiles[n]
        store_rows(grad_key, columns, segment.num_keys, key_block, D, PIECES, UNIT)
        store_rows(grad_value, columns, segment.num_keys, value_block, DV, VALUE_PIECES, UNIT)


def takes_whole_heads(problem: Problem) -> bool:
    """Whether one program should give all gradients of a key head."""
    if problem.mask_kind == FLOAT_MASK.value:
        return False
    launch = problem.find_launch("flash_attention_bwd_whole", problem.longest_key)
    return launch is not None and problem.fills_device(problem.batch_entries * problem.key_heads)


def whole_gradients(
    problem: Problem,
    saved: Saved,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    unit = problem.stride_unit(saved.out, saved.grad_out, grad_query, grad_key, grad_value)

    def run(launch: Launch) -> None:
        start(
            flash_attention_bwd_whole_kernel,
            problem.batch_entries * problem.key_heads,
            launch,
            **problem.inputs(unit),
            **problem.variant(),
            **problem.constants(unit),
            out=strided(saved.out, unit),
            grad_out=strided(saved.grad_out, unit),
            grad_query=strided(grad_query, unit),
            grad_key=strided(grad_key, unit),
            grad_value=strided(grad_value, unit),
            logsumexp=saved.logsumexp,
            grad_logsumexp=saved.grad_logsumexp,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            KEY_BLOCKS=max(1, ceil_div(problem.longest_key, launch.block_n)),
        )

    problem.launch("flash_attention_bwd_whole", problem.longest_key, run)
