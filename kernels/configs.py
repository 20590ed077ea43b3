"""Launch configurations: data, and how a launcher finds the row that fits.

A row is chosen by kernel, architecture, dtype class ("half": float16 and bfloat16, "float":
float32), the columns that a head dimension covers on chip, and the number of queries or keys that
the kernel walks. The first row that is large enough wins; a kernel without one cannot take the
shape. With VLMFAST_AUTOTUNE=1 the first call of each shape class times the candidates of `search`
instead; what it found stands in `searched` and prints as rows of the same form.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import triton

ARCHITECTURES = (80, 86, 90, 100, 120)  # 89 is served by 86

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


class Launch(NamedTuple):
    """Queries and keys to a tile, warps to a program, depth of the software pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Row(NamedTuple):
    """A launch for head dimensions up to `columns` and up to `rows` queries or keys."""

    columns: int
    rows: int
    launch: Launch


def _rows(*rows: tuple) -> tuple[Row, ...]:
    return tuple(Row(columns, limit, Launch(*launch)) for columns, limit, *launch in rows)


_FORWARD = {
    (90, "half"): _rows(
        (64, 64, 64, 64, 4, 3),
        (64, UNLIMITED, 128, 64, 4, 3),
        (128, 64, 64, 64, 4, 2),
        (128, UNLIMITED, 128, 64, 8, 2),
        (256, UNLIMITED, 64, 64, 8, 2),
    ),
    (90, "float"): _rows((64, UNLIMITED, 64, 32, 8, 2), (256, UNLIMITED, 32, 32, 8, 1)),
}
_BACKWARD_KEY_VALUE = {
    (90, "half"): _rows(
        (64, UNLIMITED, 64, 128, 8, 2),
        (128, UNLIMITED, 64, 64, 8, 2),
        (256, UNLIMITED, 32, 64, 8, 1),
    ),
    (90, "float"): _rows((64, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 32, 32, 8, 1)),
}
_BACKWARD_QUERY = {
    (90, "half"): _rows(
        (64, UNLIMITED, 128, 64, 8, 2),
        (128, UNLIMITED, 64, 64, 8, 2),
        (256, UNLIMITED, 64, 32, 8, 1),
    ),
    (90, "float"): _rows((64, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 32, 32, 8, 1)),
}
_BACKWARD_WHOLE = {
    (90, "half"): _rows((64, 272, 64, 0, 8, 2)),
    (90, "float"): (),
}
_BACKWARD_MASK = {
    (90, "half"): _rows((128, UNLIMITED, 64, 64, 4, 1), (256, UNLIMITED, 64, 32, 8, 1)),
    (90, "float"): _rows((256, UNLIMITED, 32, 32, 8, 1)),
}
_BACKWARD_DELTA = {
    (90, "half"): _rows((256, UNLIMITED, 64, 0, 4, 1)),
    (90, "float"): _rows((256, UNLIMITED, 64, 0, 4, 1)),
}

TABLE: dict[str, dict[tuple[int, str], tuple[Row, ...]]] = {
    "flash_attention_fwd": _FORWARD,
    "flash_attention_bwd_key_value": _BACKWARD_KEY_VALUE,
    "flash_attention_bwd_query": _BACKWARD_QUERY,
    "flash_attention_bwd_whole": _BACKWARD_WHOLE,
    "flash_attention_bwd_mask": _BACKWARD_MASK,
    "flash_attention_bwd_delta": _BACKWARD_DELTA,
}

INTERPRETED_ARCHITECTURE = 90  # whose rows CPU tensors take under TRITON_INTERPRET=1

_overrides: dict[str, Launch | None] = {}


def architecture(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0."""
    if device.type != "cuda":
        return INTERPRETED_ARCHITECTURE
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def table_architecture(arch: int) -> int:
    """The newest architecture of the table that is not newer than `arch`."""
    return max((known for known in ARCHITECTURES if known <= arch), default=ARCHITECTURES[0])


def dtype_class(dtype: torch.dtype) -> str:
    return "float" if dtype == torch.float32 else "half"


@contextlib.contextmanager
def override(**launches: Launch | None) -> Iterator[None]:
    """Within the block, kernels named here take this launch whatever the table says."""
    before = dict(_overrides)
    _overrides.update(launches)
    try:
        yield
    finally:
        _overrides.clear()
        _overrides.update(before)


def find_row(kernel: str, arch: int, dtype: torch.dtype, columns: int, rows: int) -> Row | None:
    table_rows = TABLE[kernel][table_architecture(arch), dtype_class(dtype)]
    fitting = (row for row in table_rows if columns <= row.columns and rows <= row.rows)
    return next(fitting, None)


def lookup(
    kernel: str, device: torch.device, dtype: torch.dtype, columns: int, rows: int
) -> Launch | None:
    """Launch of a kernel for this device and shape class; None where it cannot take them."""
    if kernel in _overrides:
        return _overrides[kernel]
    row = find_row(kernel, architecture(device), dtype, columns, rows)
    return row.launch if row is not None else None


def fills_device(device: torch.device, programs: int) -> bool:
    """Whether so many programs occupy at least half of the device's multiprocessors."""
    if device.type != "cuda":
        return True
    return 2 * programs >= torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    rows: int,
    run: Callable[[Launch], None],
) -> None:
    """Call `run` with the launch that fits; every call of it must give the same results."""
    if os.environ.get("VLMFAST_AUTOTUNE") == "1" and kernel not in _overrides:
        key = (kernel, architecture(device), dtype_class(dtype), columns, rows)
        if key not in searched:
            searched[key] = search(kernel, device, dtype, columns, rows, run)
            print(f"vlmfast autotune: {key[:3]}: {searched[key]}")
        run(searched[key].launch)
        return
    found = lookup(kernel, device, dtype, columns, rows)
    if found is None:
        raise NotImplementedError(
            f"{kernel} has no launch configuration for {dtype}, {columns} columns, {rows} rows"
        )
    run(found)


searched: dict[tuple, Row] = {}


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


def search(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    columns: int,
    rows: int,
    run: Callable[[Launch], None],
    timer: Callable[[Callable[[], None]], float] = triton.testing.do_bench,
) -> Row:
    """The fastest of the candidates for one shape, as a row of the table."""
    shipped = lookup(kernel, device, dtype, columns, rows)
    if shipped is None:
        raise NotImplementedError(f"{kernel} has no row to start the search from")
    times = {}
    for candidate in candidates(shipped):
        try:
            times[candidate] = timer(functools.partial(run, candidate))
        except triton.runtime.errors.OutOfResources:
            continue  # this tile does not fit on the device
    return Row(columns, rows, min(times, key=times.__getitem__))
