"""What steps leave: a line of JSON for everything measured, and files that are never half written.

A step may be stopped at any time, and what it had measured by then counts.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def append(path: Path, record: Record) -> None:
    """Adds a line, whole, so that processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as target:
        target.write(json.dumps(record) + "\n")


def read(path: Path) -> Iterator[Record]:
    """The records of a file; what was cut off while it was written is left out."""
    for line in path.read_text().splitlines():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            continue


def rewrite(path: Path, text: str) -> None:
    """Replaces a file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text)
    unfinished.replace(path)
