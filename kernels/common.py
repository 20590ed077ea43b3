"""Pieces that every kernel of this folder is built from.

A head dimension such as 80 is not padded to the next power of two: it is held as a tuple of tiles
with power-of-two widths, 64 + 16, the last of them masked where it reaches past the end. `pieces`
below is always such a tuple of (first column, width) pairs, and a "split tile" the matching tuple
of (rows, width) tiles.

Strides travel as (batch, head, row, column). The first three count units of `UNIT` elements, which
the launcher sets to 8 where it can: Triton sees by itself only that a number is divisible by 16,
and a row of 72 half-precision elements would otherwise be loaded two bytes at a time.
"""

import contextlib
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels import configs

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# Kinds of attention mask, as the kernels' MASK parameter.
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)

LONGEST = 1 << 29  # rows or windows: their numbers, and those of a block beyond, fit 32 bits

SMALLEST_PIECE = 16  # tl.dot takes nothing narrower
MOST_PIECES = 4


def split_into_pieces(
    size: int, largest: int = 256, most: int = MOST_PIECES
) -> tuple[tuple[int, int], ...]:
    """Cover `size` columns by at most `most` power-of-two widths, wasting as little as possible.

    >>> split_into_pieces(88)
    ((0, 64), (64, 32))
    """
    widths = [SMALLEST_PIECE << i for i in range(8) if SMALLEST_PIECE << i <= largest]
    choices = (
        choice
        for count in range(1, most + 1)
        for choice in itertools.combinations_with_replacement(reversed(widths), count)
        if sum(choice) >= size
    )
    best = min(choices, key=lambda choice: (sum(choice), len(choice)), default=None)
    if best is None:
        raise ValueError(f"size: expected at most {most * largest}, got {size}")
    starts = itertools.accumulate(best[:-1], initial=0)
    return tuple(zip(starts, best, strict=True))


def covered_columns(pieces: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in pieces)


def dense_like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised (B, H, L, D) tensor in the dimension order of `tensor`, without gaps."""
    if tensor.stride(1) < tensor.stride(2):
        batch, heads, rows, columns = shape
        return tensor.new_empty(batch, rows, heads, columns).transpose(1, 2)
    return tensor.new_empty(shape)


def stride_unit(*tensors: torch.Tensor) -> int:
    """8 where every stride but the last dimension's is a multiple of 8 elements, else 1."""
    strides = (s for tensor in tensors for s in kernel_strides(tensor, 1)[:-1])
    return 8 if all(s % 8 == 0 for s in strides) else 1


