"""Differentiable collectives: columns of all ranks, statistics merged over them, and means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmfast.contrastive_statistics import merge, relative_to
from vlmfast.distributed.collectives import all_gather, all_to_all, mean, reduce_scatter
from vlmfast.distributed.ranks import Ranks, outside_of_graphs
from vlmfast.reference.common import compute_dtype


@outside_of_graphs
def gather(own: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks. Backward adds up in float32 what each rank's loss says of `own`."""
    return _Gather.apply(own, ranks)


@outside_of_graphs
def merge_columns(maxima: Tensor, sums: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """From this rank's statistics of all columns to all ranks' statistics of its own columns."""
    return _MergeColumns.apply(maxima, sums, ranks)


@outside_of_graphs
def mean_over_ranks(loss: Tensor, ranks: Ranks) -> Tensor:
    """The mean of all ranks' losses; each of them gets the mean of the gradients."""
    return _Mean.apply(loss, ranks, True)


@outside_of_graphs
def mean_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    """`tensor` itself; in backward, the mean of all ranks' gradients."""
    return _Mean.apply(tensor, ranks, False)


@outside_of_graphs
def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` itself; in backward, `factor` times its gradient."""
    return _ScaleGradient.apply(tensor, factor)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return all_gather(own, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Summed as kernels sum: in float32, and rounded once.
        wide = gradient.to(compute_dtype(gradient.dtype))
        return reduce_scatter(wide, ctx.ranks).to(gradient.dtype), None


class _MergeColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maxima: Tensor, sums: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        blocks = all_to_all(torch.stack((maxima, sums), -1), ranks).unbind(-1)
        own_max, own_sum = merge(*blocks)
        ctx.ranks = ranks
        ctx.save_for_backward(maxima, own_max)
        ctx.mark_non_differentiable(own_max)
        return own_max, own_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        maxima, own_max = ctx.saved_tensors
        merged = all_gather(torch.stack((own_max, gradient), -1), ctx.ranks)
        return None, relative_to(maxima, *merged.unbind(-1)), None


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, of_values: bool) -> Tensor:
        ctx.ranks = ranks
        return mean(tensor, ranks) if of_values else tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return mean(gradient, ctx.ranks), None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None
