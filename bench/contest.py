"""One case: every contestant is checked, those that are right are raced."""

from collections.abc import Iterator, Sequence
from types import ModuleType

import torch

from bench.cases import CASES, AttentionCase, WindowCase
from bench.measure import Call, judge, race
from bench.peers import OURS, Contestant
from bench.report import Row

Case = AttentionCase | WindowCase


def contests(
    family: str, dtypes: Sequence[str] | None, modes: Sequence[str], name_part: str
) -> Iterator[tuple[Case, str, str]]:
    """(case, dtype, mode) of every contest asked for; dtypes None means those of each case."""
    for case in CASES[family]:
        if name_part in case.name:
            for dtype in dtypes or case.dtypes:
                for mode in modes:
                    yield case, dtype, mode


def checked_calls(
    family: ModuleType,
    case: Case,
    dtype_name: str,
    mode: str,
    contestants: Sequence[Contestant],
) -> tuple[Row, dict[str, Call]]:
    """The calls that may be timed: each has just computed the right thing from these very inputs.

    Returns:
        The row, without times yet: errors, and the reasons of those left out.
        The calls by contestant.
    """
    dtype = getattr(torch, dtype_name)
    inputs = family.make_inputs(case, dtype, mode)
    row = Row(
        case=case.name,
        shape=case.shape,
        source=case.source,
        dtype=dtype_name,
        mode=mode,
        backend=family.chosen_backend(case, inputs),
        work=family.work(case, dtype, mode),
    )
    truths = family.reference(case, inputs, mode)
    yardsticks = family.yardsticks(case, dtype, mode)
    calls = {}
    for contestant in contestants:
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


def run(
    family: ModuleType,
    case: Case,
    dtype: str,
    mode: str,
    contestants: Sequence[Contestant],
    seconds: float,
) -> Row:
    """Checks and races one case; without a right answer of our own there is no race."""
    row, calls = checked_calls(family, case, dtype, mode, contestants)
    if OURS in calls:
        again = f"{OURS} again"
        row.timings.update(race({**calls, again: calls[OURS]}, seconds))
        # Raced against itself, a call shows how much of a ratio is chance.
        row.noise = abs(row.timings.pop(again).median / row.timings[OURS].median - 1)
    return row
