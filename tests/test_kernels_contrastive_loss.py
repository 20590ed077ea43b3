"""The Triton kernels of the contrastive losses, interpreted, against float64.

Every launch runs under the guard: memory beyond the arguments, races between programs, undefined
lanes and the order of programs all show.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tools.budget import assert_keeps_budget
from vlmfast.ops import contrastive_loss as ops
from vlmfast.reference.contrastive_loss import contrastive_loss as reference
from vlmfast.verify.common import relative_error, unit_roundoff
from vlmfast.verify.contrastive_loss import (
    aligned_pairs,
    blip2_case,
    clip_case,
    duplicated_pairs,
    itc_case,
    momentum_pairs,
    ntxent_case,
    query_pairs,
    random_pairs,
    siglip_case,
)

pytest.importorskip("triton")

from vlmfast.kernels.contrastive_loss import backward as backward_module
from vlmfast.kernels.contrastive_loss import problem as problem_module
from vlmfast.kernels.contrastive_loss.backward import backward
from vlmfast.kernels.contrastive_loss.forward import forward

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("guarded")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


CASES = [
    clip_case("clip, random", random_pairs(70, 40)),
    clip_case("clip, near convergence", aligned_pairs(140, 24, 0.3, 0.9)),
    clip_case("clip, converged", aligned_pairs(50, 32, 0.95, 1.0)),
    clip_case("clip, duplicates", duplicated_pairs(20, 16)),
    siglip_case("siglip", aligned_pairs(70, 24, 0.0, 0.9)),
    ntxent_case("ntxent", aligned_pairs(30, 16, 0.3, 0.9)),
    itc_case("itc, soft targets", momentum_pairs(20, 50, 16), alpha=0.4),
    blip2_case("itc, queries", query_pairs(20, 3, 16), label_smoothing=0.1),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_keeps_its_budget(case, dtype):
    assert_keeps_budget(case, dtype, backend="triton")


def sample(n, queries, m, dim, dtype=torch.float32):
    rows = F.normalize(torch.randn(n, queries, dim), dim=-1).to(dtype)
    return rows, F.normalize(torch.randn(m, dim), dim=-1).to(dtype), torch.tensor(9.0)


def assert_agree(x, y, terms):
    """Up to the rounding of sums of so many terms, of which logits of up to 9 are a part."""
    assert relative_error(x, y) <= 9 * terms * unit_roundoff(torch.float32)


@pytest.mark.parametrize("first_column", [0, 40, -30, 500])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_blocks_are_those_of_the_cpu_kernels(first_column, sigmoid):
    """Two implementations of one operator: what they round differs, what they compute does not."""
    rows, columns, scale = sample(100, 2, 150, 24)
    bias = torch.tensor(-1.0) if sigmoid else None
    args = (rows, columns, scale, bias, first_column, sigmoid, not sigmoid)
    ours, theirs = ops.FORWARD["triton"](*args), ops.FORWARD["cpu"](*args)
    for x, y in zip(ours, theirs, strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
        assert_agree(x, y, 24)
    grads = [torch.randn(100) for _ in range(3)] + [None if sigmoid else torch.randn(150)]
    rest = (*args[:4], theirs[0], theirs[4], first_column, sigmoid)
    for wanted in ((True, True, True, True, False), (False, True, False, True, True)):
        both = [ops.BACKWARD[name](*grads, *rest, *wanted) for name in ("triton", "cpu")]
        for x, y in zip(*both, strict=True):
            assert x.shape == y.shape and x.dtype == y.dtype and x.stride() == y.stride()
            assert_agree(x, y, 24 + 150)


def test_chunks_of_rows_sum_up(monkeypatch):
    rows, columns, scale = sample(300, 1, 60, 16)
    args = (rows, columns, scale, None, 5, False, True)
    row_max, *_, column_max, _ = forward(*args)
    grads = [torch.randn(300) for _ in range(3)] + [torch.randn(60)]
    rest = (*grads, *args[:4], row_max, column_max, 5, False, *(True,) * 5)
    whole = backward(*rest)
    monkeypatch.setattr(backward_module, "CHUNK_BYTES", 60 * 4 * 128)
    for x, y in zip(backward(*rest), whole, strict=True):
        assert_agree(x, y, 300)


def test_strips_of_columns_merge(monkeypatch):
    rows, columns, scale = sample(70, 1, 300, 16)
    args = (rows, columns, scale, None, 5, False, True)
    exact = reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for programs in (1, 4, 1000):
        monkeypatch.setattr(problem_module, "PROGRAMS", programs)
        for x, y in zip(forward(*args), exact, strict=True):
            assert_agree(x, y, 16 + 300)


@pytest.mark.parametrize("n, m", [(1, 1), (0, 3), (3, 0), (0, 0)])
def test_nothing_to_compare_with(n, m):
    rows, columns, scale = (x.requires_grad_() for x in sample(n, 1, m, 8))
    args = (rows, columns, scale, None, 0, False, True)
    ours, exact = ops.FORWARD["triton"](*args), reference(*args)
    for x, y in zip(ours, exact, strict=True):
        assert_close(x, y)
    total = [sum(x.sum() for x in (out[1], out[2], out[3], out[5])) for out in (ours, exact)]
    gradients = [torch.autograd.grad(x, (rows, columns, scale)) for x in total]
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("layout", ["last", "expanded", "steps"])
def test_any_strides(layout):
    rows, columns, scale = sample(40, 2, 50, 16)
    if layout == "expanded":
        rows, columns = rows[:1].expand(40, 2, 16), columns[:1].expand(50, 16)
    elif layout == "last":
        rows, columns = rows.mT.contiguous().mT, columns.mT.contiguous().mT
    else:
        rows, columns = rows[::2, :, ::2], columns[:, ::2]
    rest = (scale, None, 0, False, True)
    dense = forward(rows.contiguous(), columns.contiguous(), *rest)
    for x, y in zip(forward(rows, columns, *rest), dense, strict=True):
        assert torch.equal(x, y)


def test_float16_holds_small_gradients():
    """A loss scaled down by 2**-20: the largest entry of G would be a subnormal float16."""
    rows, columns, scale = sample(60, 1, 60, 16, torch.float16)
    args = (rows, columns, scale, None, 0, False, True)
    row_max, *_, column_max, _ = forward(*args)
    grads = [torch.rand(60) for _ in range(4)]
    results = []
    for factor in (1.0, 2.0**-20):
        rest = (*args[:4], row_max, column_max, 0, False, *(True,) * 5)
        results.append(backward(*(factor * x for x in grads), *rest))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x * 2.0**-20, y)
