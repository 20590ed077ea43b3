"""The statistics of one block of logits, on this process, of which contrastive losses are made."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast import backends, dispatch
from vlmfast.reference.common import compute_dtype


class Statistics(NamedTuple):
    """What `vlmfast.reference.contrastive_loss` returns: of each row and column, all other logits'
    maximum and sum, and the logit of the pair."""

    row_max: Tensor
    row_sum: Tensor
    row_total: Tensor
    positive: Tensor
    column_max: Tensor
    column_sum: Tensor


def block_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    first_column: int = 0,
    sigmoid: bool = False,
    column_statistics: bool = True,
    backend: str | None = None,
) -> Statistics:
    """`vlmfast.reference.contrastive_loss` by the backend that runs it.

    Args are checked already; rows may be (n, D). The caller has switched autocast off.
    """
    if rows.dim() == 2:
        rows = rows.unsqueeze(1)
    args = (rows, columns, scale, bias, first_column, sigmoid, column_statistics)
    return Statistics(*dispatch.run("contrastive_loss", args, backend, (rows, columns)))


def choose_backend(rows: Tensor, columns: Tensor, backend: str | None) -> str:
    """The backend that computes the statistics of a block."""
    return backends.choose("contrastive_loss", backend, rows.device.type, rows, columns)


def merge(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum and sum of several blocks.

    Args:
        maxima: (blocks, n).
        sums: (blocks, n), relative to them.

    Returns:
        (n,) each.
    """
    most = maxima.amax(0)
    shift = most.masked_fill(most == -torch.inf, 0.0)
    return most, (sums * torch.exp(maxima - shift)).sum(0)


def relative_to(maxima: Tensor, merged_maxima: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a block's sums, which count from its own maxima, from that of merged sums."""
    return gradient * torch.exp(maxima - merged_maxima)


def pair_loss(most: Tensor, total: Tensor, positive: Tensor) -> Tensor:
    """-log of the pair's share of a softmax, from the statistics of all other logits."""
    # The largest numbers cancel first, and a sum of nothing must not give NaN in backward.
    others = (most - positive) + total.masked_fill(total == 0.0, 1.0).log()
    return -F.logsigmoid(-others)


def normalize(z: Tensor) -> Tensor:
    """Rows of unit length in z's dtype."""
    return F.normalize(z.to(compute_dtype(z.dtype)), dim=-1).to(z.dtype)
