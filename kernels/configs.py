"""Launch configurations: data, and how a launcher finds the row that fits.

A row is chosen by kernel, architecture, precision ("half": float16 and bfloat16; "tf32" and "ieee":
float32 as its products are rounded), the columns that a head dimension covers on chip, and the
number of queries or keys that the kernel walks. The first row that is large enough wins; a kernel
without one cannot take the shape. Whatever hides or drops scores takes registers: a row marked
PLAIN would spill with it and serves only calls without mask, causality, dropout and packing.

With VLMFAST_AUTOTUNE=1 the first call of each shape class times the candidates of `search`
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
    plain_only: bool = False


class ShapeClass(NamedTuple):
    """What a row is looked up by, besides the device."""

    kernel: str
    precision: str
    columns: int
    rows: int
    plain: bool


PLAIN = "plain"


def _rows(*rows: tuple) -> tuple[Row, ...]:
    """Rows from tuples of columns, rows, the launch's four numbers and perhaps PLAIN."""
    return tuple(Row(row[0], row[1], Launch(*row[2:6]), row[6:] == (PLAIN,)) for row in rows)


Table = dict[tuple[int, str], tuple[Row, ...]]


def _table(
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
    table: Table = {(arch, "half"): half[arch] for arch in ARCHITECTURES}
    for arch in ARCHITECTURES:
        table[arch, "tf32"] = tf32
        table[arch, "ieee"] = ieee
    return table


_FORWARD_90 = _rows(
    (64, 64, 64, 64, 4, 3),
    (64, UNLIMITED, 128, 64, 4, 3, PLAIN),
    (64, UNLIMITED, 128, 64, 8, 3),
    (112, 64, 64, 64, 4, 2),
    (112, UNLIMITED, 128, 64, 8, 2),
    (128, 64, 64, 64, 4, 2, PLAIN),
    (128, UNLIMITED, 128, 64, 8, 2, PLAIN),
    (128, UNLIMITED, 128, 32, 8, 2),
    (256, UNLIMITED, 64, 64, 8, 2, PLAIN),
    (256, UNLIMITED, 64, 32, 8, 2),
)
_FORWARD = _table(
    sm_90=_FORWARD_90,
    sm_100=_FORWARD_90,
    mma_sync=_rows(
        (64, 64, 64, 64, 4, 2, PLAIN),
        (64, UNLIMITED, 128, 64, 8, 3, PLAIN),
        (64, UNLIMITED, 64, 32, 4, 2),
        (128, 64, 64, 32, 4, 2),
        (128, UNLIMITED, 128, 64, 8, 2, PLAIN),
        (128, UNLIMITED, 64, 32, 4, 2),
        (256, UNLIMITED, 64, 32, 8, 2),
    ),
    tf32=_rows(
        (64, UNLIMITED, 64, 32, 8, 2),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    ieee=_rows(
        (64, UNLIMITED, 64, 32, 8, 2, PLAIN),
        (64, UNLIMITED, 32, 32, 4, 1),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
)

_BACKWARD_KEY_VALUE_90 = _rows(
    (64, UNLIMITED, 64, 128, 8, 2),
    (80, UNLIMITED, 64, 64, 8, 2),
    (128, UNLIMITED, 64, 64, 8, 2, PLAIN),
    (128, UNLIMITED, 32, 64, 8, 2),
    (256, UNLIMITED, 64, 32, 8, 1),
)
_BACKWARD_KEY_VALUE = _table(
    sm_90=_BACKWARD_KEY_VALUE_90,
    sm_100=_BACKWARD_KEY_VALUE_90,
    mma_sync=_rows(
        (64, UNLIMITED, 64, 128, 8, 2, PLAIN),
        (64, UNLIMITED, 32, 64, 4, 2),
        (112, UNLIMITED, 32, 64, 8, 2, PLAIN),
        (112, UNLIMITED, 32, 32, 4, 1),
        (128, UNLIMITED, 64, 64, 8, 2),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    tf32=_rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 16, 32, 8, 1),
        (256, UNLIMITED, 16, 16, 8, 1),
    ),
    ieee=_rows((128, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
)

_BACKWARD_QUERY_90 = _rows(
    (64, UNLIMITED, 128, 64, 8, 2),
    (128, UNLIMITED, 128, 32, 8, 2),
    (256, UNLIMITED, 32, 64, 8, 1),
)
_BACKWARD_QUERY = _table(
    sm_90=_BACKWARD_QUERY_90,
    sm_100=_BACKWARD_QUERY_90,
    mma_sync=_rows(
        (64, UNLIMITED, 128, 64, 8, 2, PLAIN),
        (64, UNLIMITED, 64, 32, 4, 2),
        (128, UNLIMITED, 128, 32, 8, 2),
        (256, UNLIMITED, 32, 64, 8, 1),
    ),
    tf32=_rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 32, 16, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    ieee=_rows((128, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1)),
)

_BACKWARD_WHOLE = _table(
    sm_90=_rows(
        (64, 64, 64, 64, 8, 1, PLAIN),
        (64, 64, 32, 64, 8, 2),
        (64, 128, 32, 128, 8, 2),
        (64, 256, 32, 128, 8, 2, PLAIN),
        (80, 128, 32, 128, 8, 1, PLAIN),
        (128, 64, 32, 64, 8, 1, PLAIN),
    ),
    sm_100=_rows(
        (64, 64, 64, 64, 8, 1),
        (64, 128, 32, 128, 8, 2),
        (64, 256, 16, 128, 8, 1, PLAIN),
        (80, 128, 32, 128, 8, 1),
        (128, 64, 32, 64, 8, 1),
    ),
    mma_sync=_rows(
        (64, 64, 32, 64, 8, 2),
        (64, 128, 32, 128, 8, 2),
        (128, 64, 32, 64, 8, 1),
    ),
    tf32=(),
    ieee=(),
)

# Only with a float mask, hence never PLAIN.
_BACKWARD_STATISTICS_90 = _rows((128, UNLIMITED, 128, 64, 8, 2), (256, UNLIMITED, 64, 64, 8, 2))
_BACKWARD_STATISTICS_FLOAT = _rows((128, UNLIMITED, 64, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1))
_BACKWARD_STATISTICS = _table(
    sm_90=_BACKWARD_STATISTICS_90,
    sm_100=_BACKWARD_STATISTICS_90,
    mma_sync=_rows((128, UNLIMITED, 64, 32, 4, 2), (256, UNLIMITED, 32, 32, 8, 2)),
    tf32=_BACKWARD_STATISTICS_FLOAT,
    ieee=_BACKWARD_STATISTICS_FLOAT,
)

_BACKWARD_MASK_HALF = _rows((128, UNLIMITED, 64, 64, 4, 1), (256, UNLIMITED, 64, 32, 8, 1))
_BACKWARD_MASK_FLOAT = _rows((64, UNLIMITED, 32, 32, 8, 1), (256, UNLIMITED, 16, 32, 8, 1))
_BACKWARD_MASK = _table(
    sm_90=_BACKWARD_MASK_HALF,
    sm_100=_BACKWARD_MASK_HALF,
    mma_sync=_BACKWARD_MASK_HALF,
    tf32=_BACKWARD_MASK_FLOAT,
    ieee=_BACKWARD_MASK_FLOAT,
)

_WINDOW_FORWARD_90 = _rows(
    (64, 64, 64, 64, 4, 2),
    (32, 144, 64, 64, 4, 2),
    (32, 256, 128, 64, 8, 2, PLAIN),
    (32, 256, 64, 64, 8, 2),
    (128, UNLIMITED, 64, 32, 8, 1),
)
_WINDOW_FORWARD_FLOAT = _rows((128, UNLIMITED, 32, 32, 8, 1))
_WINDOW_FORWARD = _table(
    sm_90=_WINDOW_FORWARD_90,
    sm_100=_WINDOW_FORWARD_90,
    mma_sync=_rows(
        (64, 64, 64, 64, 4, 2),
        (32, 256, 64, 64, 4, 2),
        (128, UNLIMITED, 64, 32, 8, 1),
    ),
    tf32=_WINDOW_FORWARD_FLOAT,
    ieee=_WINDOW_FORWARD_FLOAT,
)

_WINDOW_BACKWARD_WHOLE_HALF = _rows((32, 64, 64, 64, 8, 2, PLAIN))
_WINDOW_BACKWARD_WHOLE = _table(
    sm_90=_WINDOW_BACKWARD_WHOLE_HALF,
    sm_100=_WINDOW_BACKWARD_WHOLE_HALF,
    mma_sync=_WINDOW_BACKWARD_WHOLE_HALF,
    tf32=(),
    ieee=(),
)

_WINDOW_BACKWARD_QUERY_90 = _rows(
    (32, 144, 64, 32, 4, 2, PLAIN),
    (32, 144, 64, 32, 8, 1),
    (32, 256, 64, 64, 8, 2, PLAIN),
    (32, 256, 64, 32, 8, 2),
    (128, UNLIMITED, 64, 32, 8, 1),
)
_WINDOW_BACKWARD_KEY_VALUE_FLOAT = _rows((128, UNLIMITED, 16, 16, 8, 1))
_WINDOW_BACKWARD_BIAS_FLOAT = _rows((128, UNLIMITED, 32, 32, 8, 1))
_WINDOW_BACKWARD_QUERY = _table(
    sm_90=_WINDOW_BACKWARD_QUERY_90,
    sm_100=_WINDOW_BACKWARD_QUERY_90,
    mma_sync=_rows((32, 144, 64, 32, 4, 2), (128, UNLIMITED, 64, 32, 8, 1)),
    tf32=_rows((128, UNLIMITED, 16, 32, 8, 1)),
    ieee=_rows((128, UNLIMITED, 16, 16, 8, 1)),
)

_WINDOW_BACKWARD_KEY_VALUE_90 = _rows(
    (32, 256, 64, 64, 8, 2, PLAIN),
    (32, 144, 32, 64, 8, 1),
    (32, 256, 64, 32, 8, 1),
    (128, UNLIMITED, 64, 32, 8, 1),
)
_WINDOW_BACKWARD_KEY_VALUE = _table(
    sm_90=_WINDOW_BACKWARD_KEY_VALUE_90,
    sm_100=_WINDOW_BACKWARD_KEY_VALUE_90,
    mma_sync=_rows((32, 144, 64, 64, 8, 2), (128, UNLIMITED, 64, 32, 8, 1)),
    tf32=_WINDOW_BACKWARD_KEY_VALUE_FLOAT,
    ieee=_WINDOW_BACKWARD_KEY_VALUE_FLOAT,
)

_WINDOW_BACKWARD_BIAS_HALF = _rows(
    (32, UNLIMITED, 64, 64, 4, 2, PLAIN),
    (32, UNLIMITED, 64, 64, 8, 1),
    (128, UNLIMITED, 64, 32, 8, 1),
)
_WINDOW_BACKWARD_BIAS = _table(
    sm_90=_WINDOW_BACKWARD_BIAS_HALF,
    sm_100=_WINDOW_BACKWARD_BIAS_HALF,
    mma_sync=_WINDOW_BACKWARD_BIAS_HALF,
    tf32=_WINDOW_BACKWARD_BIAS_FLOAT,
    ieee=_WINDOW_BACKWARD_BIAS_FLOAT,
)

_BACKWARD_DELTA_ROWS = _rows((256, UNLIMITED, 64, 0, 4, 1))
_BACKWARD_DELTA = _table(*(_BACKWARD_DELTA_ROWS for _ in range(5)))

_CROSS_FORWARD_90 = _rows(
    (64, UNLIMITED, 64, 64, 4, 2), (128, UNLIMITED, 64, 64, 8, 2), (256, UNLIMITED, 64, 32, 8, 1)
)
_CROSS_FORWARD = _table(
    sm_90=_CROSS_FORWARD_90,
    sm_100=_CROSS_FORWARD_90,
    mma_sync=_rows(
        (64, UNLIMITED, 64, 64, 4, 2),
        (128, UNLIMITED, 64, 32, 4, 2),
        (256, UNLIMITED, 32, 32, 8, 1),
    ),
    tf32=_rows(
        (64, UNLIMITED, 64, 32, 8, 1),
        (128, UNLIMITED, 32, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    ieee=_rows(
        (64, UNLIMITED, 32, 32, 8, 1),
        (128, UNLIMITED, 32, 32, 4, 1),
        (256, UNLIMITED, 16, 16, 8, 1),
    ),
)

_CROSS_KEY_VALUE_90 = _rows(
    (80, UNLIMITED, 64, 64, 8, 1),
    (128, UNLIMITED, 32, 64, 8, 1),
    (256, UNLIMITED, 32, 32, 8, 1),
)
_CROSS_KEY_VALUE = _table(
    sm_90=_CROSS_KEY_VALUE_90,
    sm_100=_CROSS_KEY_VALUE_90,
    mma_sync=_rows(
        (64, UNLIMITED, 32, 64, 4, 1),
        (128, UNLIMITED, 32, 64, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    tf32=_rows((64, UNLIMITED, 16, 32, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
    ieee=_rows((128, UNLIMITED, 16, 32, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
)

# The whole image is one block of latents.
_CROSS_WHOLE = _table(
    sm_90=_rows((80, 64, 64, 64, 8, 1), (128, 64, 32, 64, 8, 1)),
    sm_100=_rows((80, 64, 64, 64, 8, 1), (128, 64, 32, 64, 8, 1)),
    mma_sync=_rows((64, 64, 32, 64, 8, 1), (128, 64, 32, 64, 8, 1)),
    tf32=(),
    ieee=(),
)

_CROSS_QUERY_90 = _rows(
    (64, UNLIMITED, 64, 64, 4, 1),
    (128, UNLIMITED, 64, 32, 8, 1),
    (256, UNLIMITED, 32, 32, 8, 1),
)
_CROSS_QUERY = _table(
    sm_90=_CROSS_QUERY_90,
    sm_100=_CROSS_QUERY_90,
    mma_sync=_rows(
        (64, UNLIMITED, 64, 32, 4, 1),
        (128, UNLIMITED, 64, 32, 8, 1),
        (256, UNLIMITED, 16, 32, 8, 1),
    ),
    tf32=_rows((64, UNLIMITED, 32, 16, 8, 1), (256, UNLIMITED, 16, 16, 8, 1)),
    ieee=_rows((128, UNLIMITED, 32, 16, 8, 1), (256, UNLIMITED, 16, 32, 8, 1)),
)

_CROSS_ROWS = _rows((256, UNLIMITED, 32, 32, 4, 1))
_CROSS_EVERY_ROW = _table(*(_CROSS_ROWS for _ in range(5)))

# The feature dimension is walked, so that any fits. PLAIN: one query a row; several keep the
# largest product and its query beside the running one.
_CONTRASTIVE_FLOAT = _rows(
    (UNLIMITED, UNLIMITED, 64, 64, 8, 2, PLAIN),
    (UNLIMITED, UNLIMITED, 32, 64, 8, 2),
)
_CONTRASTIVE_90 = _rows(
    (UNLIMITED, UNLIMITED, 128, 64, 8, 4, PLAIN),
    (UNLIMITED, UNLIMITED, 64, 64, 8, 3),
)
_CONTRASTIVE = _table(
    sm_90=_CONTRASTIVE_90,
    sm_100=_CONTRASTIVE_90,
    mma_sync=_rows(
        (UNLIMITED, UNLIMITED, 128, 64, 8, 3, PLAIN),
        (UNLIMITED, UNLIMITED, 64, 64, 8, 2),
    ),
    tf32=_CONTRASTIVE_FLOAT,
    ieee=_CONTRASTIVE_FLOAT,
)

TABLE: dict[str, Table] = {
    "flash_attention_fwd": _FORWARD,
    "flash_attention_bwd_statistics": _BACKWARD_STATISTICS,
    "flash_attention_bwd_key_value": _BACKWARD_KEY_VALUE,
    "flash_attention_bwd_query": _BACKWARD_QUERY,
    "flash_attention_bwd_whole": _BACKWARD_WHOLE,
    "flash_attention_bwd_mask": _BACKWARD_MASK,
    "flash_attention_bwd_delta": _BACKWARD_DELTA,
    "window_attention_fwd": _WINDOW_FORWARD,
    "window_attention_bwd_whole": _WINDOW_BACKWARD_WHOLE,
    "window_attention_bwd_query": _WINDOW_BACKWARD_QUERY,
    "window_attention_bwd_bias": _WINDOW_BACKWARD_BIAS,
    "window_attention_bwd_key_value": _WINDOW_BACKWARD_KEY_VALUE,
    "cross_attention_fwd": _CROSS_FORWARD,
    "cross_attention_fill": _CROSS_EVERY_ROW,
    "cross_attention_bwd_key_value": _CROSS_KEY_VALUE,
    "cross_attention_bwd_whole": _CROSS_WHOLE,
    "cross_attention_bwd_query": _CROSS_QUERY,
    "cross_attention_bwd_uniform": _CROSS_EVERY_ROW,
    "contrastive_loss_fwd": _CONTRASTIVE,
    "contrastive_loss_bwd": _CONTRASTIVE,
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


def find_row(shape: ShapeClass, arch: int) -> Row | None:
    for row in TABLE[shape.kernel][table_architecture(arch), shape.precision]:
        fits = shape.columns <= row.columns and shape.rows <= row.rows
        if fits and (shape.plain or not row.plain_only):
            return row
    return None


def lookup(shape: ShapeClass, device: torch.device) -> Launch | None:
    """Launch of a kernel for this shape and device; None where it cannot take them."""
    if shape.kernel in _overrides:
        return _overrides[shape.kernel]
    row = find_row(shape, architecture(device))
    return row.launch if row is not None else None


def multiprocessors(device: torch.device) -> int:
    """How many the device has; one for what only interprets or compiles."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def fills_device(device: torch.device, programs: int) -> bool:
    """Whether so many programs occupy at least half of the device's multiprocessors."""
    if device.type != "cuda":
        return True
    return 2 * programs >= multiprocessors(device)


def launch(shape: ShapeClass, device: torch.device, run: Callable[[Launch], None]) -> None:
    """Call `run` with the launch that fits; every call of it must give the same results."""
    if os.environ.get("VLMFAST_AUTOTUNE") == "1" and shape.kernel not in _overrides:
        key = (architecture(device), shape)
        if key not in searched:
            searched[key] = search(shape, device, run)
            print(
                f"vlmfast autotune: sm_{key[0]} {shape.kernel} {shape.precision}: {searched[key]}"
            )
        run(searched[key].launch)
        return
    found = lookup(shape, device)
    if found is None:
        raise NotImplementedError(f"no launch configuration for {shape}")
    run(found)


searched: dict[tuple[int, ShapeClass], Row] = {}


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
    shape: ShapeClass,
    device: torch.device,
    run: Callable[[Launch], None],
    timer: Callable[[Callable[[], None]], float] = triton.testing.do_bench,
) -> Row:
    """The fastest of the candidates for one shape, as a row of the table."""
    shipped = lookup(shape, device)
    if shipped is None:
        raise NotImplementedError(f"no launch configuration to search from for {shape}")
    times = {}
    for candidate in candidates(shipped):
        try:
            times[candidate] = timer(functools.partial(run, candidate))
        except triton.runtime.errors.OutOfResources:
            continue  # this tile does not fit on the device
    fastest = min(times, key=times.__getitem__)
    return Row(shape.columns, shape.rows, fastest, plain_only=shape.plain)
