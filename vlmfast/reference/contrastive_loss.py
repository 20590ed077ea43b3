"""Statistics of a block of logits in plain PyTorch: what every contrastive kernel must compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.reference.common import compute_dtype


def _maximum(logits: Tensor, dim: int) -> Tensor:
    """The maximum along a dimension, without gradient; -inf where that is empty."""
    if logits.shape[dim] == 0:
        return logits.new_full((logits.shape[1 - dim],), -torch.inf)
    return logits.detach().amax(dim)


def _sum_of_exponentials(logits: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Maximum and sum of exp(logits - maximum); -inf and 0 where there is nothing but -inf."""
    most = _maximum(logits, dim)
    shift = most.masked_fill(most == -torch.inf, 0.0).unsqueeze(dim)
    return most, torch.exp(logits - shift).sum(dim)


def contrastive_loss(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    first_column: int = 0,
    sigmoid: bool = False,
    column_statistics: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What contrastive losses need to know of a block of logits.

        logits[i, j] = scale * max over q of <rows[i, q], columns[j]> + bias

    Row i and column first_column + i are a pair. Its logit stands apart as `positive`, and all
    other results are of the other logits: thus nothing cancels when training has converged, and
    a row's own column, which NT-Xent leaves out, is left out by ignoring `positive`.

        row_max[i] = max over others of logits[i, j]
        row_sum[i] = sum over others of exp(logits[i, j] - row_max[i]), or with `sigmoid`
                     sum over others of log(1 + exp(logits[i, j]))
        row_total[i] = sum over others of logits[i, j]

    and column_max, column_sum are as row_max, row_sum, along the rows. Then
    -log(softmax(logits[i])[pair]) is log(1 + exp(row_max - positive + log(row_sum))). Blocks of
    one matrix are merged by their maxima and sums.

    A maximum is a mere shift and carries no gradient: sums are differentiated as if it were
    constant, which is exact for whatever depends on max + log(sum) alone.

    Args:
        rows: (n, queries, D), any floating dtype.
        columns: (M, D).
        scale: 0-d tensor.
        bias: 0-d tensor or None.
        first_column: the column that is paired with row 0. Rows whose column lies outside [0, M)
            have no pair; any integer is legal.
        sigmoid: sums of log(1 + exp(logits)) in place of exponentials; row_max is then 0. Not
            with column_statistics.
        column_statistics: False leaves column_max and column_sum empty, of shape (0,).

    Returns:
        row_max, row_sum, row_total, positive (n,) and column_max, column_sum (M,), in float32 or
        rows' dtype if wider. Where there are no others, the maximum is -inf and the sum 0; where
        there is no pair, positive is 0.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
    (2021); Zhai et al., "Sigmoid Loss for Language Image Pre-Training" (2023).
    """
    dtype = compute_dtype(rows.dtype)
    similarity = rows.to(dtype) @ columns.to(dtype).T
    # One query alone gets the gradient, as in BLIP-2.
    similarity = similarity.max(1).values if rows.shape[1] > 1 else similarity.squeeze(1)
    logits = scale.to(dtype) * similarity
    if bias is not None:
        logits = logits + bias.to(dtype)

    row_index = torch.arange(logits.shape[0], device=logits.device)
    column_index = torch.arange(logits.shape[1], device=logits.device)
    paired = column_index == row_index[:, None] + first_column
    positive = logits.masked_fill(~paired, 0.0).sum(1)
    row_total = logits.masked_fill(paired, 0.0).sum(1)
    column_max = column_sum = logits.new_empty(0)
    if sigmoid:
        row_max = torch.zeros_like(positive)
        row_sum = (-F.logsigmoid(-logits)).masked_fill(paired, 0.0).sum(1)
    else:
        others = logits.masked_fill(paired, -torch.inf)
        row_max, row_sum = _sum_of_exponentials(others, 1)
        if column_statistics:
            column_max, column_sum = _sum_of_exponentials(others, 0)
    return row_max, row_sum, row_total, positive, column_max, column_sum
