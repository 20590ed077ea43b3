"""The Triton kernels of cross_attention, interpreted, against float64.

Every launch runs under the guard: memory beyond the arguments, races between programs, undefined
lanes and the order of programs all show.
"""

import pytest
import torch

import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.verify.cross_attention import CASES, image_case, random_bits, shuffled, visible_latents

pytest.importorskip("triton")

from vlmfast.kernels import launch as launching

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("guarded")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case):
    assert_keeps_budget(case, torch.bfloat16, backend="triton")


def test_half_precision_keeps_its_budget():
    case = image_case("", (1, 2, 40, 32), (1, 2, 40))
    assert_keeps_budget(case, torch.float16, backend="triton")


MORE_CASES = [
    image_case("nine latents", (1, 2, 20, 32), (2, 3, 9)),
    image_case("more images than tokens", (1, 2, 3, 32), (1, 9, 5), phi=shuffled(1, 3, 9)),
    image_case("several blocks of an image's tokens", (1, 1, 150, 32), (1, 2, 20)),
    image_case("several blocks of latents", (1, 2, 20, 32), (1, 2, 150)),
    image_case("negative scale", (1, 2, 21, 32), (1, 2, 20), scale=-0.3),
    image_case("negative scale, several images", (1, 2, 21, 32), (1, 2, 20), mode="all_previous",
               scale=-0.3),
    image_case("scale 0", (1, 2, 21, 32), (1, 2, 20), scale=0.0),
    image_case("scale 0, several images", (1, 2, 21, 32), (1, 2, 20), mode="all_previous",
               scale=0.0),
    image_case("bits", (1, 4, 70, 32), (2, 3, 20), phi=random_bits(1, 70, 3)),
    image_case("uniform", (1, 4, 70, 32), (2, 3, 20), empty_rows="uniform", overflow="uniform"),
    image_case("uniform, several", (1, 4, 40, 32), (2, 3, 9), 40, mode="all_previous",
               empty_rows="uniform", lengths=(9, 0, 4)),
]  # fmt: skip


@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_more_cases(case):
    assert_keeps_budget(case, torch.float32, backend="triton")


@pytest.mark.parametrize("dim", [8, 40, 80, 256])
def test_head_dimensions(dim):
    case = image_case(f"{dim}", (1, 2, 19, dim), (1, 2, 20))
    assert_keeps_budget(case, torch.bfloat16, backend="triton")


def attend(inputs, plan):
    out, logsumexp = VF.image_cross_attention(*inputs, plan, return_lse=True, backend="triton")
    return [out.detach(), logsumexp, *torch.autograd.grad(out.square().sum(), inputs)]


def qkv(tokens=40, images=3, latents=20, dim=16, heads=4):
    shapes = ((heads, tokens), (2, images, latents), (2, images, latents))
    return [torch.randn(2, *shape, dim).requires_grad_() for shape in shapes]


LENGTHS = torch.tensor([[20, 0, 7], [3, 20, 5]])


@pytest.mark.parametrize(
    "empty_rows, lengths", [("zero", None), ("dense", LENGTHS)], ids=["whole", "dense, lengths"]
)
@pytest.mark.parametrize("mode", ["last", "all_previous", "bits"])
def test_nan_in_an_image_stays_with_those_who_see_it(mode, empty_rows, lengths):
    phi = torch.rand(2, 40, 3) < 0.4 if mode == "bits" else torch.randint(0, 5, (2, 40))
    plan = VF.cross_attention_plan(
        phi, 3, "last" if mode == "bits" else mode, empty_rows, image_lengths=lengths
    )
    inputs = qkv()
    clean = attend(inputs, plan)
    poisoned = [x.detach().clone() for x in inputs]
    poisoned[1][:, :, 1] = torch.nan
    poisoned[2][:, :, 1] = torch.inf
    after = attend([x.requires_grad_() for x in poisoned], plan)
    sees = visible_latents(plan, 20).unflatten(-1, (3, 20))[:, :, 1].any(-1)
    blind = ~sees[:, None].expand(2, 4, 40)
    assert 0 < blind.sum() < blind.numel()
    for name, a, b in zip(("out", "logsumexp", "grad_query"), clean, after, strict=False):
        assert torch.equal(a[blind], b[blind]), name
    assert after[0][~blind].isnan().all()


def test_hidden_latents_are_never_read():
    plan = VF.cross_attention_plan(torch.randint(0, 4, (2, 40)), 3, image_lengths=LENGTHS)
    inputs = qkv()
    clean = attend(inputs, plan)
    hidden = (torch.arange(20) >= LENGTHS[..., None])[:, None].expand(2, 2, 3, 20)
    poisoned = [x.detach().clone() for x in inputs]
    for x in poisoned[1:]:
        x[hidden] = torch.nan
    after = attend([x.requires_grad_() for x in poisoned], plan)
    for a, b in zip(clean, after, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_strides_are_free_and_gradients_repeat_bitwise(mode):
    plan = VF.cross_attention_plan(torch.randint(0, 5, (2, 40)), 3, mode)
    query = torch.randn(2, 40, 4, 16).transpose(1, 2).requires_grad_()
    key, value = torch.randn(2, 3, 20, 2, 2, 16).permute(3, 0, 4, 1, 2, 5).unbind(0)
    inputs = [query, key.requires_grad_(), value.requires_grad_()]
    ours = attend(inputs, plan)
    again = attend(inputs, plan)
    dense = attend([x.detach().contiguous().requires_grad_() for x in inputs], plan)
    for a, b, c in zip(ours, again, dense, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_autotuning_never_cuts_an_image_whose_pass_gives_every_gradient(monkeypatch):
    def search(shape, shipped, run):
        if shape.kernel == "cross_attention_bwd_whole":
            shipped = shipped._replace(block_n=shipped.block_n // 2)
        return launching.Row(shape.columns, shape.rows, shipped)

    plan = VF.cross_attention_plan(torch.randint(0, 4, (2, 40)), 3)
    inputs = [x.detach().bfloat16().requires_grad_() for x in qkv(latents=40)]
    expected = attend(inputs, plan)
    monkeypatch.setenv("VLMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launching, "searched", {})
    monkeypatch.setattr(launching, "search", search)
    for a, b in zip(attend(inputs, plan), expected, strict=True):
        assert torch.equal(a, b)
    assert "cross_attention_bwd_whole" in {shape.kernel for _, shape in launching.searched}


@pytest.mark.parametrize(
    "sizes", [{"tokens": 0}, {"images": 0}, {"latents": 0}, {"heads": 0}], ids=str
)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "dense"])
def test_empty_tensors(sizes, empty_rows):
    inputs = qkv(**sizes)
    phi = torch.randint(0, 3, (2, inputs[0].shape[2]))
    plan = VF.cross_attention_plan(phi, inputs[1].shape[2], empty_rows=empty_rows)
    out, logsumexp, *grads = attend(inputs, plan)
    assert torch.equal(out, torch.zeros_like(out))
    assert (logsumexp == -torch.inf).all()
    for grad in grads:
        assert torch.equal(grad, torch.zeros_like(grad))
