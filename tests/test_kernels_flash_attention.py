"""The Triton kernels of flash_attention, interpreted, against float64.

Every launch runs under the guard: memory beyond the arguments, races between programs, undefined
lanes and the order of programs all show.
"""

import pytest
import torch

import vlmfast
import vlmfast.functional as VF
from tools.budget import assert_keeps_budget
from vlmfast.reference.flash_attention import flash_attention as reference
from vlmfast.verify.common import budget, relative_error
from vlmfast.verify.flash_attention import CASES, dense_case, normal_bias, packed_case, random_mask

launch = pytest.importorskip("vlmfast.kernels.launch")
forward = pytest.importorskip("vlmfast.kernels.flash_attention.forward").forward
backward = pytest.importorskip("vlmfast.kernels.flash_attention.backward").backward
TABLES = pytest.importorskip("vlmfast.kernels.flash_attention.configs").TABLES

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("guarded")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton")


# Head dimensions that split into powers of two, and such that mask their last piece.
@pytest.mark.parametrize("dim", [8, 16, 24, 40, 72, 80, 88, 96, 104, 128, 160, 200, 256])
def test_head_dimensions(dim):
    assert_keeps_budget(dense_case(f"{dim}", (1, 2, 19, dim)), torch.bfloat16, backend="triton")


MORE_CASES = [
    dense_case("several tiles", (1, 1, 150, 64), (1, 1, 300)),
    dense_case("several tiles, causal", (1, 2, 150, 64), (1, 1, 150), is_causal=True),
    dense_case("beyond one whole head", (1, 1, 290, 64), is_causal=True),
    dense_case("more queries than keys, causal", (1, 1, 70, 32), (1, 1, 20), is_causal=True),
    dense_case("one query", (2, 2, 1, 64), (2, 2, 33)),
    dense_case("one key", (2, 2, 33, 64), (2, 2, 1)),
    dense_case("negative scale", (1, 2, 21, 32), scale=-0.3),
    dense_case("scale 0", (1, 2, 21, 32), scale=0.0),
    dense_case("bias of one row", (2, 2, 21, 32), mask=normal_bias(1, 2, 21, 1)),
    dense_case("bias over batch and heads", (2, 2, 21, 32), mask=normal_bias(1, 1, 21, 21)),
    dense_case(
        "bool mask and causal", (1, 2, 40, 32), mask=random_mask(1, 1, 40, 40), is_causal=True
    ),
    dense_case("bias and dropout", (1, 2, 24, 32), mask=normal_bias(1, 2, 24, 24), dropout_p=0.4),
    packed_case("packed, empty at both ends", [(0, 7), (20, 0), (13, 40), (0, 0)], (2, 1), 32),
]


@pytest.mark.parametrize("case", MORE_CASES, ids=lambda case: case.name)
def test_more_cases(case):
    assert_keeps_budget(case, torch.float32, backend="triton")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
def test_rows_of_a_bias_s_gradient_cancel(options, dtype):
    """Also where the output, with which the gradient could be found, has been rounded."""
    case = dense_case("", (1, 1, 20, 32), (1, 1, 100), mask=normal_bias(1, 1, 20, 1), **options)

    def by_a_whole_bias(inputs):
        bias = inputs["attn_mask"].expand(1, 1, 20, 100)
        return case.kernel({**inputs, "attn_mask": bias}, "triton")

    assert_keeps_budget(case, dtype, kernel=by_a_whole_bias)


@pytest.mark.parametrize("shape", [(2, 2, 5, 1), (1, 2, 1, 1)])
def test_gradient_of_a_bias_over_queries_is_that_of_the_logsumexp(shape):
    query, key, value, grad_out = torch.randn(4, 2, 2, 5, 16).unbind(0)
    bias, grad_logsumexp = torch.randn(shape), torch.randn(2, 2, 5)
    bias[:, :, -1:] = -torch.inf  # hides its rows: nothing of theirs counts
    rest = (None, None, 0, 0, 0, 0.3, 0.0, None)
    out, logsumexp = forward(query, key, value, bias, *rest)
    saved = (grad_out, grad_logsumexp, query, key, value, bias, out, logsumexp)
    gradient = backward(*saved, *rest, False, False, True)[3]
    seen = grad_logsumexp.masked_fill(bias[..., 0].expand(2, 2, 5) == -torch.inf, 0.0)
    torch.testing.assert_close(gradient, seen.unsqueeze(3).sum_to_size(shape))


@pytest.mark.parametrize("is_causal", [False, True])
def test_huge_logits(is_causal):
    """Of billions. Weights from a rounded log-sum-exp are then inexact, but bounded."""
    tensors = torch.randn(3, 1, 1, 40, 32)
    query, key, value = (x.requires_grad_() for x in tensors.unbind(0))
    out = attend(query, key, value, is_causal=is_causal, scale=1e9)
    exact = (x.detach().double() for x in (query, key, value))
    expected, _ = reference(*exact, causal=int(is_causal), scale=1e9)
    torch.testing.assert_close(out, expected.float())
    gradients = torch.autograd.grad(out.square().sum(), (query, key, value))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_lengths_that_kernels_cannot_count_are_named():
    x = torch.zeros(1, 1, 1, 8).expand(1, 1, 2**29 + 1, 8)
    with pytest.raises(ValueError, match=r"query: expected at most 536870912, got 536870913"):
        forward(x, x, x, None, None, None, 0, 0, 0, 1.0, 0.0, None)


def attend(query, key, value, **options):
    return VF.scaled_dot_product_attention(query, key, value, backend="triton", **options)


