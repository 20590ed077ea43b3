"""The benchmark's own correctness: its formulas, its check before the race, its report."""

import csv
import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command_line
from bench import contest as contest_module
from bench import contestant as contestant_module
from bench import measure, ncu, search
from bench import report as report_module
from bench.compare import changes, contests_lost
from bench.contest import Contest, checked_calls, contests
from bench.contest import run as race_contest
from bench.contestant import OURS, Contestant
from bench.contrastive_loss import calls as losses_family
from bench.contrastive_loss.cases import BIAS, LossCase
from bench.contrastive_loss.peers import dense_loss
from bench.cross_attention.cases import ImageAttentionCase
from bench.families import FAMILIES
from bench.family import Case
from bench.flash_attention import calls as family
from bench.flash_attention.cases import AttentionCase
from bench.flash_attention.peers import CONTESTANTS, eager_attention
from bench.html import page
from bench.measure import (
    Call,
    Ceilings,
    Rotation,
    Timing,
    Truth,
    Verdict,
    Work,
    input_sets,
    judge,
    measure_ceilings,
    race,
)
from bench.memory import MemoryMeter
from bench.modules import calls as modules
from bench.modules import peers as module_peers
from bench.modules.cases import LAYERS, MODELS, ModuleCase
from bench.results import (
    Results,
    Row,
    append_csv,
    check_csv,
    machine,
    machine_file,
    write_json,
)
from bench.tables import markdown, notes
from bench.window_attention import calls as windows_family
from bench.window_attention.cases import WindowCase
from vlmfast import verify
from vlmfast.verify.common import relative_error

FLASH_ATTENTION, SDPA, EAGER = CONTESTANTS[:3]
ROOT = Path(__file__).resolve().parent.parent
SELF = AttentionCase("tiny", "a test", 2, 3, 10, 10, 16)
CAUSAL = replace(SELF, name="tiny-causal", is_causal=True)
CROSS = replace(SELF, name="tiny-cross", query_length=5, key_length=12)
# Who computes attention on a CPU without compiling first.
ON_CPU = {OURS, "torch SDPA", "eager", "SDPA math"}
WORK = Work(10**9, 10**6, 10**6)
CEILINGS = Ceilings({"float32": 1e9, "bfloat16": 1e9}, {"float32": "", "bfloat16": ""}, 1e9, 1e9)


def run(
    case: AttentionCase, dtype: str, mode: str, contestants: Sequence[Contestant] | None = None
) -> Row:
    return race_contest(Contest("flash_attention", case, dtype, mode), 0.0, contestants)


def brute_force_pairs(case: AttentionCase) -> int:
    pairs = itertools.product(range(case.query_length), range(case.key_length))
    return sum(1 for i, j in pairs if j <= i or not case.is_causal)