def kernel_strides(tensor: torch.Tensor, unit: int) -> tuple[int, ...]:
    """Strides as kernels take them; a dimension of size 1 has stride 0, whatever torch says."""
    strides = [s if n > 1 else 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return (*(s // unit for s in strides[:-1]), strides[-1])


def with_strides(unit: int, *tensors: torch.Tensor) -> list:
    """Each tensor followed by its strides: the arguments of a kernel."""
    return [arg for tensor in tensors for arg in (tensor, kernel_strides(tensor, unit))]


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Makes the tensor's GPU the current one: Triton launches on whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def precision_of(tensor: torch.Tensor) -> str:
    """ "half", or how products of float32 are rounded, as torch's own are: "tf32" or "ieee"."""
    if tensor.dtype != torch.float32:
        return "half"
    # allow_tf32 reads the same setting, but raises once the newer name has been written to.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def input_precision(tensor: torch.Tensor) -> str:
    """What `tl.dot` is told; it does not ask where the inputs are in half precision."""
    return "tf32" if precision_of(tensor) == "tf32" else "ieee"


def head_pieces(size: int, precision: str, largest: int = 256) -> tuple[tuple[int, int], ...]:
    """The tiles that a head dimension is split into.

    Without tensor cores a product is unrolled along its inner dimension; wider tiles than 64 would
    then spill.
    """
    return split_into_pieces(size, largest=64 if precision == "ieee" else largest)


def with_positive_scale(problem: Any) -> tuple[Any, float]:
    """A family's problem with scale > 0, and the factor that the queries were multiplied by.

    Kernels take the maximum of scores before they scale them, which wants a positive scale. Any
    other (nobody uses one) costs a copy of the queries.
    """
    if not problem.scale <= 0.0:
        return problem, 1.0
    factor = -1.0 if problem.scale < 0.0 else 0.0
    scale = -problem.scale if problem.scale < 0.0 else 1.0
    return problem._replace(query=problem.query * factor, scale=scale), factor


class Saved(NamedTuple):
    """What the backward takes besides the problem; statistics are contiguous float32."""

    out: torch.Tensor
    logsumexp: torch.Tensor
    grad_out: torch.Tensor
    grad_logsumexp: torch.Tensor | None


def saved_for_backward(
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
) -> Saved:
    """From an operator's arguments."""
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(torch.float32).contiguous()
    return Saved(out, logsumexp.contiguous(), grad_out.to(out.dtype), grad_logsumexp)


def dropout_threshold(dropout_p: float) -> int:
    """Elements whose 32 random bits fall below this are dropped; as the int32 of the same bits."""
    threshold = min(int(dropout_p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def dropout_scale(dropout_p: float) -> float:
    """What the kept elements are multiplied by; nothing is kept at p = 1."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0


def run_with_launch(
    shape: configs.ShapeClass, tensor: torch.Tensor, run: Callable[[configs.Launch], None]
) -> None:
    """Call `run` with the launch that fits the shape on the tensor's device."""
    with device_guard(tensor):
        configs.launch(shape, tensor.device, run)


def check_lengths(**lengths: int) -> None:
    """Raises ValueError for what kernels cannot count in 32 bits."""
    for name, length in lengths.items():
        if length > LONGEST:
            raise ValueError(f"{name}: expected at most {LONGEST}, got {length}")


def run_kernel(
    kernel: triton.JITFunction, programs: int, *args, launch: configs.Launch, **constants
) -> None:
    if programs >= 1 << 31:
        raise ValueError(
            f"batch, heads, lengths: expected to make fewer than 2**31 blocks, got {programs}"
        )
    if programs > 0:
        kernel[(programs,)](
            *args, **constants, num_warps=launch.num_warps, num_stages=launch.num_stages
        )


@triton.jit
def program_indices(inner, middle):
    """Index along each axis of a grid of programs, (any number, middle, inner): the last first."""
    program = tl.program_id(0)
    return program % inner, program // inner % middle, program // inner // middle


@triton.jit
def head_pointer(pointer, strides, batch, head, row, UNIT: tl.constexpr):
    """Address of element (batch, head, row, 0); in 64 bits, since a tensor may exceed 2**31."""
    pointer += tl.cast(batch, tl.int64) * strides[0] * UNIT
    pointer += tl.cast(head, tl.int64) * strides[1] * UNIT
    return pointer + tl.cast(row, tl.int64) * strides[2] * UNIT


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
    pointer,
    strides,
    rows,
    num_rows,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    CHECK_ROWS: tl.constexpr,
):
    """Split tile of the given rows, (len(rows), SIZE); rows from num_rows on read as 0."""
    pointers = pointer + rows[:, None].to(tl.int64) * strides[2] * UNIT
    return load_pieces(pointers, strides[3], rows < num_rows, SIZE, PIECES, CHECK_ROWS)


@triton.jit
def store_rows(
    pointer,
    strides,
    rows,
    num_rows,
    tiles,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """Write a split tile to the given rows, but those from num_rows on."""
    pointers = pointer + rows[:, None].to(tl.int64) * strides[2] * UNIT
    store_pieces(pointers, strides[3], rows < num_rows, tiles, SIZE, PIECES)


@triton.jit
def load_head_rows(
    pointer,
    strides,
    batch,
    head,
    first_row,
    rows,
    num_rows,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`load_rows` of a head, its rows counted from first_row, of a (B, H, rows, SIZE) tensor."""
    pointer = head_pointer(pointer, strides, batch, head, first_row, UNIT)
    return load_rows(pointer, strides, rows, num_rows, SIZE, PIECES, UNIT, True)


@triton.jit
def store_head_rows(
    pointer,
    strides,
    batch,
    head,
    first_row,
    rows,
    num_rows,
    tiles,
    SIZE: tl.constexpr,
    PIECES: tl.constexpr,
    UNIT: tl.constexpr,
):
    """`store_rows` to a head, its rows counted from first_row, of a (B, H, rows, SIZE) tensor."""
    pointer = head_pointer(pointer, strides, batch, head, first_row, UNIT)
    store_rows(pointer, strides, rows, num_rows, tiles, SIZE, PIECES, UNIT)


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
def mask_scores(
    scores,
    rows,
    columns,
    num_rows,
    num_columns,
    causal_offset,
    attn_mask,
    mask_strides,
    scale,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
):
    """Apply every mask to the unscaled products `scores`; what is hidden becomes -inf.

    `rows` and `columns` are indices of queries and keys, shaped to broadcast to the tile: (M, 1)
    and (1, N), or (1, M) and (N, 1) where the tile is transposed. A float mask is added to the
    scaled scores, so the result is scaled with one and unscaled without.
    """
    if MASK != NO_MASK:
        pointers = attn_mask + columns.to(tl.int64) * mask_strides[3]
        inside = columns < num_columns
        if MASK_HAS_ROWS:
            pointers += rows.to(tl.int64) * mask_strides[2]
            inside = inside & (rows < num_rows)
        if MASK == FLOAT_MASK:
            scores = scores * scale + tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        else:
            keep = tl.load(pointers, mask=inside, other=0) != 0
            scores = tl.where(keep, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(columns <= rows + causal_offset, scores, float("-inf"))
    if CHECK_COLUMNS:
        scores = tl.where(columns < num_columns, scores, float("-inf"))
    return scores


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
    dropout_seed,
    threshold,
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
    seed = tl.load(dropout_seed)
    threshold = threshold.to(tl.uint32, bitcast=True)
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
