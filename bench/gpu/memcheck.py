"""Do our kernels stay within their tensors: python -m bench.gpu.memcheck FILE.

The small cases of `numbers.py` under compute-sanitizer, which watches our kernels alone. FILE gets
a record of each case that ended, and beside it lies what compute-sanitizer says of each.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.cases import SMALL
from bench.gpu.children import run_each
from bench.gpu.numbers import command

CASES = 4  # one of each family
FOUND = 9  # what compute-sanitizer exits with where it finds something
OURS = ("attention", "contrastive")  # in the names of our kernels, and of few others


def sanitized(line: Sequence[str], log: Path, parts: Sequence[str] = OURS) -> list[str]:
    """A command under compute-sanitizer, of kernels with one of these parts in their names."""
    watched = [word for part in parts for word in ("--kernel-regex", f"kns={part}")]
    options = ["--error-exitcode", str(FOUND), "--log-file", str(log)]
    return ["compute-sanitizer", *options, *watched, *line]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where compute-sanitizer is missing or finds something, or a case fails."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m bench.gpu.memcheck FILE", file=sys.stderr)
        return 2
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not installed", file=sys.stderr)
        return 1
    file = Path(arguments[0])
    file.unlink(missing_ok=True)
    lines = [
        (command(file, goal, "cuda"), file.with_name(f"memcheck-{goal.name}.txt"))
        for goal in SMALL[:CASES]
    ]
    codes = run_each([sanitized(*line) for line in lines])
    if not file.exists():  # not one ended: perhaps another version, whose filter is another one
        print("compute-sanitizer as it is, of every kernel", file=sys.stderr)
        codes = run_each([sanitized(*lines[0], parts=())])
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
