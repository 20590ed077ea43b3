"""Shifted-window attention.

    out[i] = sum_j P[i, j] value[j],  P[i] = softmax_j(scale * query[i] . key[j] + bias[i, j])

within each window of a map that is padded to whole windows and cyclically shifted (Liu et al.,
Swin Transformer), or with the cosine of query and key in place of their product (Swin Transformer
V2). Tokens are gathered and scattered by address: nothing rolled, padded, partitioned or masked is
ever written, and only windows that hold several regions of the map compute a mask.

A program stays with one head and walks over windows. What it adds to the scores stays in registers
where it fits, and so do the sums over windows: the gradients of bias, logit scale and padding are
written once by each program, and the few partial sums added in order. There are no atomics, hence
one result on one machine.

The tokens of a window are cut into pieces of power-of-two widths, 144 = 64 + 64 + 16. Scores are
kept in base 2: products, bias and mask carry a factor log2(e).
"""

import math

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LN2,
    LOG2E,
    add_products,
    dropout_keep,
    online_softmax_step,
    program_indices,
    scale_tiles,
    zero_tiles,
)
from vlmfast.kernels.launch import (
    Launch,
    ceil_div,
    check_lengths,
    covered_columns,
    next_power_of_2,
    start,
    strided,
)
from vlmfast.kernels.window_attention.cosines import normalize_rows
from vlmfast.kernels.window_attention.problem import MOST_BIAS_REGISTERS, make_problem, token_pieces
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
from vlmfast.kernels.window_attention.tokens import (
    load_tokens,
    locate_tokens,
    piece_tokens,
    store_tokens,
)


@triton.jit(do_not_specialize=VARYING)
def window_attention_fwd_kernel(
    query,
    key,
    value,
    bias,
    logit_scale,
    pad_value,
    out,
    logsumexp,
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
    """Outputs and log-sum-exps of ROWS queries of a head, in every num_splits-th window.

    Programs run over heads first, so that those sharing the memory lines of a token run side by
    side, and all move over the map together.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    ROW_PIECES: tl.constexpr = ((0, ROWS),)
    head, group, split = program_indices(num_heads, num_groups)

    rows = group * ROWS + tl.arange(0, ROWS)

    factor = product_factor(scale, logit_scale, head) * LOG2E
    biases = load_biases(bias, head, group * ROWS, 0, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    padding = (
        load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES),
        load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES),
    )

    for window in range(split, geometry.num_windows, num_splits):
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(query, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS)
        if COSINE:
            query_tiles, _ = normalize_rows(query_tiles)
        acc = zero_tiles(ROWS, PIECES)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
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
            weights, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, 1.0)
            if DROPOUT:
                keep = dropout_keep(
                    dropout,
                    window * num_heads + head,
                    rows,
                    KEY_PIECES[n][0],
                    COLUMNS=KEY_PIECES[n][1],
                    ALIGNED=True,
                )
                weights = tl.where(keep, weights, 0.0)
            if n > 0:
                acc = scale_tiles(acc, decay[:, None])
            acc = add_products(acc, weights, value_tiles, PRECISION)
        acc = scale_tiles(acc, ((dropout.scale if DROPOUT else 1.0) / row_sum)[:, None])
        store_tokens(out, window, head, place, geometry, acc, D, PIECES, UNIT)
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
        natural = (row_max + tl.math.log2(row_sum)) * LN2
        tl.store(logsumexp + statistics, natural, mask=rows < TOKENS)


def forward(
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    pad_value: torch.Tensor | None,
    num_heads: int,
    window_height: int,
    window_width: int,
    shift_height: int,
    shift_width: int,
    wrap_padded: bool,
    scale: float,
    mask_value: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, W, C), contiguous, and float32 natural log-sum-exp (B, windows, heads, M).

    Args:
        query, key, value: (B, H, W, C) of any strides; or (B, H, W, 3C), None and None.
        bias: (heads, M, M), M = window_height * window_width, of any strides and floating dtype.
        logit_scale: (heads,): scores are cosines times this, and `scale` is not used.
        pad_value: (3C,): query, key and value of the tokens that fill the windows at the bottom
            and at the right; zeros for None.
        shift_height, shift_width: of the map, up and to the left; after it was padded for
            `wrap_padded`, else before.
        mask_value: what is added to scores between regions that the shift brought together.
        dropout_seed: int64 (1,) on the device, where dropout_p > 0.
    """
    problem = make_problem(
        query,
        key,
        value,
        bias,
        logit_scale,
        pad_value,
        num_heads,
        window_height,
        window_width,
        shift_height,
        shift_width,
        wrap_padded,
        scale,
        mask_value,
        dropout_p,
        dropout_seed,
    )
    check_lengths(windows=problem.num_windows)
    out = query.new_empty(problem.query.shape)
    statistics = (query.shape[0], math.prod(problem.grid), num_heads, problem.tokens)
    logsumexp = query.new_empty(statistics, dtype=torch.float32)
    unit = problem.stride_unit(out)

    def run(launch: Launch) -> None:
        rows = min(launch.block_m, max(16, next_power_of_2(problem.tokens)))
        key_pieces = token_pieces(problem.tokens, launch.block_n)
        groups = ceil_div(problem.tokens, rows)
        splits = problem.splits(launch, groups)
        keys = covered_columns(key_pieces)
        start(
            window_attention_fwd_kernel,
            num_heads * groups * splits,
            launch,
            **problem.arguments(unit, groups, splits),
            **problem.tile_constants(launch, rows, keys, MOST_BIAS_REGISTERS),
            out=strided(out, unit),
            logsumexp=logsumexp,
            ROWS=rows,
            KEY_PIECES=key_pieces,
        )

    if problem.num_windows > 0:
        problem.launch("window_attention_fwd", problem.tokens, run)
    return out, logsumexp
