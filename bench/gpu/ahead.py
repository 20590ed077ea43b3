"""What later steps launch, compiled by many processes: python -m bench.gpu.ahead FILE.

Fills Triton's cache for the GPU that is there, or for --arch, without using it: first every call as
it ships, then the alternatives of the goals, then the candidates of the costliest kernels. FILE
gets a record of each compilation.
"""

import argparse
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch

from bench.gpu import launches, records
from bench.gpu.cases import BY_NAME, COSTLIEST, GOALS, MODES, SMALL
from bench.gpu.no_card import compile_only
from bench.gpu.records import Record
from vlmfast.kernels import launch
from vlmfast.kernels.launch import Launch


class Target(NamedTuple):
    """A GPU: its architecture as `kernels/launch.py` numbers it, and its multiprocessors."""

    arch: int
    multiprocessors: int


class Job(NamedTuple):
    """A goal's call, with one kernel's launch in place of that of its table."""

    goal: str
    mode: str
    kernel: str | None = None
    launch: Launch | None = None


def compiled(job: Job, target: Target) -> Record:
    """Compiles what a call launches; the record says how long it took, or what was wrong."""
    record: Record = job._asdict()
    begin = time.perf_counter()
    overrides = {job.kernel: job.launch} if job.kernel else {}
    try:
        with (
            compile_only(*target) as kernels,
            launches.noted() as found,
            launch.override(**overrides),
        ):
            BY_NAME[job.goal].our_call(job.mode, "meta")()
        record["kernels"] = [kernel.name for kernel in kernels]
        record["shipped"] = {shape.kernel: taken for shape, taken in found.items()}
    except Exception as error:  # whatever a compiler raises is an answer
        record["error"] = f"{type(error).__name__}: {error}"[:400]
    record["seconds"] = round(time.perf_counter() - begin, 2)
    return record


def as_shipped() -> list[Job]:
    """Every call, with the launches of the tables; what is needed first comes first."""
    return [Job(goal.name, mode) for goal in (*SMALL, *GOALS) for mode in MODES[::-1]]


def others(found: Iterable[Record]) -> Iterator[Job]:
    """What may be tried in place of the launches that were found, in the order of the steps."""
    shipped = {
        (record["goal"], kernel): Launch(*taken)
        for record in found
        if record["mode"] == MODES[-1]
        for kernel, taken in record.get("shipped", {}).items()
        if not launches.is_minor(kernel)
    }
    for goal in GOALS:
        for (name, kernel), taken in shipped.items():
            if name == goal.name:
                for other in launches.alternatives(taken):
                    yield Job(name, MODES[-1], kernel, other)
    for name, kernel in COSTLIEST:
        if (name, kernel) in shipped:
            for other in launches.candidates(shipped[name, kernel]):
                yield Job(name, MODES[-1], kernel, other)


def run_all(
    jobs: Iterable[Job],
    target: Target,
    workers: int,
    compile_job: Callable[[Job, Target], Record] = compiled,
) -> Iterator[Record]:
    """The record of each job as it is done, by processes that each compile one after another.

    Where a compiler crashes, what was compiled at the time is compiled once more at the end, one
    after the other.
    """
    left, suspects = deque(jobs), []
    while left:
        suspects += yield from _until_crash(left, target, workers, compile_job)
    for job in suspects:
        if (yield from _until_crash(deque([job]), target, 1, compile_job)):
            yield {**job._asdict(), "error": "the compiler crashed"}


def _until_crash(
    left: deque[Job],
    target: Target,
    workers: int,
    compile_job: Callable[[Job, Target], Record],
) -> Generator[Record, None, list[Job]]:
    """Takes jobs from `left` and yields their records; returns those that a crash has ended."""
    context = get_context("spawn")  # forking would copy the threads of torch
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_prepare_worker)
    running: dict[Future[Record], Job] = {}
    try:
        while left or running:
            while left and len(running) < workers:
                future = pool.submit(compile_job, left[0], target)
                running[future] = left.popleft()
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                record = future.result()
                del running[future]
                yield record
    except BrokenProcessPool:
        pass
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return list(running.values())


def _prepare_worker() -> None:
    """One compilation needs one thread, and an interrupt ends it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(1)


def target_here() -> Target:
    """The GPU of this machine."""
    device = torch.device("cuda")
    return Target(launch.architecture(device), launch.multiprocessors(device))


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if something did not compile as it ships."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.ahead", description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--arch", type=int, help="such as 90; default: that of this machine's GPU")
    parser.add_argument("--multiprocessors", type=int, default=132)
    parser.add_argument("--only", default="", help="only goals with this in their name")
    options = parser.parse_args(arguments)
    if options.arch is None and not torch.cuda.is_available():
        parser.error("argument --arch: torch finds no GPU")
    target = (
        target_here() if options.arch is None else Target(options.arch, options.multiprocessors)
    )
    options.file.unlink(missing_ok=True)
    try:
        return int(not _compile_all(options, target))
    except KeyboardInterrupt:
        os._exit(130)  # without waiting for what is being compiled


def _compile_all(options: argparse.Namespace, target: Target) -> bool:
    """Whether everything compiled as it ships."""
    shipped = []
    for record in run_all(
        [job for job in as_shipped() if options.only in job.goal], target, options.workers
    ):
        records.append(options.file, record)
        shipped.append(record)
    for record in run_all(list(dict.fromkeys(others(shipped))), target, options.workers):
        records.append(options.file, record)
    return not any("error" in record for record in shipped)


if __name__ == "__main__":
    sys.exit(main())
