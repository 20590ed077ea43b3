"""The Triton kernels of window_attention, interpreted, against float64.

Every launch runs under the guard: memory beyond the arguments, races between programs, undefined
lanes and the order of programs all show.
"""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from tools.budget import assert_keeps_budget
from tools.window_attention import with_lengths
from vlmfast.kernels.window_attention.forward import forward
from vlmfast.ops import window_attention as ops
from vlmfast.reference import window_attention as reference
from vlmfast.verify.common import Case
from vlmfast.verify.window_attention import window_case

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("guarded")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOWEST = torch.finfo(torch.float32).min


def case(
    name: str,
    size: tuple[int, int, int],
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    heads: int = 2,
    dim: int = 32,
    **options: Any,
) -> Case:
    """`window_case` with what most cases here have in common: few heads and no pad_value."""
    return window_case(name, size, heads, dim, window, shift, **{"pad_value": False, **options})


CASES = [
    case("shifted", (1, 8, 12), (4, 4), (2, 2)),
    case("w7, padded, shifted", (1, 10, 7), (7, 7), (3, 3), pad_value=True),
    case("cosine, padded", (1, 8, 5), (8, 8), (4, 0), heads=1, cosine=True, pad_value=True),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_dtype_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton")


HALF_CASES = [
    case("two windows a program", (3, 14, 14), (7, 7), (3, 3)),
    case("no bias", (1, 7, 14), (7, 7), (0, 3), bias_std=None),
    case("shift before padding", (1, 9, 10), (7, 7), (3, 2), pad_value=True, wrap_padded=False),
    case("padding of zeros", (1, 9, 10), (7, 7), (3, 3)),
    case("rectangular, apart", (2, 7, 11), (3, 5), (1, 2), packed=False, pad_value=True),
    case("window larger than the map", (1, 3, 5), (7, 7), (5, 6), pad_value=True),
    case("the same, before padding", (1, 3, 5), (7, 7), (5, 6), wrap_padded=False),
    case("w6", (1, 12, 6), (6, 6), (3, 3)),
    case("w10", (1, 10, 20), (10, 10), (5, 5), heads=1, pad_value=True),
    case("w12", (1, 12, 24), (12, 12), (6, 6), heads=1),
    case("w12, padded", (1, 13, 12), (12, 12), (6, 6), heads=1, pad_value=True),
    case("w16, cosine", (1, 16, 32), (16, 16), (8, 8), heads=1, cosine=True),
    case("w24", (1, 24, 24), (24, 24), (12, 12), heads=1),
    case("dropout", (1, 7, 14), (7, 7), (3, 3), dropout_p=0.3),
    case("w12, dropout", (1, 12, 12), (12, 12), heads=1, dropout_p=0.3),
    case("bias and padding in half precision", (1, 9, 7), (7, 7), pad_value=True, bias_dtype=None),
    case("small mask value", (1, 8, 8), (8, 8), (4, 4), mask_value=-1.5),
    case("lowest mask value", (1, 7, 14), (7, 7), (0, 3), mask_value=LOWEST),
    case("lowest mask value, by blocks", (1, 9, 18), (9, 9), (0, 4), mask_value=LOWEST),
    *(case(f"head dim {dim}", (1, 8, 5), (8, 5), (4, 2), dim=dim) for dim in (8, 24, 80, 128)),
]


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case):
    assert_keeps_budget(case, torch.bfloat16, backend="triton")


FLOAT_CASES = [
    case("lowest mask value", (1, 9, 18), (9, 9), (0, 4), cosine=True, mask_value=LOWEST),
    case("large bias", (1, 8, 8), (8, 8), (4, 4), bias_std=20.0),
    case("large bias, by blocks", (1, 12, 12), (12, 12), (6, 6), heads=1, bias_std=20.0),
    case("cosine, by blocks", (1, 9, 9), (9, 9), (4, 4), heads=1, cosine=True),
]


@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda case: case.name)
def test_float32(case):
    assert_keeps_budget(case, torch.float32, backend="triton")


