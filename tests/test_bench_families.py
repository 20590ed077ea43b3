"""Cases, peers and formulas of every family that is raced."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as command_line
from bench import contestant as contestant_module
from bench.contest import Contest, checked_calls, contests, run
from bench.contestant import OURS
from bench.contrastive_loss import calls as losses_family
from bench.contrastive_loss.cases import BIAS, LossCase
from bench.contrastive_loss.peers import dense_loss
from bench.cross_attention.cases import ImageAttentionCase
from bench.families import FAMILIES
from bench.family import TimedCase
from bench.flash_attention import calls as family
from bench.flash_attention.cases import AttentionCase
from bench.flash_attention.peers import eager_attention
from bench.measure import Truth, judge
from bench.window_attention import calls as windows_family
from bench.window_attention.cases import WindowCase
from tools.bench_samples import CAUSAL, CROSS, EAGER, SDPA, SELF, parsed
from vlmfast import verify


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


def test_eager_refuses_what_would_not_fit_in_memory() -> None:
    endless = replace(SELF, query_length=2**24, key_length=2**24)
    assert "score matrices" in EAGER.refusal(endless, torch.float32)
    assert EAGER.refusal(SELF, torch.float32) is None


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


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_contrastive_losses_are_right_and_do_the_work_that_is_stated(loss: str, mode: str) -> None:
    case = LossCase("tiny", "a test", 40, 16, loss)
    row = run(Contest("contrastive_loss", case, "float32", mode), 0.0)
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


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_only_the_yardsticks_of_sums_grow_with_the_batch(mode: str, monkeypatch) -> None:
    case = LossCase("tiny", "a test", 64, 16)
    monkeypatch.setattr(losses_family, "YARDSTICK_PAIRS", 16)
    few = losses_family.yardsticks(replace(case, pairs=16), torch.float32, mode)
    many = losses_family.yardsticks(case, torch.float32, mode)
    grown = {"fwd": [2], "bwd": [1, 1, 2], "fwd+bwd": [2, 1, 1, 2]}[mode]
    assert many == [factor * error for factor, error in zip(grown, few, strict=True)]


TINY = {
    "flash_attention": CAUSAL,
    "window_attention": WindowCase("tiny", "a test", 2, 14, 2, 8, 7, 3),
    "cross_attention": ImageAttentionCase("tiny", "a test", 2, 2, 20, 3, 5, 8),
    "contrastive_loss": LossCase("tiny", "a test", 12, 256),
}


def why_not(family: str, name: str, case: TimedCase, dtype: torch.dtype) -> str | None:
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


def test_names_are_unique_and_lengths_are_real() -> None:
    for row in FAMILIES.values():
        assert len({case.name for case in row.cases}) == len(row.cases)
        assert [case.name for case in row.selected] == list(row.selection)
    chosen = list(contests("flash_attention", ["float16"], ("fwd", "bwd"), "vit-h"))
    assert [str(contest) for contest in chosen] == ["vit-h14 float16 fwd", "vit-h14 float16 bwd"]


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
