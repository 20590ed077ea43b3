"""The same calls one by one under pytest-benchmark: pytest bench -k swin --benchmark-autosave.

Contestants of one case run one after the other here, so that whatever slows the machine down hits
one and not the next. For ratios take `python -m bench`, which interleaves them.
"""

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.contest import Contest, checked_calls, contests
from bench.contestant import Contestant
from bench.families import FAMILIES

CONTESTS = [
    (contest, contestant)
    for family in FAMILIES
    for contest in contests(family, None, ("fwd", "fwd+bwd"))
    for contestant in contest.contestants
]


@pytest.mark.parametrize(
    ("contest", "contestant"),
    CONTESTS,
    ids=[f"{c.family}-{c.case.name}-{c.dtype}-{c.mode}-{who.name}" for c, who in CONTESTS],
)
def test_speed(
    benchmark: BenchmarkFixture,
    contest: Contest,
    contestant: Contestant,
    pytestconfig: pytest.Config,
) -> None:
    if contest.missing:
        pytest.skip(f"not installed: {contest.missing}")
    row, calls = checked_calls(contest, (contestant,), pytestconfig.getoption("--compile"))
    if contestant.name not in calls:
        if contestant.name in row.verdicts:
            pytest.fail(row.refusals[contestant.name])
        pytest.skip(row.refusals[contestant.name])
    benchmark.group = str(contest)
    benchmark.extra_info.update(
        shape=row.shape, source=row.source, backend=row.backend, **asdict(row.work)
    )
    benchmark(calls[contestant.name])
