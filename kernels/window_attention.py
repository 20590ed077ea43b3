"""Shifted-window attention, forward and backward.

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
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels import configs
from vlmfast.kernels.common import (
    LN2,
    LOG2E,
    add_products,
    check_lengths,
    covered_columns,
    dropout_keep,
    dropout_scale,
    dropout_threshold,
    head_pieces,
    inner_products,
    input_precision,
    load_pieces,
    online_softmax_step,
    precision_of,
    program_indices,
    row_inner_products,
    run_kernel,
    run_with_launch,
    scale_tiles,
    split_into_pieces,
    store_pieces,
    stride_unit,
    with_strides,
    zero_tiles,
)
from vlmfast.kernels.configs import Launch

NORM_FLOOR = tl.constexpr(1e-12)  # cosines divide by max(|x|, 1e-12), as torch normalises
LARGEST_INVERSE_NORM = tl.constexpr(1e12)

# Whether tokens are added to fill the windows, before or after the shift: the PADDING parameter.
NO_PADDING = tl.constexpr(0)
WRAP_PADDED = tl.constexpr(1)
WRAP_UNPADDED = tl.constexpr(2)

# What is finite stays finite with the factor log2(e): scores must not be differences of infinities
# where a whole row has the lowest number, or the largest, or a query beyond its window sees no
# region.
LARGEST_BIAS = tl.constexpr(1e38)
LARGEST_MASK = 6e37

KEY_PART, VALUE_PART = tl.constexpr(1), tl.constexpr(2)  # of pad_value; the first is the query's

WHOLE_KERNEL = "window_attention_bwd_whole"

# Registers of a thread up to which kernels keep the bias in them; that of keys and values holds
# more besides.
MOST_BIAS_REGISTERS = 128
MOST_BIAS_REGISTERS_FOR_KEYS = 64

# Warps that a multiprocessor is given, as programs; more than are resident, so that it has others
# to go on with when some programs end early.
WARPS_PER_MULTIPROCESSOR = 32


_PLAIN_NUMBERS = [  # whose values no kernel is compiled for
    "num_windows",
    "num_heads",
    "num_groups",
    "num_splits",
    "height",
    "width",
    "grid_height",
    "grid_width",
    "shift_height",
    "shift_width",
    "threshold",
]


@triton.jit
def piece_tokens(first, PIECES: tl.constexpr, i: tl.constexpr):
    return first + PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))


@triton.jit
def source_on_axis(place, size, padded_size, shift, SHIFTED: tl.constexpr, PADDING: tl.constexpr):
    """Where on one axis of the map the places of the shifted, padded map come from.

    Gives their indices, and whether they come from the map at all.
    """
    source = place
    if SHIFTED:
        wrap = size if PADDING == WRAP_UNPADDED else padded_size
        source = place + shift % wrap
        source = tl.where(source >= wrap, source - wrap, source)
    return source, (place if PADDING == WRAP_UNPADDED else source) < size


@triton.jit
def locate_tokens(
    tokens,
    window,
    geometry,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDING: tl.constexpr,
):
    """(row of the map, column, whether it is on the map, whether it is padding) of tokens.

    `tokens` count through the window row by row; those beyond it are neither map nor padding.
    """
    map_size, grid, shift, _ = geometry
    exists = tokens < WINDOW[0] * WINDOW[1]
    place_y = window // grid[1] % grid[0] * WINDOW[0] + tokens // WINDOW[1]
    place_x = window % grid[1] * WINDOW[1] + tokens % WINDOW[1]
    padded_y, padded_x = grid[0] * WINDOW[0], grid[1] * WINDOW[1]
    y, inside_y = source_on_axis(place_y, map_size[0], padded_y, shift[0], SHIFTED, PADDING)
    x, inside_x = source_on_axis(place_x, map_size[1], padded_x, shift[1], SHIFTED, PADDING)
    inside = exists
    if PADDING != NO_PADDING:
        inside = exists & inside_y & inside_x
    return y, x, inside, exists & ~inside


@triton.jit
def holds_regions(window, geometry):
    """Whether the shift put a window together from parts of the map that are no neighbours."""
    _, grid, shift, _ = geometry
    in_last_row = window // grid[1] % grid[0] == grid[0] - 1
    in_last_column = window % grid[1] == grid[1] - 1
    return (in_last_row & (shift[0] > 0)) | (in_last_column & (shift[1] > 0))


@triton.jit
def not_hoisted(tokens, window, geometry):
    """The same tokens, in a way that what is computed of them stays within the loop over windows.

    The compiler would keep it in registers from window to window, which has none to spare.
    """
    return tokens + window // geometry[3]  # + 0


@triton.jit
def region_of_tokens(tokens, window, geometry, WINDOW: tl.constexpr):
    """Numbers the parts: which of the last shift rows and columns tokens are in."""
    _, grid, shift, _ = geometry
    tokens = not_hoisted(tokens, window, geometry)
    in_last_row = window // grid[1] % grid[0] == grid[0] - 1
    in_last_column = window % grid[1] == grid[1] - 1
    wrapped_y = in_last_row & (tokens >= (WINDOW[0] - shift[0]) * WINDOW[1])
    wrapped_x = in_last_column & (tokens % WINDOW[1] >= WINDOW[1] - shift[1])
    return 2 * wrapped_y.to(tl.int32) + wrapped_x.to(tl.int32)


@triton.jit
def token_pointers(
    pointer, strides, window, head, place, geometry, D: tl.constexpr, UNIT: tl.constexpr
):
    """Addresses (M, 1) of a head's first channel in the located tokens; in 64 bits."""
    grid = geometry[1]
    batch = window // (grid[0] * grid[1])
    pointer += tl.cast(batch, tl.int64) * strides[0] * UNIT
    pointer += tl.cast(head, tl.int64) * D * strides[3]
    offsets = place[0].to(tl.int64) * strides[1] * UNIT + place[1].to(tl.int64) * strides[2] * UNIT
    return pointer + offsets[:, None]


