"""Operators of the contrastive losses: schemas, fakes, autograd and FLOP formulas.

What the arguments mean is written once, at `vlmfast.reference.contrastive_loss`. Beyond that:

- rows and columns are float32, bfloat16 or float16, strides are free; scale and bias are float32
  and 0-d; all statistics are float32 and contiguous.
- the sums, row_total and positive are differentiable. With g_* for their gradients, which may be
  None (zero), and c as the saved maxima, backward computes tile by tile
      G[i, j] = g_row_sum[i] * exp(logits[i, j] - row_max[i])
                + g_column_sum[j] * exp(logits[i, j] - column_max[j]) + g_row_total[i]
  (with `sigmoid` the derivative of log(1 + exp(logits[i, j])) stands for both exponentials), and
  G = g_positive[i] where i and j are a pair; then
      grad_rows = scale * G @ columns, grad_columns = scale * G^T @ rows,
      grad_scale = sum of G * similarity, grad_bias = sum of G.
  Thus blocks of a larger matrix are differentiated by handing in the maxima of the whole and
  gradients of its sums.
- gradients are contiguous and in the dtype of what they are gradients of; with `float32_grads`
  they are float32, to be summed over blocks. One that is not asked for is an empty tensor of shape
  (0,).
"""

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import common

_COMMON = "Tensor rows, Tensor columns, Tensor scale, Tensor? bias"
_SCHEMA = (
    f"({_COMMON}, SymInt first_column, bool sigmoid, bool column_statistics) "
    "-> (Tensor row_max, Tensor row_sum, Tensor row_total, Tensor positive, "
    "Tensor column_max, Tensor column_sum)"
)
_BACKWARD_SCHEMA = (
    "(Tensor? grad_row_sum, Tensor? grad_row_total, Tensor? grad_positive, "
    f"Tensor? grad_column_sum, {_COMMON}, Tensor row_max, Tensor column_max, "
    "SymInt first_column, bool sigmoid, "
    "bool rows_grad, bool columns_grad, bool scale_grad, bool bias_grad, bool float32_grads) "
    "-> (Tensor grad_rows, Tensor grad_columns, Tensor grad_scale, Tensor grad_bias)"
)


def _fake_forward(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    first_column: int,
    sigmoid: bool,
    column_statistics: bool,
) -> tuple[Tensor, ...]:
    of_rows = [rows.new_empty(rows.shape[0], dtype=torch.float32) for _ in range(4)]
    n_columns = columns.shape[0] if column_statistics else 0
    of_columns = [rows.new_empty(n_columns, dtype=torch.float32) for _ in range(2)]
    return (*of_rows, *of_columns)


def _fake_backward(
    grad_row_sum: Tensor | None,
    grad_row_total: Tensor | None,
    grad_positive: Tensor | None,
    grad_column_sum: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    row_max: Tensor,
    column_max: Tensor,
    first_column: int,
    sigmoid: bool,
    *flags: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows_grad, columns_grad, scale_grad, bias_grad, float32_grads = flags
    dtype = torch.float32 if float32_grads else rows.dtype
    return (
        rows.new_empty(rows.shape if rows_grad else 0, dtype=dtype),
        columns.new_empty(columns.shape if columns_grad else 0, dtype=dtype),
        scale.new_empty(() if scale_grad else 0),
        scale.new_empty(() if bias_grad else 0),
    )


def _autograd_function(forward_op: Any, backward_op: Any) -> type[torch.autograd.Function]:
    class ContrastiveLoss(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
            rows, columns, scale, bias, first_column, sigmoid, column_statistics = args
            statistics = common.call_in_forward(forward_op, *args)
            row_max, _, _, _, column_max, _ = statistics
            ctx.mark_non_differentiable(row_max, column_max)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(rows, columns, scale, bias, row_max, column_max)
            ctx.first_column, ctx.sigmoid = first_column, sigmoid
            ctx.column_statistics = column_statistics
            return statistics

        @staticmethod
        def backward(
            ctx: Any,
            _row_max: None,
            grad_row_sum: Tensor | None,
            grad_row_total: Tensor | None,
            grad_positive: Tensor | None,
            _column_max: None,
            grad_column_sum: Tensor | None,
        ) -> Any:
            gradients = common.call(
                backward_op,
                grad_row_sum,
                grad_row_total,
                grad_positive,
                grad_column_sum if ctx.column_statistics else None,
                *ctx.saved_tensors,
                ctx.first_column,
                ctx.sigmoid,
                *ctx.needs_input_grad[:4],
                False,
            )
            wanted = (
                gradient if needed else None
                for gradient, needed in zip(gradients, ctx.needs_input_grad[:4], strict=True)
            )
            return (*wanted, None, None, None)

    return ContrastiveLoss


def _products(rows: Tensor, columns: Tensor) -> int:
    """Floating-point operations of one product of rows with columns."""
    return 2 * rows.shape[0] * rows.shape[1] * rows.shape[2] * columns.shape[0]


def _flops(rows: Tensor, columns: Tensor, *rest: Any, **_: Any) -> int:
    return _products(rows, columns)


def _backward_flops(*args: Any, **_: Any) -> int:
    rows, columns = args[4:6]
    rows_grad, columns_grad = args[-5:-3]
    # the logits again, G @ columns, G^T @ rows
    return _products(rows, columns) * (1 + rows_grad + columns_grad)


FORWARD, BACKWARD = common.register_family(
    "contrastive_loss",
    (_SCHEMA, _BACKWARD_SCHEMA),
    (_fake_forward, _fake_backward),
    _autograd_function,
    (_flops, _backward_flops),
)
