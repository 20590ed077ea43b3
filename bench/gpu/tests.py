"""GPU tests by many processes: python -m bench.gpu.tests FOLDER [--workers N] FILE ...

With pytest-xdist, or else by as many processes of pytest, each of which takes every Nth test.
FOLDER/tests.jsonl gets a record of each test as it ends, FOLDER/tests-<N>.log what pytest prints.
"""

import argparse
import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from bench.gpu.children import wait_for_all

PLUGIN = "bench.gpu.pytest_plugin"


def has_xdist() -> bool:
    """Whether pytest-xdist is installed."""
    return importlib.util.find_spec("xdist") is not None


def commands(files: Sequence[str], workers: int, xdist: bool) -> list[list[str]]:
    """One command line, or one for each worker."""
    line = [sys.executable, "-m", "pytest", "-q", "-p", PLUGIN, "-p", "no:cacheprovider"]
    line += ["-o", "minversion=7", "-o", "addopts="]  # an older pytest will do, and what it knows
    if xdist:
        return [[*line, "-n", str(workers), "--dist", "worksteal", *files]]
    return [[*line, "--every", f"{part}/{workers}", *files] for part in range(workers)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a test failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tests", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("files", nargs="+")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    record = options.folder / "tests.jsonl"
    record.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "VLMFAST_TEST_RECORDS": str(record.absolute()),
        "OMP_NUM_THREADS": "1",  # a process each has one core
    }
    with ExitStack() as logs:
        processes = []
        for number, line in enumerate(commands(options.files, options.workers, has_xdist())):
            log = logs.enter_context((options.folder / f"tests-{number}.log").open("w"))
            processes.append(
                subprocess.Popen(line, stdout=log, stderr=subprocess.STDOUT, env=environment)
            )
        codes = wait_for_all(processes)
    nothing_to_do = 5  # what pytest exits with where its part has no test
    return int(any(code not in (0, nothing_to_do) for code in codes))


if __name__ == "__main__":
    sys.exit(main())