@triton.jit
def load_tokens(
    pointer,
    strides,
    window,
    head,
    place,
    geometry,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    CHECK: tl.constexpr,
):
    """Split tile (M, D) of a head in the located tokens; those not on the map read as 0."""
    pointers = token_pointers(pointer, strides, window, head, place, geometry, D, UNIT)
    return load_pieces(pointers, strides[3], place[2], D, PIECES, CHECK)


@triton.jit
def store_tokens(
    pointer,
    strides,
    window,
    head,
    place,
    geometry,
    tiles,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write a split tile to the located tokens, but those not on the map."""
    pointers = token_pointers(pointer, strides, window, head, place, geometry, D, UNIT)
    store_pieces(pointers, strides[3], place[2], tiles, D, PIECES)


@triton.jit
def load_padding(
    pad_value, part: tl.constexpr, head, num_heads, D: tl.constexpr, PIECES: tl.constexpr
):
    """What a head's padded tokens carry as key or value, (1, width) tiles; () for zeros."""
    pieces = ()
    if pad_value is not None:
        for i in tl.static_range(len(PIECES)):
            columns = PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))
            offsets = (part * num_heads + head) * D + columns
            piece = tl.load(pad_value + offsets, mask=columns < D, other=0.0)
            pieces = pieces + (piece[None, :],)
    return pieces


@triton.jit
def fill_padding(tiles, is_padding, padding):
    filled = ()
    for i in tl.static_range(len(tiles)):
        values = padding[i].to(tiles[i].dtype)
        filled = filled + (tl.where(is_padding[:, None], values, tiles[i]),)
    return filled


@triton.jit
def load_bias(bias, head, rows, columns, TOKENS: tl.constexpr):
    """What the scores of a tile carry in base 2: (M, N), or (1, N) without a bias.

    It is -inf for keys beyond the window, and finite for queries there.
    """
    exists = (columns < TOKENS)[None, :]
    tile = tl.zeros([1, columns.shape[0]], tl.float32)
    if bias is not None:
        offsets = (head * TOKENS + rows)[:, None].to(tl.int64) * TOKENS + columns[None, :]
        inside = exists & (rows < TOKENS)[:, None]
        tile = tl.load(bias + offsets, mask=inside, other=0.0).to(tl.float32)
        bounded = tl.maximum(tl.minimum(tile * LOG2E, LARGEST_BIAS), -LARGEST_BIAS)
        tile = tl.where(tl.abs(tile) < float("inf"), bounded, tile)
    return tl.where(exists, tile, float("-inf"))


@triton.jit
def load_biases(
    bias,
    head,
    first_row,
    first_column,
    TOKENS: tl.constexpr,
    ROW_PIECES: tl.constexpr,
    COLUMN_PIECES: tl.constexpr,
    KEEP_BIAS: tl.constexpr,
):
    """`load_bias` of all pieces of rows, by all pieces of columns; nothing unless KEEP_BIAS."""
    tiles = ()
    if KEEP_BIAS:
        for m in tl.static_range(len(ROW_PIECES)):
            rows = piece_tokens(first_row, ROW_PIECES, m)
            row_tiles = ()
            for n in tl.static_range(len(COLUMN_PIECES)):
                columns = piece_tokens(first_column, COLUMN_PIECES, n)
                row_tiles = row_tiles + (load_bias(bias, head, rows, columns, TOKENS),)
            tiles = tiles + (row_tiles,)
    return tiles


@triton.jit
def bias_of_tile(
    biases,
    m: tl.constexpr,
    n: tl.constexpr,
    bias,
    head,
    rows,
    columns,
    window,
    geometry,
    TOKENS: tl.constexpr,
    KEEP_BIAS: tl.constexpr,
):
    """The tile of `load_biases` if those were kept, else loaded now."""
    if KEEP_BIAS:
        tile = biases[m][n]
    else:
        rows = not_hoisted(rows, window, geometry)
        columns = not_hoisted(columns, window, geometry)
        tile = load_bias(bias, head, rows, columns, TOKENS)
    return tile


