"""Launching kernels: the configurations to choose from, and what every family's launcher needs.

A configuration is a row of a family's table, `TABLES` of `<family>/configs.py`. It is chosen by
kernel, architecture, precision ("half": float16 and bfloat16; "tf32" and "ieee": float32 as its
products are rounded), the columns that a head dimension covers on chip, and the number of queries
or keys that the kernel walks. The first row that is large enough wins; a kernel without one cannot
take the shape. Whatever hides or drops scores takes registers: a row marked PLAIN would spill with
it and serves only calls without mask, causality, dropout and packing. One marked REPEATS has more
warps than its tile has parts, and computes some products more than once.

With VLMFAST_AUTOTUNE=1 the first call of each shape class times the candidates of `search`
instead; what it found stands in `searched` and prints as rows of the same form.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import triton

from vlmfast.kernels.common import Dropout, Strided

ARCHITECTURES = (80, 86, 90, 100, 120)  # 89 is served by 86
INTERPRETED_ARCHITECTURE = 90  # whose rows CPU tensors take under TRITON_INTERPRET=1

# Bytes of shared memory that one block may use (CUDA C++ Programming Guide, compute capabilities).
SHARED_MEMORY = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}

UNLIMITED = 1 << 40
PLAIN = "plain"
REPEATS = "repeats"

LONGEST = 1 << 29  # rows or windows: their numbers, and those of a block beyond, fit 32 bits

SMALLEST_PIECE = 16  # tl.dot takes nothing narrower
MOST_PIECES = 4


class Launch(NamedTuple):
    """Queries and keys to a tile, warps to a program, depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """A launch for head dimensions up to `columns` and up to `rows` queries or keys.

    With `repeats` its warps compute some products more than once: on sm_90 in half precision the
    table says beside it why it must, and no other row does.
    """

    columns: int
    rows: int
    launch: Launch
    plain_only: bool = False
    repeats: bool = False


class ShapeClass(NamedTuple):
    """What a row is looked up by, besides the device."""

    kernel: str
    precision: str
    columns: int
    rows: int
    plain: bool


Table = Mapping[tuple[int, str], tuple[Row, ...]]  # one kernel's, by architecture and precision


def rows(*rows: tuple) -> tuple[Row, ...]:
    """Rows from tuples of columns, rows, the launch's four numbers and perhaps PLAIN, REPEATS."""
    return tuple(
        Row(row[0], row[1], Launch(*row[2:6]), PLAIN in row[6:], REPEATS in row[6:]) for row in rows
    )


def table(
    sm_90: tuple[Row, ...],
    sm_100: tuple[Row, ...],
    mma_sync: tuple[Row, ...],
    tf32: tuple[Row, ...],
    ieee: tuple[Row, ...],
) -> Table:
    """Rows by architecture and precision.

    The first three are for half precision; sm_80, sm_86 and sm_120 share theirs, which fit the
    smallest shared memory among them, as do those for float32.
    """
    half = {80: mma_sync, 86: mma_sync, 90: sm_90, 100: sm_100, 120: mma_sync}
    by_precision = {(arch, "half"): half[arch] for arch in ARCHITECTURES}
    for arch in ARCHITECTURES:
        by_precision[arch, "tf32"] = tf32
        by_precision[arch, "ieee"] = ieee
    return by_precision


@functools.cache
def architecture(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def table_architecture(arch: int) -> int:
    """The newest architecture of the tables that is not newer than `arch`."""
    return max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])


def find_row(table: Table, shape: ShapeClass, arch: int) -> Row | None:
    for row in table[table_architecture(arch), shape.precision]:
        fits = shape.columns <= row.columns and shape.rows <= row.rows
        if fits and (shape.plain or not row.plain_only):
            return row
    return None


_overrides: dict[str, Launch | None] = {}


@contextlib.contextmanager
def override(**launches: Launch | None) -> Iterator[None]:
    """Within the block, kernels named here take this launch whatever their table says."""
    before = dict(_overrides)
    _overrides.update(launches)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def find_launch(table: Table, shape: ShapeClass, device: torch.device) -> Launch | None:
    """Launch of a kernel for this shape and device; None where it cannot take them."""
    if shape.kernel in _overrides:
        return _overrides[shape.kernel]
    row = find_row(table, shape, architecture(device))
    return row.launch if row is not None else None


searched: dict[tuple[int, ShapeClass], Row] = {}


def run_with_launch(
    table: Table, shape: ShapeClass, device: torch.device, run: Callable[[Launch], None]
) -> None:
    """Call `run` with the launch that fits; every call of it must give the same results."""
    launch = find_launch(table, shape, device)
    if launch is None:
        raise NotImplementedError(f"no launch configuration for {shape}")
    with device_guard(device):
        if os.environ.get("VLMFAST_AUTOTUNE") == "1" and shape.kernel not in _overrides:
            key = (architecture(device), shape)
            if key not in searched:
                searched[key] = found = search(shape, launch, run)
                print(f"vlmfast autotune: sm_{key[0]} {shape.kernel} {shape.precision}: {found}")
            launch = searched[key].launch
        run(launch)


