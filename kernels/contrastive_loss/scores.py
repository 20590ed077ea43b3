"""Tiles of contrastive logits, on the device: what forward and backward share."""

import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E

# The numbers whose values no kernel is compiled for.
PLAIN_NUMBERS = ["num_rows", "num_columns", "first_column", "tiles_per_program"]


@triton.jit
def similarities(
    rows,
    columns,
    row_index,
    column_index,
    num_rows,
    num_columns,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the largest similarities over the queries, and which query each is of.

    DIM is a multiple of BLOCK_K, and features lie side by side: see `in_whole_blocks`.
    """
    # Beyond the end the last row is read again; whoever takes the tile leaves it out.
    row_index = tl.minimum(row_index, num_rows - 1)
    column_index = tl.minimum(column_index, num_columns - 1)
    row_pointer = rows.pointer + row_index[:, None].to(tl.int64) * rows.strides[0]
    column_pointer = columns.pointer + column_index[None, :].to(tl.int64) * columns.strides[0]
    largest = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    query_index = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for query in range(QUERIES):
        product = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(0, DIM, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(row_pointer + query * rows.strides[1] + k[None, :])
            y = tl.load(column_pointer + k[:, None])
            product = tl.dot(x, y, product, input_precision=PRECISION)
        if QUERIES == 1:
            largest = product
        else:
            # The first of equals, and NaN once there is one.
            better = (
                (query == 0) | (product > largest) | ((product != product) & (largest == largest))
            )
            query_index = tl.where(better, query, query_index)
            largest = tl.where(better, product, largest)
    return largest, query_index


@triton.jit
def exponential(x):
    return tl.math.exp2(x * LOG2E)


@triton.jit
def finite(most):
    """A maximum as what may be subtracted: that of nothing must not turn -inf into NaN."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], also where x is tiny: the rounding of 1 + x cancels."""
    shifted = 1.0 + x
    exact = shifted == 1.0
    return tl.where(exact, x, tl.log(shifted) * (x / tl.where(exact, 1.0, shifted - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exponential(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + exponential(-x))


@triton.jit
def tile_masks(row_index, column_index, num_rows, num_columns, first_column):
    """Which elements of a tile exist, and which are pairs."""
    inside = (row_index < num_rows)[:, None] & (column_index < num_columns)[None, :]
    return inside, inside & (column_index[None, :] == row_index[:, None] + first_column)