@triton.jit
def window_scores(
    query_tiles,
    key_tiles,
    bias_tile,
    factor,
    rows,
    columns,
    window,
    geometry,
    mask_value,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Scores (M, N) in base 2, of queries `rows` and keys `columns` of a window."""
    scores = inner_products(query_tiles, key_tiles, PRECISION) * factor + bias_tile
    if SHIFTED:  # noqa: SIM102 (one is known to the compiler, the other at run time)
        if holds_regions(window, geometry):
            query_regions = region_of_tokens(rows, window, geometry, WINDOW)
            key_regions = region_of_tokens(columns, window, geometry, WINDOW)
            same = query_regions[:, None] == key_regions[None, :]
            scores += tl.where(same, 0.0, mask_value * LOG2E)
    return scores


@triton.jit
def shrink_rows(tiles):
    """A split tile in float32, each row times a power of two; and these (M,).

    They leave the largest element of a row below 4, so that squares do not overflow, and never make
    a row longer. float16 holds nothing that long.
    """
    most = tl.max(tl.abs(tiles[0].to(tl.float32)), 1)
    for i in tl.static_range(1, len(tiles)):
        most = tl.maximum(most, tl.max(tl.abs(tiles[i].to(tl.float32)), 1))
    exponents = 255 - (most.to(tl.int32, bitcast=True) >> 23)
    exponents = tl.minimum(tl.maximum(exponents, 1), 127)
    factors = (exponents << 23).to(tl.float32, bitcast=True)
    shrunk = ()
    for i in tl.static_range(len(tiles)):
        shrunk = shrunk + (tiles[i].to(tl.float32) * factors[:, None],)
    return shrunk, factors


@triton.jit
def normalize_rows(tiles):
    """The rows of a split tile times 1 / max(|x|, 1e-12), in the tile's dtype; and that (M,)."""
    rows = tiles
    factors = tl.full([tiles[0].shape[0]], 1.0, tl.float32)
    if tiles[0].dtype != tl.float16:
        rows, factors = shrink_rows(tiles)
    norms = tl.math.sqrt_rn(row_inner_products(rows, rows))
    inverse = tl.math.div_rn(tl.full(norms.shape, 1.0, tl.float32), tl.maximum(norms, NORM_FLOOR))
    normalized = ()
    for i in tl.static_range(len(tiles)):
        row = rows[i].to(tl.float32) * inverse[:, None]
        normalized = normalized + (row.to(tiles[i].dtype),)
    return normalized, inverse * factors


@triton.jit
def normalization_gradient(gradients, normalized, inverse):
    """Gradient of x from that of y = x / max(|x|, 1e-12), and y . gradient (M,).

    It is (gradient - y (y . gradient)) / |x|; below the floor the divisor is a constant.
    """
    products = row_inner_products(gradients, normalized)
    along = tl.where(inverse < LARGEST_INVERSE_NORM, products, 0.0)
    results = ()
    for i in tl.static_range(len(normalized)):
        across = gradients[i] - normalized[i].to(tl.float32) * along[:, None]
        results = results + (across * inverse[:, None],)
    return results, products


@triton.jit
def add_padding_rows(sums, is_padding, gradients):
    """sums (width,) + the gradients of the rows that are padding, piece by piece."""
    totals = ()
    for i in tl.static_range(len(sums)):
        rows = tl.where(is_padding[:, None], gradients[i], 0.0)
        totals = totals + (sums[i] + tl.sum(rows, 0),)
    return totals


@triton.jit
def load_keys_values(
    keys_and_values,
    window,
    head,
    columns,
    geometry,
    D: tl.constexpr,
    PIECES: tl.constexpr,
    WINDOW: tl.constexpr,
    CHECK: tl.constexpr,
    SHIFTED: tl.constexpr,
    PADDING: tl.constexpr,
    COSINE: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Keys, values, what the keys were multiplied by (normalised for COSINE), and their place.

    `keys_and_values` are, for keys and for values, pointer, strides and what padded tokens carry.
    """
    key, key_strides, key_padding, value, value_strides, value_padding = keys_and_values
    place = locate_tokens(columns, window, geometry, WINDOW, SHIFTED, PADDING)
    keys = load_tokens(key, key_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK)
    values = load_tokens(
        value, value_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK
    )
    if PADDING != NO_PADDING and len(key_padding) > 0:
        keys = fill_padding(keys, place[3], key_padding)
        values = fill_padding(values, place[3], value_padding)
    inverse = tl.full(columns.shape, 1.0, tl.float32)
    if COSINE:
        keys, inverse = normalize_rows(keys)
    return keys, values, inverse, place


@triton.jit
def product_factor(scale, logit_scale, head):
    """What the products of queries and keys are multiplied by."""
    if logit_scale is not None:
        scale = tl.load(logit_scale + head).to(tl.float32)
    return scale


@triton.jit
def zero_vectors(PIECES: tl.constexpr):
    vectors = ()
    for i in tl.static_range(len(PIECES)):
        vectors = vectors + (tl.zeros([tl.constexpr(PIECES[i][1])], dtype=tl.float32),)
    return vectors


@triton.jit
def zero_squares(ROW_PIECES: tl.constexpr, COLUMN_PIECES: tl.constexpr):
    """float32 zeros for all pieces of rows, by all pieces of columns."""
    squares = ()
    for m in tl.static_range(len(ROW_PIECES)):
        row = ()
        for n in tl.static_range(len(COLUMN_PIECES)):
            rows = piece_tokens(0, ROW_PIECES, m)
            columns = piece_tokens(0, COLUMN_PIECES, n)
            row = row + (tl.zeros([rows.shape[0], columns.shape[0]], dtype=tl.float32),)
        squares = squares + (row,)
    return squares


@triton.jit
def store_bias_sums(
    partial,
    sums,
    first_row,
    first_column,
    TOKENS: tl.constexpr,
    ROW_PIECES: tl.constexpr,
    COLUMN_PIECES: tl.constexpr,
):
    """Write what belongs into the (TOKENS, TOKENS) matrix at `partial`."""
    for m in tl.static_range(len(ROW_PIECES)):
        rows = piece_tokens(first_row, ROW_PIECES, m)
        for n in tl.static_range(len(COLUMN_PIECES)):
            columns = piece_tokens(first_column, COLUMN_PIECES, n)
            tl.store(
                partial + (rows * TOKENS)[:, None] + columns[None, :],
                sums[m][n],
                mask=(rows < TOKENS)[:, None] & (columns < TOKENS)[None, :],
            )


@triton.jit
def store_padding_sums(partial, sums, D: tl.constexpr, PIECES: tl.constexpr):
    for i in tl.static_range(len(PIECES)):
        columns = PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))
        tl.store(partial + columns, sums[i], mask=columns < D)


@triton.jit(do_not_specialize=_PLAIN_NUMBERS)
def window_attention_fwd_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    bias,
    logit_scale,
    pad_value,
    out,
    out_strides,
    logsumexp,
    dropout_seed,
    num_windows,
    num_heads,
    num_groups,
    num_splits,
    height,
    width,
    grid_height,
    grid_width,
    shift_height,
    shift_width,
    scale,
    mask_value,
    threshold,
    keep_scale,
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
    map_size, grid = (height, width), (grid_height, grid_width)
    geometry = (map_size, grid, (shift_height, shift_width), num_windows)
    head, group, split = program_indices(num_heads, num_groups)

    rows = group * ROWS + tl.arange(0, ROWS)

    factor = product_factor(scale, logit_scale, head) * LOG2E
    biases = load_biases(bias, head, group * ROWS, 0, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    key_padding = load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES)
    value_padding = load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES)
    keys_and_values = (key, key_strides, key_padding, value, value_strides, value_padding)

    for window in range(split, num_windows, num_splits):
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(
            query, query_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        if COSINE:
            query_tiles, _ = normalize_rows(query_tiles)
        acc = zero_tiles(ROWS, PIECES)
        row_max = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        for n in tl.static_range(len(KEY_PIECES)):
            columns = piece_tokens(0, KEY_PIECES, n)
            key_tiles, value_tiles, _, _ = load_keys_values(
                keys_and_values,
                window,
                head,
                columns,
                geometry,
                D,
                PIECES,
                WINDOW,
                CHECK_KEYS,
                SHIFTED,
                PADDING,
                COSINE,
                UNIT,
            )
            bias_tile = bias_of_tile(
                biases, 0, n, bias, head, rows, columns, window, geometry, TOKENS, KEEP_BIAS
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
                mask_value,
                WINDOW,
                SHIFTED,
                PRECISION,
            )
            weights, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, 1.0)
            if DROPOUT:
                keep = dropout_keep(
                    dropout_seed,
                    threshold,
                    window * num_heads + head,
                    rows,
                    KEY_PIECES[n][0],
                    KEY_PIECES[n][1],
                    True,
                )
                weights = tl.where(keep, weights, 0.0)
            if n > 0:
                acc = scale_tiles(acc, decay[:, None])
            acc = add_products(acc, weights, value_tiles, PRECISION)
        acc = scale_tiles(acc, ((keep_scale if DROPOUT else 1.0) / row_sum)[:, None])
        store_tokens(out, out_strides, window, head, place, geometry, acc, D, PIECES, UNIT)
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
        natural = (row_max + tl.math.log2(row_sum)) * LN2
        tl.store(logsumexp + statistics, natural, mask=rows < TOKENS)


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


@triton.jit
def weights_of_rows(scores, shift, factor):
    """exp2(scores - shift) * factor of (M, N) scores, for rows' maxima and inverse sums.

    Another kernel computed the maxima, maybe in another order, in which large scores round
    differently: what exceeds them counts as equal.
    """
    exponents = tl.minimum(scores - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.math.exp2(exponents) * factor[:, None]


@triton.jit(do_not_specialize=_PLAIN_NUMBERS)
def window_attention_bwd_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    bias,
    logit_scale,
    pad_value,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    grad_bias,
    grad_logit_scale,
    grad_padding,
    row_shift,
    row_scale,
    row_delta,
    dropout_seed,
    num_windows,
    num_heads,
    num_groups,
    num_splits,
    height,
    width,
    grid_height,
    grid_width,
    shift_height,
    shift_width,
    scale,
    mask_value,
    threshold,
    keep_scale,
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
    map_size, grid = (height, width), (grid_height, grid_width)
    geometry = (map_size, grid, (shift_height, shift_width), num_windows)
    head, group, split = program_indices(num_heads, num_groups)
    first_column = group * KEYS

    gradient_factor = product_factor(scale, logit_scale, head)
    factor = gradient_factor * LOG2E
    biases = load_biases(bias, head, 0, first_column, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    key_padding = load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES)
    value_padding = load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES)
    keys_and_values = (key, key_strides, key_padding, value, value_strides, value_padding)
    bias_sums = ()
    if grad_bias is not None:
        bias_sums = zero_squares(ROW_PIECES, KEY_PIECES)
    key_padding_sums = zero_vectors(PIECES)
    value_padding_sums = zero_vectors(PIECES)
    scale_sum = 0.0

    for window in range(split, num_windows, num_splits):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS
        key_tiles = ()
        value_tiles = ()
        key_inverses = ()
        key_places = ()
        for n in tl.static_range(len(KEY_PIECES)):
            keys, values, key_inverse, place = load_keys_values(
                keys_and_values,
                window,
                head,
                piece_tokens(first_column, KEY_PIECES, n),
                geometry,
                D,
                PIECES,
                WINDOW,
                CHECK_KEYS,
                SHIFTED,
                PADDING,
                COSINE,
                UNIT,
            )
            key_tiles = key_tiles + (keys,)
            value_tiles = value_tiles + (values,)
            key_inverses = key_inverses + (key_inverse,)
            key_places = key_places + (place,)
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
                query, query_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
            )
            grad_out_tiles = load_tokens(
                grad_out,
                grad_out_strides,
                window,
                head,
                place,
                geometry,
                D,
                PIECES,
                UNIT,
                CHECK_ROWS,
            )
            if COSINE:
                query_tiles, inverse = normalize_rows(query_tiles)

            scores = ()
            for n in tl.static_range(len(KEY_PIECES)):
                columns = piece_tokens(first_column, KEY_PIECES, n)
                bias_tile = bias_of_tile(
                    biases, m, n, bias, head, rows, columns, window, geometry, TOKENS, KEEP_BIAS
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
                        mask_value,
                        WINDOW,
                        SHIFTED,
                        PRECISION,
                    ),
                )
            if WHOLE:
                shift, inverse_sum = softmax_statistics(scores)
                delta = tl.zeros([rows.shape[0]], tl.float32)
            else:
                exists = rows < TOKENS
                shift = tl.load(row_shift + statistics + rows, mask=exists, other=float("inf"))
                inverse_sum = tl.load(row_scale + statistics + rows, mask=exists, other=0.0)
                delta = tl.load(row_delta + statistics + rows, mask=exists, other=0.0)
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
                        dropout_seed,
                        threshold,
                        window * num_heads + head,
                        rows,
                        first_column + KEY_PIECES[n][0],
                        KEY_PIECES[n][1],
                        True,
                    )
                    kept = tl.where(keep, tile * keep_scale, 0.0)
                    grad_tile = tl.where(keep, grad_tile * keep_scale, 0.0)
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
                grad_scores = grad_scores.to(query.dtype.element_ty)
                if WHOLE:
                    grad_query_tiles = add_products(
                        grad_query_tiles, grad_scores, key_tiles[n], PRECISION
                    )
                summed_grad_value_tiles = summed_grad_value_tiles + (
                    add_products(
                        grad_value_tiles[n],
                        tl.trans(kept.to(query.dtype.element_ty)),
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
                        grad_query_strides,
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
            place = key_places[n]
            if grad_key is not None:
                store_tokens(
                    grad_key,
                    grad_key_strides,
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
                    grad_value_strides,
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
                key_padding_sums = add_padding_rows(key_padding_sums, place[3], key_gradient)
                value_padding_sums = add_padding_rows(
                    value_padding_sums, place[3], grad_value_tiles[n]
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


@triton.jit(do_not_specialize=_PLAIN_NUMBERS)
def window_attention_bwd_query_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    bias,
    logit_scale,
    pad_value,
    out,
    out_strides,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    grad_logit_scale,
    row_shift,
    row_scale,
    row_delta,
    dropout_seed,
    num_windows,
    num_heads,
    num_groups,
    num_splits,
    height,
    width,
    grid_height,
    grid_width,
    shift_height,
    shift_width,
    scale,
    mask_value,
    threshold,
    keep_scale,
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
    map_size, grid = (height, width), (grid_height, grid_width)
    geometry = (map_size, grid, (shift_height, shift_width), num_windows)
    head, group, split = program_indices(num_heads, num_groups)
    rows = group * ROWS + tl.arange(0, ROWS)
    exists = rows < TOKENS

    gradient_factor = product_factor(scale, logit_scale, head)
    factor = gradient_factor * LOG2E
    biases = load_biases(bias, head, group * ROWS, 0, TOKENS, ROW_PIECES, KEY_PIECES, KEEP_BIAS)
    key_padding = load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES)
    value_padding = load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES)
    keys_and_values = (key, key_strides, key_padding, value, value_strides, value_padding)
    scale_sum = 0.0

    # What does not depend on the window is not kept in between: registers would spill on sm_90.
    for window in tl.range(split, num_windows, num_splits, disable_licm=True):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(
            query, query_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        grad_out_tiles = load_tokens(
            grad_out, grad_out_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        out_tiles = load_tokens(
            out, out_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        delta = row_inner_products(grad_out_tiles, out_tiles)
        if COSINE:
            query_tiles, inverse = normalize_rows(query_tiles)
        shift = tl.full([ROWS], float("-inf"), tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        grad_query_tiles = zero_tiles(ROWS, PIECES)
        for n in tl.static_range(len(KEY_PIECES)):
            columns = piece_tokens(0, KEY_PIECES, n)
            key_tiles, value_tiles, _, _ = load_keys_values(
                keys_and_values,
                window,
                head,
                columns,
                geometry,
                D,
                PIECES,
                WINDOW,
                CHECK_KEYS,
                SHIFTED,
                PADDING,
                COSINE,
                UNIT,
            )
            bias_tile = bias_of_tile(
                biases, 0, n, bias, head, rows, columns, window, geometry, TOKENS, KEEP_BIAS
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
                mask_value,
                WINDOW,
                SHIFTED,
                PRECISION,
            )
            weights, decay, shift, row_sum = online_softmax_step(scores, shift, row_sum, 1.0)
            grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
            if DROPOUT:
                keep = dropout_keep(
                    dropout_seed,
                    threshold,
                    window * num_heads + head,
                    rows,
                    KEY_PIECES[n][0],
                    KEY_PIECES[n][1],
                    True,
                )
                grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
            grad_scores = weights * (grad_weights - delta[:, None])
            if n > 0:
                grad_query_tiles = scale_tiles(grad_query_tiles, decay[:, None])
            grad_query_tiles = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)
        inverse_sum = 1.0 / row_sum
        grad_query_tiles = scale_tiles(grad_query_tiles, inverse_sum[:, None])
        tl.store(row_shift + statistics, shift, mask=exists)
        tl.store(row_scale + statistics, inverse_sum, mask=exists)
        tl.store(row_delta + statistics, delta, mask=exists)
        if COSINE:
            grad_query_tiles, products = normalization_gradient(
                grad_query_tiles, query_tiles, inverse
            )
            if grad_logit_scale is not None:
                scale_sum += tl.sum(products)
        if grad_query is not None:
            store_tokens(
                grad_query,
                grad_query_strides,
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


@triton.jit(do_not_specialize=_PLAIN_NUMBERS)
def window_attention_bwd_bias_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    bias,
    logit_scale,
    pad_value,
    grad_out,
    grad_out_strides,
    grad_bias,
    row_shift,
    row_scale,
    row_delta,
    dropout_seed,
    num_windows,
    num_heads,
    num_groups,
    num_splits,
    height,
    width,
    grid_height,
    grid_width,
    shift_height,
    shift_width,
    scale,
    mask_value,
    threshold,
    keep_scale,
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
    map_size, grid = (height, width), (grid_height, grid_width)
    geometry = (map_size, grid, (shift_height, shift_width), num_windows)
    head, group, split = program_indices(num_heads, num_groups)
    first_column = group % KEY_GROUPS * KEYS
    columns = first_column + tl.arange(0, KEYS)
    rows = group // KEY_GROUPS * ROWS + tl.arange(0, ROWS)
    exists = rows < TOKENS

    factor = product_factor(scale, logit_scale, head) * LOG2E
    bias_tile = load_bias(bias, head, rows, columns, TOKENS)
    key_padding = load_padding(pad_value, KEY_PART, head, num_heads, D, PIECES)
    value_padding = load_padding(pad_value, VALUE_PART, head, num_heads, D, PIECES)
    keys_and_values = (key, key_strides, key_padding, value, value_strides, value_padding)
    bias_sum = tl.zeros([ROWS, KEYS], tl.float32)

    for window in range(split, num_windows, num_splits):
        statistics = (tl.cast(window, tl.int64) * num_heads + head) * TOKENS + rows
        key_tiles, value_tiles, _, _ = load_keys_values(
            keys_and_values,
            window,
            head,
            columns,
            geometry,
            D,
            PIECES,
            WINDOW,
            CHECK_KEYS,
            SHIFTED,
            PADDING,
            logit_scale is not None,
            UNIT,
        )
        place = locate_tokens(rows, window, geometry, WINDOW, SHIFTED, PADDING)
        query_tiles = load_tokens(
            query, query_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
        )
        grad_out_tiles = load_tokens(
            grad_out, grad_out_strides, window, head, place, geometry, D, PIECES, UNIT, CHECK_ROWS
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
            mask_value,
            WINDOW,
            SHIFTED,
            PRECISION,
        )
        shift = tl.load(row_shift + statistics, mask=exists, other=float("inf"))
        row_factor = tl.load(row_scale + statistics, mask=exists, other=0.0)
        weights = weights_of_rows(scores, shift, row_factor)
        grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
        if DROPOUT:
            keep = dropout_keep(
                dropout_seed,
                threshold,
                window * num_heads + head,
                rows,
                first_column,
                KEYS,
                True,
            )
            grad_weights = tl.where(keep, grad_weights * keep_scale, 0.0)
        delta = tl.load(row_delta + statistics, mask=exists, other=0.0)
        bias_sum += weights * (grad_weights - delta[:, None])

    partial = grad_bias + tl.cast(split * num_heads + head, tl.int64) * TOKENS * TOKENS
    tl.store(
        partial + (rows * TOKENS)[:, None] + columns[None, :],
        bias_sum,
        mask=exists[:, None] & (columns < TOKENS)[None, :],
    )


def token_pieces(tokens: int, largest: int) -> tuple[tuple[int, int], ...]:
    """Cut tokens into pieces of power-of-two widths: whole ones of the largest, then at most two.

    >>> token_pieces(144, 128), token_pieces(49, 64)
    (((0, 128), (128, 16)), ((0, 64),))
    """
    whole = tuple((start, largest) for start in range(0, tokens - largest + 1, largest))
    rest = tokens - largest * len(whole)
    last = split_into_pieces(rest, largest, most=2) if rest else ()
    return whole + tuple((largest * len(whole) + start, width) for start, width in last)


def with_optional_strides(unit: int, *tensors: torch.Tensor | None) -> list:
    """As `with_strides`; None stands for both of a tensor that is not there."""
    pairs = ((None, None) if x is None else with_strides(unit, x) for x in tensors)
    return [arg for pair in pairs for arg in pair]


class Problem(NamedTuple):
    """What the kernels of one call have in common."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: torch.Tensor | None
    pad_value: torch.Tensor | None
    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    wrap_padded: bool
    scale: float
    mask_value: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @property
    def dim(self) -> int:
        return self.query.shape[3] // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Windows along the height and the width of the map."""
        height, width = self.query.shape[1:3]
        return triton.cdiv(height, self.window[0]), triton.cdiv(width, self.window[1])

    @property
    def num_windows(self) -> int:
        return self.query.shape[0] * self.grid[0] * self.grid[1]

    @property
    def padding(self) -> int:
        sizes = zip(self.query.shape[1:3], self.window, strict=True)
        if all(size % window == 0 for size, window in sizes):
            return NO_PADDING.value
        return (WRAP_PADDED if self.wrap_padded else WRAP_UNPADDED).value

    @property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """The tiles that a head's channels are split into."""
        return head_pieces(self.dim, precision_of(self.query), largest=128)

    def added_tensors(self) -> tuple[torch.Tensor | None, ...]:
        """What is added to the inputs, as the kernels take it."""
        return tuple(
            None if tensor is None else tensor.contiguous()
            for tensor in (self.bias, self.logit_scale, self.pad_value)
        )

    def numbers(self, groups: int, splits: int) -> tuple:
        """Trailing arguments of every kernel."""
        return (
            self.dropout_seed,
            self.num_windows,
            self.num_heads,
            groups,
            splits,
            *self.query.shape[1:3],
            *self.grid,
            *self.shift,
            self.scale,
            max(-LARGEST_MASK, min(self.mask_value, LARGEST_MASK)),
            dropout_threshold(self.dropout_p),
            dropout_scale(self.dropout_p),
        )

    def constants(self, unit: int) -> dict:
        return {
            "D": self.dim,
            "PIECES": self.pieces,
            "WINDOW": self.window,
            "SHIFTED": any(self.shift),
            "PADDING": self.padding,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": input_precision(self.query),
            "UNIT": unit,
        }

    def checks(self, rows: int, keys: int) -> dict:
        """Whether tiles may hold tokens beyond the window or off the map.

        That is for programs that take so many queries and keys of a window.
        """
        padded = self.padding != NO_PADDING.value
        return {
            "CHECK_ROWS": padded or self.tokens % rows != 0,
            "CHECK_KEYS": padded or self.tokens % keys != 0,
        }

    def tile_constants(self, launch: Launch, rows: int, keys: int, most_registers: int) -> dict:
        """`checks`, and whether a program has the registers to keep its part of the bias."""
        keep_bias = rows * keys <= most_registers * 32 * launch.num_warps
        return {**self.checks(rows, keys), "KEEP_BIAS": keep_bias}

    def splits(self, launch: Launch, groups: int) -> int:
        """Programs that share the windows of a head."""
        multiprocessors = configs.multiprocessors(self.query.device)
        programs = multiprocessors * WARPS_PER_MULTIPROCESSOR // launch.num_warps
        return max(1, min(self.num_windows, triton.cdiv(programs, self.num_heads * groups)))

    def shape_class(self, kernel: str) -> configs.ShapeClass:
        padded = self.padding != NO_PADDING.value
        plain = self.logit_scale is None and self.dropout_p == 0.0 and not padded
        columns = covered_columns(self.pieces)
        return configs.ShapeClass(kernel, precision_of(self.query), columns, self.tokens, plain)

    def find_launch(self, kernel: str) -> Launch | None:
        return configs.lookup(self.shape_class(kernel), self.query.device)

    def launch(self, kernel: str, run: Callable[[Launch], None]) -> None:
        run_with_launch(self.shape_class(kernel), self.query, run)


def make_problem(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, *rest
) -> Problem:
    """From an operator's arguments; three tensors packed into one become views of it."""
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=3)
    *tensors, heads, height, width, shift_height, shift_width = rest[:8]
    window, shift = (height, width), (shift_height, shift_width)
    return Problem(query, key, value, *tensors, heads, window, shift, *rest[8:])


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
    unit = stride_unit(*problem[:3], out)

    def run(launch: Launch) -> None:
        rows = min(launch.block_m, max(16, triton.next_power_of_2(problem.tokens)))
        key_pieces = token_pieces(problem.tokens, launch.block_n)
        groups = triton.cdiv(problem.tokens, rows)
        splits = problem.splits(launch, groups)
        run_kernel(
            window_attention_fwd_kernel,
            num_heads * groups * splits,
            *with_strides(unit, *problem[:3]),
            *problem.added_tensors(),
            *with_strides(unit, out),
            logsumexp,
            *problem.numbers(groups, splits),
            **problem.constants(unit),
            **problem.tile_constants(
                launch, rows, covered_columns(key_pieces), MOST_BIAS_REGISTERS
            ),
            ROWS=rows,
            KEY_PIECES=key_pieces,
            launch=launch,
        )

    if problem.num_windows > 0:
        problem.launch("window_attention_fwd", run)
    return out, logsumexp


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    pad_value: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
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
    qkv_grad: bool,
    bias_grad: bool,
    logit_scale_grad: bool,
    pad_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, bias, logit_scale and pad_value.

    Takes what `forward` took and gave, and grad_out (B, H, W, C) of any strides. Each gradient is
    contiguous, in the shape and dtype of what it belongs to, and of shape (0,) where it is not
    asked for or there is nothing that it would belong to.
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
    grad_query, grad_key, grad_value = (
        query.new_empty(x.shape if qkv_grad and x is not None else 0) for x in (query, key, value)
    )
    map_gradients: tuple[torch.Tensor | None, ...] = (None, None, None)
    if qkv_grad:
        packed = key is None or value is None
        map_gradients = grad_query.chunk(3, 3) if packed else (grad_query, grad_key, grad_value)
    wanted = (bias_grad, logit_scale_grad, pad_grad)
    added_gradients = tuple(
        None if tensor is None or not is_wanted else tensor.new_zeros(tensor.shape)
        for tensor, is_wanted in zip((bias, logit_scale, pad_value), wanted, strict=True)
    )
    if problem.num_windows > 0:
        gradients = Gradients(*map_gradients, *added_gradients)
        grad_out = grad_out.to(query.dtype)
        statistics = None
        if problem.find_launch(WHOLE_KERNEL) is None:
            statistics = query_gradient(problem, out, grad_out, gradients)
            if gradients.bias is not None:
                bias_gradient(problem, statistics, grad_out, gradients.bias)
        key_value_gradients(problem, statistics, grad_out, gradients)
    return (
        grad_query,
        grad_key,
        grad_value,
        *(
            (query if tensor is None else tensor).new_empty(0) if gradient is None else gradient
            for tensor, gradient in zip(
                (bias, logit_scale, pad_value), added_gradients, strict=True
            )
        ),
    )


class Gradients(NamedTuple):
    """Where gradients go; None where one is not asked for. The map's have any strides."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    logit_scale: torch.Tensor | None
    pad_value: torch.Tensor | None


def partial_sums(like: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """What the programs of a kernel write; nothing where the sum is not asked for."""
    return None if like is None else like.new_empty(shape, dtype=torch.float32)


def add_up(partials: torch.Tensor | None, result: torch.Tensor | None) -> None:
    """Sum over the first dimension of the partial sums, in order, into the result."""
    if partials is not None:
        result.copy_(partials.sum(0).view(result.shape))


class RowStatistics(NamedTuple):
    """What the gradient of keys is computed from, float32 (windows, heads, M).

    P = exp2(scores - shift) * scale and dS = P * (dP - delta).
    """

    shift: torch.Tensor
    scale: torch.Tensor
    delta: torch.Tensor


def query_gradient(
    problem: Problem,
    out: torch.Tensor,
    grad_out: torch.Tensor,
    gradients: Gradients,
) -> RowStatistics:
    """Gradients of queries and logit scale, and on the way the statistics of all rows."""
    rows = (problem.num_windows, problem.num_heads, problem.tokens)
    statistics = RowStatistics(*(out.new_empty(rows, dtype=torch.float32) for _ in range(3)))
    grad_query = problem.query if gradients.query is None else gradients.query
    unit = stride_unit(*problem[:3], out, grad_out, grad_query)

    def run(launch: Launch) -> None:
        key_pieces = token_pieces(problem.tokens, launch.block_n)
        groups = triton.cdiv(problem.tokens, launch.block_m)
        splits = problem.splits(launch, groups)
        scale_sums = partial_sums(gradients.logit_scale, splits * groups, problem.num_heads)
        run_kernel(
            window_attention_bwd_query_kernel,
            problem.num_heads * groups * splits,
            *with_strides(unit, *problem[:3]),
            *problem.added_tensors(),
            *with_strides(unit, out, grad_out),
            *with_optional_strides(unit, gradients.query),
            scale_sums,
            *statistics,
            *problem.numbers(groups, splits),
            **problem.constants(unit),
            **problem.tile_constants(
                launch, launch.block_m, covered_columns(key_pieces), MOST_BIAS_REGISTERS
            ),
            ROWS=launch.block_m,
            KEY_PIECES=key_pieces,
            launch=launch,
        )
        add_up(scale_sums, gradients.logit_scale)

    problem.launch("window_attention_bwd_query", run)
    return statistics


def bias_gradient(
    problem: Problem, statistics: RowStatistics, grad_out: torch.Tensor, grad_bias: torch.Tensor
) -> None:
    tokens, heads = problem.tokens, problem.num_heads
    unit = stride_unit(*problem[:3], grad_out)

    def run(launch: Launch) -> None:
        groups = triton.cdiv(tokens, launch.block_m) * triton.cdiv(tokens, launch.block_n)
        splits = problem.splits(launch, groups)
        bias_sums = partial_sums(grad_bias, splits, heads, tokens, tokens)
        run_kernel(
            window_attention_bwd_bias_kernel,
            heads * groups * splits,
            *with_strides(unit, *problem[:3]),
            *problem.added_tensors(),
            *with_strides(unit, grad_out),
            bias_sums,
            *statistics,
            *problem.numbers(groups, splits),
            **problem.constants(unit),
            **problem.checks(launch.block_m, launch.block_n),
            ROWS=launch.block_m,
            KEYS=launch.block_n,
            launch=launch,
        )
        add_up(bias_sums, grad_bias)

    problem.launch("window_attention_bwd_bias", run)


def key_value_gradients(
    problem: Problem,
    statistics: RowStatistics | None,
    grad_out: torch.Tensor,
    gradients: Gradients,
) -> None:
    """Gradients of keys, values and padding; without statistics, of everything."""
    whole = statistics is None
    tokens, heads = problem.tokens, problem.num_heads
    maps = [problem.query if x is None else x for x in gradients[:3]]
    unit = stride_unit(*problem[:3], grad_out, *maps)

    def run(launch: Launch) -> None:
        row_pieces = token_pieces(tokens, launch.block_m)
        key_pieces = token_pieces(tokens, launch.block_n) if whole else ((0, launch.block_n),)
        rows, keys = covered_columns(row_pieces), covered_columns(key_pieces)
        groups = triton.cdiv(tokens, keys)
        splits = problem.splits(launch, groups)
        bias_sums = scale_sums = padding_sums = None
        if whole:
            bias_sums = partial_sums(gradients.bias, splits, heads, tokens, tokens)
            scale_sums = partial_sums(gradients.logit_scale, splits, heads)
        if problem.padding != NO_PADDING.value:
            padding_sums = partial_sums(
                gradients.pad_value, splits * groups, 2 * heads * problem.dim
            )
        run_kernel(
            window_attention_bwd_kernel,
            heads * groups * splits,
            *with_strides(unit, *problem[:3]),
            *problem.added_tensors(),
            *with_strides(unit, grad_out),
            *with_optional_strides(unit, *gradients[:3]),
            bias_sums,
            scale_sums,
            padding_sums,
            *(statistics or (None, None, None)),
            *problem.numbers(groups, splits),
            **problem.constants(unit),
            **problem.tile_constants(launch, rows, keys, MOST_BIAS_REGISTERS_FOR_KEYS),
            KEYS=keys,
            ROW_PIECES=row_pieces,
            KEY_PIECES=key_pieces,
            WHOLE=whole,
            launch=launch,
        )
        add_up(bias_sums, gradients.bias)
        add_up(scale_sums, gradients.logit_scale)
        if gradients.pad_value is not None:  # the query of a padded token has no gradient
            add_up(padding_sums, gradients.pad_value[heads * problem.dim :])

    problem.launch(WHOLE_KERNEL if whole else "window_attention_bwd_key_value", run)
