"""Launch configurations searched on this GPU: VLMFAST_AUTOTUNE=1 python -m bench.search FILE.

Runs the selected cases, forward and backward, with the search of `kernels/launch.py` switched on,
and writes what it found, after every case, as rows in the form that `kernels/<family>/configs.py`
has them.
"""

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from bench.contest import Contest, our_call
from bench.families import FAMILIES


def formatted(searched: Mapping[tuple[int, object], object]) -> str:
    """Rows by kernel, architecture and precision, as `rows(...)` of `kernels/launch.py`."""
    tables: dict[str, list[tuple]] = {}
    for (architecture, shape), row in searched.items():
        title = f"{shape.kernel}, sm_{architecture}, {shape.precision}"
        tables.setdefault(title, []).append((row.columns, row.rows, *row.launch, row.plain_only))
    lines = []
    for title, rows in sorted(tables.items()):
        lines += [f"# {title}", "rows("]
        for *numbers, is_plain in sorted(rows):
            mark = ", PLAIN" if is_plain else ""
            lines.append(f"    ({', '.join(map(str, numbers))}{mark}),")
        lines.append(")")
    return "\n".join(lines) + "\n"


def training_contests(device: str) -> list[Contest]:
    """The selected cases of every family, as they train."""
    found = (
        Contest(name, case, dtype, "fwd+bwd", device)
        for name, family in FAMILIES.items()
        for case in family.selected
        for dtype in ("bfloat16", "float32")
    )
    return [contest for contest in found if not contest.missing]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where there is nothing to search with."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: VLMFAST_AUTOTUNE=1 python -m bench.search FILE", file=sys.stderr)
        return 2
    target = Path(arguments[0])
    if not torch.cuda.is_available() or os.environ.get("VLMFAST_AUTOTUNE") != "1":
        print("the search wants a GPU and VLMFAST_AUTOTUNE=1", file=sys.stderr)
        return 1
    from vlmfast.kernels import launch

    target.parent.mkdir(parents=True, exist_ok=True)
    for contest in training_contests("cuda"):
        print(contest, flush=True)
        our_call(contest)()
        target.write_text(formatted(launch.searched))
    return 0


if __name__ == "__main__":
    sys.exit(main())
