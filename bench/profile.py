"""`python -m bench profile`: what `python -m vlmfast profile` does, and of cases, too.

The machine's ceilings are measured here, so that a table says what share of them was reached.
"""

import argparse
from collections.abc import Iterator, Sequence

from bench.contest import Contest, checked_calls
from bench.contestant import OURS
from bench.families import FAMILIES
from bench.measure import Ceilings, measure_ceilings, race
from vlmfast import profile
from vlmfast.profile import Target


def main(arguments: Sequence[str] | None = None) -> int:
    """Profiles a model or a case; returns 0."""
    return profile.main(arguments, "bench", case_targets, _ceilings)


def _ceilings(dtypes: Sequence[str], device: str) -> Ceilings:
    return measure_ceilings(dtypes, seconds=1.0, device=device)


def case_targets(options: argparse.Namespace, device: str) -> Iterator[Target]:
    """Our call of a case; with --patched first that of the fastest peer."""
    contests = [
        Contest(name, case, options.dtype, options.mode, device)
        for name, family in FAMILIES.items()
        for case in family.cases
    ]
    contest = next((x for x in contests if x.case.name == options.target), None)
    if contest is None:
        names = ", ".join(x.case.name for x in contests)
        raise SystemExit(f"TARGET: expected a row of the demo, a model of timm, or one of {names}")
    if contest.missing:
        raise SystemExit(f"{contest.case.name}: not installed: {contest.missing}")
    row, calls = checked_calls(contest)
    if OURS not in calls:
        raise SystemExit(f"{contest}: our result is {row.refusals[OURS]}")
    names = [OURS]
    if options.patched and len(calls) > 1:
        row.timings = race(calls, 0.0)
        names.insert(0, row.best_peer)
    for name in names:
        yield Target(name, calls[name], contest.dtype, row.work.flops, row.work.least_bytes)
