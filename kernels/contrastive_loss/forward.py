"""Statistics of contrastive logits, which are never held together.

    logits[i, j] = scale * max over q of <rows[i, q], columns[j]> + bias

One matrix product whose epilogue keeps, of each tile, the maximum and sum of its rows and columns;
the partial results of tiles are merged in a fixed order. No atomics, hence one result.

What the arguments mean is written at `vlmfast.reference.contrastive_loss` and
`vlmfast.ops.contrastive_loss`.
"""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.contrastive_loss.problem import make_problem
from vlmfast.kernels.contrastive_loss.scores import (
    PLAIN_NUMBERS,
    exponential,
    finite,
    similarities,
    softplus,
    tile_masks,
)
from vlmfast.kernels.launch import Launch, start


@triton.jit(do_not_specialize=PLAIN_NUMBERS)
def contrastive_loss_fwd_kernel(
    rows,
    columns,
    scale,
    bias,
    row_max,
    row_sum,
    row_total,
    positive,
    column_max,
    column_sum,
    num_rows,
    num_columns,
    first_column,
    row_tiles,
    tiles_per_program,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    SIGMOID: tl.constexpr,
    COLUMN_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of rows by a strip of column tiles.

    Statistics of rows go to [strip, row], those of columns to [row tile, column].
    """
    row_tile = tl.program_id(0) % row_tiles
    strip = tl.program_id(0) // row_tiles
    row_index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.load(scale)
    most = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    pairs = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(strip * tiles_per_program, (strip + 1) * tiles_per_program):
        column_index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        logits, _ = similarities(
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
        logits = logits * factor
        if bias is not None:
            logits += tl.load(bias)
        inside, paired = tile_masks(row_index, column_index, num_rows, num_columns, first_column)
        pairs += tl.sum(tl.where(paired, logits, 0.0), 1)
        others = inside & (paired == 0)
        total += tl.sum(tl.where(others, logits, 0.0), 1)
        if SIGMOID:
            sums += tl.sum(tl.where(others, softplus(logits), 0.0), 1)
        else:
            logits = tl.where(others, logits, float("-inf"))
            new_most = tl.maximum(most, tl.max(logits, 1))
            shift = finite(new_most)
            weights = exponential(logits - shift[:, None])
            sums = sums * exponential(most - shift) + tl.sum(weights, 1)
            most = new_most
            if COLUMN_STATISTICS:
                column_most = tl.max(logits, 0)
                weights = exponential(logits - finite(column_most)[None, :])
                at = row_tile.to(tl.int64) * num_columns + column_index
                tl.store(column_max + at, column_most, mask=column_index < num_columns)
                tl.store(column_sum + at, tl.sum(weights, 0), mask=column_index < num_columns)
    at = strip.to(tl.int64) * num_rows + row_index
    if not SIGMOID:
        tl.store(row_max + at, most, mask=row_index < num_rows)
    tl.store(row_sum + at, sums, mask=row_index < num_rows)
    tl.store(row_total + at, total, mask=row_index < num_rows)
    tl.store(positive + at, pairs, mask=row_index < num_rows)


def forward(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    first_column: int,
    sigmoid: bool,
    column_statistics: bool,
) -> tuple[torch.Tensor, ...]:
    """row_max, row_sum, row_total, positive, column_max, column_sum: all float32."""
    problem = make_problem(rows, columns, scale, bias, first_column, sigmoid)
    n, m = rows.shape[0], columns.shape[0]
    results: list[torch.Tensor] = []

    def run(launch: Launch) -> None:
        grid = problem.grid(launch)
        empty = {"dtype": torch.float32, "device": rows.device}
        row_max, row_sum, row_total, positive = (
            torch.empty((grid.strips, n), **empty) for _ in range(4)
        )
        m_kept = m if column_statistics else 0
        column_max, column_sum = (torch.empty((grid.row_tiles, m_kept), **empty) for _ in range(2))
        start(
            contrastive_loss_fwd_kernel,
            grid.programs,
            launch,
            **problem.arguments(launch),
            row_max=row_max,
            row_sum=row_sum,
            row_total=row_total,
            positive=positive,
            column_max=column_max,
            column_sum=column_sum,
            COLUMN_STATISTICS=column_statistics,
        )
        if sigmoid:
            statistics = torch.zeros(n, **empty), row_sum.sum(0)
        else:
            statistics = merge(row_max, row_sum)
        totals = row_total.sum(0), positive.sum(0)
        results[:] = [*statistics, *totals, *merge(column_max, column_sum)]

    problem.launch("contrastive_loss_fwd", n, run)
    return tuple(results)


def merge(maxima: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of (parts, n) partial ones, which are overwritten."""
    if maxima.shape[0] == 0:
        return maxima.new_full(maxima.shape[1:], -torch.inf), sums.new_zeros(sums.shape[1:])
    most = maxima.amax(0)
    maxima.sub_(most.masked_fill(most == -torch.inf, 0.0)).exp_()
    return most, sums.mul_(maxima).sum(0)
