"""Pieces that every kernel of this folder is built from, on the device.

A head dimension such as 80 is not padded to the next power of two: it is held as a tuple of tiles
with power-of-two widths, 64 + 16, the last of them masked where it reaches past the end. PIECES
below is always such a tuple of (first column, width) pairs, and a "split tile" the matching tuple
of (rows, width) tiles.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


class Strided(NamedTuple):
    """A tensor in a kernel: where it begins, and its strides (batch, head, row, column).

    All strides but the last count units of UNIT elements, which the launcher sets to 8 where it
    can: Triton sees by itself only that a number is divisible by 16, and a row of 72 half-precision
    elements would otherwise be loaded two bytes at a time.
    """

    pointer: torch.Tensor
    strides: tuple[int, ...]


class Dropout(NamedTuple):
    """What dropout is drawn by: see `dropout_keep`. `scale` is that of the elements kept."""

    seed: torch.Tensor | None
    threshold: int
    scale: float


@triton.jit
def program_indices(inner, middle):
    """Index along each axis of a grid of programs, (any number, middle, inner): the last first."""
    program = tl.program_id(0)
    return program % inner, program // inner % middle, program // inner // middle


@triton.jit
def at_head(tensor, batch, head, row, UNIT: tl.constexpr):
    """The tensor from element (batch, head, row, 0) on; its address in 64 bits, for what exceeds
    2**31 elements."""
    pointer = tensor.pointer + tl.cast(batch, tl.int64) * tensor.strides[0] * UNIT
    pointer += tl.cast(head, tl.int64) * tensor.strides[1] * UNIT
    pointer += tl.cast(row, tl.int64) * tensor.strides[2] * UNIT
    return Strided(pointer, tensor.strides)


@triton.jit
def segment_bounds(cu_seqlens, segment, total):
    """First row and length of a packed segment; wrong cumulative lengths never leave the tensor."""
    first = tl.minimum(tl.maximum(tl.load(cu_seqlens + segment), 0), total)
    end = tl.minimum(tl.maximum(tl.load(cu_seqlens + segment + 1), first), total)
    return first, end - first


@triton.jit
def load_pieces(
    pointers,
    column_stride,
    inside,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Split tile (M, SIZE) of rows beginning at `pointers` (M, 1); those not `inside` read as 0."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        columns = PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))
        piece_pointers = pointers + columns[None, :].to(tl.int64) * column_stride
        if PIECES[i][0] + PIECES[i][1] > SIZE:
            mask = (columns < SIZE)[None, :]
            if CHECK_ROWS:
                mask = mask & inside[:, None]
            tile = tl.load(piece_pointers, mask=mask, other=0.0)
        elif CHECK_ROWS:
            tile = tl.load(piece_pointers, mask=inside[:, None], other=0.0)
        else:
            tile = tl.load(piece_pointers)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def store_pieces(pointers, column_stride, inside, tiles, SIZE: tl.constexpr, PIECES: tl.constexpr):
    """Write a split tile to the rows that begin at `pointers` (M, 1) and are `inside`."""
    for i in tl.static_range(len(PIECES)):
        columns = PIECES[i][0] + tl.arange(0, tl.constexpr(PIECES[i][1]))
        mask = inside[:, None]
        if PIECES[i][0] + PIECES[i][1] > SIZE:
            mask = mask & (columns < SIZE)[None, :]
        piece_pointers = pointers + columns[None, :].to(tl.int64) * column_stride
        tl.store(piece_pointers, tiles[i].to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def load_rows(
    tensor,
    rows,
    num_rows,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    CHECK_ROWS: tl.constexpr = True,
):
    """Split tile of rows of a tensor (`at_head`), (len(rows), SIZE); from num_rows on, 0."""
    pointers = tensor.pointer + rows[:, None].to(tl.int64) * tensor.strides[2] * UNIT
    return load_pieces(pointers, tensor.strides[3], rows < num_rows, SIZE, PIECES, CHECK_ROWS)


@triton.jit
def store_rows(
    tensor,
    rows,
    num_rows,
    tiles,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write a split tile to rows of a tensor (`at_head`), but those from num_rows on."""
    pointers = tensor.pointer + rows[:, None].to(tl.int64) * tensor.strides[2] * UNIT
    store_pieces(pointers, tensor.strides[3], rows < num_rows, tiles, SIZE, PIECES)


