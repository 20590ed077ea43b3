"""Gradients of queries and of the logit scale, and the statistics of rows."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    add_products,
    dropout_keep,
    inner_products,
    online_softmax_step,
    program_indices,
    row_inner_products,
    scale_tiles,
    zero_tiles,
)
from vlmfast.kernels.launch import Launch, ceil_div, covered_columns, start, strided
from vlmfast.kernels.window_attention.cosines import normalization_gradient, normalize_rows
from vlmfast.kernels.window_attention.problem import (
    MOST_BIAS_REGISTERS,
    Gradients,
    Problem,
    RowStatistics,
    token_pieces,
)
from vlmfast.kernels.window_attention.scores import (
    KEY_PART,
    VALUE_PART,
    VARYING,
    bias_of_tile,
    load_biases,
    load_keys_values,
    load_padding,
    product_factor,
    window_scores,
)
from vlmfast.kernels.window_attention.sums import add_up, partial_sums
from vlmfast.kernels.window_attention.tokens import (
    load_tokens,
    locate_tokens,
    piece_tokens,
    store_tokens,
)


@triton.jit(do_not_specialize=VARYING)
def window_attention_bwd_query_kernel(
    query,
    key,
    value,
    bias,
    logit_scale,
    pad_value,
    out,
    grad_out,
    grad_query,
    grad_logit_scale,
    row_statistics,
    geometry,
    dropout,
    num_heads,
    num_groups,
    num_splits,
    scale,
    mask_value,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDING: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
    KEEP_BIAS: tl.constexpr,
):
    """Gradients of ROWS queries of a head and of the logit scale.

    Writes what the other kernels must know of the rows, too: row_shift, row_scale and row_delta,
    with P = exp2(scores - row_shift) * row_scale and dS = P * (dP - row_delta). The maximum and the
    sum are computed anew: the log-sum-exp of large scores has lost all that exp2 needs to rounding.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    ROW_PIECES: tl.constexpr = ((0, ROWS),)
    head, group, split = program_indices(num_heads, num_groups)
    rows = group * ROWS + tl.arange(0, ROWS)
    exists = rows < TOKENS

    gradient_factor = product_factor(scale, logit_scale, head)
    factor = gradient_factor * LOG2E
    biases = load_biases(bias, head, group * ROWS, 0, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    padding = (
        load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES),
        load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES),
    )
    scale_sum = 0.0

    # What does not depend on the window is not kept in between: registers would spill on sm_90.
    for window in tl.range(split, geometry.num_windows, num_splits, disable_licm=True):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(query, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS)
        grad_out_tiles = load_tokens(
            grad_out, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        out_tiles = load_tokens(out, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS)
        delta = row_inner_products(grad_out_tiles, out_tiles)
        if COSINE:
            query_tiles, inverse = normalize_rows(query_tiles)
        shift = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        grad_query_tiles = zero_tiles(ROWS, PIECES)
        for n in tl.static_range(len(KEY_PIECES)):
            columns = piece_tokens(0, KEY_PIECES, n)
            key_tiles, value_tiles, _, _ = load_keys_values(
                key,
                value,
                padding,
                window,
                head,
                columns,
                geometry,
                D=D,
                PIECES=PIECES,
                WINDOW=WINDOW,
                CHECK=CHECK_KEYS,
                SHIFTED=SHIFTED,
                PADDING=PADDING,
                COSINE=COSINE,
                UNIT=UNIT,
            )
            bias_tile = bias_of_tile(
                biases,
                0,
                n,
                bias,
                head,
                rows,
                columns,
                window,
                geometry,
                TOKENS=TOKENS,
                KEEP_BIAS=KEEP_BIAS,
            )
            scores = window_scores(
                query_tiles,
                key_tiles,
                bias_tile,
                factor,
                rows,
                columns,
                window,
                geometry,
                mask_value=mask_value,
                WINDOW=WINDOW,
                SHIFTED=SHIFTED,
                PRECISION=PRECISION,
            )
            weights, decay, shift, row_sum = online_softmax_step(scores, shift, row_sum, 1.0)
            grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
            if DROPOUT:
                keep = dropout_keep(
                    dropout,
                    window * num_heads + head,
                    rows,
                    KEY_PIECES[n][0],
                    COLUMNS=KEY_PIECES[n][1],
                    ALIGNED=True,
                )
                grad_weights = tl.where(keep, grad_weights * dropout.scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            if n > 0:
                grad_query_tiles = scale_tiles(grad_query_tiles, decay[:, None])
            grad_query_tiles = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)
        inverse_sum = 1.0 / row_sum
        grad_query_tiles = scale_tiles(grad_query_tiles, inverse_sum[:, None])
        tl.store(row_statistics.shift + statistics, shift, mask=exists)
        tl.store(row_statistics.scale + statistics, inverse_sum, mask=exists)
        tl.store(row_statistics.delta + statistics, delta, mask=exists)
        if COSINE:
            grad_query_tiles, products = normalization_gradient(
                grad_query_tiles, query_tiles, inverse
            )
            if grad_logit_scale is not None:
                scale_sum += tl.sum(products)
        if grad_query is not None:
            store_tokens(
                grad_query,
                window,
                head,
                place,
                geometry,
                scale_tiles(grad_query_tiles, gradient_factor),
                D,
                PIECES,
                UNIT,
            )
    if grad_logit_scale is not None:
        partial = (split * num_groups + group) * num_heads + head
        tl.store(grad_logit_scale + partial, scale_sum)


def query_gradient(
    problem: Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    gradients: Gradients,
) -> RowStatistics:
    """Gradients of queries and logit scale, and on the way the statistics of all rows."""
    rows = (problem.num_windows, problem.num_heads, problem.tokens)
    statistics = RowStatistics(*(out.new_empty(rows, dtype=torch.float32) for _ in range(3)))
    unit = problem.stride_unit(out, grad_out, gradients.query)

    def run(launch: Launch) -> None:
        key_pieces = token_pieces(problem.tokens, launch.block_n)
        groups = ceil_div(problem.tokens, launch.block_m)
        splits = problem.splits(launch, groups)
        keys = covered_columns(key_pieces)
        scale_sums = partial_sums(gradients.logit_scale, splits * groups, problem.num_heads)
        start(
            window_attention_bwd_query_kernel,
            problem.num_heads * groups * splits,
            launch,
            **problem.arguments(unit, groups, splits),
            **problem.tile_constants(launch, launch.block_m, keys, MOST_BIAS_REGISTERS),
            out=strided(out, unit),
            grad_out=strided(grad_out, unit),
            grad_query=strided(gradients.query, unit),
            grad_logit_scale=scale_sums,
            row_statistics=statistics,
            ROWS=launch.block_m,
            KEY_PIECES=key_pieces,
        )
        add_up(scale_sums, gradients.logit_scale)

    problem.launch("window_attention_bwd_query", problem.tokens, run)
    return statistics
