"""What the backward knows of each query, and what it makes of a tile of scores."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import LOG2E, dropout_keep, row_inner_products, shifted_exp2


class Statistics(NamedTuple):
    """What the backward knows of all queries, float32 (B, Hq, L).

    The weights come from logsumexp, or from row_max and log_sum where there is a float mask.
    """

    logsumexp: torch.Tensor
    row_max: torch.Tensor | None
    log_sum: torch.Tensor | None
    delta: torch.Tensor


class RowStatistics(NamedTuple):
    """What the backward knows of a block of queries, (M,).

    The shift is the log-sum-exp of their scores, times log2(e); or, where there is a float mask,
    their maximum, and log_sum log2 of the sum that is left.
    """

    shift: tl.tensor
    log_sum: tl.tensor
    delta: tl.tensor


@triton.jit
def load_shift(logsumexp, rows, num_rows):
    """The log-sum-exp of each query as the shift of unscaled scores.

    Rows that do not exist or see no key get +inf, which turns all of their weights into 0.
    """
    lse = tl.load(logsumexp + rows, mask=rows < num_rows, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def load_row_statistics(statistics, offset, rows, num_rows):
    """The statistics of rows of a head, whose own begin at `offset`."""
    inside = rows < num_rows
    if statistics.row_max is not None:
        shift = tl.load(statistics.row_max + offset + rows, mask=inside, other=float("inf"))
        log_sum = tl.load(statistics.log_sum + offset + rows, mask=inside, other=0.0)
    else:
        shift = load_shift(statistics.logsumexp + offset, rows, num_rows)
        log_sum = tl.zeros_like(shift)
    delta = tl.load(statistics.delta + offset + rows, mask=inside, other=0.0)
    return RowStatistics(shift, log_sum, delta)


@triton.jit
def along_queries(vector, TRANSPOSED: tl.constexpr):
    """One number a query, shaped to broadcast along the keys: (M, 1), or (1, M)."""
    return vector[None, :] if TRANSPOSED else vector[:, None]


@triton.jit
def weights_and_gradient(
    scores,
    grad_weights,
    statistics,
    factor,
    dropout,
    stream,
    first_row_index,
    first_column_index,
    SCALED: tl.constexpr,
    DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Weights after dropout, and the gradient of the (scaled) scores, of one tile.

    dS = P * (dP - delta), delta[i] = out[i] . grad_out[i] - grad_logsumexp[i]. SCALED scores are
    those with a float mask. A TRANSPOSED tile has keys for rows.
    """
    shift = along_queries(statistics.shift, TRANSPOSED)
    log_sum = along_queries(statistics.log_sum, TRANSPOSED)
    delta = along_queries(statistics.delta, TRANSPOSED)
    if SCALED:
        weights = tl.math.exp2((scores - shift) * factor - log_sum)
    else:
        weights = shifted_exp2(scores, shift, factor)
    kept_weights = weights
    if DROPOUT:
        BLOCK_M: tl.constexpr = scores.shape[1] if TRANSPOSED else scores.shape[0]
        BLOCK_N: tl.constexpr = scores.shape[0] if TRANSPOSED else scores.shape[1]
        keep = dropout_keep(
            dropout,
            stream,
            first_row_index + tl.arange(0, BLOCK_M),
            first_column_index,
            COLUMNS=BLOCK_N,
            ALIGNED=not VARLEN,
        )
        if TRANSPOSED:
            keep = tl.trans(keep)
        kept_weights = tl.where(keep, weights * dropout.scale, 0.0)
        grad_weights = tl.where(keep, grad_weights * dropout.scale, 0.0)
    return kept_weights, weights * (grad_weights - delta)


@triton.jit
def row_delta(grad_out_tiles, out_tiles, logsumexp, grad_logsumexp, rows, num_rows):
    """delta (M,) of a block of queries; 0 for those that see no key."""
    delta = row_inner_products(grad_out_tiles, out_tiles)
    if grad_logsumexp is not None:
        inside = rows < num_rows
        grad_lse = tl.load(grad_logsumexp + rows, mask=inside, other=0.0)
        lse = tl.load(logsumexp + rows, mask=inside, other=0.0)
        delta -= tl.where(lse == float("-inf"), 0.0, grad_lse)
    return delta