# One-hot: a maximum that is off by one rounding of such scores makes weights infinite, or all 0.
HUGE = [
    case(
        f"{scale:g}, w{window}",
        (1, window, window),
        (window, window),
        heads=1,
        packed=False,
        scale=scale,
    )
    for window in (7, 9)
    for scale in (-1e7, 1e9, 1e30)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", HUGE, ids=lambda case: case.name)
def test_huge_logits(case, dtype):
    if dtype == torch.float32:
        # The other gradients are P (dP - delta), where torch's delta is dP to the last digit. Here
        # it sums other products.
        case = dataclasses.replace(case, differentiable=("value",))
    assert_keeps_budget(case, dtype, backend="triton")


@pytest.mark.parametrize("window", [7, 9])
def test_signs_of_scale_and_logit_scale_hold(window):
    plain, cosine = (
        case("", (1, window, window), (window, window), heads=1, **options)
        for options in ({"scale": -0.3}, {"cosine": True})
    )
    assert_keeps_budget(plain, torch.float32, backend="triton")

    def negative(backend: str) -> Any:
        return lambda inputs: cosine.kernel(
            {**inputs, "logit_scale": -inputs["logit_scale"], "query": flipped(inputs["query"])},
            backend,
        )

    def flipped(qkv: Tensor) -> Tensor:
        return qkv * torch.tensor([-1.0, 1.0, 1.0]).repeat_interleave(32)

    assert_keeps_budget(cosine, torch.float32, kernel=negative("triton"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [7, 9])
def test_cosines_do_not_depend_on_lengths(window, dtype):
    cosine = case("", (1, window, window), (window, window), heads=1, cosine=True)
    for lengths in ((60, 60), (120, 120), (120, -30)):
        kernel = with_lengths(cosine, *lengths, "triton")
        assert_keeps_budget(cosine, dtype, kernel=kernel)


def operands(dtype: torch.dtype = torch.bfloat16, batch: int = 3) -> tuple[list, tuple]:
    qkv = torch.randn(batch, 9, 14, 3 * 64, dtype=dtype)
    tensors = [qkv, None, None, torch.randn(2, 49, 49), torch.rand(2) + 5, torch.randn(192)]
    return tensors, (2, 7, 7, 3, 3, True, 0.0, -100.0, 0.0, None)


def backward(tensors: list, numbers: tuple, grad_out: Tensor, *wanted: bool) -> tuple:
    out, logsumexp = ops.FORWARD["triton"](*tensors, *numbers)
    return ops.BACKWARD["triton"](grad_out, *tensors, out, logsumexp, *numbers, *wanted)


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [7, 9])
@pytest.mark.parametrize("extreme", [LOWEST, -LOWEST])
def test_extreme_bias_of_every_key_gives_no_nan(extreme, window, dtype, cosine):
    tokens = window**2
    tensors = [torch.randn(1, window, window, 96, dtype=dtype), None, None]
    tensors += [torch.randn(2, tokens, tokens), torch.full((2,), 5.0) if cosine else None, None]
    tensors[3][:, 3] = extreme
    numbers = (2, window, window, 0, 0, True, 0.25, -100.0, 0.0, None)
    out, _ = ops.FORWARD["triton"](*tensors, *numbers)
    gradients = backward(tensors, numbers, torch.ones_like(out), *(True,) * 4)
    assert all(x.isfinite().all() for x in (out, *gradients))


def test_repeats_bitwise():
    tensors, numbers = operands()
    grad_out = torch.randn(3, 9, 14, 64, dtype=torch.bfloat16)
    first, second = (backward(tensors, numbers, grad_out, *(True,) * 4) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("window", [7, 12])
def test_gradients_alone_are_those_of_all(window):
    tensors, numbers = operands(batch=1)
    tensors[3] = torch.randn(2, window**2, window**2)
    numbers = (2, window, window, *numbers[3:])
    grad_out = torch.randn(1, 9, 14, 64, dtype=torch.bfloat16)
    together = backward(tensors, numbers, grad_out, *(True,) * 4)
    for i, place in enumerate((0, 3, 4, 5)):
        alone = backward(tensors, numbers, grad_out, *(j == i for j in range(4)))
        assert torch.equal(alone[place], together[place])
        assert all(x.shape == (0,) for j, x in enumerate(alone) if j != place)


def test_strides_make_no_difference():
    tensors, numbers = operands()
    qkv = tensors[0]
    grad_out = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16).expand(3, 9, 14, 64)
    expected = backward(tensors, numbers, grad_out.contiguous(), *(True,) * 4)
    wide = torch.randn(3, 20, 14, 2, 3 * 64, dtype=torch.bfloat16)[:, ::2, :, 1][:, :9]
    wide.copy_(qkv)
    columns_first = qkv.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    for strided in (wide, columns_first):
        tensors[0] = strided
        results = backward(tensors, numbers, grad_out, *(True,) * 4)
        assert all(torch.equal(*pair) for pair in zip(results, expected, strict=True))


def test_logsumexp_is_the_reference_s():
    tensors, numbers = operands(torch.float32, batch=1)
    tensors[0] = tensors[0][:, :7].contiguous()  # no padded queries
    _, logsumexp = ops.FORWARD["triton"](*tensors, *numbers)
    _, expected = reference.window_attention(*tensors, *numbers)
    torch.testing.assert_close(logsumexp, expected)


def test_an_empty_batch_has_gradients_of_zero():
    tensors, numbers = operands(batch=0)
    grad_out = torch.randn(0, 9, 14, 64, dtype=torch.bfloat16)
    grad_qkv, _, _, *others = backward(tensors, numbers, grad_out, *(True,) * 4)
    assert grad_qkv.shape == (0, 9, 14, 192)
    for gradient, tensor in zip(others, tensors[3:], strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_other_windows_and_heads_do_not_leak():
    tensors, numbers = operands(torch.float32, batch=1)
    tensors[0] = tensors[0][:, :7].contiguous()
    numbers = (*numbers[:3], 0, 0, *numbers[5:])
    clean, _ = ops.FORWARD["triton"](*tensors, *numbers)
    tensors[0][:, :, 7:] = float("nan")  # the second window
    tensors[0][..., 64 + 32 : 128] = float("nan")  # the second head's keys
    out, _ = ops.FORWARD["triton"](*tensors, *numbers)
    assert torch.equal(out[:, :, :7, :32], clean[:, :, :7, :32])


def test_windows_that_kernels_cannot_count_are_named():
    qkv = torch.zeros(1, 1, 1, 24).expand(1, 2**15, 2**15, 24)
    with pytest.raises(ValueError, match="windows: expected at most 536870912, got 1073741824"):
        forward(*(qkv, None, None, None, None, None, 1, 1, 1, 0, 0, True, 1.0, -100.0, 0.0, None))
