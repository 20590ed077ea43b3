"""Sums over windows: each program writes its own, and these are added in order."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.window_attention.tokens import piece_tokens


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
def add_padding_rows(sums, is_padding, gradients):
    """sums (width,) + the gradients of the rows that are padding, piece by piece."""
    totals = ()
    for i in tl.static_range(len(sums)):
        rows = tl.where(is_padding[:, None], gradients[i], 0.0)
        totals = totals + (sums[i] + tl.sum(rows, 0),)
    return totals


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


def partial_sums(like: torch.Tensor | None, *shape: int) -> torch.Tensor | None:
    """What the programs of a kernel write; nothing where the sum is not asked for."""
    return None if like is None else like.new_empty(shape, dtype=torch.float32)


def add_up(partials: torch.Tensor | None, result: torch.Tensor | None) -> None:
    """Sum over the first dimension of the partial sums, in order, into the result."""
    if partials is not None:
        result.copy_(partials.sum(0).view(result.shape))