def test_fully_masked_rows_are_zero_and_so_are_their_gradients():
    query, key, value = (torch.randn(1, 2, 20, 32, requires_grad=True) for _ in range(3))
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[[0, 7, 19]] = False
    out = attend(query, key, value, attn_mask=mask)
    out.backward(torch.randn_like(out))
    for tensor in (out, query.grad):
        assert torch.equal(tensor[:, :, [0, 7, 19]], torch.zeros(1, 2, 3, 32))
    assert all(x.grad.isfinite().all() for x in (query, key, value))


def test_rows_hidden_by_the_lowest_finite_number_are_means():
    query, key, value = (torch.randn(1, 2, 20, 32, requires_grad=True) for _ in range(3))
    mask = torch.zeros(1, 1, 20, 20)
    mask[:, :, [3, 12]] = torch.finfo(torch.float32).min
    out = attend(query, key, value, attn_mask=mask)
    mean = value.mean(2, keepdim=True).expand(1, 2, 2, 32)
    torch.testing.assert_close(out[:, :, [3, 12]], mean)
    grad_out = torch.randn(1, 2, 2, 32)
    inputs = (query, key, value)
    grads = torch.autograd.grad(out[:, :, [3, 12]], inputs, grad_out)
    grad_out_values = torch.autograd.grad(mean, value, grad_out)[0]
    torch.testing.assert_close(grads[2], grad_out_values)


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_logsumexp(kind, dropout_p):
    """It knows nothing of dropout, and is -inf for a row that sees no key."""
    query, key, value = torch.randn(3, 2, 2, 70, 32).unbind(0)
    keep = torch.rand(2, 1, 70, 70) < 2 / 3
    keep[:, :, [0, 40, 69]] = False
    mask = keep if kind == "bool" else torch.randn(keep.shape).masked_fill(~keep, -torch.inf)
    seed = torch.tensor([5])
    arguments = (mask, None, None, 0, 0, 0, 0.2, dropout_p, seed if dropout_p else None)
    out, logsumexp = forward(query, key, value, *arguments)
    _, truth = reference(query.double(), key.double(), value.double(), mask, *arguments[1:])
    _, by_torch = reference(query, key, value, mask, *arguments[1:])
    hidden = ~keep.any(3).expand(2, 2, 70)
    assert torch.equal(out[hidden], torch.zeros(12, 32))
    assert torch.equal(logsumexp == -torch.inf, hidden)
    allowed = budget([relative_error(by_torch, truth)], torch.float32)
    assert relative_error(logsumexp, truth) <= allowed


def test_strided_and_expanded_tensors():
    packed = torch.randn(2, 21, 3, 2, 40, dtype=torch.float32)
    query, key, value = (x.transpose(1, 2) for x in packed.unbind(2))
    expected = attend(query.contiguous(), key.contiguous(), value.contiguous())
    out = attend(query, key, value)
    assert torch.equal(out, expected)
    assert out.transpose(1, 2).is_contiguous()

    leaf = torch.randn(1, 1, 21, 40, requires_grad=True)
    attend(query, leaf.expand(2, 2, 21, 40), value).sum().backward()  # grad_out has stride 0
    dense = leaf.detach().expand(2, 2, 21, 40).contiguous().requires_grad_()
    grad_out = torch.ones(2, 2, 21, 40)
    attend(query, dense, value).backward(grad_out)
    torch.testing.assert_close(leaf.grad, dense.grad.sum((0, 1), keepdim=True))


def test_a_padded_query_of_negative_scale():
    """Whose copy times -1 has other strides, no longer multiples of 8."""
    query, key, value = torch.randn(3, 1, 2, 9, 24)[..., :20].unbind(0)
    expected = attend(-query, key, value, scale=0.3)
    torch.testing.assert_close(attend(query, key, value, scale=-0.3), expected)


def test_dropout_mask_is_the_reference_s():
    query, key = torch.randn(2, 2, 20, 32), torch.randn(2, 2, 30, 32)
    value = torch.eye(30).expand(2, 2, 30, 30)  # the output is the weights
    results = []
    for backend in ("triton", "reference", "cpu"):
        torch.manual_seed(5)
        weights = VF.scaled_dot_product_attention(query, key, value, dropout_p=0.5, backend=backend)
        results.append(weights == 0)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_repeats_bitwise():
    case = torch.randn(3, 1, 2, 70, 64, requires_grad=True)

    def gradient():
        query, key, value = case.unbind(0)
        return torch.autograd.grad(attend(query, key, value).square().sum(), case)[0]

    assert torch.equal(gradient(), gradient())


def test_autotuned_launches_keep_the_budget(monkeypatch):
    """Whatever launch autotuning settles on computes the same thing, forward and backward."""
    search, near = launch.search, launch.candidates
    tuned = set()

    def search_without_a_gpu(shape, shipped, run):
        row = search(shape, shipped, run, timer=lambda call: call() or 1.0)
        assert row.launch != shipped
        tuned.add(shape.kernel)
        return row

    monkeypatch.setenv("VLMFAST_AUTOTUNE", "1")
    monkeypatch.setattr(launch, "searched", {})
    monkeypatch.setattr(launch, "candidates", lambda shipped: list(near(shipped))[1:3])
    monkeypatch.setattr(launch, "search", search_without_a_gpu)
    case = dense_case("bias", (1, 2, 40, 32), mask=normal_bias(1, 2, 40, 40))
    assert_keeps_budget(case, torch.float32, backend="triton")
    assert tuned == TABLES.keys() - {"flash_attention_bwd_whole"}


def test_the_interpreter_takes_cpu_tensors_only_when_asked():
    x = torch.randn(1, 1, 5, 16)
    assert vlmfast.explain(VF.scaled_dot_product_attention, x, x, x).backend == "cpu"
    explanation = vlmfast.explain(VF.scaled_dot_product_attention, x, x, x, backend="triton")
    assert explanation.backend == "triton"
