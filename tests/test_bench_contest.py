"""One contest: what is checked before the race, and who is let in."""

import pytest
import torch

from bench.contest import Contest, run
from bench.contestant import OURS, Contestant
from bench.flash_attention.cases import AttentionCase
from bench.results import Results
from bench.tables import markdown
from tools.bench_samples import (
    CAUSAL,
    CEILINGS,
    FLASH_ATTENTION,
    ON_CPU,
    SDPA,
    SELF,
    planted,
    raced,
)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_right_contestants_are_raced(dtype: str, mode: str) -> None:
    row = raced(CAUSAL, dtype, mode)
    assert set(row.timings) == ON_CPU
    assert set(row.refusals) == {"torch.compile", "FlexAttention"}
    assert row.best_peer in ON_CPU - {OURS}
    assert row.ratio(row.best_peer) == pytest.approx(
        row.timings[row.best_peer].median / row.timings[OURS].median
    )
    for timing in row.timings.values():
        assert 0 < timing.p20 <= timing.median <= timing.p80
    assert "WRONG" not in markdown(Results([row], CEILINGS))


@pytest.mark.parametrize("damage", [1e-4, float("nan")])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_speed_of_a_wrong_kernel_is_not_reported(damage: float, mode: str) -> None:
    row = raced(SELF, "float32", mode, (planted(OURS, damage), SDPA))
    assert not row.timings
    assert row.noise is None
    assert row.refusals[OURS].startswith("WRONG")
    table = markdown(Results([row], CEILINGS))
    assert table.count("WRONG") == 2  # in its row, and why below the table


def test_wrong_peer_does_not_count_as_a_peer() -> None:
    row = raced(SELF, "float32", "fwd", (FLASH_ATTENTION, planted("fast", 1e-4), SDPA))
    assert set(row.timings) == {OURS, "torch SDPA"}
    assert row.refusals["fast"].startswith("WRONG")
    assert row.ratio("fast") is None


def test_refusals_are_reported() -> None:
    shy = Contestant("shy", lambda case, dtype: "not today", SDPA.prepare)
    row = raced(SELF, "float32", "fwd", (FLASH_ATTENTION, shy))
    assert row.refusals == {"shy": "not today"}
    assert "shy: not today" in markdown(Results([row], CEILINGS))


def test_a_peer_that_breaks_does_not_end_the_race() -> None:
    def broken(case: AttentionCase):
        def attention(*tensors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this\nand a long trace")

        return attention

    refusal = lambda case, dtype: None  # noqa: E731
    row = raced(SELF, "float32", "fwd", (FLASH_ATTENTION, Contestant("broken", refusal, broken)))
    assert set(row.timings) == {OURS}
    assert row.refusals == {"broken": "no kernel for this"}
    with pytest.raises(RuntimeError, match="no kernel for this"):
        raced(SELF, "float32", "fwd", (Contestant(OURS, refusal, broken),))


def test_peers_of_gpus_stay_out_of_races_on_a_cpu() -> None:
    names = {x.name for x in Contest("flash_attention", SELF, "float32", "fwd").contestants}
    assert names == ON_CPU | {"torch.compile", "FlexAttention"}
    contest = Contest("flash_attention", SELF, "float32", "fwd", "cuda")
    expected = {"SDPA flash", "SDPA efficient", "SDPA cuDNN", "xformers", "flash-attn"}
    assert names | expected | {"torch varlen"} == {x.name for x in contest.contestants}


def test_peers_that_compile_race_on_a_cpu_only_if_asked_to() -> None:
    compiling = Contestant("slow to start", SDPA.refusal, SDPA.prepare, compiles=True)
    contest = Contest("flash_attention", SELF, "float32", "fwd")
    row = run(contest, 0.0, (FLASH_ATTENTION, compiling))
    assert "--compile" in row.refusals["slow to start"]
    row = run(contest, 0.0, (FLASH_ATTENTION, compiling), compiles=True)
    assert set(row.timings) == {OURS, "slow to start"}
