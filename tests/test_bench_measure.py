"""What is measured of a call: errors, times, memory; and of the machine: its ceilings."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import contest as contest_module
from bench import measure
from bench.contest import Contest, checked_calls
from bench.contestant import OURS
from bench.families import FAMILIES
from bench.measure import (
    Call,
    Rotation,
    Truth,
    Verdict,
    Work,
    input_sets,
    judge,
    measure_ceilings,
    race,
)
from bench.memory import MemoryMeter
from tools.bench_samples import SELF


def test_wrong_gradient_alone_is_found() -> None:
    truths = [Truth(torch.ones(3, dtype=torch.float64)), Truth(torch.ones(4, dtype=torch.float64))]
    results = [torch.ones(3), torch.tensor([1.0, 1.0, 1.0, 1.1])]
    assert not judge(results, truths, [1e-7, 1e-7]).passed
    assert not judge([torch.ones(3), torch.ones(1)], truths, [1e-7, 1e-7]).passed
    assert judge([torch.ones(3), torch.ones(4)], truths, [0.0, 0.0]) == Verdict(
        0.0, torch.finfo(torch.float32).eps / 2
    )


def test_no_result_is_right_that_is_nan() -> None:
    truth = Truth(torch.ones(3, dtype=torch.float64))
    assert not judge([torch.full((3,), float("nan"))], [truth], [float("inf")]).passed


def test_race_interleaves() -> None:
    order = []

    def call(name: str) -> Call:
        def run() -> tuple[torch.Tensor, ...]:
            order.append(name)
            time.sleep(0.002)  # longer than the shortest sample: one sample is one call
            return ()

        return run

    timings = race({"a": call("a"), "b": call("b")}, 0.0)
    warm_up, rounds = order[:4], order[4:]
    assert warm_up == ["a", "a", "b", "b"]
    assert rounds == ["a", "b", "b", "a", "a", "b", "b", "a", "a", "b"]
    assert timings["a"].samples == timings["b"].samples == 5


def test_launches_begin_with_an_empty_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert measure.launch_seconds(lambda: log.append("launch") or (), 10**6) > 0
    assert log == ["wait", *["launch"] * measure.MOST_LAUNCHED]


def test_inputs_that_a_cache_holds_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        L2_cache_size = 1000

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(measure, "_cpu_cache", lambda: 1000)
    for device in ("cpu", "cuda"):
        sets = [input_sets(Work(0, size), device) for size in (1, 100, 999, 2000, 10**6)]
        assert sets == [measure.MOST_SETS, 20, 3, 1, 1]
    called: list[int] = []
    rotation = Rotation([lambda i=i: called.append(i) or () for i in range(3)])
    for _ in range(4):
        rotation()
    assert called == [0, 1, 2, 0]
    monkeypatch.setattr(measure, "_cpu_cache", lambda: 10**5)
    contest = Contest("flash_attention", SELF, "float32", "fwd")
    contest_module._prepared.cache_clear()
    _, calls = checked_calls(contest)
    assert len(calls[OURS].calls) == input_sets(
        contest.family_calls.work(SELF, torch.float32, "fwd"), "cpu"
    )
    contest_module._prepared.cache_clear()


def test_the_clock_of_a_gpu_is_asked_of_its_driver(tmp_path: Path, monkeypatch) -> None:
    fake = tmp_path / "nvidia-smi"
    fake.write_text("#!/bin/sh\necho 1980\necho 345\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert measure.clock_rate("cuda") == 345.0
    fake.unlink()
    assert measure.clock_rate("cuda") is None


def test_ceilings_and_the_fraction_of_them() -> None:
    ceilings = measure_ceilings(["float32", "float16"], size=64, seconds=0.0)
    assert ceilings.flops["float16"] >= ceilings.flops["float32"] > 0
    assert ceilings.bandwidth > 0
    assert ceilings.exps > 0
    limited = replace(ceilings, flops={"float32": 100.0}, bandwidth=10.0, exps=1.0)
    for work, seconds, limit in (
        (Work(1000, 10, 9), 10.0, "matrix"),
        (Work(1000, 1000, 10), 100.0, "memory"),
        (Work(1000, 10, 11), 11.0, "exp"),
    ):
        assert limited.least_seconds(work, "float32") == seconds
        assert limited.binding(work, "float32") == limit


def test_peak_memory_is_that_of_the_scores() -> None:
    """Eager attention holds matrices of scores, the kernel none."""
    case = next(case for case in FAMILIES["flash_attention"].cases if case.name == "long-4096")
    with MemoryMeter("cpu") as meter:
        contest = Contest("flash_attention", case, "float32", "fwd")
        found = meter.peak_bytes(contest, [OURS, "eager"])
    scores = case.heads * case.query_length * case.key_length * 4
    assert scores < found["eager"] < 4 * scores
    assert found[OURS] < scores / 8


def test_peak_memory_is_that_of_the_forced_backend() -> None:
    """The reference holds matrices of scores, the kernel none."""
    case = next(case for case in FAMILIES["flash_attention"].cases if case.name == "vit-l14-336")
    scores = case.heads * case.query_length * case.key_length * 4
    with MemoryMeter("cpu", "reference") as meter:
        contest = Contest("flash_attention", case, "float32", "fwd")
        assert meter.peak_bytes(contest, [OURS])[OURS] > scores


def test_peak_memory_of_a_first_gradient_is_that_of_a_second() -> None:
    """What torch imports for it is nobody's."""
    case = next(case for case in FAMILIES["flash_attention"].cases if case.name == "vit-h14")
    contest = Contest("flash_attention", case, "float32", "fwd+bwd")
    with MemoryMeter("cpu") as meter:
        first, second = (meter.peak_bytes(contest, ["torch SDPA"]) for _ in range(2))
    assert first["torch SDPA"] < second["torch SDPA"] + 10e6


def test_a_process_that_measures_memory_and_ends_costs_one_contest() -> None:
    case = next(case for case in FAMILIES["flash_attention"].cases if case.name == "vit-h14")
    contest = Contest("flash_attention", case, "float32", "fwd")
    with MemoryMeter("cpu") as meter:
        meter._child.kill()
        with pytest.raises(RuntimeError, match="ended"):
            meter.peak_bytes(contest, [OURS])
        assert meter.peak_bytes(contest, [OURS])[OURS] > 0
