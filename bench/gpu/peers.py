"""Peers that compile first, compiled in the background: python -m bench.gpu.peers FILE.

Calls each of them once, so that the compilers' caches on disk have what the goal table will ask
for; nothing is timed. FILE gets a record of each.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.contestant import Contestant
from bench.gpu import records
from bench.gpu.cases import DTYPE, GOALS, Goal
from bench.gpu.children import run_each
from bench.gpu.goals import contests
from bench.gpu.records import Record


def called(goal: Goal, mode: str, contestant: Contestant, device: str) -> Record:
    """The record of one call: how long it took with all that it compiled, or what went wrong."""
    record: Record = {"goal": goal.name, "mode": mode, "contestant": contestant.name}
    torch.compiler.reset()  # else a second shape would be compiled for any
    begin = time.perf_counter()
    try:
        inputs = goal.family.calls.make_inputs(goal.case, DTYPE, mode, device=device)
        goal.family.calls.make_call(contestant.prepare(goal.case), inputs, mode)()
    except Exception as error:  # a compiler may raise anything
        record["refused"] = f"{type(error).__name__}: {error}"[:300]
    record["seconds"] = round(time.perf_counter() - begin, 1)
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where there is no GPU, or a process fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.peers", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--part", type=int, help="only goals whose number is this modulo workers")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("torch finds no GPU", file=sys.stderr)
        return 1
    if options.part is None:
        options.file.unlink(missing_ok=True)
        line = [sys.executable, "-m", "bench.gpu.peers", str(options.file)]
        line += ["--workers", str(options.workers), "--part"]
        return int(any(run_each([[*line, str(part)] for part in range(options.workers)])))
    for goal, mode, contestant in contests(GOALS[options.part :: options.workers], compiles=True):
        record = called(goal, mode, contestant, "cuda")
        print(record, flush=True)
        records.append(options.file, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
