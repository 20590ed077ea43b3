"""Scores of queries and keys of a window, and what is added to them, on the device."""

import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E, inner_products
from vlmfast.kernels.window_attention.cosines import normalize_rows
from vlmfast.kernels.window_attention.tokens import (
    NO_PADDING,
    holds_regions,
    load_tokens,
    locate_tokens,
    not_hoisted,
    piece_tokens,
    region_of_tokens,
)

# The numbers whose values no kernel is compiled for.
VARYING = ["geometry", "dropout", "num_heads", "num_groups", "num_splits"]

# What is finite stays finite with the factor log2(e): scores must not be differences of infinities
# where a whole row has the lowest number, or the largest, or a query beyond its window sees no
# region.
LARGEST_BIAS = tl.constexpr(1e38)

KEY_PART, VALUE_PART = tl.constexpr(1), tl.constexpr(2)  # of pad_value; the first is the query's


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
def product_factor(scale, logit_scale, head):
    """What the products of queries and keys are multiplied by."""
    if logit_scale is not None:
        scale = tl.load(logit_scale + head).to(tl.float32)
    return scale


@triton.jit
def load_keys_values(
    key,
    value,
    padding,
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

    `padding` is what padded tokens carry as keys and as values.
    """
    place = locate_tokens(columns, window, geometry, WINDOW, SHIFTED, PADDING)
    keys = load_tokens(key, window, head, place, geometry, D, PIECES, UNIT, CHECK)
    values = load_tokens(value, window, head, place, geometry, D, PIECES, UNIT, CHECK)
    if PADDING != NO_PADDING and len(padding[0]) > 0:
        keys = fill_padding(keys, place.is_padding, padding[0])
        values = fill_padding(values, place.is_padding, padding[1])
    inverse = tl.full(columns.shape, 1.0, tl.float32)
    if COSINE:
        keys, inverse = normalize_rows(keys)
    return keys, values, inverse, place


@triton.jit
def weights_of_rows(scores, shift, factor):
    """exp2(scores - shift) * factor of (M, N) scores, for rows' maxima and inverse sums.

    Another kernel computed the maxima, maybe in another order, in which large scores round
    differently: what exceeds them counts as equal.
    """
    exponents = tl.minimum(scores - shift[:, None], 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.math.exp2(exponents) * factor[:, None]
