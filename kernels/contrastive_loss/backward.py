"""Gradients of contrastive logits, which are never held together.

A chunk of rows is recomputed, its gradient G stored in the features' dtype, and both products with
the features are left to the library's matrix multiplication, which nothing here would beat.
"""

import dataclasses

import torch

from vlmfast.kernels.contrastive_loss.backward_logits import logit_gradients
from vlmfast.kernels.contrastive_loss.problem import make_problem
from vlmfast.kernels.launch import ceil_div

# Bytes of G that backward holds at once: half of the 256 MiB that a batch of 32,768 of 512 features
# is to take, where the sums for the columns take 64 more.
CHUNK_BYTES = 128 << 20
# G has a multiple of so many columns, that each thread may store its share at once.
COLUMN_STEP = 16
# G is at most this after scaling: large enough that float16 keeps its small entries, too.
LARGEST_GRADIENT = 16384.0


def backward(
    grad_row_sum: torch.Tensor | None,
    grad_row_total: torch.Tensor | None,
    grad_positive: torch.Tensor | None,
    grad_column_sum: torch.Tensor | None,
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    row_max: torch.Tensor,
    column_max: torch.Tensor,
    first_column: int,
    sigmoid: bool,
    rows_grad: bool,
    columns_grad: bool,
    scale_grad: bool,
    bias_grad: bool,
    float32_grads: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """grad_rows, grad_columns, grad_scale, grad_bias; of shape (0,) where not asked for."""
    problem = make_problem(rows, columns, scale, bias, first_column, sigmoid)
    n, queries, dim = rows.shape
    m = columns.shape[0]
    dtype = torch.float32 if float32_grads else rows.dtype
    zeros = torch.zeros(n, dtype=torch.float32, device=rows.device)
    of_row_sum = None if grad_row_sum is None else grad_row_sum.contiguous()
    of_row_total = zeros if grad_row_total is None else grad_row_total.contiguous()
    of_positive = zeros if grad_positive is None else grad_positive.contiguous()
    of_column_sum = None if grad_column_sum is None else grad_column_sum.contiguous()
    factor = storage_factor(of_row_sum, of_row_total, of_positive, of_column_sum)
    unstored = scale / factor
    stored_columns = ceil_div(m, COLUMN_STEP) * COLUMN_STEP
    chunk = max(1, CHUNK_BYTES // max(1, stored_columns * queries * rows.element_size()))
    chunk = min(n, ceil_div(chunk, 128) * 128)
    buffer = rows.new_empty(chunk, queries, stored_columns) if rows_grad or columns_grad else None
    grad_rows = rows.new_empty(rows.shape if rows_grad else 0, dtype=dtype)
    column_sums = torch.zeros(
        columns.shape if columns_grad else 0, dtype=torch.float32, device=rows.device
    )
    sums = zeros.new_zeros(2)
    for first in range(0, n, max(1, chunk)):
        part = slice(first, min(n, first + chunk))
        gradient = None if buffer is None else buffer[: part.stop - first]
        shares = logit_gradients(
            dataclasses.replace(
                problem, rows=problem.rows[part], first_column=first_column + first
            ),
            of_row_sum=None if of_row_sum is None else of_row_sum[part],
            of_row_total=of_row_total[part],
            of_positive=of_positive[part],
            of_column_sum=of_column_sum,
            row_max=row_max[part],
            column_max=column_max,
            stored_factor=factor,
            gradient=gradient,
        )
        sums += shares.sum((1, 2))
        if rows_grad:
            products = product(gradient.flatten(0, 1)[:, :m], columns) * unstored
            grad_rows[part] = products.unflatten(0, (-1, queries)).to(dtype)
        if columns_grad:
            add_product(column_sums, gradient.flatten(0, 1)[:, :m].T, rows[part].reshape(-1, dim))
    return (
        grad_rows,
        column_sums.mul_(unstored).to(dtype),
        sums[0] if scale_grad else scale.new_empty(0),
        sums[1] if bias_grad else scale.new_empty(0),
    )


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, by the library."""
    if left.dtype == torch.float32 or left.device.type == "cuda":
        out = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
        return torch.mm(left, right, **out)
    return left.float() @ right.float()


def add_product(sums: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """sums += left @ right in float32, by the library, which reads and writes the sums once."""
    if left.dtype == torch.float32:
        sums.addmm_(left, right)
    elif left.device.type == "cuda":
        torch.addmm(sums, left, right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left.float(), right.float())


def storage_factor(*vectors: torch.Tensor | None) -> torch.Tensor:
    """A power of two by which G is multiplied where it is stored, so that float16 can hold it."""
    given = [x.abs().amax() for x in vectors if x is not None and x.numel()]
    if not given:
        return torch.ones(())
    bound = torch.stack(given).sum()
    power = torch.exp2(torch.floor(torch.log2(LARGEST_GRADIENT / bound)))
    return torch.where((bound > 0) & power.isfinite(), power, 1.0)
