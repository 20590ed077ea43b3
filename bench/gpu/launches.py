"""Launches of our kernels: which ones a call takes, and others that a GPU might prefer.

The table of a family is written without a GPU, from what the compiler says. Whether four warps or
eight, a larger tile or a smaller one are faster, only a GPU can tell.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from unittest import mock

from bench.gpu import records
from vlmfast.kernels import launch
from vlmfast.kernels.launch import Launch, ShapeClass

MOST_CANDIDATES = 10
GAIN = 0.98  # of the time as shipped: what gains less gains by chance
# Endings of kernels that take a small part of a call, whatever their launch.
MINOR = ("_fill", "_uniform", "_delta", "_statistics")

Noted = dict[ShapeClass, Launch]


@contextlib.contextmanager
def noted() -> Iterator[Noted]:
    """The launches of all kernels that are started within the block."""
    found: Noted = {}
    run_with_launch = launch.run_with_launch

    def run_and_note(table, shape, device, run):
        taken = launch.find_launch(table, shape, device)
        if taken is not None:
            found[shape] = taken
        run_with_launch(table, shape, device, run)

    with mock.patch.object(launch, "run_with_launch", run_and_note):
        yield found


def alternatives(shipped: Launch) -> list[Launch]:
    """Other warps; half or twice the rows, with warps to match; half or twice the columns."""
    warps = shipped.num_warps
    found = [shipped._replace(num_warps=4 if warps == 8 else 8)]
    for rows in launch.neighbours(shipped.block_m, 16, 128):
        if rows != shipped.block_m:
            found.append(shipped._replace(block_m=rows, num_warps=8 if rows > 64 else 4))
    for columns in launch.neighbours(shipped.block_n, 16, 128):
        if columns != shipped.block_n:
            found.append(shipped._replace(block_n=columns))
    return list(dict.fromkeys(x for x in found if x != shipped))


def is_minor(kernel: str) -> bool:
    """Whether a kernel takes a small part of a call."""
    return kernel.endswith(MINOR)


def candidates(shipped: Launch, most: int = MOST_CANDIDATES) -> list[Launch]:
    """Those of `launch.candidates` that are nearest to the shipped one, less the alternatives."""
    tried = {shipped, *alternatives(shipped)}
    left = (x for x in launch.candidates(shipped) if x not in tried)
    return list(itertools.islice(sorted(left, key=lambda x: _distance(x, shipped)), most))


def _distance(one: Launch, other: Launch) -> int:
    return sum(x != y for x, y in zip(one, other, strict=True))


def did_not_compile(ahead: Path) -> set[tuple[str, str, Launch]]:
    """Goals, kernels and launches that `ahead.py` could not compile: none is worth a try."""
    if not ahead.exists():
        return set()
    failed = (x for x in records.read(ahead) if "error" in x and x.get("launch"))
    return {(x["goal"], x["kernel"], Launch(*x["launch"])) for x in failed}


def formatted(found: Iterable[tuple[int, ShapeClass, Launch]]) -> str:
    """Rows by kernel, architecture and precision, as `rows(...)` of kernels/<family>/configs.py."""
    tables: dict[str, list[tuple]] = {}
    for architecture, shape, taken in found:
        title = f"{shape.kernel}, sm_{architecture}, {shape.precision}"
        tables.setdefault(title, []).append((shape.columns, shape.rows, *taken, shape.plain))
    lines = []
    for title, rows in sorted(tables.items()):
        lines += [f"# {title}", "rows("]
        for *numbers, is_plain in sorted(rows):
            mark = ", PLAIN" if is_plain else ""
            lines.append(f"    ({', '.join(map(str, numbers))}{mark}),")
        lines.append(")")
    return "\n".join(lines) + "\n"