def device_guard(device: torch.device) -> contextlib.AbstractContextManager:
    """Makes a GPU the current one: Triton launches on whichever is current."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _NO_GUARD
    return torch.cuda.device(device)


_NO_GUARD = contextlib.nullcontext()


def search(
    shape: ShapeClass,
    shipped: Launch,
    run: Callable[[Launch], None],
    timer: Callable[[Callable[[], None]], float] = triton.testing.do_bench,
) -> Row:
    """The fastest of the candidates for one shape, as a row of the table."""
    times = {}
    for candidate in candidates(shipped):
        try:
            times[candidate] = timer(functools.partial(run, candidate))
        except triton.runtime.errors.OutOfResources:
            continue  # this tile does not fit on the device
    fastest = min(times, key=times.__getitem__)
    return Row(shape.columns, shape.rows, fastest, plain_only=shape.plain)


def candidates(shipped: Launch) -> Iterable[Launch]:
    """Launches near the shipped one, itself first."""
    yield shipped
    for block_m, block_n, num_warps, num_stages in itertools.product(
        neighbours(shipped.block_m, 16, 128),
        neighbours(shipped.block_n, 16, 128),
        neighbours(shipped.num_warps, 4, 8),
        (1, 2, 3),
    ):
        candidate = Launch(block_m, block_n, num_warps, num_stages)
        if candidate != shipped:
            yield candidate


def neighbours(size: int, smallest: int, largest: int) -> tuple[int, ...]:
    """Half, the same and double, within the bounds; 0 means that a kernel has no such block."""
    if size == 0:
        return (0,)
    return tuple(n for n in (size // 2, size, 2 * size) if n == size or smallest <= n <= largest)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many the device has; one for what only interprets or compiles."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


M = TypeVar("M", bound=Callable[..., Any])


def once(method: M) -> M:
    """A problem's method that is asked once for the same arguments: its kernels share the answer.

    functools.cached_property has no arguments.
    """
    name = method.__name__

    @functools.wraps(method)
    def answer(self: Any, *arguments: Any) -> Any:
        key = name, arguments
        known = self.__dict__
        if key not in known:
            known[key] = method(self, *arguments)
        return known[key]

    return answer  # type: ignore[return-value]


class Problem:
    """What the kernels of one call have in common, as the operators receive it.

    A family's own is a dataclass that says what its shape class is, and makes the arguments that
    its kernels share. Nothing changes its fields; it is not frozen, because that makes it slow to
    make.
    """

    TABLES: ClassVar[Mapping[str, Table]]  # by kernel

    @property
    def device(self) -> torch.device:
        raise NotImplementedError

    def shape_class(self, kernel: str, rows: int) -> ShapeClass:
        """What the kernel's table is asked for, where it walks `rows` queries or keys."""
        raise NotImplementedError

    def find_launch(self, kernel: str, rows: int) -> Launch | None:
        """The kernel's launch; None where it cannot take the shape."""
        return find_launch(self.TABLES[kernel], self.shape_class(kernel, rows), self.device)

    def launch(self, kernel: str, rows: int, run: Callable[[Launch], None]) -> None:
        """Calls `run`, which starts the kernel, with its launch for walking `rows` rows."""
        run_with_launch(self.TABLES[kernel], self.shape_class(kernel, rows), self.device, run)

    def fills_device(self, programs: int) -> bool:
        """Whether so many programs occupy at least half of the device's multiprocessors."""
        return self.device.type != "cuda" or 2 * programs >= multiprocessors(self.device)


def start(kernel: triton.JITFunction, programs: int, launch: Launch, **arguments: Any) -> None:
    """Starts a kernel as a row of programs; its parameters go by their names."""
    if programs >= 1 << 31:
        raise ValueError(
            f"batch, heads, lengths: expected to make fewer than 2**31 blocks, got {programs}"
        )
    if programs > 0:
        # kernel[grid](...) is this, by way of one more function that collects all arguments.
        kernel.run(
            grid=(programs,),
            warmup=False,
            **arguments,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
        )


