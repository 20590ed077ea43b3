"""Softmax attention, forward and backward.

    out[i] = sum_j P[i, j] value[j],  P[i] = softmax_j(scale * query[i] . key[j] + mask[i, j])

by tiles, with the softmax taken online in base 2 (Dao et al., FlashAttention-2), so that no L x S
matrix is ever held. Shapes: query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv).

The backward has no atomics, hence one result on one machine. Where a head's keys fit on chip,
`flash_attention_bwd_whole_kernel` walks the queries once and gives all three gradients (five
products a tile); elsewhere key/value and query gradients come from two kernels (seven products).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels import configs
from vlmfast.kernels.common import (
    BOOL_MASK,
    FLOAT_MASK,
    LN2,
    LOG2E,
    NO_MASK,
    Saved,
    add_products,
    add_transposed_products,
    check_lengths,
    covered_columns,
    dense_like,
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    head_pieces,
    head_pointer,
    inner_products,
    input_precision,
    kernel_strides,
    load_head_rows,
    load_rows,
    mask_scores,
    online_softmax_step,
    precision_of,
    program_indices,
    row_inner_products,
    run_kernel,
    run_with_launch,
    saved_for_backward,
    scale_tiles,
    segment_bounds,
    shifted_exp2,
    store_head_rows,
    store_rows,
    stride_unit,
    transpose_tiles,
    with_positive_scale,
    with_strides,
    zero_tiles,
    zero_transposed_tiles,
)
from vlmfast.kernels.configs import Launch

CAUSAL_BOTTOM_RIGHT = tl.constexpr(2)

# Programs that the mask gradient is spread over where the mask has fewer tiles than this. With
# 64 x 64 tiles the float32 partial sums then stay within 4 MiB, whatever the sizes.
MASK_GRADIENT_PROGRAMS = 256


@triton.jit
def locate(
    batch,
    cu_seqlens_q,
    cu_seqlens_k,
    num_queries,
    num_keys,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
):
    """Where a batch entry or packed segment lies: (batch, first query, queries, first key, keys).

    The last value is the causal offset: query i sees the keys j <= i + offset.
    """
    total_queries = num_queries
    first_query = 0
    first_key = 0
    if VARLEN:
        first_query, num_queries = segment_bounds(cu_seqlens_q, batch, total_queries)
        first_key, num_keys = segment_bounds(cu_seqlens_k, batch, num_keys)
        batch = 0
    causal_offset = 0
    if CAUSAL == CAUSAL_BOTTOM_RIGHT:
        causal_offset = num_keys - num_queries
    return batch, first_query, num_queries, first_key, num_keys, causal_offset


@triton.jit
def visible_columns(
    first_row,
    num_keys,
    causal_offset,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that a block of queries sees: (end of them all, end of the blocks seen by every row)."""
    end = num_keys
    checked_from = num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        seen_by_first_row = tl.maximum(first_row + causal_offset + 1, 0)
        seen_by_last_row = tl.maximum(first_row + causal_offset + BLOCK_M, 0)
        end = tl.minimum(end, seen_by_last_row)
        checked_from = tl.minimum(checked_from, seen_by_first_row // BLOCK_N * BLOCK_N)
    return end, checked_from


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_queries", "threshold"])
def flash_attention_fwd_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    out,
    out_strides,
    logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout_seed,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    threshold,
    keep_scale,
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
    """One block of BLOCK_M queries of one head: its output (BLOCK_M, DV) and log-sum-exp.

    Programs run over blocks first, then heads, so that those sharing keys run side by side.
    """
    block, head, batch = program_indices(num_blocks, num_heads)
    if CAUSAL:
        block = num_blocks - 1 - block  # the blocks that see most keys start first
    total_queries = num_queries
    batch, first_query, num_queries, first_key, num_keys, causal_offset = locate(
        batch, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, CAUSAL, VARLEN
    )
    first_row = block * BLOCK_M
    if first_row >= num_queries:
        return
    stream = batch * num_heads + head

    query = head_pointer(query, query_strides, batch, head, first_query, UNIT)
    key = head_pointer(key, key_strides, batch, head // GROUP, first_key, UNIT)
    value = head_pointer(value, value_strides, batch, head // GROUP, first_key, UNIT)
    out = head_pointer(out, out_strides, batch, head, first_query, UNIT)
    logsumexp += tl.cast(stream, tl.int64) * total_queries + first_query
    if MASK != NO_MASK:
        attn_mask = head_pointer(attn_mask, mask_strides, batch, head, 0, 1)

    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, query_strides, rows, num_queries, D, PIECES, UNIT, True)
    acc = zero_tiles(BLOCK_M, VALUE_PIECES)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    end, checked_from = visible_columns(
        first_row, num_keys, causal_offset, CAUSAL, BLOCK_M, BLOCK_N
    )
    for phase in tl.static_range(2):  # 0: whole blocks, nothing to check; 1: the rest
        phase_start = checked_from if phase == 1 else 0
        phase_end = end if phase == 1 else checked_from
        for first_column in range(phase_start, phase_end, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)
            key_tiles = load_rows(key, key_strides, columns, num_keys, D, PIECES, UNIT, phase == 1)
            scores = mask_scores(
                inner_products(query_tiles, key_tiles, PRECISION),
                rows[:, None],
                columns[None, :],
                num_queries,
                num_keys,
                causal_offset,
                attn_mask,
                mask_strides,
                scale,
                MASK,
                MASK_HAS_ROWS,
                CAUSAL and phase == 1,
                phase == 1,
            )
            weights, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, factor)
            if DROPOUT:
                weights = tl.where(
                    dropout_keep(
                        dropout_seed,
                        threshold,
                        stream,
                        first_query + rows,
                        first_key + first_column,
                        BLOCK_N,
                        not VARLEN,
                    ),
                    weights,
                    0.0,
                )
            value_tiles = load_rows(
                value, value_strides, columns, num_keys, DV, VALUE_PIECES, UNIT, phase == 1
            )
            acc = add_products(scale_tiles(acc, decay[:, None]), weights, value_tiles, PRECISION)

    visible_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a fully masked row gives 0, not 0 / 0
    acc = scale_tiles(acc, ((keep_scale if DROPOUT else 1.0) / visible_sum)[:, None])
    store_rows(out, out_strides, rows, num_queries, acc, DV, VALUE_PIECES, UNIT)
    natural_max = row_max if MASK == FLOAT_MASK else row_max * scale
    tl.store(
        logsumexp + rows, natural_max + tl.math.log2(visible_sum) * LN2, mask=rows < num_queries
    )


@triton.jit
def load_shift(logsumexp, rows, num_rows):
    """The log-sum-exp of each query as the shift of unscaled scores.

    Rows that do not exist or see no key get +inf, which turns all of their weights into 0.
    """
    lse = tl.load(logsumexp + rows, mask=rows < num_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def load_row_statistics(logsumexp, row_max, log_sum, delta, rows, num_rows, SCALED: tl.constexpr):
    """What the backward knows of each query: its shift, log2 of the sum after it, and delta."""
    inside = rows < num_rows
    if SCALED:
        shift = tl.load(row_max + rows, mask=inside, other=float("inf"))
        rest = tl.load(log_sum + rows, mask=inside, other=0.0)
    else:
        shift = load_shift(logsumexp, rows, num_rows)
        rest = tl.zeros_like(shift)
    return shift, rest, tl.load(delta + rows, mask=inside, other=0.0)


@triton.jit
def weights_and_gradient(
    scores,
    grad_weights,
    shift,
    log_sum,
    delta,
    factor,
    dropout_seed,
    threshold,
    keep_scale,
    stream,
    first_row_index,
    first_column_index,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Weights after dropout, and the gradient of the (scaled) scores, of one tile.

    dS = P * (dP - delta), delta[i] = out[i] . grad_out[i] - grad_logsumexp[i]. The statistics of
    rows are shaped to broadcast along the keys; a TRANSPOSED tile has keys for rows.
    """
    if SCALED:
        weights = tl.math.exp2((scores - shift) * factor - log_sum)
    else:
        weights = shifted_exp2(scores, shift, factor)
    kept_weights = weights
    if DROPOUT:
        BLOCK_M: tl.constexpr = scores.shape[1] if TRANSPOSED else scores.shape[0]
        BLOCK_N: tl.constexpr = scores.shape[0] if TRANSPOSED else scores.shape[1]
        keep = dropout_keep(
            dropout_seed,
            threshold,
            stream,
            first_row_index + tl.arange(0, BLOCK_M),
            first_column_index,
            BLOCK_N,
            not VARLEN,
        )
        if TRANSPOSED:
            keep = tl.trans(keep)
        kept_weights = tl.where(keep, weights * keep_scale, 0.0)
        grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
    return kept_weights, weights * (grad_weights - delta)


@triton.jit
def row_delta(grad_out_tiles, out_tiles, logsumexp, grad_logsumexp, rows, num_rows):
    """delta (M,) of a block of queries; 0 for those that see no key."""
    delta = row_inner_products(grad_out_tiles, out_tiles)
    if grad_logsumexp is not None:
        inside = rows < num_rows
        grad_lse = tl.load(grad_logsumexp + rows, mask=inside, other=0.0)
        lse = tl.load(logsumexp + rows, mask=inside, other=0.0)
        delta -= tl.where(lse == float("-inf"), 0.0, grad_lse)
    return delta


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_queries", "threshold"])
def flash_attention_bwd_statistics_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    grad_out,
    grad_out_strides,
    grad_logsumexp,
    dropout_seed,
    row_max,
    log_sum,
    delta,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    threshold,
    keep_scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Maximum of each query's scores and log2 of the sum that is left, where a float mask is added.

    A float mask can make the log-sum-exp so large that its rounding to float32 shows in the
    weights, or swallows the sum altogether (a row hidden by the lowest finite number). So the
    backward takes the two apart. A row that sees no key gets maximum +inf, which makes its weights
    0.

    With DELTA also delta = sum_j P[i, j] dP[i, j] - grad_logsumexp[i]. As out . grad_out it lacks
    what rounding took from out: rows of dS would not sum to 0, and the mask's gradient shows it.
    """
    block, head, batch = program_indices(num_blocks, num_heads)
    stream = batch * num_heads + head
    query = head_pointer(query, query_strides, batch, head, 0, UNIT)
    key = head_pointer(key, key_strides, batch, head // GROUP, 0, UNIT)
    attn_mask = head_pointer(attn_mask, mask_strides, batch, head, 0, 1)
    causal_offset = 0
    if CAUSAL == CAUSAL_BOTTOM_RIGHT:
        causal_offset = num_keys - num_queries
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, query_strides, rows, num_queries, D, PIECES, UNIT, True)
    if DELTA:
        value = head_pointer(value, value_strides, batch, head // GROUP, 0, UNIT)
        grad_out_tiles = load_head_rows(
            grad_out,
            grad_out_strides,
            batch,
            head,
            0,
            rows,
            num_queries,
            DV,
            VALUE_PIECES,
            UNIT,
        )
    running_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_M], tl.float32)
    products = tl.zeros([BLOCK_M], tl.float32)
    end, _checked_from = visible_columns(
        first_row, num_keys, causal_offset, CAUSAL, BLOCK_M, BLOCK_N
    )
    for first_column in range(0, end, BLOCK_N):
        columns = first_column + tl.arange(0, BLOCK_N)
        key_tiles = load_rows(key, key_strides, columns, num_keys, D, PIECES, UNIT, True)
        scores = mask_scores(
            inner_products(query_tiles, key_tiles, PRECISION),
            rows[:, None],
            columns[None, :],
            num_queries,
            num_keys,
            causal_offset,
            attn_mask,
            mask_strides,
            scale,
            FLOAT_MASK,
            MASK_HAS_ROWS,
            CAUSAL,
            True,
        )
        weights, decay, running_max, running_sum = online_softmax_step(
            scores, running_max, running_sum, LOG2E
        )
        if DELTA:
            value_tiles = load_rows(
                value, value_strides, columns, num_keys, DV, VALUE_PIECES, UNIT, True
            )
            grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
            if DROPOUT:
                keep = dropout_keep(
                    dropout_seed, threshold, stream, rows, first_column, BLOCK_N, True
                )
                grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
            products = products * decay + tl.sum(weights * grad_weights, 1)
    hidden = running_max == float("-inf")
    statistics_offset = tl.cast(stream, tl.int64) * num_queries
    inside = rows < num_queries
    if DELTA:
        row_deltas = products / running_sum
        if grad_logsumexp is not None:
            row_deltas -= tl.load(grad_logsumexp + statistics_offset + rows, mask=inside, other=0.0)
        tl.store(delta + statistics_offset + rows, tl.where(hidden, 0.0, row_deltas), mask=inside)
    tl.store(
        row_max + statistics_offset + rows,
        tl.where(hidden, float("inf"), running_max),
        mask=inside,
    )
    tl.store(
        log_sum + statistics_offset + rows,
        tl.math.log2(tl.where(hidden, 1.0, running_sum)),
        mask=inside,
    )


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_queries"])
def flash_attention_bwd_delta_kernel(
    out,
    out_strides,
    grad_out,
    grad_out_strides,
    logsumexp,
    grad_logsumexp,
    delta,
    num_heads,
    num_blocks,
    num_queries,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta[b, h, i] = out[b, h, i] . grad_out[b, h, i] - grad_logsumexp[b, h, i]."""
    block, head, batch = program_indices(num_blocks, num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    statistics_offset = tl.cast(batch * num_heads + head, tl.int64) * num_queries
    if grad_logsumexp is not None:
        grad_logsumexp += statistics_offset
    out = head_pointer(out, out_strides, batch, head, 0, UNIT)
    grad_out = head_pointer(grad_out, grad_out_strides, batch, head, 0, UNIT)
    row_deltas = row_delta(
        load_rows(grad_out, grad_out_strides, rows, num_queries, DV, VALUE_PIECES, UNIT, True),
        load_rows(out, out_strides, rows, num_queries, DV, VALUE_PIECES, UNIT, True),
        logsumexp + statistics_offset,
        grad_logsumexp,
        rows,
        num_queries,
    )
    tl.store(delta + statistics_offset + rows, row_deltas, mask=rows < num_queries)


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_queries", "threshold"])
def flash_attention_bwd_key_value_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    grad_out,
    grad_out_strides,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    logsumexp,
    row_max,
    log_sum,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout_seed,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    threshold,
    keep_scale,
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
    block, key_head, batch = program_indices(num_blocks, num_heads // GROUP)
    total_queries = num_queries
    batch, first_query, num_queries, first_key, num_keys, causal_offset = locate(
        batch, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, CAUSAL, VARLEN
    )
    first_column = block * BLOCK_N
    if first_column >= num_keys:
        return

    key = head_pointer(key, key_strides, batch, key_head, first_key, UNIT)
    value = head_pointer(value, value_strides, batch, key_head, first_key, UNIT)
    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    columns = first_column + tl.arange(0, BLOCK_N)
    key_tiles = load_rows(key, key_strides, columns, num_keys, D, PIECES, UNIT, True)
    value_tiles = load_rows(value, value_strides, columns, num_keys, DV, VALUE_PIECES, UNIT, True)
    grad_key_tiles = zero_tiles(BLOCK_N, PIECES)
    grad_value_tiles = zero_tiles(BLOCK_N, VALUE_PIECES)

    start = 0
    if CAUSAL:
        start = tl.maximum(first_column - causal_offset, 0) // BLOCK_M * BLOCK_M
    for member in range(GROUP):
        head = key_head * GROUP + member
        stream = batch * num_heads + head
        head_query = head_pointer(query, query_strides, batch, head, first_query, UNIT)
        head_grad_out = head_pointer(grad_out, grad_out_strides, batch, head, first_query, UNIT)
        statistics_offset = tl.cast(stream, tl.int64) * total_queries + first_query
        head_mask = attn_mask
        if MASK != NO_MASK:
            head_mask = head_pointer(attn_mask, mask_strides, batch, head, 0, 1)
        for first_row in range(start, num_queries, BLOCK_M):
            rows = first_row + tl.arange(0, BLOCK_M)
            query_tiles = load_rows(
                head_query, query_strides, rows, num_queries, D, PIECES, UNIT, True
            )
            scores = mask_scores(
                inner_products(key_tiles, query_tiles, PRECISION),
                rows[None, :],
                columns[:, None],
                num_queries,
                num_keys,
                causal_offset,
                head_mask,
                mask_strides,
                scale,
                MASK,
                MASK_HAS_ROWS,
                CAUSAL,
                False,
            )
            grad_out_tiles = load_rows(
                head_grad_out,
                grad_out_strides,
                rows,
                num_queries,
                DV,
                VALUE_PIECES,
                UNIT,
                True,
            )
            shift, rest, row_deltas = load_row_statistics(
                logsumexp + statistics_offset,
                row_max + statistics_offset if MASK == FLOAT_MASK else None,
                log_sum + statistics_offset if MASK == FLOAT_MASK else None,
                delta + statistics_offset,
                rows,
                num_queries,
                MASK == FLOAT_MASK,
            )
            weights, grad_scores = weights_and_gradient(
                scores,
                inner_products(value_tiles, grad_out_tiles, PRECISION),
                shift[None, :],
                rest[None, :],
                row_deltas[None, :],
                factor,
                dropout_seed,
                threshold,
                keep_scale,
                stream,
                first_query + first_row,
                first_key + first_column,
                MASK == FLOAT_MASK,
                DROPOUT,
                VARLEN,
                True,
            )
            grad_value_tiles = add_products(grad_value_tiles, weights, grad_out_tiles, PRECISION)
            grad_key_tiles = add_products(grad_key_tiles, grad_scores, query_tiles, PRECISION)

    grad_key = head_pointer(grad_key, grad_key_strides, batch, key_head, first_key, UNIT)
    grad_value = head_pointer(grad_value, grad_value_strides, batch, key_head, first_key, UNIT)
    store_rows(
        grad_key,
        grad_key_strides,
        columns,
        num_keys,
        scale_tiles(grad_key_tiles, scale),
        D,
        PIECES,
        UNIT,
    )
    store_rows(
        grad_value, grad_value_strides, columns, num_keys, grad_value_tiles, DV, VALUE_PIECES, UNIT
    )


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_queries", "threshold"])
def flash_attention_bwd_query_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    logsumexp,
    row_max,
    log_sum,
    delta,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout_seed,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    threshold,
    keep_scale,
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
    """Gradient of one block of BLOCK_M queries of one head, in a loop over the keys it sees."""
    block, head, batch = program_indices(num_blocks, num_heads)
    if CAUSAL:
        block = num_blocks - 1 - block
    total_queries = num_queries
    batch, first_query, num_queries, first_key, num_keys, causal_offset = locate(
        batch, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, CAUSAL, VARLEN
    )
    first_row = block * BLOCK_M
    if first_row >= num_queries:
        return
    stream = batch * num_heads + head
    statistics_offset = tl.cast(stream, tl.int64) * total_queries + first_query

    query = head_pointer(query, query_strides, batch, head, first_query, UNIT)
    key = head_pointer(key, key_strides, batch, head // GROUP, first_key, UNIT)
    value = head_pointer(value, value_strides, batch, head // GROUP, first_key, UNIT)
    grad_out = head_pointer(grad_out, grad_out_strides, batch, head, first_query, UNIT)
    if MASK != NO_MASK:
        attn_mask = head_pointer(attn_mask, mask_strides, batch, head, 0, 1)

    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, query_strides, rows, num_queries, D, PIECES, UNIT, True)
    grad_out_tiles = load_rows(
        grad_out, grad_out_strides, rows, num_queries, DV, VALUE_PIECES, UNIT, True
    )
    shift, rest, row_deltas = load_row_statistics(
        logsumexp + statistics_offset,
        row_max + statistics_offset if MASK == FLOAT_MASK else None,
        log_sum + statistics_offset if MASK == FLOAT_MASK else None,
        delta + statistics_offset,
        rows,
        num_queries,
        MASK == FLOAT_MASK,
    )
    grad_query_tiles = zero_tiles(BLOCK_M, PIECES)

    end, checked_from = visible_columns(
        first_row, num_keys, causal_offset, CAUSAL, BLOCK_M, BLOCK_N
    )
    for phase in tl.static_range(2):  # 0: whole blocks, nothing to check; 1: the rest
        phase_start = checked_from if phase == 1 else 0
        phase_end = end if phase == 1 else checked_from
        for first_column in range(phase_start, phase_end, BLOCK_N):
            columns = first_column + tl.arange(0, BLOCK_N)
            key_tiles = load_rows(key, key_strides, columns, num_keys, D, PIECES, UNIT, phase == 1)
            value_tiles = load_rows(
                value, value_strides, columns, num_keys, DV, VALUE_PIECES, UNIT, phase == 1
            )
            scores = mask_scores(
                inner_products(query_tiles, key_tiles, PRECISION),
                rows[:, None],
                columns[None, :],
                num_queries,
                num_keys,
                causal_offset,
                attn_mask,
                mask_strides,
                scale,
                MASK,
                MASK_HAS_ROWS,
                CAUSAL and phase == 1,
                phase == 1,
            )
            _, grad_scores = weights_and_gradient(
                scores,
                inner_products(grad_out_tiles, value_tiles, PRECISION),
                shift[:, None],
                rest[:, None],
                row_deltas[:, None],
                factor,
                dropout_seed,
                threshold,
                keep_scale,
                stream,
                first_query + first_row,
                first_key + first_column,
                MASK == FLOAT_MASK,
                DROPOUT,
                VARLEN,
                False,
            )
            grad_query_tiles = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)

    grad_query = head_pointer(grad_query, grad_query_strides, batch, head, first_query, UNIT)
    store_rows(
        grad_query,
        grad_query_strides,
        rows,
        num_queries,
        scale_tiles(grad_query_tiles, scale),
        D,
        PIECES,
        UNIT,
    )


@triton.jit(do_not_specialize=["num_heads", "num_queries", "threshold"])
def flash_attention_bwd_whole_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    out,
    out_strides,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    logsumexp,
    grad_logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout_seed,
    num_heads,
    num_queries,
    num_keys,
    scale,
    threshold,
    keep_scale,
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
    batch = tl.program_id(0) // key_heads
    total_queries = num_queries
    batch, first_query, num_queries, first_key, num_keys, causal_offset = locate(
        batch, cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, CAUSAL, VARLEN
    )
    key = head_pointer(key, key_strides, batch, key_head, first_key, UNIT)
    value = head_pointer(value, value_strides, batch, key_head, first_key, UNIT)
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
            key_strides,
            columns,
            num_keys,
            D,
            PIECES,
            UNIT,
            VARLEN or n == KEY_BLOCKS - 1,
        )
        value_block = load_rows(
            value,
            value_strides,
            columns,
            num_keys,
            DV,
            VALUE_PIECES,
            UNIT,
            VARLEN or n == KEY_BLOCKS - 1,
        )
        key_tiles = key_tiles + (key_block,)
        value_tiles = value_tiles + (value_block,)
        grad_key_tiles = grad_key_tiles + (zero_tiles(BLOCK_N, PIECES),)
        grad_value_tiles = grad_value_tiles + (zero_tiles(BLOCK_N, VALUE_PIECES),)

    num_blocks = tl.cdiv(num_queries, BLOCK_M)
    for step in range(GROUP * num_blocks):
        head = key_head * GROUP + step // num_blocks
        first_row = step % num_blocks * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        stream = batch * num_heads + head
        statistics_offset = tl.cast(stream, tl.int64) * total_queries + first_query
        query_tiles = load_head_rows(
            query, query_strides, batch, head, first_query, rows, num_queries, D, PIECES, UNIT
        )
        grad_out_tiles = load_head_rows(
            grad_out,
            grad_out_strides,
            batch,
            head,
            first_query,
            rows,
            num_queries,
            DV,
            VALUE_PIECES,
            UNIT,
        )
        out_tiles = load_head_rows(
            out, out_strides, batch, head, first_query, rows, num_queries, DV, VALUE_PIECES, UNIT
        )
        head_grad_logsumexp = grad_logsumexp
        if grad_logsumexp is not None:
            head_grad_logsumexp = grad_logsumexp + statistics_offset
        head_mask = attn_mask
        if MASK != NO_MASK:
            head_mask = head_pointer(attn_mask, mask_strides, batch, head, 0, 1)
        row_deltas = row_delta(
            grad_out_tiles,
            out_tiles,
            logsumexp + statistics_offset,
            head_grad_logsumexp,
            rows,
            num_queries,
        )
        shift = load_shift(logsumexp + statistics_offset, rows, num_queries)
        grad_query_tiles = zero_transposed_tiles(BLOCK_M, PIECES)
        summed_grad_key_tiles = ()
        summed_grad_value_tiles = ()
        for n in tl.static_range(KEY_BLOCKS):
            columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
            scores = mask_scores(
                inner_products(key_tiles[n], query_tiles, PRECISION),
                rows[None, :],
                columns[:, None],
                num_queries,
                num_keys,
                causal_offset,
                head_mask,
                mask_strides,
                scale,
                MASK,
                MASK_HAS_ROWS,
                CAUSAL,
                VARLEN or n == KEY_BLOCKS - 1,
            )
            weights, grad_scores = weights_and_gradient(
                scores,
                inner_products(value_tiles[n], grad_out_tiles, PRECISION),
                shift[None, :],
                0.0,
                row_deltas[None, :],
                factor,
                dropout_seed,
                threshold,
                keep_scale,
                stream,
                first_query + first_row,
                first_key + n * BLOCK_N,
                False,
                DROPOUT,
                VARLEN,
                True,
            )
            grad_scores = grad_scores.to(query.dtype.element_ty)
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
        store_head_rows(
            grad_query,
            grad_query_strides,
            batch,
            head,
            first_query,
            rows,
            num_queries,
            transpose_tiles(scale_tiles(grad_query_tiles, scale)),
            D,
            PIECES,
            UNIT,
        )

    grad_key = head_pointer(grad_key, grad_key_strides, batch, key_head, first_key, UNIT)
    grad_value = head_pointer(grad_value, grad_value_strides, batch, key_head, first_key, UNIT)
    for n in tl.static_range(KEY_BLOCKS):
        columns = n * BLOCK_N + tl.arange(0, BLOCK_N)
        store_rows(
            grad_key,
            grad_key_strides,
            columns,
            num_keys,
            scale_tiles(grad_key_tiles[n], scale),
            D,
            PIECES,
            UNIT,
        )
        store_rows(
            grad_value,
            grad_value_strides,
            columns,
            num_keys,
            grad_value_tiles[n],
            DV,
            VALUE_PIECES,
            UNIT,
        )


@triton.jit(
    do_not_specialize=[
        "num_heads",
        "num_queries",
        "num_splits",
        "num_steps",
        "head_steps",
        "row_steps",
        "threshold",
    ]
)
def flash_attention_bwd_mask_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    attn_mask,
    mask_strides,
    grad_out,
    grad_out_strides,
    grad_mask,
    row_max,
    log_sum,
    delta,
    dropout_seed,
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
    threshold,
    keep_scale,
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

    causal_offset = 0
    if CAUSAL == CAUSAL_BOTTOM_RIGHT:
        causal_offset = num_keys - num_queries
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
        statistics_offset = tl.cast(stream, tl.int64) * num_queries
        query_tiles = load_head_rows(
            query, query_strides, batch, head, 0, rows, num_queries, D, PIECES, UNIT
        )
        key_tiles = load_head_rows(
            key, key_strides, batch, head // GROUP, 0, columns, num_keys, D, PIECES, UNIT
        )
        value_tiles = load_head_rows(
            value, value_strides, batch, head // GROUP, 0, columns, num_keys, DV, VALUE_PIECES, UNIT
        )
        grad_out_tiles = load_head_rows(
            grad_out, grad_out_strides, batch, head, 0, rows, num_queries, DV, VALUE_PIECES, UNIT
        )
        shift, rest, row_deltas = load_row_statistics(
            None,
            row_max + statistics_offset,
            log_sum + statistics_offset,
            delta + statistics_offset,
            rows,
            num_queries,
            True,
        )
        scores = mask_scores(
            inner_products(query_tiles, key_tiles, PRECISION),
            rows[:, None],
            columns[None, :],
            num_queries,
            num_keys,
            causal_offset,
            head_pointer(attn_mask, mask_strides, batch, head, 0, 1),
            mask_strides,
            scale,
            FLOAT_MASK,
            True,
            CAUSAL,
            True,
        )
        _, grad_scores = weights_and_gradient(
            scores,
            inner_products(grad_out_tiles, value_tiles, PRECISION),
            shift[:, None],
            rest[:, None],
            row_deltas[:, None],
            LOG2E,
            dropout_seed,
            threshold,
            keep_scale,
            stream,
            first_row,
            first_column,
            True,
            DROPOUT,
            False,
            False,
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


class Problem(NamedTuple):
    """What the kernels of one call have in common, as the operators receive it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: int
    scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch_entries(self) -> int:
        """Batch entries, or segments of a packed batch."""
        return self.cu_seqlens_q.shape[0] - 1 if self.packed else self.query.shape[0]

    @property
    def longest_query(self) -> int:
        return self.max_seqlen_q if self.packed else self.query.shape[2]

    @property
    def longest_key(self) -> int:
        return self.max_seqlen_k if self.packed else self.key.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def mask_kind(self) -> int:
        if self.attn_mask is None:
            return NO_MASK.value
        return (BOOL_MASK if self.attn_mask.dtype == torch.bool else FLOAT_MASK).value

    def inputs(self, unit: int) -> list:
        """Leading arguments of every kernel that recomputes scores."""
        mask = self.attn_mask
        mask_strides = None
        if mask is not None:
            mask_strides = kernel_strides(mask, 1)
            mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
        return [
            *with_strides(unit, self.query, self.key, self.value),
            mask,
            mask_strides,
        ]

    def constants(self, unit: int) -> dict:
        """Compile-time constants of every kernel that recomputes scores."""
        return {
            "GROUP": self.heads // self.key_heads,
            "D": self.query.shape[3],
            "DV": self.value.shape[3],
            "PIECES": self.pieces(self.query.shape[3]),
            "VALUE_PIECES": self.pieces(self.value.shape[3]),
            "CAUSAL": self.causal,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": input_precision(self.query),
            "UNIT": unit,
        }

    def mask_constants(self) -> dict:
        return {
            "MASK": self.mask_kind,
            "MASK_HAS_ROWS": self.attn_mask is not None and self.attn_mask.shape[2] > 1,
            "VARLEN": self.packed,
        }

    def dropout(self) -> tuple[int, float]:
        return dropout_threshold(self.dropout_p), dropout_scale(self.dropout_p)

    def shape_class(self, kernel: str, rows: int) -> configs.ShapeClass:
        """What the table of launch configurations is asked for."""
        plain = not (self.packed or self.causal or self.dropout_p) and self.attn_mask is None
        return configs.ShapeClass(kernel, precision_of(self.query), self.columns, rows, plain)

    def find_launch(self, kernel: str, rows: int) -> Launch | None:
        return configs.lookup(self.shape_class(kernel, rows), self.query.device)

    def launch(self, kernel: str, rows: int, run: Callable[[Launch], None]) -> None:
        """Call `run` with the launch configuration for walking `rows` queries or keys."""
        run_with_launch(self.shape_class(kernel, rows), self.query, run)

    @property
    def columns(self) -> int:
        """Columns that the wider of the two head dimensions covers on chip."""
        return max(covered_columns(self.pieces(t.shape[3])) for t in (self.query, self.value))

    def pieces(self, size: int) -> tuple[tuple[int, int], ...]:
        return head_pieces(size, precision_of(self.query))


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Hq, L, Dv) in the queries' dtype and float32 natural log-sum-exp (B, Hq, L).

    Args:
        query, key, value: (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), of any strides; query
            head h reads key head h // (Hq // Hkv).
        attn_mask: four dimensions, each 1 or that of (B, Hq, L, S); bool (True = keep) or
            floating, added to the scaled scores.
        cu_seqlens_q, cu_seqlens_k: int32 (segments + 1,) on the device, for packed batches: then
            B is 1, L and S are totals, and the longest segments bound the grid.
        causal: 0 none; 1 key j visible to query i iff j <= i; 2 iff j <= i + S - L.
        dropout_seed: int64 (1,) on the device, where dropout_p > 0.

    Rows that see no key, and rows of a packed batch in no segment, give 0 and -inf.
    """
    problem, _ = with_positive_scale(
        Problem(
            query,
            key,
            value,
            attn_mask,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            dropout_p,
            dropout_seed,
        )
    )
    batch, heads, num_queries, _ = query.shape
    check_lengths(query=num_queries, key=key.shape[2])
    out = dense_like(query, (batch, heads, num_queries, value.shape[3]))
    logsumexp = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if problem.packed:  # no program may come by rows outside every segment
        out.zero_()
        logsumexp.fill_(float("-inf"))
    unit = stride_unit(query, key, value, out)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(problem.longest_query, launch.block_m)
        run_kernel(
            flash_attention_fwd_kernel,
            problem.batch_entries * heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, out),
            logsumexp,
            cu_seqlens_q,
            cu_seqlens_k,
            dropout_seed,
            heads,
            blocks,
            num_queries,
            key.shape[2],
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            **problem.mask_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("flash_attention_fwd", problem.longest_query, run)
    return out, logsumexp


def backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    query_grad: bool,
    key_value_grad: bool,
    mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and mask, each of shape (0,) where it is not asked for.

    Takes what `forward` took and gave, grad_out (B, Hq, L, Dv) of any strides and grad_logsumexp
    (B, Hq, L). grad_mask is contiguous, in the mask's shape and dtype, and sums over the dimensions
    that the mask broadcasts over.
    """
    problem, query_factor = with_positive_scale(
        Problem(
            query,
            key,
            value,
            attn_mask,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            dropout_p,
            dropout_seed,
        )
    )
    check_lengths(query=query.shape[2], key=key.shape[2])
    saved = saved_for_backward(out, logsumexp, grad_out, grad_logsumexp)
    grad_query, grad_key, grad_value = (tensor.new_empty(0) for tensor in (query, key, value))
    grad_mask = (query if attn_mask is None else attn_mask).new_empty(0)
    if query_grad:
        grad_query = gradient_like(query, problem)
    if key_value_grad:
        grad_key, grad_value = gradient_like(key, problem), gradient_like(value, problem)

    whole = query_grad and key_value_grad and takes_whole_heads(problem)
    if whole:
        whole_gradients(problem, saved, grad_query, grad_key, grad_value)
    if mask_grad and attn_mask.shape[3] == 1:
        grad_mask = row_mask_gradient(attn_mask, saved)
        mask_grad = False
    if mask_grad or ((query_grad or key_value_grad) and not whole):
        # Of float32 outputs rounding takes no more than of the gradient itself.
        exact_delta = mask_grad and query.dtype != torch.float32
        statistics = row_statistics(problem, saved, exact_delta)
    if key_value_grad and not whole:
        key_value_gradients(problem, saved, statistics, grad_key, grad_value)
    if query_grad and not whole:
        query_gradient(problem, saved, statistics, grad_query)
    if mask_grad:
        grad_mask = mask_gradient(problem, saved, statistics)
    if query_grad and query_factor != 1.0:
        grad_query *= query_factor
    return grad_query, grad_key, grad_value, grad_mask


def gradient_like(tensor: torch.Tensor, problem: Problem) -> torch.Tensor:
    gradient = dense_like(tensor, tuple(tensor.shape))
    return gradient.zero_() if problem.packed else gradient


def takes_whole_heads(problem: Problem) -> bool:
    """Whether one program should give all gradients of a key head."""
    if problem.mask_kind == FLOAT_MASK.value:
        return False
    launch = problem.find_launch("flash_attention_bwd_whole", problem.longest_key)
    programs = problem.batch_entries * problem.key_heads
    return launch is not None and configs.fills_device(problem.query.device, programs)


def whole_gradients(
    problem: Problem,
    saved: Saved,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    outputs = (saved.out, saved.grad_out, grad_query, grad_key, grad_value)
    unit = stride_unit(problem.query, problem.key, problem.value, *outputs)

    def run(launch: Launch) -> None:
        run_kernel(
            flash_attention_bwd_whole_kernel,
            problem.batch_entries * problem.key_heads,
            *problem.inputs(unit),
            *with_strides(unit, *outputs),
            saved.logsumexp,
            saved.grad_logsumexp,
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            problem.dropout_seed,
            problem.heads,
            problem.query.shape[2],
            problem.key.shape[2],
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            **problem.mask_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            KEY_BLOCKS=max(1, triton.cdiv(problem.longest_key, launch.block_n)),
            launch=launch,
        )

    problem.launch("flash_attention_bwd_whole", problem.longest_key, run)


class Statistics(NamedTuple):
    """What the backward knows of each query, float32 (B, Hq, L).

    The weights come from logsumexp, or from row_max and log_sum where there is a float mask.
    """

    logsumexp: torch.Tensor
    row_max: torch.Tensor | None
    log_sum: torch.Tensor | None
    delta: torch.Tensor


def row_statistics(problem: Problem, saved: Saved, exact_delta: bool) -> Statistics:
    """Args:
    exact_delta: where there is a float mask, take delta from the weights instead of from out.
    """
    if problem.mask_kind != FLOAT_MASK.value:
        return Statistics(saved.logsumexp, None, None, row_deltas(problem, saved))
    row_max, log_sum = torch.empty_like(saved.logsumexp), torch.empty_like(saved.logsumexp)
    delta = torch.empty_like(row_max) if exact_delta else row_deltas(problem, saved)
    unit = stride_unit(problem.query, problem.key, problem.value, saved.grad_out)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(problem.longest_query, launch.block_m)
        run_kernel(
            flash_attention_bwd_statistics_kernel,
            problem.batch_entries * problem.heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, saved.grad_out),
            saved.grad_logsumexp,
            problem.dropout_seed,
            row_max,
            log_sum,
            delta,
            problem.heads,
            blocks,
            problem.query.shape[2],
            problem.key.shape[2],
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            MASK_HAS_ROWS=problem.attn_mask.shape[2] > 1,
            DELTA=exact_delta,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("flash_attention_bwd_statistics", problem.longest_query, run)
    return Statistics(saved.logsumexp, row_max, log_sum, delta)


def row_deltas(problem: Problem, saved: Saved) -> torch.Tensor:
    """out . grad_out - grad_logsumexp of each query, float32 (B, Hq, L)."""
    delta = torch.empty_like(saved.logsumexp)
    batch, heads, num_queries, value_size = saved.out.shape
    unit = stride_unit(saved.out, saved.grad_out)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(num_queries, launch.block_m)
        run_kernel(
            flash_attention_bwd_delta_kernel,
            batch * heads * blocks,
            *with_strides(unit, saved.out, saved.grad_out),
            saved.logsumexp,
            saved.grad_logsumexp,
            delta,
            heads,
            blocks,
            num_queries,
            DV=value_size,
            VALUE_PIECES=problem.pieces(value_size),
            UNIT=unit,
            BLOCK_M=launch.block_m,
            launch=launch,
        )

    problem.launch("flash_attention_bwd_delta", num_queries, run)
    return delta


def key_value_gradients(
    problem: Problem,
    saved: Saved,
    statistics: Statistics,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
) -> None:
    outputs = (saved.grad_out, grad_key, grad_value)
    unit = stride_unit(problem.query, problem.key, problem.value, *outputs)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(problem.longest_key, launch.block_n)
        run_kernel(
            flash_attention_bwd_key_value_kernel,
            problem.batch_entries * problem.key_heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, *outputs),
            *statistics,
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            problem.dropout_seed,
            problem.heads,
            blocks,
            problem.query.shape[2],
            problem.key.shape[2],
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            **problem.mask_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("flash_attention_bwd_key_value", problem.longest_key, run)


def query_gradient(
    problem: Problem, saved: Saved, statistics: Statistics, grad_query: torch.Tensor
) -> None:
    outputs = (saved.grad_out, grad_query)
    unit = stride_unit(problem.query, problem.key, problem.value, *outputs)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(problem.longest_query, launch.block_m)
        run_kernel(
            flash_attention_bwd_query_kernel,
            problem.batch_entries * problem.heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, *outputs),
            *statistics,
            problem.cu_seqlens_q,
            problem.cu_seqlens_k,
            problem.dropout_seed,
            problem.heads,
            blocks,
            problem.query.shape[2],
            problem.key.shape[2],
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            **problem.mask_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("flash_attention_bwd_query", problem.longest_query, run)


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
    num_keys = problem.key.shape[2]
    mask = problem.attn_mask
    mask_batches, mask_heads, mask_rows, mask_columns = mask.shape
    unit = stride_unit(problem.query, problem.key, problem.value, saved.grad_out)
    result = torch.empty_like(mask, memory_format=torch.contiguous_format)

    def run(launch: Launch) -> None:
        row_blocks = triton.cdiv(mask_rows, launch.block_m)
        column_blocks = triton.cdiv(mask_columns, launch.block_n)
        tiles = mask_batches * mask_heads * row_blocks * column_blocks
        head_steps = heads if mask_heads == 1 else 1
        row_steps = triton.cdiv(num_queries, launch.block_m) if mask_rows == 1 else 1
        steps = (batch if mask_batches == 1 else 1) * head_steps * row_steps
        splits = max(1, min(steps, MASK_GRADIENT_PROGRAMS // max(tiles, 1)))
        partials = result
        if splits > 1:
            partials = mask.new_empty((splits, *mask.shape), dtype=torch.float32)
        run_kernel(
            flash_attention_bwd_mask_kernel,
            splits * tiles,
            *problem.inputs(unit),
            *with_strides(unit, saved.grad_out),
            partials,
            *statistics[1:],
            problem.dropout_seed,
            heads,
            num_queries,
            num_keys,
            mask_batches,
            mask_heads,
            mask_rows,
            mask_columns,
            splits,
            steps,
            head_steps,
            row_steps,
            problem.scale,
            *problem.dropout(),
            **problem.constants(unit),
            SUM_ROWS=mask_rows == 1,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )
        if splits > 1:
            result.copy_(partials.sum(0))

    problem.launch("flash_attention_bwd_mask", num_queries, run)
    return result
