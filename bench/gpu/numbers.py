"""Are our numbers right on this GPU: python -m bench.gpu.numbers FILE.

One forward and backward in bfloat16 of each small case, held against float64, each in a process of
its own, since a kernel that reads out of bounds ends all that its process could still do. FILE gets
a record of each.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.gpu import records
from bench.gpu.cases import BY_NAME, DTYPE, MODES, SMALL, Goal
from bench.gpu.children import run_each
from bench.gpu.records import Record
from bench.measure import judge


def judged(goal: Goal, device: str) -> Record:
    """Error and budget of the result that is nearest to its budget, or furthest beyond it."""
    calls, case, mode = goal.family.calls, goal.case, MODES[-1]
    inputs = calls.make_inputs(case, DTYPE, mode, device=device)
    results = calls.make_call(goal.ours.prepare(case), inputs, mode)()
    truths = calls.reference(case, inputs, mode)
    verdict = judge(results, truths, calls.yardsticks(case, DTYPE, mode, device))
    backend = calls.chosen_backend(case, inputs)
    return {
        "goal": goal.name,
        "mode": mode,
        "backend": backend,
        "error": verdict.error,
        "budget": verdict.budget,
        "passed": verdict.passed and backend != "reference",  # which says nothing of kernels
    }


def command(file: Path, goal: Goal, device: str) -> list[str]:
    """The command line that judges one case."""
    line = [sys.executable, "-m", "bench.gpu.numbers", str(file), "--device", device]
    return [*line, "--case", goal.name]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a case is wrong or fails."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.numbers", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--case", choices=BY_NAME, metavar="NAME", help="only this, in here")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    options = parser.parse_args(arguments)
    if options.case:
        record = judged(BY_NAME[options.case], options.device)
        records.append(options.file, record)
        print(record, flush=True)
        return int(not record["passed"])
    options.file.unlink(missing_ok=True)
    codes = run_each([command(options.file, goal, options.device) for goal in SMALL])
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main())