def ceil_div(length: int, block: int) -> int:
    """How many blocks cover the length; triton.cdiv, in a small part of its time."""
    return -(-length // block)


def next_power_of_2(n: int) -> int:
    """The smallest that is not below n, and 1 for 0; triton's own, in a small part of its time."""
    return 1 << max(n - 1, 0).bit_length()


def check_lengths(**lengths: int) -> None:
    """Raises ValueError for what kernels cannot count in 32 bits."""
    for name, length in lengths.items():
        if length > LONGEST:
            raise ValueError(f"{name}: expected at most {LONGEST}, got {length}")


# Shapes and strides whose consequences are remembered, of each kind; few calls have many.
REMEMBERED = 4096


def stride_unit(*tensors: torch.Tensor | None) -> int:
    """8 where every stride but the last dimension's is a multiple of 8 elements, else 1."""
    for x in tensors:
        if x is not None and not counts_in_eights(x.shape, x.stride()):
            return 1
    return 8


@functools.lru_cache(REMEMBERED)
def counts_in_eights(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    return all(s % 8 == 0 for s in element_strides(shape, strides)[:-1])


def element_strides(shape: tuple[int, ...], strides: tuple[int, ...]) -> list[int]:
    """A dimension of size 1 has stride 0, whatever torch says."""
    return [s if n > 1 else 0 for n, s in zip(shape, strides, strict=True)]


def strided(tensor: torch.Tensor | None, unit: int = 1) -> Strided | None:
    """A tensor as kernels take it."""
    if tensor is None:
        return None
    return Strided(tensor, strides_in_units(tensor.shape, tensor.stride(), unit))


@functools.lru_cache(REMEMBERED)
def strides_in_units(
    shape: tuple[int, ...], strides: tuple[int, ...], unit: int
) -> tuple[int, ...]:
    *others, last = element_strides(shape, strides)
    return (*(s // unit for s in others), last)


def dense_like(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Uninitialised (B, H, L, D) tensor in the dimension order of `tensor`, without gaps."""
    _, head, row, _ = tensor.stride()
    if head < row:
        return tensor.new_empty_strided(shape, strides_of_heads_inside_rows(shape))
    return tensor.new_empty(shape)


@functools.lru_cache(REMEMBERED)
def strides_of_heads_inside_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    batch, heads, rows, columns = shape
    return torch.empty((batch, rows, heads, columns), device="meta").transpose(1, 2).stride()


def dropout(dropout_p: float, seed: torch.Tensor | None) -> Dropout:
    """As kernels take it: an element whose 32 random bits fall below the threshold is dropped.

    The threshold is the int32 of the bits of an unsigned one; nothing is kept at dropout_p 1.
    """
    threshold = min(int(dropout_p * 2**32), 2**32 - 1)
    scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    return Dropout(seed, threshold - 2**32 if threshold >= 2**31 else threshold, scale)


def precision_of(tensor: torch.Tensor) -> str:
    """ "half", or how products of float32 are rounded, as torch's own are: "tf32" or "ieee"."""
    if tensor.dtype != torch.float32:
        return "half"
    # allow_tf32 reads the same setting, but raises once the newer name has been written to.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def input_precision(tensor: torch.Tensor) -> str:
    """What `tl.dot` is told; it does not ask where the inputs are in half precision."""
    return "tf32" if precision_of(tensor) == "tf32" else "ieee"


def split_into_pieces(
    size: int, largest: int = 256, most: int = MOST_PIECES
) -> tuple[tuple[int, int], ...]:
    """Cover `size` columns by at most `most` power-of-two widths, wasting as little as possible.

    >>> split_into_pieces(88)
    ((0, 64), (64, 32))
    """
    widths = [SMALLEST_PIECE << i for i in range(8) if SMALLEST_PIECE << i <= largest]
    choices = (
        choice
        for count in range(1, most + 1)
        for choice in itertools.combinations_with_replacement(reversed(widths), count)
        if sum(choice) >= size
    )
    best = min(choices, key=lambda choice: (sum(choice), len(choice)), default=None)
    if best is None:
        raise ValueError(f"size: expected at most {most * largest}, got {size}")
    starts = itertools.accumulate(best[:-1], initial=0)
    return tuple(zip(starts, best, strict=True))


def covered_columns(pieces: tuple[tuple[int, int], ...]) -> int:
    return sum(width for _, width in pieces)


@functools.cache
def head_pieces(size: int, precision: str, largest: int = 256) -> tuple[tuple[int, int], ...]:
    """The tiles that a head dimension is split into.

    Without tensor cores a product is unrolled along its inner dimension; wider tiles than 64 would
    then spill.
    """
    return split_into_pieces(size, largest=64 if precision == "ieee" else largest)


@functools.cache
def head_columns(size: int, precision: str) -> int:
    """The columns that those tiles cover on chip."""
    return covered_columns(head_pieces(size, precision))


P = TypeVar("P", bound=Problem)


def with_positive_scale(problem: P) -> tuple[P, float]:
    """A family's problem with scale > 0, and the factor that the queries were multiplied by.

    Kernels take the maximum of scores before they scale them, which wants a positive scale. Any
    other (nobody uses one) costs a copy of the queries.
    """
    if not problem.scale <= 0.0:
        return problem, 1.0
    factor = -1.0 if problem.scale < 0.0 else 0.0
    scale = -problem.scale if problem.scale < 0.0 else 1.0
    return dataclasses.replace(problem, query=problem.query * factor, scale=scale), factor


class Saved(NamedTuple):
    """What the backward takes besides the problem; statistics are contiguous float32."""

    out: torch.Tensor
    logsumexp: torch.Tensor
    grad_out: torch.Tensor
    grad_logsumexp: torch.Tensor | None


def saved_for_backward(
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
) -> Saved:
    """From an operator's arguments."""
    if grad_logsumexp is not None:
        grad_logsumexp = grad_logsumexp.to(torch.float32).contiguous()
    return Saved(out, logsumexp.contiguous(), grad_out.to(out.dtype), grad_logsumexp)
