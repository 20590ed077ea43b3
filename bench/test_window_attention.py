"""The same calls one by one under pytest-benchmark: pytest bench -k swin --benchmark-only.

Contestants of one case run one after the other here, so that whatever slows the machine down hits
one and not the next. For ratios take `python -m bench window_attention`, which interleaves them.
"""

from dataclasses import asdict

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import window_attention as family
from bench.cases import WindowCase
from bench.contest import checked_calls, contests
from bench.peers import CONTESTANTS, Contestant

CONTESTS = list(contests("window_attention", None, ("fwd", "fwd+bwd"), ""))


@pytest.mark.parametrize(
    "contestant", CONTESTANTS["window_attention"], ids=lambda contestant: contestant.name
)
@pytest.mark.parametrize(
    ("case", "dtype", "mode"), CONTESTS, ids=[f"{c.name}-{d}-{m}" for c, d, m in CONTESTS]
)
def test_window_attention(
    benchmark: BenchmarkFixture,
    case: WindowCase,
    dtype: str,
    mode: str,
    contestant: Contestant,
) -> None:
    row, calls = checked_calls(family, case, dtype, mode, (contestant,))
    if contestant.name not in calls:
        if contestant.name in row.verdicts:
            pytest.fail(row.refusals[contestant.name])
        pytest.skip(row.refusals[contestant.name])
    benchmark.group = f"{case.name} {dtype} {mode}"
    benchmark.extra_info.update(shape=case.shape, backend=row.backend, **asdict(row.work))
    benchmark(calls[contestant.name])
