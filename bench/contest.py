"""One case: every contestant is checked, those that are right are raced."""

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from bench.contestant import OURS, Contestant, is_installed
from bench.families import FAMILIES
from bench.family import TimedCase
from bench.measure import (
    Call,
    Rotation,
    Truth,
    Work,
    captured,
    clock_rate,
    cuda_seconds,
    input_sets,
    judge,
    launch_seconds,
    race,
)
from bench.modules.cases import ModuleCase
from bench.results import Row


class Contest(NamedTuple):
    """What contestants are raced on: a case in one dtype and one of the modes fwd, bwd, fwd+bwd."""

    family: str
    case: TimedCase
    dtype: str
    mode: str
    device: str = "cpu"

    @property
    def contestants(self) -> Sequence[Contestant]:
        return [x for x in FAMILIES[self.family].contestants if self.device in x.devices]

    @property
    def family_calls(self) -> ModuleType:
        """The module of the family: inputs, calls and formulas."""
        return FAMILIES[self.family].calls

    @property
    def missing(self) -> str | None:
        """The libraries that the layer or model is from and that are not installed."""
        libraries = self.case.libraries if isinstance(self.case, ModuleCase) else ()
        return ", ".join(name for name in libraries if not is_installed(name)) or None

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype} {self.mode}"


def contests(
    family: str,
    dtypes: Sequence[str] | None,
    modes: Sequence[str],
    name_part: str = "",
    device: str = "cpu",
) -> Iterator[Contest]:
    """Every contest asked for; dtypes None means those of each case."""
    for case in FAMILIES[family].cases:
        if name_part in case.name:
            for dtype in dtypes or case.dtypes:
                for mode in modes:
                    yield Contest(family, case, dtype, mode, device)


class _Prepared(NamedTuple):
    """What every contestant of a contest is given, and what its results are held against."""

    inputs: Sequence[Any]
    truths: Sequence[Truth]
    yardsticks: Sequence[float]
    backend: str
    work: Work


@functools.lru_cache(maxsize=1)
def _prepared(contest: Contest) -> _Prepared:
    module, case, mode = contest.family_calls, contest.case, contest.mode
    dtype = getattr(torch, contest.dtype)
    work = module.work(case, dtype, mode)
    inputs = [
        module.make_inputs(case, dtype, mode, seed, contest.device)
        for seed in range(input_sets(work, contest.device))
    ]
    return _Prepared(
        inputs,
        module.reference(case, inputs[0], mode),
        module.yardsticks(case, dtype, mode),
        module.chosen_backend(case, inputs[0]),
        work,
    )


def checked_calls(
    contest: Contest,
    contestants: Sequence[Contestant] | None = None,
    compiles: bool = False,
) -> tuple[Row, dict[str, Call]]:
    """The calls that may be timed: each has just computed the right thing from these very inputs.

    Args:
        contest: what is computed.
        contestants: by whom; None for all of the family.
        compiles: do not leave out those that must compile first.

    Returns:
        The row, without times yet: errors, and the reasons of those left out.
        The calls by contestant.
    """
    module, case, mode = contest.family_calls, contest.case, contest.mode
    inputs, truths, yardsticks, backend, work = _prepared(contest)
    row = Row(
        family=contest.family,
        case=case.name,
        shape=case.shape,
        source=case.source,
        dtype=contest.dtype,
        mode=mode,
        device=contest.device,
        backend=backend,
        work=work,
    )
    calls: dict[str, Call] = {}
    for contestant in contest.contestants if contestants is None else contestants:
        name = contestant.name
        refusal = contestant.refusal(case, getattr(torch, contest.dtype))
        if contestant.compiles and not compiles:
            refusal = "must compile first, for up to a minute: left out without --compile"
        if refusal is not None:
            row.refusals[name] = refusal
            continue
        try:
            function = contestant.prepare(case)
            call = module.make_call(function, inputs[0], mode)
            verdict = judge(call(), truths, yardsticks)
        except Exception as error:  # a library of others may raise anything
            if name == OURS:
                raise
            row.refusals[name] = str(error).strip().partition("\n")[0] or repr(error)
            continue
        row.verdicts[name] = verdict
        if verdict.passed:
            others = [module.make_call(function, x, mode) for x in inputs[1:]]
            calls[name] = Rotation([call, *others]) if others else call
        else:
            row.refusals[name] = (
                f"WRONG, error {verdict.error:.1e} above its budget {verdict.budget:.1e}"
            )
    return row, calls


def run(
    contest: Contest,
    seconds: float,
    contestants: Sequence[Contestant] | None = None,
    compiles: bool = False,
) -> Row:
    """Checks and races one case; without a right answer of our own there is no race.

    On a GPU the calls are raced as CUDA graphs, and what launching them takes is measured apart.
    """
    row, calls = checked_calls(contest, contestants, compiles)
    _prepared.cache_clear()  # a model's gradients in float64 are large
    if OURS not in calls:
        return row
    clock = None
    if contest.device == "cuda":
        launches = race(calls, seconds / 4, launch_seconds)
        row.launch = {name: timing.median for name, timing in launches.items()}
        clock = cuda_seconds
        try:
            calls = {name: captured(call) for name, call in calls.items()}
        except RuntimeError as error:  # then all are raced as they are launched
            row.refusals["CUDA graphs"] = str(error).strip().partition("\n")[0]
    again = f"{OURS} again"
    row.timings.update(race({**calls, again: calls[OURS]}, seconds, clock))
    row.clock_mhz = clock_rate(contest.device)
    # Raced against itself, a call shows how much of a ratio is chance.
    row.noise = abs(row.timings.pop(again).median / row.timings[OURS].median - 1)
    return row
