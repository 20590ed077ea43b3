"""The Triton kernels of window_attention on a GPU, against float64."""

import pytest
import torch
from test_kernels_window_attention import CASES, DTYPES, FLOAT_CASES, HALF_CASES, case

from vlmfast.ops import window_attention as ops
from vlmfast.verify.common import measure

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

MODEL_CASES = [
    case("Swin-T, stage 1", (4, 56, 56), (7, 7), (3, 3), heads=3),
    case("Swin-B at 384, stage 1", (1, 96, 96), (12, 12), (6, 6), heads=4),
    case("Swin V2, stage 1, w16", (1, 64, 64), (16, 16), (8, 8), heads=3, cosine=True),
    case("Swin V2 at 384, w24", (1, 96, 96), (24, 24), (12, 12), heads=4, cosine=True),
    case("a map that nothing divides", (2, 61, 47), (7, 7), (3, 3), heads=3, pad_value=True),
]


def assert_keeps_budget_on_gpu(case, dtype):
    over = [m for m in measure(case, "triton", dtype, device="cuda") if not m.passed]
    assert not over, f"{case.name}, {dtype}: {over}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *MODEL_CASES], ids=lambda case: case.name)
def test_every_dtype_keeps_its_budget(case, dtype):
    assert_keeps_budget_on_gpu(case, dtype)


@pytest.mark.parametrize("case", HALF_CASES, ids=lambda case: case.name)
def test_half_precision(case):
    assert_keeps_budget_on_gpu(case, torch.bfloat16)


@pytest.mark.parametrize("case", FLOAT_CASES, ids=lambda case: case.name)
def test_float32(case):
    assert_keeps_budget_on_gpu(case, torch.float32)


@pytest.mark.parametrize("case", MODEL_CASES, ids=lambda case: case.name)
def test_repeats_bitwise(case):
    inputs = case.make(torch.Generator().manual_seed(0), torch.bfloat16, "cuda")
    tensors = [inputs.get(name) for name in ("query", "key", "value")]
    tensors += [inputs.get(name) for name in ("bias", "logit_scale", "pad_value")]
    numbers = inputs["numbers"]
    out, logsumexp = ops.FORWARD["triton"](*tensors, *numbers)
    grad_out = torch.randn_like(out)
    first, second = (
        ops.BACKWARD["triton"](grad_out, *tensors, out, logsumexp, *numbers, *(True,) * 4)
        for _ in range(2)
    )
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))
