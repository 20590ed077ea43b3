"""Command line of all steps on a GPU: bench/gpu.sh, or python -m bench.gpu; see --help."""

import argparse
import glob
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.plan import Plan, Step, windows

PACKING = 10.0  # seconds that are kept for the last archive
MINUTES = 8.0
WORKERS = 14  # of 16 cores
PEERS = 4  # processes that compile peers
CUDA_TESTS = "tests/test_kernels_*_cuda.py"
TEST_PATHS = {"PYTHONPATH": os.pathsep.join([".", "tests"])}
FREE_CORES = ("host", "ncu")  # steps that want nothing beside them on the host,
FREE_GPU = ("goals", *FREE_CORES, "search")  # and on the GPU
FEW_JOBS = {"MAX_JOBS": "4"}  # of ninja
UNCACHED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else what lies beyond a tensor is torch's too
DESCRIPTION = (
    "Builds and compiles in the background; holds numbers against float64 and ends if they are "
    "wrong; runs the GPU tests; times the goal table, what a launch costs its host, and candidates "
    "of launches; has ncu and memcheck look at the kernels. Each step is stopped when its share of "
    "the time is up, and leaves what it has."
)
EPILOG = (
    "OUT then holds a log and the results of each step and summary.txt, and OUT.tar.gz all of "
    "these, renewed after each step. Needs torch with CUDA, Triton, pytest and ninja, and "
    "downloads nothing."
)


def steps(python: str, out: Path, workers: int) -> list[Step]:
    """Every step: those in the background, then the others, the most valuable ones first."""

    def module(name: str, *arguments: object) -> list[str]:
        return [python, "-m", f"bench.gpu.{name}", *map(str, arguments)]

    def behind(name: str, command: list[str], until: tuple[str, ...], **options: Any) -> Step:
        return Step(name, ["nice", *command], background=True, until=until, **options)

    build = [python, "setup.py", "build_ext", "--inplace"]
    peers = module("peers", out / "peers.jsonl", "--workers", PEERS)
    tests = module("tests", out, "--workers", workers, *sorted(glob.glob(CUDA_TESTS)))
    return [
        behind("build", build, FREE_CORES, environment=FEW_JOBS),
        behind("ahead", module("ahead", out / "ahead.jsonl", "--workers", workers), FREE_CORES),
        behind("peers", peers, FREE_GPU),
        behind("predict", module("predict", "--out", out), FREE_CORES),
        Step("numbers", module("numbers", out / "numbers.jsonl"), 12, essential=True),
        Step("tests", tests, 25, environment=TEST_PATHS),
        Step("goals", module("goals", out), 31),
        Step("host", module("host", out), 5),
        Step("search", module("search", out), 13),
        Step("ncu", module("ncu", out), 7),
        Step("memcheck", module("memcheck", out / "memcheck.jsonl"), 7, environment=UNCACHED),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a step failed or was stopped."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    every = steps(options.python, options.out.absolute(), options.workers)
    unknown = set(options.steps) - {step.name for step in every}
    if unknown:
        parser.error(f"argument STEP: unknown: {', '.join(sorted(unknown))}")
    if not options.minutes > 0:
        parser.error(f"argument --minutes: expected more than 0, got {options.minutes}")
    chosen = [step for step in every if not options.steps or step.name in options.steps]
    seconds = 60 * options.minutes - min(PACKING, 3 * options.minutes)
    if options.dry_run:
        print("\n".join(described(chosen, seconds)))
        return 0
    # A shell that runs this in the background has told it to ignore interrupts, and so would
    # every step.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return Plan(chosen, options.out.absolute(), seconds).run()


def described(chosen: Sequence[Step], seconds: float) -> list[str]:
    """A line for each step: until when it may run, and its command."""
    until = windows(chosen, seconds)
    lines = []
    for step in chosen:
        when = "in the background" if step.background else f"to {until[step.name].end:.0f} s"
        lines.append(f"{step.name}: {when}: {shlex.join(step.command)}")
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False
    )
    names = [step.name for step in steps("", Path(), 1)]
    parser.add_argument(
        "steps", nargs="*", metavar="STEP", help=f"of {', '.join(names)}; default: all"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/gpu"), help="a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--python", default=sys.executable, help="the interpreter (default: this one)"
    )
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help="for everything (default: %(default)s)"
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=max(1, min(WORKERS, (os.cpu_count() or 1) - 2)),
        help="processes that compile and test (default: %(default)s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only print the steps")
    return parser


if __name__ == "__main__":
    sys.exit(main())
