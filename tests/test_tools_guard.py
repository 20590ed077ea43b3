"""The mended interpreter computes as a GPU; each guard catches a planted bug."""

import pytest
import torch

pytestmark = pytest.mark.interpreter

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.errors import InterpreterError  # noqa: E402

from tools import guard  # noqa: E402


@triton.jit
def scale_kernel(x, out, n, factor, BLOCK: tl.constexpr, SLACK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + at, mask=at < n + SLACK, other=0.0)
    tl.store(out + at, values * factor, mask=at < n + SLACK)


@triton.jit
def total_kernel(x, out, n, BLOCK: tl.constexpr, WITH_OTHER: tl.constexpr):
    at = tl.arange(0, BLOCK)
    if WITH_OTHER:  # noqa: SIM108  (Triton knows no conditional loads)
        values = tl.load(x + at, mask=at < n, other=0.0)
    else:
        values = tl.load(x + at, mask=at < n)
    tl.store(out, tl.sum(values, 0))


@triton.jit
def last_program_kernel(out, SHARED: tl.constexpr):
    program = tl.program_id(0)
    tl.store(out + (0 if SHARED else program), program.to(tl.float32))


@triton.jit
def running_total_kernel(x, out):
    program = tl.program_id(0)
    before = tl.load(out + tl.maximum(program - 1, 0), mask=program > 0, other=0.0)
    tl.store(out + program, before + tl.load(x + program))


@triton.jit
def product_kernel(a, b, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    grid = at[:, None] * SIZE + at[None, :]
    product = tl.dot(tl.load(a + grid), tl.load(b + grid))
    tl.store(out + grid, product.to(out.dtype.element_ty))


def scale(n, slack, capacity):
    x, out = torch.randn(capacity)[:n], torch.zeros(capacity)[:n]
    scale_kernel[(triton.cdiv(n, 16),)](x, out, n, 2.0, BLOCK=16, SLACK=slack)
    return x, out


@triton.jit
def double_kernel(out, number):
    tl.store(out, 2.0 * number - number)


def test_float_arguments_are_float32():
    out = torch.zeros(1)
    double_kernel[(1,)](out, 3e38)
    assert out.item() == float("inf")


def test_sound_kernel_passes():
    with guard.guarded():
        x, out = scale(37, slack=0, capacity=64)
    assert torch.equal(out, 2 * x)


def test_access_beyond_a_view_is_caught_even_inside_its_storage():
    with (
        guard.guarded(),
        pytest.raises(InterpreterError, match=r"OutOfBounds.*of x, which has 148"),
    ):
        scale(37, slack=1, capacity=64)


def test_access_without_a_mask_is_watched_too():
    with guard.guarded(), pytest.raises(InterpreterError, match=r"OutOfBounds.*load.*of x"):
        running_total_kernel[(8,)](torch.ones(7), torch.zeros(8))
    with guard.guarded(), pytest.raises(InterpreterError, match=r"OutOfBounds.*store.*of out"):
        last_program_kernel[(4,)](torch.zeros(3), SHARED=False)


def test_missing_other_shows_as_nan():
    x, out = torch.ones(32)[:20], torch.zeros(1)
    with guard.guarded():
        total_kernel[(1,)](x, out, 20, BLOCK=32, WITH_OTHER=True)
        assert out.item() == 20
        total_kernel[(1,)](x, out, 20, BLOCK=32, WITH_OTHER=False)
    assert out.isnan().all()


def test_write_race_is_caught():
    with guard.guarded():
        last_program_kernel[(4,)](torch.zeros(4), SHARED=False)
        with pytest.raises(InterpreterError, match="WriteRace"):
            last_program_kernel[(4,)](torch.zeros(4), SHARED=True)


def test_order_dependence_changes_the_result():
    x = torch.arange(1.0, 9.0)
    in_order, shuffled = torch.zeros(8), torch.zeros(8)
    running_total_kernel[(8,)](x, in_order)
    with guard.guarded(seed=1):
        running_total_kernel[(8,)](x, shuffled)
    assert torch.equal(in_order, x.cumsum(0))
    assert not torch.equal(shuffled, in_order)


def test_guard_leaves_nothing_behind():
    with pytest.raises(InterpreterError, match="OutOfBounds"), guard.guarded():
        scale(37, slack=1, capacity=64)
    scale(37, slack=1, capacity=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_arithmetic_rounds_as_torch(dtype):
    x = torch.randn(48).to(dtype)
    out = torch.empty_like(x)
    scale_kernel[(3,)](x, out, 48, 3.0, BLOCK=16, SLACK=0)
    torch.testing.assert_close(out, (x.float() * 3.0).to(dtype), rtol=0, atol=0)


def test_bfloat16_products_accumulate_in_float32():
    a, b = (torch.randn(16, 16).to(torch.bfloat16) for _ in range(2))
    out = torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out, SIZE=16)
    torch.testing.assert_close(out, (a.float() @ b.float()).to(torch.bfloat16), rtol=0, atol=0)


def test_bfloat16_sum():
    x, out = torch.randn(32).to(torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    total_kernel[(1,)](x, out, 32, BLOCK=32, WITH_OTHER=True)
    assert abs(out.item() - x.float().sum().item()) <= 2**-8 * abs(x.float().sum().item())
