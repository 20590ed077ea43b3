"""Statistics and gradients of contrastive logits, which are never held together.

    logits[i, j] = scale * max over q of <rows[i, q], columns[j]> + bias

Forward is one matrix product whose epilogue keeps, of each tile, the maximum and sum of its rows
and columns; the partial results of tiles are merged in a fixed order. Backward recomputes a chunk
of rows, stores its gradient G in the features' dtype, and leaves both products with the features to
the library's matrix multiplication, which nothing here would beat. No atomics, hence one result.

What the arguments mean is written at `vlmfast.reference.contrastive_loss` and
`vlmfast.ops.contrastive_loss`.
"""

import torch
import triton
import triton.language as tl

from vlmfast.kernels import configs
from vlmfast.kernels.common import (
    LOG2E,
    check_lengths,
    input_precision,
    precision_of,
    run_kernel,
    run_with_launch,
)
from vlmfast.kernels.configs import Launch

# Bytes of G that backward holds at once.
CHUNK_BYTES = 64 << 20
# Programs that a launch is cut into, where there are tiles enough: several for each multiprocessor.
PROGRAMS = 1024
# G is at most this after scaling: large enough that float16 keeps its small entries, too.
LARGEST_GRADIENT = 16384.0


@triton.jit
def similarities(
    rows,
    row_strides,
    columns,
    column_strides,
    row_index,
    column_index,
    num_rows,
    num_columns,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A tile of the largest similarities over the queries, and which query each is of.

    DIM is a multiple of BLOCK_K, and features lie side by side: see `in_whole_blocks`.
    """
    # Beyond the end the last row is read again; whoever takes the tile leaves it out.
    row_index = tl.minimum(row_index, num_rows - 1)
    column_index = tl.minimum(column_index, num_columns - 1)
    row_pointer = rows + row_index[:, None].to(tl.int64) * row_strides[0]
    column_pointer = columns + column_index[None, :].to(tl.int64) * column_strides[0]
    largest = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    query_index = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for query in range(QUERIES):
        product = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for first in range(0, DIM, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            x = tl.load(row_pointer + query * row_strides[1] + k[None, :])
            y = tl.load(column_pointer + k[:, None])
            product = tl.dot(x, y, product, input_precision=PRECISION)
        if QUERIES == 1:
            largest = product
        else:
            # The first of equals, and NaN once there is one.
            better = (
                (query == 0) | (product > largest) | ((product != product) & (largest == largest))
            )
            query_index = tl.where(better, query, query_index)
            largest = tl.where(better, product, largest)
    return largest, query_index


@triton.jit
def exponential(x):
    return tl.math.exp2(x * LOG2E)


@triton.jit
def finite(most):
    """A maximum as what may be subtracted: that of nothing must not turn -inf into NaN."""
    return tl.where(most == float("-inf"), 0.0, most)


@triton.jit
def log1p(x):
    """log(1 + x) for x in [0, 1], also where x is tiny: the rounding of 1 + x cancels."""
    shifted = 1.0 + x
    exact = shifted == 1.0
    return tl.where(exact, x, tl.log(shifted) * (x / tl.where(exact, 1.0, shifted - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(exponential(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = exponential(-tl.abs(x))
    return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)


@triton.jit
def tile_masks(row_index, column_index, num_rows, num_columns, first_column):
    """Which elements of a tile exist, and which are pairs."""
    inside = (row_index < num_rows)[:, None] & (column_index < num_columns)[None, :]
    return inside, inside & (column_index[None, :] == row_index[:, None] + first_column)


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_column", "tiles_per_program"])
def contrastive_loss_fwd_kernel(
    rows,
    row_strides,
    columns,
    column_strides,
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
    HAS_BIAS: tl.constexpr,
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
            row_strides,
            columns,
            column_strides,
            row_index,
            column_index,
            num_rows,
            num_columns,
            DIM,
            QUERIES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        logits = logits * factor
        if HAS_BIAS:
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


@triton.jit(do_not_specialize=["num_rows", "num_columns", "first_column", "tiles_per_program"])
def contrastive_loss_bwd_kernel(
    rows,
    row_strides,
    columns,
    column_strides,
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
    grad_scale,
    grad_bias,
    num_rows,
    num_columns,
    first_column,
    row_tiles,
    tiles_per_program,
    DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SIGMOID: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STORE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """G of one tile of rows by a strip of column tiles, to gradient (rows, queries, columns).

    Sums of G and of G * similarity go to [strip, row].
    """
    row_tile = tl.program_id(0) % row_tiles
    strip = tl.program_id(0) // row_tiles
    row_index = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    exists = row_index < num_rows
    factor = tl.load(scale)
    of_total = tl.load(of_row_total + row_index, mask=exists, other=0.0)
    of_pair = tl.load(of_positive + row_index, mask=exists, other=0.0)
    if ROWS:
        of_sum = tl.load(of_row_sum + row_index, mask=exists, other=0.0)
        row_shift = finite(tl.load(row_max + row_index, mask=exists, other=0.0))
    scale_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    bias_sums = tl.zeros([BLOCK_M], dtype=tl.float32)
    for tile in range(strip * tiles_per_program, (strip + 1) * tiles_per_program):
        column_index = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        column_exists = column_index < num_columns
        similarity, query_index = similarities(
            rows,
            row_strides,
            columns,
            column_strides,
            row_index,
            column_index,
            num_rows,
            num_columns,
            DIM,
            QUERIES,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            PRECISION,
        )
        inside, paired = tile_masks(row_index, column_index, num_rows, num_columns, first_column)
        logits = similarity * factor
        if HAS_BIAS:
            logits += tl.load(bias)
        # The maxima are of rounded products, which an exact one exceeds by what grows with the
        # logits. This keeps the compiler from fusing product and difference.
        logits = tl.where(inside, logits, float("-inf"))
        grads = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32) + of_total[:, None]
        if ROWS:
            if SIGMOID:
                grads += of_sum[:, None] * sigmoid(logits)
            else:
                grads += of_sum[:, None] * exponential(logits - row_shift[:, None])
        if COLUMNS:
            of_column = tl.load(of_column_sum + column_index, mask=column_exists, other=0.0)
            shift = finite(tl.load(column_max + column_index, mask=column_exists, other=0.0))
            grads += of_column[None, :] * exponential(logits - shift[None, :])
        grads = tl.where(paired, of_pair[:, None], grads)
        grads = tl.where(inside, grads, 0.0)
        scale_sums += tl.sum(tl.where(inside, grads * similarity, 0.0), 1)
        bias_sums += tl.sum(grads, 1)
        if STORE:
            stored = grads * tl.load(stored_factor)
            at = row_index[:, None].to(tl.int64) * (QUERIES * num_columns) + column_index[None, :]
            for query in range(QUERIES):
                counts = stored
                if QUERIES > 1:
                    counts = tl.where(query_index == query, stored, 0.0)
                tl.store(
                    gradient + at + query * num_columns,
                    counts.to(gradient.dtype.element_ty),
                    mask=inside,
                )
    at = strip.to(tl.int64) * num_rows + row_index
    tl.store(grad_scale + at, scale_sums, mask=exists)
    tl.store(grad_bias + at, bias_sums, mask=exists)


def strips(row_tiles: int, column_tiles: int) -> tuple[int, int]:
    """Strips that the columns are cut into, and column tiles of each."""
    per_program = max(1, row_tiles * column_tiles // PROGRAMS)
    return triton.cdiv(column_tiles, per_program), per_program


def launch(kernel: str, rows: torch.Tensor, run) -> None:
    """Runs with the launch that fits; with several queries more is kept in registers."""
    shape = configs.ShapeClass(
        kernel, precision_of(rows), rows.shape[2], rows.shape[0], plain=rows.shape[1] == 1
    )
    run_with_launch(shape, rows, run)


def block_k(tensor: torch.Tensor) -> int:
    return 64 if tensor.dtype != torch.float32 else 32


def in_whole_blocks(features: torch.Tensor) -> torch.Tensor:
    """The features side by side, with zeros up to a multiple of the block: a copy where need be.

    Masks and odd strides in the innermost loop would cost far more.
    """
    missing = -features.shape[-1] % block_k(features)
    if missing:
        return torch.nn.functional.pad(features, (0, missing))
    return features if features.stride(-1) == 1 else features.contiguous()


def shape_constants(rows: torch.Tensor, launch: Launch) -> dict:
    return {
        "DIM": rows.shape[2],
        "QUERIES": rows.shape[1],
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": block_k(rows),
        "PRECISION": input_precision(rows),
        "launch": launch,
    }


def bounded(first_column: int) -> int:
    """Beyond these bounds no row has a pair."""
    return max(-(1 << 29), min(1 << 29, first_column))


def merge(maxima: torch.Tensor, sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum and sum of (parts, n) partial ones, which are overwritten."""
    if maxima.shape[0] == 0:
        return maxima.new_full(maxima.shape[1:], -torch.inf), sums.new_zeros(sums.shape[1:])
    most = maxima.amax(0)
    maxima.sub_(most.masked_fill(most == -torch.inf, 0.0)).exp_()
    return most, sums.mul_(maxima).sum(0)


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
    n, m = rows.shape[0], columns.shape[0]
    check_lengths(rows=n, columns=m)
    rows, columns = in_whole_blocks(rows), in_whole_blocks(columns)
    results: list[torch.Tensor] = []

    def run(launch: Launch) -> None:
        row_tiles = triton.cdiv(n, launch.block_m)
        count, per_program = strips(row_tiles, triton.cdiv(m, launch.block_n))
        empty = {"dtype": torch.float32, "device": rows.device}
        of_rows = [torch.empty((count, n), **empty) for _ in range(4)]
        m_kept = m if column_statistics else 0
        of_columns = [torch.empty((row_tiles, m_kept), **empty) for _ in range(2)]
        run_kernel(
            contrastive_loss_fwd_kernel,
            row_tiles * count,
            rows,
            rows.stride(),
            columns,
            columns.stride(),
            scale,
            bias,
            *of_rows,
            *of_columns,
            n,
            m,
            bounded(first_column),
            row_tiles,
            per_program,
            HAS_BIAS=bias is not None,
            SIGMOID=sigmoid,
            COLUMN_STATISTICS=column_statistics,
            **shape_constants(rows, launch),
        )
        if sigmoid:
            row_max, row_sum = torch.zeros(n, **empty), of_rows[1].sum(0)
        else:
            row_max, row_sum = merge(*of_rows[:2])
        totals = (of_rows[2].sum(0), of_rows[3].sum(0))
        results[:] = [row_max, row_sum, *totals, *merge(*of_columns)]

    launch("contrastive_loss_fwd", rows, run)
    return tuple(results)


def product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left @ right in float32, by the library."""
    if left.dtype == torch.float32 or left.device.type == "cuda":
        out = {} if left.dtype == torch.float32 else {"out_dtype": torch.float32}
        return torch.mm(left, right, **out)
    return left.float() @ right.float()


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
    n, queries, dim = rows.shape
    m = columns.shape[0]
    check_lengths(rows=n, columns=m)
    dtype = torch.float32 if float32_grads else rows.dtype
    zeros = torch.zeros(n, dtype=torch.float32, device=rows.device)
    of_sum, of_total, of_positive = (
        zeros if x is None else x.contiguous()
        for x in (grad_row_sum, grad_row_total, grad_positive)
    )
    of_column = None if grad_column_sum is None else grad_column_sum.contiguous()
    factor = storage_factor(of_sum, of_total, of_positive, of_column)
    store = rows_grad or columns_grad
    chunk = max(1, CHUNK_BYTES // max(1, m * queries * rows.element_size()))
    chunk = min(n, triton.cdiv(chunk, 128) * 128)
    buffer = rows.new_empty((chunk, queries, m) if store else 0)
    grad_rows = rows.new_empty(rows.shape if rows_grad else 0, dtype=dtype)
    column_sums = torch.zeros(
        columns.shape if columns_grad else 0, dtype=torch.float32, device=rows.device
    )
    unstored = scale / factor
    whole_rows, whole_columns = in_whole_blocks(rows), in_whole_blocks(columns)
    shares = []
    for first in range(0, n, max(1, chunk)):
        part = slice(first, min(n, first + chunk))
        gradient = buffer[: part.stop - first]
        vectors = (of_sum[part], of_total[part], of_positive[part], of_column, row_max[part])
        arguments = (whole_rows[part], whole_columns, scale, bias, *vectors, column_max)
        shares.append(
            gradients(
                arguments,
                factor,
                gradient,
                bounded(first_column) + first,
                sigmoid,
                grad_row_sum is not None,
                store,
            )
        )
        flat = gradient.flatten(0, 1) if store else gradient
        if rows_grad:
            product_of_rows = product(flat, columns) * unstored
            grad_rows[part] = product_of_rows.unflatten(0, (-1, queries)).to(dtype)
        if columns_grad:
            column_sums += product(flat.T, rows[part].reshape(-1, dim))
    sums = (
        torch.stack([share.sum((1, 2)) for share in shares]).sum(0)
        if shares
        else zeros.new_zeros(2)
    )
    return (
        grad_rows,
        column_sums.mul_(unstored).to(dtype),
        sums[0] if scale_grad else scale.new_empty(0),
        sums[1] if bias_grad else scale.new_empty(0),
    )


def storage_factor(*vectors: torch.Tensor | None) -> torch.Tensor:
    """A power of two by which G is multiplied where it is stored, so that float16 can hold it."""
    given = [x.abs().amax() for x in vectors if x is not None and x.numel()]
    if not given:
        return torch.ones(())
    bound = torch.stack(given).sum()
    power = torch.exp2(torch.floor(torch.log2(LARGEST_GRADIENT / bound)))
    return torch.where((bound > 0) & power.isfinite(), power, 1.0)


def gradients(
    arguments: tuple,
    factor: torch.Tensor,
    gradient: torch.Tensor,
    first_column: int,
    sigmoid: bool,
    of_rows: bool,
    store: bool,
) -> torch.Tensor:
    """Fills the G of some rows; gives (2, strips, rows) sums of G * similarity and of G."""
    rows, columns, scale, bias, *vectors = arguments
    of_column = vectors[3]
    n, m = rows.shape[0], columns.shape[0]
    results: list[torch.Tensor] = []

    def run(launch: Launch) -> None:
        row_tiles = triton.cdiv(n, launch.block_m)
        count, per_program = strips(row_tiles, triton.cdiv(m, launch.block_n))
        shares = torch.empty((2, count, n), dtype=torch.float32, device=rows.device)
        run_kernel(
            contrastive_loss_bwd_kernel,
            row_tiles * count,
            rows,
            rows.stride(),
            columns,
            columns.stride(),
            scale,
            bias,
            *vectors,
            factor,
            gradient,
            *shares,
            n,
            m,
            first_column,
            row_tiles,
            per_program,
            HAS_BIAS=bias is not None,
            SIGMOID=sigmoid,
            ROWS=of_rows,
            COLUMNS=of_column is not None,
            STORE=store,
            **shape_constants(rows, launch),
        )
        results[:] = [shares]

    launch("contrastive_loss_bwd", rows, run)
    return results[0]
