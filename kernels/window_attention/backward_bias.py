"""Gradient of the bias, for windows too large for one program."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E, dropout_keep, inner_products, program_indices
from vlmfast.kernels.launch import Launch, ceil_div, start, strided
from vlmfast.kernels.window_attention.cosines import normalize_rows
from vlmfast.kernels.window_attention.problem import Problem, RowStatistics
from vlmfast.kernels.window_attention.scores import (
    KEY_PART,
    VALUE_PART,
    VARYING,
    load_bias,
    load_keys_values,
    load_padding,
    product_factor,
    weights_of_rows,
    window_scores,
)
from vlmfast.kernels.window_attention.sums import add_up, partial_sums
from vlmfast.kernels.window_attention.tokens import load_tokens, locate_tokens


@triton.jit(do_not_specialize=VARYING)
def window_attention_bwd_bias_kernel(
    query,
    key,
    value,
    bias,
    logit_scale,
    pad_value,
    grad_out,
    grad_bias,
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
    KEYS: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
):
    """Gradient of a tile (ROWS, KEYS) of a head's bias, for windows too large for one program.

    It recomputes what other kernels compute, too: their registers have no place for these sums.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    KEY_GROUPS: tl.constexpr = (TOKENS + KEYS - 1) // KEYS
    head, group, split = program_indices(num_heads, num_groups)
    first_column = group % KEY_GROUPS * KEYS
    columns = first_column + tl.arange(0, KEYS)
    rows = group // KEY_GROUPS * ROWS + tl.arange(0, ROWS)
    exists = rows < TOKENS

    factor = product_factor(scale, logit_scale, head) * LOG2E
    bias_tile = load_bias(bias, head, rows, columns, TOKENS)
    padding = (
        load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES),
        load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES),
    )
    bias_sum = tl.zeros([ROWS, KEYS], tl.float32)

    for window in range(split, geometry.num_windows, num_splits):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
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
            COSINE=logit_scale is not None,
            UNIT=UNIT,
        )
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(query, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS)
        grad_out_tiles = load_tokens(
            grad_out, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        if logit_scale is not None:
            query_tiles, _ = normalize_rows(query_tiles)
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
        shift = tl.load(row_statistics.shift + statistics, mask=exists, other=float("inf"))
        row_factor = tl.load(row_statistics.scale + statistics, mask=exists, other=0.0)
        weights = weights_of_rows(scores, shift, row_factor)
        grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
        if DROPOUT:
            keep = dropout_keep(
                dropout, window * num_heads + head, rows, first_column, COLUMNS=KEYS, ALIGNED=True
            )
            grad_weights = tl.where(keep, grad_weights * dropout.scale, 0.0)
        delta = tl.load(row_statistics.delta + statistics, mask=exists, other=0.0)
        bias_sum += weights * (grad_weights - delta[:, None])

    partial = grad_bias + tl.cast(split * num_heads + head, tl.int64) * TOKENS * TOKENS
    tl.store(
        partial + (rows * TOKENS)[:, None] + columns[None, :],
        bias_sum,
        mask=exists[:, None] & (columns < TOKENS)[None, :],
    )


def bias_gradient(
    problem: Problem, statistics: RowStatistics, grad_out: torch.Tensor, grad_bias: torch.Tensor
) -> None:
    tokens, heads = problem.tokens, problem.num_heads
    unit = problem.stride_unit(grad_out)

    def run(launch: Launch) -> None:
        groups = ceil_div(tokens, launch.block_m) * ceil_div(tokens, launch.block_n)
        splits = problem.splits(launch, groups)
        bias_sums = partial_sums(grad_bias, splits, heads, tokens, tokens)
        start(
            window_attention_bwd_bias_kernel,
            heads * groups * splits,
            launch,
            **problem.arguments(unit, groups, splits),
            **problem.checks(launch.block_m, launch.block_n),
            grad_out=strided(grad_out, unit),
            grad_bias=bias_sums,
            row_statistics=statistics,
            ROWS=launch.block_m,
            KEYS=launch.block_n,
        )
        add_up(bias_sums, grad_bias)

    problem.launch("window_attention_bwd_bias", tokens, run)
