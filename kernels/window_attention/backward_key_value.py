"""Gradients of keys, values and padding; where a window fits on chip, of everything."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    add_products,
    dropout_keep,
    inner_products,
    program_indices,
    scale_tiles,
    zero_tiles,
)
from vlmfast.kernels.launch import Launch, ceil_div, covered_columns, start, strided
from vlmfast.kernels.window_attention.cosines import normalization_gradient, normalize_rows
from vlmfast.kernels.window_attention.problem import (
    MOST_BIAS_REGISTERS_FOR_KEYS,
    WHOLE_KERNEL,
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
    weights_of_rows,
    window_scores,
)
from vlmfast.kernels.window_attention.sums import (
    add_padding_rows,
    add_up,
    partial_sums,
    store_bias_sums,
    store_padding_sums,
    zero_squares,
    zero_vectors,
)
from vlmfast.kernels.window_attention.tokens import (
    NO_PADDING,
    Place,
    load_tokens,
    locate_tokens,
    piece_tokens,
    store_tokens,
)


@triton.jit
def softmax_statistics(scores):
    """Maximum and inverse sum of the weights of each row, from the scores of all keys."""
    row_max = tl.max(scores[0], 1)
    for n in tl.static_range(1, len(scores)):
        row_max = tl.maximum(row_max, tl.max(scores[n], 1))
    row_sum = tl.sum(tl.math.exp2(scores[0] - row_max[:, None]), 1)
    for n in tl.static_range(1, len(scores)):
        row_sum += tl.sum(tl.math.exp2(scores[n] - row_max[:, None]), 1)
    return row_max, 1.0 / row_sum


@triton.jit(do_not_specialize=VARYING)
def window_attention_bwd_kernel(
    query,
    key,
    value,
    bias,
    logit_scale,
    pad_value,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
    grad_bias,
    grad_logit_scale,
    grad_padding,
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
    KEYS: tl.constexpr,
    ROW_PIECES: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
    CHECK_KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    KEEP_BIAS: tl.constexpr,
):
    """Gradients of KEYS keys and values of a head, and of the padding.

    For WHOLE these are all keys of a window, and everything else is complete, too: the gradients
    of queries, bias and logit scale, and the statistics of the rows, which are computed anew: the
    log-sum-exp of large scores has lost all that exp2 needs to rounding. Otherwise
    `window_attention_bwd_query_kernel` gives all of these.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1]
    COSINE: tl.constexpr = logit_scale is not None
    head, group, split = program_indices(num_heads, num_groups)
    first_column = group * KEYS

    gradient_factor = product_factor(scale, logit_scale, head)
    factor = gradient_factor * LOG2E
    biases = load_biases(bias, head, 0, first_column, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    padding = (
        load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES),
        load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES),
    )
    bias_sums = ()
    if grad_bias is not None:
        bias_sums = zero_squares(ROW_PIECES, KEY_PIECES)
    key_padding_sums = zero_vectors(PIECES)
    value_padding_sums = zero_vectors(PIECES)
    scale_sum = 0.0

    for window in range(split, geometry.num_windows, num_splits):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS
        key_tiles = ()
        value_tiles = ()
        key_inverses = ()
        key_places = ()
        for n in tl.static_range(len(KEY_PIECES)):
            keys, values, key_inverse, place = load_keys_values(
                key,
                value,
                padding,
                window,
                head,
                piece_tokens(first_column, KEY_PIECES, n),
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
            key_tiles = key_tiles + (keys,)
            value_tiles = value_tiles + (values,)
            key_inverses = key_inverses + (key_inverse,)
            # Triton 3.6 forgets the names of a tuple within a tuple.
            key_places = key_places + ((place.y, place.x, place.inside, place.is_padding),)
        grad_key_tiles = ()
        grad_value_tiles = ()
        for n in tl.static_range(len(KEY_PIECES)):
            grad_key_tiles = grad_key_tiles + (zero_tiles(KEY_PIECES[n][1], PIECES),)
            grad_value_tiles = grad_value_tiles + (zero_tiles(KEY_PIECES[n][1], PIECES),)
        new_bias_sums = ()
        for m in tl.static_range(len(ROW_PIECES)):
            rows = piece_tokens(0, ROW_PIECES, m)
            place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
            query_tiles = load_tokens(
                query, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
            )
            grad_out_tiles = load_tokens(
                grad_out, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
            )
            if COSINE:
                query_tiles, inverse = normalize_rows(query_tiles)

            scores = ()
            for n in tl.static_range(len(KEY_PIECES)):
                columns = piece_tokens(first_column, KEY_PIECES, n)
                bias_tile = bias_of_tile(
                    biases,
                    m,
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
                scores = scores + (
                    window_scores(
                        query_tiles,
                        key_tiles[n],
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
                    ),
                )
            if WHOLE:
                shift, inverse_sum = softmax_statistics(scores)
                delta = tl.zeros([rows.shape[0]], tl.float32)
            else:
                exists = rows < TOKENS
                shift = tl.load(
                    row_statistics.shift + statistics + rows, mask=exists, other=float("inf")
                )
                inverse_sum = tl.load(
                    row_statistics.scale + statistics + rows, mask=exists, other=0.0
                )
                delta = tl.load(row_statistics.delta + statistics + rows, mask=exists, other=0.0)
            weights = ()
            grad_weights = ()
            for n in tl.static_range(len(KEY_PIECES)):
                if WHOLE:
                    tile = tl.math.exp2(scores[n] - shift[:, None]) * inverse_sum[:, None]
                else:
                    tile = weights_of_rows(scores[n], shift, inverse_sum)
                grad_tile = inner_products(grad_out_tiles, value_tiles[n], PRECISION)
                kept = tile
                if DROPOUT:
                    keep = dropout_keep(
                        dropout,
                        window * num_heads + head,
                        rows,
                        first_column + KEY_PIECES[n][0],
                        COLUMNS=KEY_PIECES[n][1],
                        ALIGNED=True,
                    )
                    kept = tl.where(keep, tile * dropout.scale, 0.0)
                    grad_tile = tl.where(keep, grad_tile * dropout.scale, 0.0)
                if WHOLE:
                    delta += tl.sum(tile * grad_tile, 1)
                weights = weights + ((tile, kept),)
                grad_weights = grad_weights + (grad_tile,)

            grad_query_tiles = zero_tiles(rows.shape[0], PIECES)
            summed_grad_key_tiles = ()
            summed_grad_value_tiles = ()
            summed_biases = ()
            for n in tl.static_range(len(KEY_PIECES)):
                tile, kept = weights[n]
                grad_scores = tile * (grad_weights[n] - delta[:, None])
                if grad_bias is not None:
                    summed_biases = summed_biases + (bias_sums[m][n] + grad_scores,)
                grad_scores = grad_scores.to(query.pointer.dtype.element_ty)
                if WHOLE:
                    grad_query_tiles = add_products(
                        grad_query_tiles, grad_scores, key_tiles[n], PRECISION
                    )
                summed_grad_value_tiles = summed_grad_value_tiles + (
                    add_products(
                        grad_value_tiles[n],
                        tl.trans(kept.to(query.pointer.dtype.element_ty)),
                        grad_out_tiles,
                        PRECISION,
                    ),
                )
                summed_grad_key_tiles = summed_grad_key_tiles + (
                    add_products(grad_key_tiles[n], tl.trans(grad_scores), query_tiles, PRECISION),
                )
            new_bias_sums = new_bias_sums + (summed_biases,)
            grad_key_tiles = summed_grad_key_tiles
            grad_value_tiles = summed_grad_value_tiles
            if WHOLE:
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
        if grad_bias is not None:
            bias_sums = new_bias_sums
        for n in tl.static_range(len(KEY_PIECES)):
            key_gradient = grad_key_tiles[n]
            if COSINE:
                key_gradient, _ = normalization_gradient(
                    key_gradient, key_tiles[n], key_inverses[n]
                )
            key_gradient = scale_tiles(key_gradient, gradient_factor)
            place = Place(key_places[n][0], key_places[n][1], key_places[n][2], key_places[n][3])
            if grad_key is not None:
                store_tokens(
                    grad_key,
                    window,
                    head,
                    place,
                    geometry,
                    key_gradient,
                    D,
                    PIECES,
                    UNIT,
                )
                store_tokens(
                    grad_value,
                    window,
                    head,
                    place,
                    geometry,
                    grad_value_tiles[n],
                    D,
                    PIECES,
                    UNIT,
                )
            if grad_padding is not None:
                key_padding_sums = add_padding_rows(
                    key_padding_sums, place.is_padding, key_gradient
                )
                value_padding_sums = add_padding_rows(
                    value_padding_sums, place.is_padding, grad_value_tiles[n]
                )

    if grad_bias is not None:
        partial = grad_bias + tl.cast(split * num_heads + head, tl.int64) * TOKENS * TOKENS
        store_bias_sums(partial, bias_sums, 0, first_column, TOKENS, ROW_PIECES, KEY_PIECES)
    if grad_logit_scale is not None:
        tl.store(grad_logit_scale + split * num_heads + head, scale_sum)
    if grad_padding is not None:
        partial = grad_padding + (2 * (split * num_groups + group) * num_heads + head) * D
        store_padding_sums(partial, key_padding_sums, D, PIECES)
        store_padding_sums(partial + num_heads * D, value_padding_sums, D, PIECES)


def key_value_gradients(
    problem: Problem,
    statistics: RowStatistics | None,
    grad_out: torch.Tensor,
    gradients: Gradients,
) -> None:
    """Gradients of keys, values and padding; without statistics, of everything."""
    whole = statistics is None
    tokens, heads = problem.tokens, problem.num_heads
    unit = problem.stride_unit(grad_out, *gradients[:3])

    def run(launch: Launch) -> None:
        row_pieces = token_pieces(tokens, launch.block_m)
        key_pieces = token_pieces(tokens, launch.block_n) if whole else ((0, launch.block_n),)
        rows, keys = covered_columns(row_pieces), covered_columns(key_pieces)
        groups = ceil_div(tokens, keys)
        splits = problem.splits(launch, groups)
        bias_sums = scale_sums = padding_sums = None
        if whole:
            bias_sums = partial_sums(gradients.bias, splits, heads, tokens, tokens)
            scale_sums = partial_sums(gradients.logit_scale, splits, heads)
        if problem.padding != NO_PADDING.value:
            padding_sums = partial_sums(
                gradients.pad_value, splits * groups, 2 * heads * problem.dim
            )
        start(
            window_attention_bwd_kernel,
            heads * groups * splits,
            launch,
            **problem.arguments(unit, groups, splits),
            **problem.tile_constants(launch, rows, keys, MOST_BIAS_REGISTERS_FOR_KEYS),
            grad_out=strided(grad_out, unit),
            grad_query=strided(gradients.query, unit),
            grad_key=strided(gradients.key, unit),
            grad_value=strided(gradients.value, unit),
            grad_bias=bias_sums,
            grad_logit_scale=scale_sums,
            grad_padding=padding_sums,
            row_statistics=statistics,
            KEYS=keys,
            ROW_PIECES=row_pieces,
            KEY_PIECES=key_pieces,
            WHOLE=whole,
        )
        add_up(bias_sums, gradients.bias)
        add_up(scale_sums, gradients.logit_scale)
        if gradients.pad_value is not None:  # the query of a padded token has no gradient
            add_up(padding_sums, gradients.pad_value[heads * problem.dim :])

    kernel = WHOLE_KERNEL if whole else "window_attention_bwd_key_value"
    problem.launch(kernel, tokens, run)