@pytest.mark.parametrize("lengths", [(10, 10), (10, 4), (4, 10), (1, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_flops_count_the_visible_pairs(lengths: tuple[int, int], is_causal: bool) -> None:
    case = replace(SELF, query_length=lengths[0], key_length=lengths[1], is_causal=is_causal)
    per_product = 2 * case.batch * case.heads * brute_force_pairs(case) * case.head_dim
    for mode, products in {"fwd": 2, "bwd": 5, "fwd+bwd": 7}.items():
        assert family.work(case, torch.float32, mode).flops == products * per_product


def test_flops_are_those_torch_counts() -> None:
    """Forward of the eager formula does no more than it must; its backward keeps the scores."""
    for mode, recomputed in {"fwd": 0, "bwd": 1, "fwd+bwd": 1}.items():
        inputs = family.make_inputs(CROSS, torch.float32, mode)
        call = family.make_call(eager_attention(CROSS), inputs, mode)
        with FlopCounterMode(display=False) as counter:
            call()
        scores = family.work(CROSS, torch.float32, "fwd").flops // 2
        work = family.work(CROSS, torch.float32, mode)
        assert counter.get_total_flops() == work.flops - recomputed * scores


@pytest.mark.parametrize("case", [SELF, CROSS], ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_least_bytes_are_those_of_the_tensors(case: AttentionCase, dtype: torch.dtype) -> None:
    inputs = family.make_inputs(case, dtype, "fwd+bwd")
    out, *gradients = family.make_call(eager_attention(case), inputs, "fwd+bwd")()

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    sources = size(inputs.query, inputs.key, inputs.value)
    logsumexp = out[..., 0].numel() * 4
    forward = sources + size(out)
    backward = sources + size(out, inputs.grad_out) + logsumexp + size(*gradients)
    assert family.work(case, dtype, "fwd").least_bytes == forward
    assert family.work(case, dtype, "bwd").least_bytes == backward
    assert family.work(case, dtype, "fwd+bwd").least_bytes == forward + logsumexp + backward


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_contrastive_losses_are_right_and_do_the_work_that_is_stated(loss: str, mode: str) -> None:
    case = LossCase("tiny", "a test", 40, 16, loss)
    row = race_contest(Contest("contrastive_loss", case, "float32", mode), 0.0)
    peers = {"dense", "open_clip"} | ({"linear_cross_entropy"} if loss == "clip" else set())
    assert row.verdicts.keys() == row.timings.keys() == {OURS, *peers}
    inputs = losses_family.make_inputs(case, torch.float64, mode)
    by_autograd = losses_family.make_call(dense_loss(case), inputs, mode)()
    truths = losses_family.reference(case, inputs, mode)
    for x, y in zip(by_autograd, truths, strict=True):
        torch.testing.assert_close(x.double(), y.value, rtol=1e-6, atol=1e-12)
    ours = FAMILIES["contrastive_loss"].contestants[0].prepare(case)
    inputs = losses_family.make_inputs(case, torch.float32, mode)
    call = losses_family.make_call(ours, inputs, mode)
    with FlopCounterMode(display=False) as counter:
        call()
    assert counter.get_total_flops() == losses_family.work(case, torch.float32, mode).flops


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_terms_of_contrastive_losses_are_those_of_verify(loss: str, monkeypatch) -> None:
    monkeypatch.setattr(losses_family, "TRUTH_ELEMENTS", 7 * 40)  # several blocks of rows
    case = LossCase("tiny", "a test", 40, 16, loss)
    inputs = losses_family.make_inputs(case, torch.float64, "fwd+bwd")
    page = verify.contrastive_loss
    make = {"clip": page.clip_case, "siglip": page.siglip_case}[loss]
    verified = make("tiny", page.random_pairs(40, 16))
    named = {"image": inputs.image, "text": inputs.text, "scale": inputs.scale.double()}
    if loss == "siglip":
        named["bias"] = torch.tensor(BIAS, dtype=torch.float64)
    named = {name: x.detach() for name, x in named.items()}
    expected = verified.terms(named, {"loss": torch.ones((), dtype=torch.float64)})
    found = [truth.terms for truth in losses_family.reference(case, inputs, "fwd+bwd")]
    names = ("loss", "grad_image", "grad_text", "grad_scale")
    assert found == pytest.approx([expected[name] for name in names], rel=1e-6)


def test_a_sum_that_cancels_is_judged_by_its_terms() -> None:
    """All terms of logit_scale's gradient are large, and their sum may be nothing."""
    case = WindowCase("tiny", "a test", 2, 8, 2, 8, 4, is_cosine=True)
    inputs = windows_family.make_inputs(case, torch.float32, "bwd")
    *_, truth = windows_family.reference(case, inputs, "bwd")
    assert truth.terms > truth.value.norm() / 10
    cancelled = Truth(torch.zeros_like(truth.value), truth.terms)
    rounding = 1e-8 * truth.terms * torch.ones_like(truth.value)
    assert judge([rounding.float()], [cancelled], [0.0]).passed
    assert not judge([rounding.float()], [Truth(cancelled.value)], [0.0]).passed
    assert not judge([100 * rounding.float()], [cancelled], [0.0]).passed


def test_inputs_are_slices_of_packed_projections() -> None:
    inputs = family.make_inputs(SELF, torch.bfloat16, "fwd")
    token = SELF.heads * SELF.head_dim
    expected = (10 * 3 * token, SELF.head_dim, 3 * token, 1)
    for tensor in (inputs.query, inputs.key, inputs.value):
        assert tensor.stride() == expected
    storages = {x.untyped_storage().data_ptr() for x in (inputs.query, inputs.key, inputs.value)}
    assert len(storages) == 1


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("case", [SELF, CAUSAL, CROSS], ids=lambda case: case.name)
def test_reference_by_heads_is_attention_in_float64(case: AttentionCase, mode: str) -> None:
    inputs = family.make_inputs(case, torch.float64, mode)
    whole = family.make_call(SDPA.prepare(case), inputs, mode)()
    for actual, expected in zip(family.reference(case, inputs, mode), whole, strict=True):
        torch.testing.assert_close(actual.value, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_right_contestants_are_raced(dtype: str, mode: str) -> None:
    row = run(CAUSAL, dtype, mode)
    assert set(row.timings) == ON_CPU
    assert set(row.refusals) == {"torch.compile", "FlexAttention"}
    assert row.best_peer in ON_CPU - {OURS}
    assert row.ratio(row.best_peer) == pytest.approx(
        row.timings[row.best_peer].median / row.timings[OURS].median
    )
    for timing in row.timings.values():
        assert 0 < timing.p20 <= timing.median <= timing.p80
    assert "WRONG" not in markdown(Results([row], CEILINGS))


def planted(name: str, damage: float) -> Contestant:
    """Attention whose output is off by a factor of 1 + damage."""

    def prepare(case: AttentionCase):
        eager = eager_attention(case)
        return lambda query, key, value: eager(query, key, value) * (1 + damage)

    return Contestant(name, lambda case, dtype: None, prepare)


@pytest.mark.parametrize("damage", [1e-4, float("nan")])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
def test_speed_of_a_wrong_kernel_is_not_reported(damage: float, mode: str) -> None:
    row = run(SELF, "float32", mode, (planted(OURS, damage), SDPA))
    assert not row.timings
    assert row.noise is None
    assert row.refusals[OURS].startswith("WRONG")
    table = markdown(Results([row], CEILINGS))
    assert table.count("WRONG") == 2  # in its row, and why below the table


def test_wrong_peer_does_not_count_as_a_peer() -> None:
    row = run(SELF, "float32", "fwd", (FLASH_ATTENTION, planted("fast", 1e-4), SDPA))
    assert set(row.timings) == {OURS, "torch SDPA"}
    assert row.refusals["fast"].startswith("WRONG")
    assert row.ratio("fast") is None


def test_wrong_gradient_alone_is_found() -> None:
    truths = [Truth(torch.ones(3, dtype=torch.float64)), Truth(torch.ones(4, dtype=torch.float64))]
    results = [torch.ones(3), torch.tensor([1.0, 1.0, 1.0, 1.1])]
    assert not judge(results, truths, [1e-7, 1e-7]).passed
    assert not judge([torch.ones(3), torch.ones(1)], truths, [1e-7, 1e-7]).passed
    assert judge([torch.ones(3), torch.ones(4)], truths, [0.0, 0.0]) == Verdict(
        0.0, torch.finfo(torch.float32).eps / 2
    )


def test_refusals_are_reported() -> None:
    shy = Contestant("shy", lambda case, dtype: "not today", SDPA.prepare)
    row = run(SELF, "float32", "fwd", (FLASH_ATTENTION, shy))
    assert row.refusals == {"shy": "not today"}
    assert "shy: not today" in markdown(Results([row], CEILINGS))


def test_a_peer_that_breaks_does_not_end_the_race() -> None:
    def broken(case: AttentionCase):
        def attention(*tensors: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no kernel for this\nand a long trace")

        return attention

    refusal = lambda case, dtype: None  # noqa: E731
    row = run(SELF, "float32", "fwd", (FLASH_ATTENTION, Contestant("broken", refusal, broken)))
    assert set(row.timings) == {OURS}
    assert row.refusals == {"broken": "no kernel for this"}
    with pytest.raises(RuntimeError, match="no kernel for this"):
        run(SELF, "float32", "fwd", (Contestant(OURS, refusal, broken),))


def test_peers_of_gpus_stay_out_of_races_on_a_cpu() -> None:
    names = {x.name for x in Contest("flash_attention", SELF, "float32", "fwd").contestants}
    assert names == ON_CPU | {"torch.compile", "FlexAttention"}
    contest = Contest("flash_attention", SELF, "float32", "fwd", "cuda")
    expected = {"SDPA flash", "SDPA efficient", "SDPA cuDNN", "xformers", "flash-attn"}
    assert names | expected | {"torch varlen"} == {x.name for x in contest.contestants}


def test_peers_that_compile_race_on_a_cpu_only_if_asked_to() -> None:
    compiling = Contestant("slow to start", SDPA.refusal, SDPA.prepare, compiles=True)
    contest = Contest("flash_attention", SELF, "float32", "fwd")
    row = race_contest(contest, 0.0, (FLASH_ATTENTION, compiling))
    assert "--compile" in row.refusals["slow to start"]
    row = race_contest(contest, 0.0, (FLASH_ATTENTION, compiling), compiles=True)
    assert set(row.timings) == {OURS, "slow to start"}


TINY = {
    "flash_attention": CAUSAL,
    "window_attention": WindowCase("tiny", "a test", 2, 14, 2, 8, 7, 3),
    "cross_attention": ImageAttentionCase("tiny", "a test", 2, 2, 20, 3, 5, 8),
    "contrastive_loss": LossCase("tiny", "a test", 12, 256),
}


def why_not(family: str, name: str, case: Case, dtype: torch.dtype) -> str | None:
    (peer,) = (x for x in FAMILIES[family].contestants if x.name == name)
    return peer.refusal(case, dtype)


def test_peers_say_what_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    half, single = torch.bfloat16, torch.float32
    losses, siglip = TINY["contrastive_loss"], replace(TINY["contrastive_loss"], loss="siglip")
    monkeypatch.setattr(contestant_module, "is_installed", lambda name: False)
    for peers_of, name in (
        ("flash_attention", "flash-attn"),
        ("flash_attention", "torch varlen"),
        ("flash_attention", "xformers"),
        ("window_attention", "timm's steps"),
        ("contrastive_loss", "inf-cl"),
        ("contrastive_loss", "open_clip"),
    ):
        assert why_not(peers_of, name, TINY[peers_of], half) == "not installed"
    monkeypatch.setattr(contestant_module, "is_installed", lambda name: True)
    for name in ("flash-attn", "torch varlen"):
        assert why_not("flash_attention", name, CAUSAL, half) is None
        assert "float32" in why_not("flash_attention", name, CAUSAL, single)
        unequal = replace(CAUSAL, key_length=12)
        assert "other end" in why_not("flash_attention", name, unequal, half)
    uneven = replace(TINY["window_attention"], size=13)
    assert "pads" in why_not("window_attention", "timm's steps", uneven, half)
    assert why_not("contrastive_loss", "inf-cl", losses, single) is None
    assert "256" in why_not("contrastive_loss", "inf-cl", replace(losses, dim=72), single)
    for name in ("inf-cl", "linear_cross_entropy"):
        assert "sigmoid" in why_not("contrastive_loss", name, siglip, single)
    monkeypatch.delattr(torch.nn.functional, "linear_cross_entropy", raising=False)
    text = why_not("contrastive_loss", "linear_cross_entropy", losses, single)
    assert text == f"torch {torch.__version__} does not have it"


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("family", TINY)
def test_every_peer_of_a_cpu_is_right(family: str, mode: str) -> None:
    contest = Contest(family, TINY[family], "float32", mode)
    _, calls = checked_calls(contest)
    assert calls.keys() == {x.name for x in contest.contestants if not x.compiles}


SMALL_LAYERS = [replace(case, batch=case.yardstick_batch) for case in LAYERS]


@pytest.mark.parametrize(
    ("case", "mode"),
    [(SMALL_LAYERS[0], "fwd"), *((case, "fwd+bwd") for case in SMALL_LAYERS)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_layers_are_right_after_patching(case: ModuleCase, mode: str) -> None:
    row, calls = checked_calls(Contest("layers", case, "float32", mode))
    assert calls.keys() == {OURS, "original"}, row.refusals


def test_original_is_never_further_off_than_its_yardstick() -> None:
    options = {"dim": 64, "heads": 2, "tokens": 65}
    case, dtype = replace(LAYERS[0], batch=16, options=options), torch.bfloat16
    inputs = modules.make_inputs(case, dtype, "fwd+bwd")
    results = modules.make_call(lambda module, mode: module, inputs, "fwd+bwd")()
    truths = modules.reference(case, inputs, "fwd+bwd")
    yardsticks = modules.yardsticks(case, dtype, "fwd+bwd")
    for result, truth, yardstick in zip(results, truths, yardsticks, strict=True):
        assert relative_error(result, *truth) <= yardstick


def test_a_module_that_nothing_is_replaced_in_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYERS[0], batch=1)
    report = type("Report", (), {"replaced": []})()
    monkeypatch.setattr(module_peers.vlmfast, "patch", lambda *_, **__: report)
    with pytest.raises(RuntimeError, match="replaced nothing"):
        race_contest(Contest("layers", case, "float32", "fwd"), 0.0)


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_work_of_modules_is_that_of_their_formulas(mode: str) -> None:
    layer = LAYERS[0]
    batch, dim, tokens = layer.batch, layer.options["dim"], layer.options["tokens"]
    inputs = 2 * batch * tokens * (dim * 3 * dim)
    output, attention = inputs // 3, 2 * 2 * batch * tokens**2 * dim
    # The input has no gradient; attention's backward computes the scores again.
    backward = inputs + 2 * output + attention * 5 // 2
    forward = inputs + output + attention
    flops = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
    parameters = 4 * dim**2 + 4 * dim
    read = parameters + 2 * batch * tokens * dim
    elements = {"fwd": read, "bwd": read + parameters, "fwd+bwd": 2 * read + parameters}[mode]
    assert modules.work(layer, torch.bfloat16, mode) == Work(flops, 2 * elements)


def test_work_of_a_whole_model_is_that_of_its_formula() -> None:
    model = next(case for case in MODELS if case.name == "vit-b16-model")
    tokens, dim = 197, 768
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim
    whole = 12 * block + (tokens - 1) * (16 * 16 * 3) * dim + dim * 1000
    assert modules.work(model, torch.float32, "fwd").flops == 2 * model.batch * whole


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


def test_eager_refuses_what_would_not_fit_in_memory() -> None:
    endless = replace(SELF, query_length=2**24, key_length=2**24)
    assert "score matrices" in EAGER.refusal(endless, torch.float32)
    assert EAGER.refusal(SELF, torch.float32) is None


def test_launches_begin_with_an_empty_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert measure.launch_seconds(lambda: log.append("launch") or (), 10**6) > 0
    assert log == ["wait", *["launch"] * measure.MOST_LAUNCHED]


def test_a_type_without_fast_products_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "unhurried_rate", lambda dtype: 1e9)
    contest = next(contests("flash_attention", ["bfloat16"], ("fwd",), "vit-b16"))
    fast = replace(CEILINGS, flops={"bfloat16": 1e12}, bandwidth=1e12, exps=1e12)
    tournament = command_line._Tournament(parsed("--minutes", "1", "--seconds", "0"), fast)
    work = family.work(contest.case, torch.bfloat16, "fwd")
    expected = command_line.FIXED + command_line.UNHURRIED_CALLS * work.flops / 1e9
    assert tournament._expected_seconds(contest) == pytest.approx(expected)
    assert measure.unhurried_rate("float32", 64) > 0


def test_no_result_is_right_that_is_nan() -> None:
    truth = Truth(torch.ones(3, dtype=torch.float64))
    assert not judge([torch.full((3,), float("nan"))], [truth], [float("inf")]).passed


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_only_the_yardsticks_of_sums_grow_with_the_batch(mode: str, monkeypatch) -> None:
    case = LossCase("tiny", "a test", 64, 16)
    monkeypatch.setattr(losses_family, "YARDSTICK_PAIRS", 16)
    few = losses_family.yardsticks(replace(case, pairs=16), torch.float32, mode)
    many = losses_family.yardsticks(case, torch.float32, mode)
    grown = {"fwd": [2], "bwd": [1, 1, 2], "fwd+bwd": [2, 1, 1, 2]}[mode]
    assert many == [factor * error for factor, error in zip(grown, few, strict=True)]


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


def test_names_are_unique_and_lengths_are_real() -> None:
    for row in FAMILIES.values():
        assert len({case.name for case in row.cases}) == len(row.cases)
        assert [case.name for case in row.selected] == list(row.selection)
    chosen = list(contests("flash_attention", ["float16"], ("fwd", "bwd"), "vit-h"))
    assert [str(contest) for contest in chosen] == ["vit-h14 float16 fwd", "vit-h14 float16 bwd"]


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, history = tmp_path / "new", tmp_path / "history.csv"
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    arguments += ["--ceiling-size", "64", "--memory", "--out", str(out), "--append", str(history)]
    for repetition in (1, 2):
        assert command_line.main([*arguments, "--backend", "reference"]) == 0
        with history.open() as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 4 * repetition
    assert {line["contestant"] for line in lines} == ON_CPU
    for line in lines:
        assert int(line["peak_bytes"]) > 0 and float(line["median"]) > 0
        assert line["limit"] in ("matrix", "memory", "exp") and float(line["of_limit"]) > 0
        assert line["torch"] == torch.__version__ and line["commit"]
        assert line["threads"] == str(torch.get_num_threads())
        assert line["cpu_isa"] == torch.ops.vlmfast.cpu_isa()
    text = capsys.readouterr().out
    assert "| vit-h14 | B1 H16 L257 S257 d80 | float32 | fwd |" in text
    assert "| vit-h14 | float32 | fwd | reference |" in text
    assert (out / "report.md").read_text().strip() in text
    document = json.loads((out / "results.json").read_text())
    assert set(document) == {"machine", "ceilings", "rows", "left_out"}
    (row,) = document["rows"]
    assert set(row["timings"]) == set(row["peak_bytes"]) == ON_CPU
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "vit-h14" in page  # speed-ups and roofline
    assert not re.search(r"""(src|href)=["']http""", page)


def test_rows_are_not_appended_to_another_table(tmp_path: Path, capsys) -> None:
    history = tmp_path / "history.csv"
    history.write_text("date,case\n")
    with pytest.raises(SystemExit) as stop:
        command_line.main(["flash_attention", "--filter", "vit-h14", "--append", str(history)])
    assert stop.value.code == 2
    assert "expected the columns" in capsys.readouterr().err
    assert history.read_text() == "date,case\n"


def test_kept_results_have_the_columns_of_today() -> None:
    folder = ROOT / "bench" / "results"
    assert machine_file().parent == folder
    for path in folder.glob("*.csv"):
        check_csv(path)


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--minutes", "0"]
    assert command_line.main([*arguments, "--seconds", "0", "--ceiling-size", "64"]) == 0
    assert "no time was left for flash_attention: vit-h14 float32 fwd" in capsys.readouterr().out


def test_sweeps_reach_the_sizes_that_they_should() -> None:
    sweeps = {name: row.sweep for name, row in FAMILIES.items() if row.sweep}
    sizes = {name: [size for size, _ in sweep.cases] for name, sweep in sweeps.items()}
    for name, first, last in (
        ("flash_attention", 128, 16384),
        ("cross_attention", 1, 64),
        ("contrastive_loss", 256, 65536),
    ):
        assert sizes[name] == sorted(sizes[name])
        assert (sizes[name][0], sizes[name][-1]) == (first, last)
    order = [contest.case.name for contest in command_line._swept(parsed("--sweeps"))]
    assert order.index("tokens-16384") > order.index("pairs-256")
    assert sorted(order) == sorted(case.name for x in sweeps.values() for _, case in x.cases)


def parsed(*arguments: str):
    return command_line._parser().parse_args(arguments)


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


def test_the_page_draws_sweeps_and_says_who_wins(tmp_path: Path, capsys) -> None:
    sweep = FAMILIES["flash_attention"].sweep
    rows = []
    for (_, case), ratio in zip(sweep.cases, itertools.count(1), strict=False):
        row = Row(
            "flash_attention", case.name, case.shape, "", "float32", "fwd", "cpu", "cpu", WORK
        )
        times = {OURS: 1e-3 * ratio, "torch SDPA": 2e-3 * ratio}
        row.timings = {name: Timing(t, 0.9 * t, 1.1 * t, 9) for name, t in times.items()}
        row.verdicts = {OURS: Verdict(1e-7, 2e-7)}
        row.peak_bytes = {OURS: 10**6}
        row.noise, row.launch = 0.01, {OURS: 5e-6}
        row.refusals = {"flash-attn": "not installed"}
        rows += [row, replace(row, swept=True)]
    results = Results(rows, CEILINGS, {"models vit fwd": "no time was left"})
    text = page(results)
    assert text.count("<svg") == 3
    assert "Faster than the best peer in 8 of 8 contests; 2.00 to 2.00 times as fast" in text
    assert "2.00 ± 1.0%" in text and "launch of vlmfast µs" in text
    assert "all of flash_attention, flash-attn: not installed" in text
    assert "no time was left for models: vit fwd" in text

    # Of results that are kept, another machine makes the same report.
    results.machine["processor"] = "of another machine"
    write_json(tmp_path / "results.json", results)
    assert command_line.main(["report", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "report.html").read_text() == page(results)
    assert (tmp_path / "report.md").read_text() == markdown(results) + "\n"
    assert "of another machine" in page(results) and "of another machine" in markdown(results)
    (tmp_path / "broken.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit):
        command_line.main(["report", str(tmp_path / "broken.json")])
    assert "broken.json: not the results of a run" in capsys.readouterr().err


def test_the_report_says_what_else_a_family_gains_from() -> None:
    sizes = ("", "", "", "float32", "fwd", "cpu", "cpu", WORK)
    rows = [Row("layers", *sizes), Row("flash_attention", *sizes)]
    told = notes(Results(rows, CEILINGS))
    assert [x for x in told if "inference=True" in x] == [f"layers: {FAMILIES['layers'].remark}"]


def recorded(ours: float, peer: float, spread: float = 0.01) -> dict:
    """A run of two contests, as results.json holds it; times in seconds."""
    rows = [
        row_of("steady", 1e-3, 2e-3, spread),
        row_of("changing", ours, peer, spread),
    ]
    return {"machine": machine(), "ceilings": {}, "rows": rows}


def row_of(name: str, ours: float, peer: float, spread: float) -> dict:
    def timing(median: float) -> dict:
        half = spread * median
        return {"median": median, "p20": median - half, "p80": median + half, "samples": 50}

    timings = {OURS: timing(ours), "torch SDPA": timing(peer)}
    keys = {"family": "flash_attention", "case": name, "dtype": "float32", "mode": "fwd"}
    return {**keys, "device": "cpu", "timings": timings, "noise": 0.005}


@pytest.mark.parametrize(
    ("ours", "peer", "spread", "verdict"),
    [
        (1e-3, 2e-3, 0.01, ""),
        (1.2e-3, 2e-3, 0.01, "SLOWER"),
        (0.8e-3, 2e-3, 0.01, "faster"),
        (1.2e-3, 2.4e-3, 0.01, ""),  # so is the peer: the machine is slower today
        (1e-3, 1.6e-3, 0.01, "SLOWER"),  # the machine is faster today, our call is not
        (1.2e-3, 2e-3, 0.9, ""),  # lost in the spread of the samples
    ],
)
def test_compare(tmp_path, capsys, ours: float, peer: float, spread: float, verdict: str) -> None:
    before, after = recorded(1e-3, 2e-3), recorded(ours, peer, spread)
    steady, changing = changes(before, after)
    assert (steady.verdict, changing.verdict) == ("", verdict)
    paths = []
    for name, document in (("before", before), ("after", after)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document))
    assert command_line.main(["compare", *map(str, paths)]) == int(verdict == "SLOWER")
    assert verdict in capsys.readouterr().out


def slowed(name: str, milliseconds: float) -> Contestant:
    """Right attention that waits first."""

    def prepare(case: AttentionCase):
        attention = SDPA.prepare(case)

        def slow(*tensors: torch.Tensor) -> torch.Tensor:
            time.sleep(milliseconds * 1e-3)
            return attention(*tensors)

        return slow

    return Contestant(name, lambda case, dtype: None, prepare)


def test_compare_finds_a_planted_slow_down() -> None:
    documents = []
    for milliseconds in (2.0, 200.0):
        contestants = (slowed(OURS, milliseconds), slowed("peer", 20.0))
        row = run(SELF, "float32", "fwd", contestants)
        documents.append({"machine": {}, "rows": [asdict(row)]})
    first, slower = documents
    assert changes(first, slower)[0].verdict == "SLOWER"
    assert changes(slower, first)[0].verdict == "faster"
    lost = {"machine": {}, "rows": [{**slower["rows"][0], "timings": {}}]}
    assert contests_lost(first, lost) == ["flash_attention tiny float32 fwd"]


def test_compare_knows_that_a_race_may_be_quiet_by_luck() -> None:
    """All of a run was noisy, and one contest happened to equal itself."""
    first, second = recorded(1e-3, 2e-3), recorded(1.1e-3, 2e-3)
    assert changes(first, second)[1].verdict == "SLOWER"
    for document in (first, second):
        steady, changing = document["rows"]
        document["rows"] = [{**steady, "case": f"{n}", "noise": 0.06} for n in range(3)]
        document["rows"].append(changing)
    assert changes(first, second)[-1].verdict == ""


def test_compare_holds_a_device_against_itself() -> None:
    first, second = recorded(1e-3, 2e-3), recorded(1e-3, 2e-3)
    for row in second["rows"]:
        row["device"] = "cuda"
    assert not changes(first, second)


def test_compare_names_what_went_wrong_and_counts_what_is_gone(tmp_path: Path, capsys) -> None:
    first, second = recorded(1e-3, 2e-3), recorded(1e-3, 2e-3)
    second["rows"] = [{**second["rows"][0], "timings": {}, "noise": None}]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, document in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(document))
    assert command_line.main(["compare", *map(str, paths)]) == 1
    text = capsys.readouterr().out
    assert "flash_attention steady float32 fwd: no right result any more" in text
    assert "1 contests of the first run are not in the second" in text


@pytest.mark.parametrize("text", ["[1]", '{"machine": {}, "rows": [{}]}', "{"])
def test_compare_refuses_what_is_no_result(tmp_path: Path, capsys, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["compare", str(path), str(path)])
    assert stop.value.code == 2
    assert "results.json: not the results of a run" in capsys.readouterr().err


def test_compare_takes_the_latest_runs_of_kept_results(tmp_path: Path, capsys) -> None:
    kept, now = tmp_path / "machine.csv", tmp_path / "results.json"
    for milliseconds in (9.0, 1.0):  # the latter is what counts
        append_csv(kept, [timed_row("steady", 1.0), timed_row("changing", milliseconds)], CEILINGS)
    rows = [timed_row("steady", 1.0), timed_row("changing", 2.0)]
    write_json(now, Results(rows, CEILINGS))
    assert command_line.main(["compare", str(kept), str(now)]) == 1
    text = capsys.readouterr().out
    assert "| changing | float32 | fwd | 1 | 2 | torch SDPA | 2.000 |" in text
    assert "1 of 2 contests are slower" in text
    assert "before" not in text.partition("| case |")[0]  # the machine is the same
    append_csv(kept, rows, CEILINGS)
    assert command_line.main(["compare", str(kept), str(now)]) == 0


def timed_row(name: str, milliseconds: float) -> Row:
    row = Row("flash_attention", name, "", "", "float32", "fwd", "cpu", "cpu", WORK)
    for contestant, seconds in ((OURS, milliseconds * 1e-3), ("torch SDPA", 3e-3)):
        row.timings[contestant] = Timing(seconds, 0.99 * seconds, 1.01 * seconds, 50)
        row.verdicts[contestant] = Verdict(1e-7, 2e-7)
    row.noise = 0.005
    return row


def test_compare_wants_two_runs_of_the_same_contests(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(recorded(1e-3, 2e-3)))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"machine": {}, "rows": []}))
    for arguments in (
        [str(path), str(empty)],
        [str(path), str(tmp_path / "none.json")],
        [str(path)],
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.main(["compare", *map(str, arguments)])
        assert stop.value.code == 2


def test_a_layer_whose_library_is_missing_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    """And so it is where nothing can draw."""
    installed = contestant_module.is_installed
    gone = {"timm", "open_clip", "flamingo_pytorch", "torchvision", "matplotlib"}
    for module in (command_line, contest_module, modules, report_module):
        monkeypatch.setattr(module, "is_installed", lambda x: x not in gone and installed(x))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "bench.html")
    modules._module.cache_clear()
    out = tmp_path / "new"
    arguments = ["layers", "models", "--dtype", "float32", "--selection", "--minutes", "0"]
    arguments += ["--seconds", "0", "--ceiling-size", "64", "--out", str(out)]
    assert command_line.main(arguments) == 0
    text = (out / "report.md").read_text()
    for line in (
        "not installed: open_clip, for layers: clip-loss-layer float32 fwd",
        "not installed: torchvision, for models: swin-t-model float32 fwd",
        "no time was left for layers: vit-b16-layer float32 fwd",
    ):
        assert f"- {line}\n" in text
    assert not (out / "report.html").exists() and "bench.html" not in sys.modules
    assert all(not contest.missing for contest in search.training_contests("cuda"))
    assert ncu.measured("layers").case.name == "vit-b16-layer"
    assert ncu.measured("models") is None


def test_every_module_says_which_library_it_is_from() -> None:
    for case in (*LAYERS, *MODELS):
        assert all(importlib.util.find_spec(name) for name in case.libraries)
    assert set(LAYERS[0].libraries) == {"torch"}


def test_command_line_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(FAMILIES["flash_attention"], contestants=(planted(OURS, 1e-3), SDPA))
    monkeypatch.setitem(FAMILIES, "flash_attention", wrong)
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    assert command_line.main([*arguments, "--ceiling-size", "64"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_command_line_says_that_nothing_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["flash_attention", "--filter", "no-such-case"]) == 2
    assert "no-such-case" in capsys.readouterr().err


def test_pytest_benchmark_runs_the_same_calls() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", "vit-h14 and float32 and fwd"]
    result = subprocess.run(
        [*command, "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 passed, 4 skipped" in result.stdout  # six contestants, forward and with backward


def test_command_line_says_why_a_forced_backend_cannot_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    arguments += ["--ceiling-size", "64"]
    assert command_line.main([*arguments, "--backend", "cuda"]) == 2
    assert "no CUDA C++ kernel of this family exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main([*arguments, "--backend", "gpu"])


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_gpu_script_dry_run(tmp_path: Path) -> None:
    result = gpu_script("--dry-run", "--out", str(tmp_path), "--minutes", "10")
    assert result.returncode == 0, result.stderr
    steps = re.findall(r"^(\w+): timeout (\d+) ", result.stdout, re.MULTILINE)
    names = ["build", "tests", "sanitizer", "search", "race", "compiled", "ncu"]
    assert [name for name, _ in steps] == names
    assert sum(int(seconds) for _, seconds in steps) <= 600
    assert (tmp_path / "summary.txt").read_text() == result.stdout
    for step in ("race", "compiled"):
        line = re.search(rf"^{step}: timeout (\d+) .* -m bench (.*)", result.stdout, re.MULTILINE)
        options = parsed(*line[2].split())
        assert 0.85 * int(line[1]) < 60 * options.minutes < 0.95 * int(line[1])
        assert options.compile == (step == "compiled")
    for module in re.findall(r"-m (bench[.\w]*)", result.stdout):
        assert importlib.util.find_spec(module) is not None


def test_gpu_script_runs_the_steps_it_is_told_and_keeps_going(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *bench.ncu*) exit 3;; esac\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    result = gpu_script("--out", str(out), "--python", str(fake), "build", "ncu", "race")
    assert result.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert re.findall(r"(\w+): exit (\d+)", summary) == [
        ("build", "0"),
        ("ncu", "3"),
        ("race", "0"),
    ]
    assert "--device cuda" in (out / "race.log").read_text()


def test_gpu_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for arguments in (["--minutes", "ten"], ["--minutes", "0"], ["everything"]):
        result = gpu_script("--out", str(tmp_path / "none"), *arguments)
        assert result.returncode == 2
        assert not (tmp_path / "none").exists()


def test_searched_rows_have_the_form_of_the_tables() -> None:
    from vlmfast.kernels import configs

    launch = configs.Launch(128, 64, 8, 3)
    searched = {
        (90, configs.ShapeClass("flash_attention_fwd", "half", 64, 197, True)): configs.Row(
            64, 197, launch, plain_only=True
        ),
        (90, configs.ShapeClass("flash_attention_fwd", "half", 64, 577, False)): configs.Row(
            64, 577, launch
        ),
    }
    text = search.formatted(searched)
    assert text.startswith("# flash_attention_fwd, sm_90, half\n_rows(\n")
    names = {"_rows": configs._rows, "PLAIN": configs.PLAIN}
    assert eval(text, names) == tuple(searched.values())


def test_ncu_reports_become_tables(tmp_path: Path) -> None:
    report = tmp_path / "ncu-flash_attention.csv"
    report.write_text(
        '"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","flash_attention_fwd","9"\n'
    )
    text = ncu.tables([report])
    assert text.splitlines()[0] == "## flash_attention"
    assert "| flash_attention_fwd | 9 |" in text
    command = ncu.command("flash_attention", report)
    assert command[0] == "ncu" and str(report) in command


def test_ncu_that_measures_nothing_does_not_end_the_rest(tmp_path, monkeypatch, capsys) -> None:
    """Where the driver forbids counters."""
    fake = tmp_path / "ncu"
    fake.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-file ]; do shift; done\n'
        'case "$2" in *flash*) echo "==WARNING== No kernels were profiled." >"$2"; exit 0;; esac\n'
        'printf "\\"Kernel Name\\"\\n\\"\\"\\n\\"a_kernel\\"\\n" >"$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ncu.main([str(tmp_path / "out")]) == 1
    assert "flash_attention: lines: expected" in capsys.readouterr().err
    text = (tmp_path / "out" / "ncu.md").read_text()
    assert "## window_attention" in text and "## flash_attention" not in text


@pytest.mark.parametrize("module", [search, ncu])
def test_gpu_programs_say_what_they_lack(module, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ncu.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([str(tmp_path / "target")]) == 1
    assert re.search("wants a GPU|is not installed", capsys.readouterr().err)
