"""Statistics of a batch whose columns are passed around the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmfast.contrastive_statistics import (
    Statistics,
    block_statistics,
    choose_backend,
    merge,
    relative_to,
)
from vlmfast.distributed.collectives import Passing, circulate, owner_after, pass_on
from vlmfast.distributed.ranks import Ranks, outside_of_graphs
from vlmfast.ops import contrastive_loss as ops
from vlmfast.reference.common import compute_dtype
from vlmfast.reference.contrastive_loss import contrastive_loss as reference


@outside_of_graphs
def ring_statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sigmoid: bool,
    column_statistics: bool,
    backend: str | None,
    ranks: Ranks,
) -> Statistics:
    """`vlmfast.distributed.statistics.statistics` of this rank's own rows and own columns."""
    if rows.dim() == 2:
        rows = rows.unsqueeze(1)
    # Chosen once: use_backend may have ended when backward runs.
    settings = _Settings(sigmoid, column_statistics, choose_backend(rows, columns, backend))
    return Statistics(*_RingStatistics.apply(rows, columns, scale, bias, settings, ranks))


class _Settings(NamedTuple):
    sigmoid: bool
    column_statistics: bool
    backend: str


class _RingStatistics(torch.autograd.Function):
    """`statistics`, one rank's columns at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        settings: _Settings,
        ranks: Ranks,
    ) -> tuple[Tensor, ...]:
        of_rows: list[Tensor] = []
        passed: Passing | None = None
        for owner, block in circulate(columns, ranks):
            first_column = _first_column(owner, block, ranks)
            part = block_statistics(rows, block, scale, bias, first_column, *settings)
            if not of_rows:
                of_rows = [part.row_max, part.row_sum, part.row_total, part.positive]
            else:
                of_rows[:2] = _merge(of_rows[0], of_rows[1], part.row_max, part.row_sum)
                of_rows[2] += part.row_total
                of_rows[3] += part.positive
            if settings.column_statistics:
                of_columns = torch.stack((part.column_max, part.column_sum))
                if passed is not None:
                    of_columns = torch.stack(_merge(*passed.wait().unbind(), *of_columns.unbind()))
                passed = pass_on(of_columns, ranks, owner_after(owner, ranks), dim=1)
        if passed is None:
            own_max = own_sum = of_rows[0].new_empty(0)
        else:
            own_max, own_sum = passed.wait().unbind()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, scale, bias, of_rows[0], own_max)
        ctx.mark_non_differentiable(of_rows[0], own_max)
        ctx.settings, ctx.ranks = settings, ranks
        return (*of_rows, own_max, own_sum)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _row_max: None,
        grad_row_sum: Tensor | None,
        grad_row_total: Tensor | None,
        grad_positive: Tensor | None,
        _column_max: None,
        grad_column_sum: Tensor | None,
    ) -> Any:
        rows, columns, scale, bias, row_max, column_max = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        wanted = ctx.needs_input_grad[:4]
        of_all_columns: Iterator[Any] = repeat((None, None))
        if grad_column_sum is not None:
            own_columns = torch.stack((column_max, grad_column_sum), -1)
            of_all_columns = (x.unbind(-1) for _, x in circulate(own_columns, ranks))
        sums: list[Tensor | None] = [None] * 4
        passed: Passing | None = None
        for owner, block in circulate(columns, ranks):
            block_max, grad_block_sum = next(of_all_columns)
            gradients: Any = _block_backward(
                (grad_row_sum, grad_row_total, grad_positive, grad_block_sum),
                (rows, block, scale, bias),
                (row_max, column_max if block_max is None else block_max),
                _first_column(owner, block, ranks),
                ctx.settings,
                wanted,
            )
            for index in (0, 2, 3):
                if wanted[index]:
                    sums[index] = _add(sums[index], gradients[index])
            if wanted[1]:
                passed = pass_on(
                    _add(None if passed is None else passed.wait(), gradients[1]),
                    ranks,
                    owner_after(owner, ranks),
                    dim=0,
                )
            del gradients  # before the next block's are made
        if passed is not None:
            sums[1] = passed.wait()
        inputs = (rows, columns, scale, bias)
        rounded = [x if x is None else x.to(y.dtype) for x, y in zip(sums, inputs, strict=True)]
        return (*rounded, None, None)


def _first_column(owner: int, columns: Tensor, ranks: Ranks) -> int:
    """Rows have their pairs among this rank's own columns; in others' they have none."""
    return 0 if owner == ranks.rank else columns.shape[0]


def _merge(*maxima_and_sums: Tensor) -> tuple[Tensor, Tensor]:
    maxima, sums = maxima_and_sums[::2], maxima_and_sums[1::2]
    return merge(torch.stack(maxima), torch.stack(sums))


def _add(so_far: Tensor | None, more: Tensor) -> Tensor:
    return more if so_far is None else so_far.add_(more)


def _block_backward(
    gradients: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    maxima: tuple[Tensor, Tensor],
    first_column: int,
    settings: _Settings,
    wanted: Sequence[bool],
) -> Sequence[Any]:
    """Gradients of a block's rows, columns, scale and bias; float32 for half precision.

    Args:
        gradients: of row_sum, row_total, positive and column_sum, counted from `maxima`.
        inputs: rows, columns, scale, bias.
        maxima: of rows and columns over all blocks.
        wanted: which gradients.
    """
    rows = inputs[0]
    if settings.backend != "reference":
        return ops.BACKWARD[settings.backend](
            *gradients, *inputs, *maxima, first_column, settings.sigmoid, *wanted, True
        )
    # The reference is differentiable, but has maxima of its own.
    dtype = compute_dtype(rows.dtype)
    leaves: list[Any] = [
        None if x is None else x.detach().to(dtype).requires_grad_(needed)
        for x, needed in zip(inputs, wanted, strict=True)
    ]
    with torch.enable_grad():
        row_max, row_sum, row_total, positive, column_max, column_sum = reference(
            leaves[0],
            leaves[1],
            leaves[2],
            leaves[3],
            first_column,
            settings.sigmoid,
            settings.column_statistics,
        )
    grad_row_sum, grad_row_total, grad_positive, grad_column_sum = gradients
    if grad_row_sum is not None:
        grad_row_sum = relative_to(row_max, maxima[0], grad_row_sum)
    if grad_column_sum is not None:
        grad_column_sum = relative_to(column_max, maxima[1], grad_column_sum)
    outputs = (row_sum, row_total, positive, column_sum)
    given = (grad_row_sum, grad_row_total, grad_positive, grad_column_sum)
    pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None]
    needed_leaves = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            needed_leaves,
            [grad for _, grad in pairs],
            materialize_grads=True,
        )
    )
    return [next(found) if needed else None for needed in wanted]
