"""What the layers of Swin and Swin V2 do around their attention, in every library."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from vlmfast.parts.common import has_hooks, is_linear, kept_result

__all__ = [
    "bias_from_table",
    "clamped_logit_scale",
    "continuous_bias_table",
    "kept_table",
    "padding_value",
    "relative_position_index",
]


def relative_position_index(
    window_size: Sequence[int], device: torch.device | None = None
) -> Tensor:
    """For each pair of tokens of a window the number of its offset, (M * M,) int64.

    Offsets are counted row by row from (-(h - 1), -(w - 1)), of the query minus the key.
    """
    rows, columns = (torch.arange(size, device=device) for size in window_size)
    down = rows[:, None] - rows + window_size[0] - 1
    right = columns[:, None] - columns + window_size[1] - 1
    # (query row, query column, key row, key column)
    index = down[:, None, :, None] * (2 * window_size[1] - 1) + right[None, :, None, :]
    return index.flatten()


def bias_from_table(table: Tensor, index: Tensor) -> Tensor:
    """The bias (heads, M, M) from `table` (offsets, heads) and `index`, M * M numbers of offsets.

    Its gradient to the table is summed in one order: by gather on a CPU, where indexing would add
    atomically, and by indexing on a GPU, where gather would.
    """
    tokens = math.isqrt(index.numel())
    if table.device.type == "cpu":
        bias = table.t().gather(1, index.view(1, -1).expand(table.shape[1], -1))
    else:
        bias = table[index.view(-1)].t().contiguous()
    return bias.view(-1, tokens, tokens)


def padding_value(projection: nn.Module, x: Tensor) -> Tensor | None:
    """What `projection` makes of a token of zeros, which models pad x with: None for zeros."""
    if is_linear(projection) and not has_hooks(projection):
        return projection.bias
    return projection(x.new_zeros(1, x.shape[-1]))[0]


def clamped_logit_scale(logarithm: Tensor) -> Tensor:
    """Swin V2's factor of the cosines, at most 100: (heads,), from any shape of heads elements."""
    return torch.clamp(logarithm, max=math.log(100.0)).exp().flatten()


def continuous_bias_table(network: nn.Module, coordinates: Tensor) -> Tensor:
    """Swin V2's bias of each offset, 16 * sigmoid(network(coordinates)): (offsets, heads)."""

    def compute() -> Tensor:
        return 16 * torch.sigmoid(network(coordinates).flatten(0, -2))

    return kept_table(network, coordinates, compute)


def kept_table(
    network: nn.Module,
    coordinates: Tensor,
    compute: Callable[[], Tensor],
    container: type[nn.Module] = nn.Sequential,
) -> Tensor:
    """`compute()`, a function of `network` and `coordinates`, or its result of last time.

    Nothing is kept where the network is not a `container` of plain layers: it may be a function of
    more than its parameters.
    """
    classes = (container, nn.ReLU, nn.Identity, nn.Dropout)
    return kept_result(network, (network,), coordinates, compute, classes)
