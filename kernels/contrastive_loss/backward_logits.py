"""Gradient of contrastive logits, chunk by chunk: the stage before the library's products."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.contrastive_loss.problem import Problem
from vlmfast.kernels.contrastive_loss.scores import (
    PLAIN_NUMBERS,
    exponential,
    finite,
    sigmoid,
    similarities,
    tile_masks,
)
from vlmfast.kernels.launch import Launch, start


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def contrastive_loss_bwd_kernel(
    rows,
    columns,
    scale,
    bias,
    of_row_sum,
    of_row_total,
    of_positive,
    of_column_sum,
    row_max,
    column_max,
    stored_factor,
    gradient,
    gradient_columns,
    grad_scale,
    grad_bias,
    num_rows,
    num_columns,
    first_column,
    row_tiles,
    tiles_per_program,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    SIGMOID: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G of one tile of rows by a strip of column tiles, to gradient (rows, queries, columns).

    The gradient has gradient_columns, of which those beyond num_columns become 0. Sums of G and of
    G * similarity go to [strip, row].
    """
    row_tile = tl.program_id(0) % row_tiles
    strip = tl.program_id(0) // row_tiles
    row_index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row_index < num_rows
    factor = tl.load(scale)
    of_total = tl.load(of_row_total + row_index, mask=exists, other=0.0)
    of_pair = tl.load(of_positive + row_index, mask=exists, other=0.0)
    if of_row_sum is not None:
        of_sum = tl.load(of_row_sum + row_index, mask=exists, other=0.0)
        row_shift = finite(tl.load(row_max + row_index, mask=exists, other=0.0))
    scale_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    bias_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(strip * tiles_per_program, (strip + 1) * tiles_per_program):
        column_index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_exists = column_index < num_columns
        similarity, query_index = similarities(
            rows,
            columns,
            row_index,
            column_index,
            num_rows,
            num_columns,
            DIM=DIM,
            QUERIES=QUERIES,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            BLOCK_K=BLOCK_K,
            PRECISION=PRECISION,
        )
        inside, paired = tile_masks(row_index, column_index, num_rows, num_columns, first_column)
        logits = similarity * factor
        if bias is not None:
            logits += tl.load(bias)
        if not SIGMOID:
            # The maxima are of rounded products, which an exact one exceeds by what grows with the
            # logits. This keeps the compiler from fusing product and difference.
            logits = tl.where(inside, logits, float("-inf"))
        grads = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32) + of_total[:, None]
        if of_row_sum is not None:
            if SIGMOID:
                grads += of_sum[:, None] * sigmoid(logits)
            else:
                grads += of_sum[:, None] * exponential(logits - row_shift[:, None])
        if of_column_sum is not None:
            of_column = tl.load(of_column_sum + column_index, mask=column_exists, other=0.0)
            shift = finite(tl.load(column_max + column_index, mask=column_exists, other=0.0))
            grads += of_column[None, :] * exponential(logits - shift[None, :])
        grads = tl.where(paired, of_pair[:, None], grads)
        grads = tl.where(inside, grads, 0.0)
        scale_sums += tl.sum(tl.where(inside, grads * similarity, 0.0), 1)
        bias_sums += tl.sum(grads, 1)
        if gradient is not None:
            stored = grads * tl.load(stored_factor)
            at = row_index[:, None].to(tl.int64) * (QUERIES * gradient_columns) + column_index
            written = exists[:, None] & (column_index < gradient_columns)[None, :]
            for query in range(QUERIES):
                counts = stored
                if QUERIES > 1:
                    counts = tl.where(query_index == query, stored, 0.0)
                tl.store(
                    gradient + at + query * gradient_columns,
                    counts.to(gradient.dtype.element_ty),
                    mask=written,
                )
    at = strip.to(tl.int64) * num_rows + row_index
    tl.store(grad_scale + at, scale_sums, mask=exists)
    tl.store(grad_bias + at, bias_sums, mask=exists)


def logit_gradients(
    problem: Problem,
    of_row_sum: torch.Tensor | None,
    of_row_total: torch.Tensor,
    of_positive: torch.Tensor,
    of_column_sum: torch.Tensor | None,
    row_max: torch.Tensor,
    column_max: torch.Tensor,
    stored_factor: torch.Tensor,
    gradient: torch.Tensor | None,
) -> torch.Tensor:
    """Fills the gradient G of the problem's rows, times stored_factor.

    The gradient is contiguous, (rows, queries, columns or more): see `backward`. Gives (2, strips,
    rows) sums of G * similarity and of G.
    """
    n = problem.rows.shape[0]
    results: list[torch.Tensor] = []

    def run(launch: Launch) -> None:
        grid = problem.grid(launch)
        shares = torch.empty((2, grid.strips, n), dtype=torch.float32, device=problem.device)
        start(
            contrastive_loss_bwd_kernel,
            grid.programs,
            launch,
            **problem.arguments(launch),
            of_row_sum=of_row_sum,
            of_row_total=of_row_total,
            of_positive=of_positive,
            of_column_sum=of_column_sum,
            row_max=row_max,
            column_max=column_max,
            stored_factor=stored_factor,
            gradient=gradient,
            gradient_columns=0 if gradient is None else gradient.shape[2],
            grad_scale=shares[0],
            grad_bias=shares[1],
        )
        results[:] = [shares]

    suffix = "_sigmoid" if problem.sigmoid else ""
    problem.launch(f"contrastive_loss_bwd{suffix}", n, run)
    return results[0]
