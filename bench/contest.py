"""One case: every contestant is checked, those that are right are raced."""

import importlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from bench.cases import CASES, Case
from bench.measure import Call, clock_rate, judge, race
from bench.peers import CONTESTANTS, OURS, Contestant
from bench.report import Row


class Contest(NamedTuple):
    """What contestants are raced on: a case in one dtype and one of the modes fwd, bwd, fwd+bwd."""

    family: str
    case: Case
    dtype: str
    mode: str

    @property
    def contestants(self) -> Sequence[Contestant]:
        return CONTESTANTS[self.family]

    @property
    def page(self) -> Any:
        """The module of the family: inputs, calls and formulas."""
        return importlib.import_module(f"bench.{self.family}")

    def __str__(self) -> str:
        return f"{self.case.name} {self.dtype} {self.mode}"


def contests(
    family: str, dtypes: Sequence[str] | None, modes: Sequence[str], name_part: str = ""
) -> Iterator[Contest]:
    """Every contest asked for; dtypes None means those of each case."""
    for case in CASES[family]:
        if name_part in case.name:
            for dtype in dtypes or case.dtypes:
                for mode in modes:
                    yield Contest(family, case, dtype, mode)


def checked_calls(
    contest: Contest, contestants: Sequence[Contestant] | None = None
) -> tuple[Row, dict[str, Call]]:
    """The calls that may be timed: each has just computed the right thing from these very inputs.

    Args:
        contest: what is computed.
        contestants: by whom; None for all of the family.

    Returns:
        The row, without times yet: errors, and the reasons of those left out.
        The calls by contestant.
    """
    family, case, mode = contest.page, contest.case, contest.mode
    dtype = getattr(torch, contest.dtype)
    inputs = family.make_inputs(case, dtype, mode)
    row = Row(
        family=contest.family,
        case=case.name,
        shape=case.shape,
        source=case.source,
        dtype=contest.dtype,
        mode=mode,
        backend=family.chosen_backend(case, inputs),
        work=family.work(case, dtype, mode),
    )
    truths = family.reference(case, inputs, mode)
    yardsticks = family.yardsticks(case, dtype, mode)
    calls = {}
    for contestant in contest.contestants if contestants is None else contestants:
        name = contestant.name
        refusal = contestant.refusal(case, dtype)
        if refusal is None:
            call = family.make_call(contestant.prepare(case), inputs, mode)
            verdict = row.verdicts[name] = judge(call(), truths, yardsticks)
            if verdict.passed:
                calls[name] = call
                continue
            refusal = f"WRONG, error {verdict.error:.1e} above its budget {verdict.budget:.1e}"
        row.refusals[name] = refusal
    return row, calls


def run(contest: Contest, seconds: float, contestants: Sequence[Contestant] | None = None) -> Row:
    """Checks and races one case; without a right answer of our own there is no race."""
    row, calls = checked_calls(contest, contestants)
    if OURS in calls:
        again = f"{OURS} again"
        row.timings.update(race({**calls, again: calls[OURS]}, seconds))
        row.clock_mhz = clock_rate()
        # Raced against itself, a call shows how much of a ratio is chance.
        row.noise = abs(row.timings.pop(again).median / row.timings[OURS].median - 1)
    return row
