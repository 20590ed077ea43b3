"""One trial: a contestant of a goal, checked against float64 and timed as a CUDA graph."""

import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from bench.contestant import Contestant
from bench.gpu import records
from bench.gpu.cases import BY_NAME, DTYPE, Goal
from bench.gpu.records import Record
from bench.measure import (
    Call,
    Rotation,
    Timing,
    Truth,
    captured,
    cuda_seconds,
    input_sets,
    judge,
    race,
)

SECONDS = 0.1  # of samples for each trial
RESUME = "--resume"  # leaves out what the results have already

Timer = Callable[[Call], Record]


class ContextLost(RuntimeError):
    """The GPU answers nothing more in this process: a kernel has read or written out of bounds."""


class Prepared(NamedTuple):
    """What every contestant of a goal is given in one mode, and what is right."""

    inputs: Sequence[object]
    truths: Sequence[Truth]
    yardsticks: Sequence[float]


@functools.cache
def prepared(name: str, mode: str, device: str) -> Prepared:
    """Kept for as long as the process: all goals together take a small part of a large GPU."""
    family, case = BY_NAME[name]
    calls = family.calls
    sets = input_sets(calls.work(case, DTYPE, mode), device) if device == "cuda" else 1
    inputs = [calls.make_inputs(case, DTYPE, mode, seed, device) for seed in range(sets)]
    truths = calls.reference(case, inputs[0], mode)
    return Prepared(inputs, truths, calls.yardsticks(case, DTYPE, mode, device))


def graph_timer(call: Call) -> Record:
    """Seconds of the GPU a call, replayed as a graph; as it is launched where it cannot be one."""
    try:
        replay, graph = captured(call), True
    except RuntimeError as error:
        _check_context(error)
        replay, graph = call, False
    timing: Timing = race({"": replay}, SECONDS, cuda_seconds)[""]
    microseconds = {
        f"{name}_us": round(1e6 * getattr(timing, name), 2) for name in ("median", "p20", "p80")
    }
    return {"graph": graph, **microseconds, "samples": timing.samples}


def tried(
    goal: Goal, mode: str, contestant: Contestant, device: str, timer: Timer = graph_timer
) -> Record:
    """The record of a trial: its times, or why there are none."""
    work = goal.family.calls.work(goal.case, DTYPE, mode)
    record: Record = {
        "goal": goal.name,
        "shape": goal.case.shape,
        "flops": work.flops,
        "bytes": work.least_bytes,
        "mode": mode,
        "contestant": contestant.name,
    }
    refusal = contestant.refusal(goal.case, DTYPE)
    if refusal is not None:
        return {**record, "refused": refusal}
    if contestant.compiles:
        torch.compiler.reset()  # else a second shape would be compiled for any
    try:
        return {**record, **_checked_and_timed(goal, mode, contestant, device, timer)}
    except Exception as error:  # a compiler, or a library of others, may raise anything
        _check_context(error)
        reason = str(error).strip().partition("\n")[0] or repr(error)
        return {**record, "refused": reason[:300]}


def _checked_and_timed(
    goal: Goal, mode: str, contestant: Contestant, device: str, timer: Timer
) -> Record:
    inputs, truths, yardsticks = prepared(goal.name, mode, device)
    calls, function = goal.family.calls, contestant.prepare(goal.case)
    call = calls.make_call(function, inputs[0], mode)
    verdict = judge(call(), truths, yardsticks)
    found: Record = {"error": verdict.error, "budget": verdict.budget}
    if not verdict.passed:
        return {**found, "refused": "WRONG"}
    others = [calls.make_call(function, x, mode) for x in inputs[1:]]
    return {**found, **timer(Rotation([call, *others]) if others else call)}


def _check_context(error: Exception) -> None:
    """Raises ContextLost where an error has left the GPU's context unusable."""
    if not torch.cuda.is_available():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        raise ContextLost(str(error)) from error


def begun(path: Path, resumes: bool) -> list[Record]:
    """The records of a file that is gone on with; none, and no file, where it is begun."""
    if resumes and path.exists():
        return list(records.read(path))
    path.unlink(missing_ok=True)
    return []


def start_again(module: str, arguments: Sequence[str]) -> NoReturn:
    """Goes on in a new process with what is not recorded yet."""
    rest = [argument for argument in arguments if argument != RESUME]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *rest, RESUME])