@triton.jit
def zero_tiles(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """Split tile of float32 zeros, (ROWS, columns of PIECES)."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros([ROWS, tl.constexpr(PIECES[i][1])], dtype=tl.float32),)
    return tiles


@triton.jit
def scale_tiles(tiles, factor):
    """Multiply a split tile by a scalar or by a column of factors, one for each row."""
    scaled = ()
    for i in tl.static_range(len(tiles)):
        scaled = scaled + (tiles[i] * factor,)
    return scaled


@triton.jit
def inner_products(left, right, PRECISION: tl.constexpr):
    """left @ right^T of two split tiles, (M, D) and (N, D), as one (M, N) tile."""
    product = tl.dot(left[0], tl.trans(right[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(left)):
        product = tl.dot(left[i], tl.trans(right[i]), product, input_precision=PRECISION)
    return product


@triton.jit
def add_products(tiles, weights, right, PRECISION: tl.constexpr):
    """tiles + weights @ right, with weights (M, N), and split tiles (M, D) and (N, D)."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        product = tl.dot(weights.to(right[i].dtype), right[i], tiles[i], input_precision=PRECISION)
        sums = sums + (product,)
    return sums


@triton.jit
def zero_transposed_tiles(ROWS: tl.constexpr, PIECES: tl.constexpr):
    """As `zero_tiles`, each tile transposed: (width, ROWS)."""
    tiles = ()
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (tl.zeros([tl.constexpr(PIECES[i][1]), ROWS], dtype=tl.float32),)
    return tiles


@triton.jit
def add_transposed_products(tiles, left, weights, PRECISION: tl.constexpr):
    """tiles + left^T @ weights, with weights (N, M), left (N, D) and transposed tiles (D, M)."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        product = tl.dot(
            tl.trans(left[i]), weights.to(left[i].dtype), tiles[i], input_precision=PRECISION
        )
        sums = sums + (product,)
    return sums


@triton.jit
def transpose_tiles(tiles):
    transposed = ()
    for i in tl.static_range(len(tiles)):
        transposed = transposed + (tl.trans(tiles[i]),)
    return transposed


@triton.jit
def row_inner_products(left, right):
    """Sum over the columns of left * right, two split tiles (M, D), in float32: (M,)."""
    total = tl.sum(left[0].to(tl.float32) * right[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(left)):
        total += tl.sum(left[i].to(tl.float32) * right[i].to(tl.float32), 1)
    return total


@triton.jit
def shifted_exp2(scores, shift, factor):
    """exp2(scores * factor - shift), at most 1: the shift is a log-sum-exp times log2(e).

    Where scores are huge, it has lost more to rounding than exp2 can take.
    """
    exponents = scores * factor - shift
    return tl.math.exp2(tl.minimum(exponents, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def online_softmax_step(scores, row_max, row_sum, factor):
    """One block of keys of softmax(scores * factor / log2(e)), over axis 1; factor > 0.

    Gives the block's weights (M, N), the decay (M,) of what was summed before, and the new row_max
    and row_sum. A row that has seen only -inf keeps maximum -inf and sum 0.

    The maximum is subtracted first: from the exact products of a fused multiply-add, a rounded
    maximum is off by more than exp2 can take where scores are huge.
    """
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.math.exp2((scores - finite_max[:, None]) * factor)
    decay = tl.math.exp2((row_max - finite_max) * factor)
    return weights, decay, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def dropout_keep(
    dropout,
    stream,
    rows,
    first_column,
    COLUMNS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Which elements of a (len(rows), COLUMNS) tile dropout keeps, as int1.

    Element (row, column) is kept iff word column % 4 of Philox 4x32-10 reaches the threshold; the
    counter is (column // 4, row, stream, 0), the key the seed's low and high half. One call gives
    four neighbours, which is used where ALIGNED: first_column is then a multiple of 4.
    """
    seed = tl.load(dropout.seed)
    threshold = dropout.threshold.to(tl.uint32, bitcast=True)
    if ALIGNED:
        quads = first_column // 4 + tl.arange(0, COLUMNS // 4)
    else:
        columns = first_column + tl.arange(0, COLUMNS)
        quads = columns // 4
    counter = tl.broadcast_to(quads[None, :], (rows.shape[0], quads.shape[0]))
    zero = tl.zeros_like(counter)
    word0, word1, word2, word3 = tl.philox(seed, counter, zero + rows[:, None], zero + stream, zero)
    if ALIGNED:
        even = tl.interleave((word0 >= threshold).to(tl.int8), (word2 >= threshold).to(tl.int8))
        odd = tl.interleave((word1 >= threshold).to(tl.int8), (word3 >= threshold).to(tl.int8))
        keep = tl.interleave(even, odd) != 0
    else:
        place = (columns % 4)[None, :]
        low = tl.where(place == 0, word0, word1)
        high = tl.where(place == 2, word2, word3)
        keep = tl.where(place < 2, low, high) >= threshold
    return keep
