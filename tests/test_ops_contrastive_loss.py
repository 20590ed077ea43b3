"""The operators, and through them the CPU kernels, in every instruction set of this machine."""

import gc
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from tools.budget import assert_keeps_budget
from vlmfast.ops import contrastive_loss as ops
from vlmfast.reference.contrastive_loss import contrastive_loss as reference
from vlmfast.verify.contrastive_loss import (
    CASES,
    aligned_pairs,
    blip2_case,
    clip_case,
    itc_case,
    momentum_pairs,
    ntxent_case,
    query_pairs,
    random_pairs,
    siglip_case,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, BACKWARD = ops.FORWARD["cpu"], ops.BACKWARD["cpu"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def features(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(shape), dim=-1).to(dtype)


def sample(requires_grad=False, n=5, queries=2, m=7, dim=8, dtype=torch.float32, **options):
    """The operator's arguments, in order."""
    defaults = {"first_column": 1, "sigmoid": False, "column_statistics": True}
    assert options.keys() <= defaults.keys()
    options = {**defaults, **options}
    bias = torch.tensor(-0.5) if options["sigmoid"] else None
    tensors = (features(n, queries, dim, dtype=dtype), features(m, dim, dtype=dtype))
    tensors = (*tensors, torch.tensor(9.0), bias)
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return (*tensors, *options.values())


OPTIONS = {
    "both sides": {},
    "rows alone": {"column_statistics": False},
    "sigmoid": {"sigmoid": True, "column_statistics": False},
    "no pairs": {"first_column": 7},
}


def backward_arguments(args, wanted=(True, True, True, True), float32_grads=False, parts="stpc"):
    """Gradients of row sums, totals, positives and column sums, where `parts` names them."""
    rows, columns, *_, first_column, sigmoid, column_statistics = args
    row_max, *_, column_max, _ = FORWARD(*args)
    n, m = rows.shape[0], columns.shape[0]
    if not column_statistics:
        parts = parts.replace("c", "")
    grads = [
        torch.randn(size) if part in parts else None
        for part, size in (("s", n), ("t", n), ("p", n), ("c", m))
    ]
    statistics = (row_max.detach(), column_max.detach())
    return (*grads, *args[:4], *statistics, first_column, sigmoid, *wanted, float32_grads)


def dense_gradients(args):
    """What the backward operator computes, from the matrix G written out, in float64; and the
    same sums of magnitudes, to which rounding errors are relative."""
    grads, (rows, columns, scale, bias), (row_max, column_max) = args[:4], args[4:8], args[8:10]
    first_column, sigmoid = args[10:12]
    of_sum, of_total, of_positive, of_column = (None if x is None else x.double() for x in grads)
    x, y, scale = rows.detach().double(), columns.detach().double(), scale.item()
    similarity, query = (x @ y.T).max(1)
    logits = scale * similarity + (0.0 if bias is None else bias.item())
    gradient = torch.zeros_like(logits)
    if of_sum is not None:
        slopes = logits.sigmoid() if sigmoid else (logits - row_max[:, None]).exp()
        gradient += of_sum[:, None] * slopes
    if of_column is not None:
        gradient += of_column * (logits - column_max).exp()
    if of_total is not None:
        gradient += of_total[:, None]
    index = torch.arange(x.shape[0])[:, None] + first_column
    paired = torch.arange(y.shape[0]) == index
    of_positive = torch.zeros(x.shape[0]).double() if of_positive is None else of_positive
    gradient = torch.where(paired, of_positive[:, None], gradient)
    of_query = gradient[:, None] * (query[:, None] == torch.arange(x.shape[1])[:, None])

    def sums(of_query, x, y, similarity):
        grad_rows = scale * of_query @ y
        grad_columns = scale * torch.einsum("iqj,iqd->jd", of_query, x)
        by_pair = of_query.sum(1)
        return grad_rows, grad_columns, (by_pair * similarity).sum(), by_pair.sum()

    exact = sums(of_query, x, y, similarity)
    return exact, sums(of_query.abs(), x.abs(), y.abs(), similarity.abs())


# --- what torch asks of an operator -------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_forward(options, requires_grad):
    torch.library.opcheck(FORWARD, sample(requires_grad, **OPTIONS[options]))


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_backward(options):
    args = sample(**OPTIONS[options])
    torch.library.opcheck(BACKWARD, backward_arguments(args))
    few = backward_arguments(args, (False, True, False, True), True, "sp")
    torch.library.opcheck(BACKWARD, few)


def test_gradients_that_are_not_wanted_are_empty():
    args = backward_arguments(sample())
    full = BACKWARD(*args)
    for i in range(4):
        wanted = tuple(j == i for j in range(4))
        for j, (gradient, whole) in enumerate(
            zip(BACKWARD(*args[:12], *wanted, False), full, strict=True)
        ):
            assert gradient.dtype == whole.dtype
            assert torch.equal(gradient, whole) if i == j else gradient.shape == (0,)


def test_nothing_is_saved_without_gradients():
    args = sample(True)
    with torch.no_grad():
        assert FORWARD(*args)[1].grad_fn is None
    with torch.inference_mode():
        assert FORWARD(*args)[1].is_inference()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        FORWARD(*sample())
        assert not saved
        FORWARD(*args)
    assert len(saved) == 5  # rows, columns, scale and the maxima
    del args
    gc.collect()


def test_maxima_carry_no_gradient():
    row_max, row_sum, _, positive, column_max, column_sum = FORWARD(*sample(True))
    assert row_sum.requires_grad and positive.requires_grad and column_sum.requires_grad
    assert not row_max.requires_grad and not column_max.requires_grad


def test_second_derivatives_fail_clearly_and_first_ones_with_create_graph_do_not():
    args = sample(True)
    (gradient,) = torch.autograd.grad(FORWARD(*args)[1].sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.sum().backward()


def test_forward_mode_fails_clearly():
    rows, *rest = sample()
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda rows: FORWARD(rows, *rest)[1], (rows,), (rows,))


@pytest.mark.filterwarnings("error")
def test_functional_transforms():
    rows, columns, scale = features(3, 5, 1, 8), features(3, 7, 8), torch.tensor(9.0)

    def loss(rows, columns):
        statistics = FORWARD(rows, columns, scale, None, 1, False, True)
        return sum(x.sin().sum() for x in statistics[1:4])

    gradient = torch.func.grad(loss, argnums=(0, 1))
    assert torch.equal(torch.vmap(loss)(rows, columns), torch.stack([*map(loss, rows, columns)]))
    one_by_one = zip(*map(gradient, rows, columns), strict=True)
    for x, y in zip(torch.vmap(gradient)(rows, columns), one_by_one, strict=True):
        assert torch.equal(x, torch.stack(y))
    for x, y in zip(
        gradient(rows[0], columns[0]), plain_gradient(loss, rows, columns), strict=True
    ):
        assert torch.equal(x, y)


def plain_gradient(loss, rows, columns):
    leaves = [x[0].clone().requires_grad_() for x in (rows, columns)]
    return torch.autograd.grad(loss(*leaves), leaves)


def test_flops():
    args = sample(True)
    unit = 2 * 5 * 2 * 7 * 8  # rows x queries x columns x dim
    with FlopCounterMode(display=False) as counter:
        _, row_sum, *_ = FORWARD(*args)
    assert counter.get_total_flops() == unit
    with FlopCounterMode(display=False) as counter:
        row_sum.sum().backward()
    assert counter.get_total_flops() == 3 * unit
    args[0].requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        FORWARD(*args)[1].sum().backward()
    assert counter.get_total_flops() == (1 + 2) * unit


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


# Around the tiles and panels of every variant, ragged both ways, and feature dims of every kind.
SHAPES = [
    clip_case("two pairs", random_pairs(2, 16), scale=10.0),
    clip_case("a tile and a panel", random_pairs(192, 24)),
    clip_case("one more", random_pairs(193, 24)),
    clip_case("dim 640", aligned_pairs(70, 640, 0.2, 0.8)),
    clip_case("dim 5", random_pairs(33, 5)),
    clip_case("dim 1152", random_pairs(25, 1152)),
    clip_case("small scale", random_pairs(60, 32), scale=0.01),
    clip_case("negative scale", random_pairs(60, 32), scale=-20.0),
    siglip_case("sigmoid, large logits", aligned_pairs(70, 16, 0.0, 1.0), 100.0, -10.0),
    siglip_case("sigmoid, far from zero", random_pairs(70, 16), 10.0, 5.0),
    ntxent_case("cold views", aligned_pairs(50, 16, 0.3, 0.9), 0.01),
    itc_case("long queue", momentum_pairs(20, 400, 16), alpha=0.4, label_smoothing=0.1),
    blip2_case("32 queries", query_pairs(20, 32, 16)),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_odd_shapes_keep_the_budget(case, dtype):
    assert_keeps_budget(case, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_blocks_of_any_shape(data):
    """Rectangles of any size with pairs anywhere: statistics and gradients against float64."""
    draw = data.draw
    args = sample(
        n=draw(st.integers(1, 150)),
        queries=draw(st.integers(1, 3)),
        m=draw(st.integers(1, 220)),
        dim=draw(st.integers(1, 70)),
        first_column=draw(st.integers(-160, 230)),
        **draw(
            st.sampled_from([OPTIONS[name] for name in ("both sides", "rows alone", "sigmoid")])
        ),
    )
    n, _, dim = args[0].shape
    eps, scale = torch.finfo(torch.float32).eps, args[2].item()
    # A sum of k terms rounds to k eps of their magnitudes at most. Logits sum `dim` products of
    # unit vectors, exponentials and sigmoids add a logit's error, here to their own.
    of_logit = eps * scale * (dim + 4)
    truth = reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for i, (ours, exact) in enumerate(zip(FORWARD(*args), truth, strict=True)):
        assert ours.dtype == torch.float32 and ours.is_contiguous()
        terms = args[1].shape[0] + n
        if i in (1, 5):  # sums of positive terms
            bound = exact * (2 * of_logit + eps * (terms + 16))
        else:
            bound = of_logit + (terms * (of_logit + eps * terms * scale) if i == 2 else 0.0)
        assert ((ours - exact).abs().nan_to_num(0.0) <= bound).all()
        assert torch.equal(ours.isinf(), exact.isinf())
    parts = "".join(part for part in "stpc" if draw(st.booleans()))
    backward = backward_arguments(args, parts=parts)
    relative = 2 * of_logit + eps * (terms + dim + 16)
    for ours, exact, magnitude in zip(BACKWARD(*backward), *dense_gradients(backward), strict=True):
        assert ((ours - exact).abs() <= relative * magnitude).all()


def strided(tensor, layout):
    """The same numbers, laid out in one of several ways."""
    if layout == "last":
        return tensor.mT.contiguous().mT
    if layout == "steps":
        wide = torch.empty([2 * size for size in tensor.shape], dtype=tensor.dtype)
        view = wide[tuple(slice(None, None, 2) for _ in tensor.shape)]
        return view.copy_(tensor)
    if layout == "offset":
        wide = torch.empty(*tensor.shape[:-1], tensor.shape[-1] + 3, dtype=tensor.dtype)
        return wide[..., 1:-2].copy_(tensor)
    return tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 37])
@pytest.mark.parametrize("layout", ["last", "steps", "offset", "expanded"])
def test_any_strides(layout, dim, dtype):
    """Whatever the layout, forward and backward are bit for bit those of the dense copy."""
    args = sample(n=70, queries=2, m=200, dim=dim, dtype=dtype)
    if layout == "expanded":
        tensors = (args[0][:1].expand(70, 2, dim), args[1][:1].expand(200, dim))
    else:
        tensors = tuple(strided(x, layout) for x in args[:2])
    dense = (*(x.clone(memory_format=torch.contiguous_format) for x in tensors), *args[2:])
    backward = backward_arguments(dense)
    for x, y in zip(FORWARD(*tensors, *args[2:]), FORWARD(*dense), strict=True):
        assert torch.equal(x, y)
    ours = BACKWARD(*backward[:4], *tensors, *backward[6:])
    for x, y in zip(ours, BACKWARD(*backward), strict=True):
        assert torch.equal(x, y) and x.is_contiguous() and not x.isnan().any()


def test_gradients_with_stride_0():
    args = sample(True)
    _, row_sum, row_total, positive, _, column_sum = FORWARD(*args)
    outputs = (row_sum, row_total, positive, column_sum)
    inputs = args[:3]
    expanded = torch.autograd.grad(sum(x.sum() for x in outputs), inputs, retain_graph=True)
    dense = torch.autograd.grad(outputs, inputs, [torch.ones_like(x) for x in outputs])
    for x, y in zip(expanded, dense, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unrounded_gradients(dtype, cpu_isa):
    args = backward_arguments(sample(n=70, m=50, dim=24, dtype=dtype))
    rounded, wide = BACKWARD(*args), BACKWARD(*args[:-1], True)
    for x, y in zip(rounded[:2], wide[:2], strict=True):
        assert x.dtype == dtype and y.dtype == torch.float32
        assert torch.equal(x, y.to(dtype)) and not torch.equal(x.float(), y)


def test_bits_depend_neither_on_the_run_nor_on_the_number_of_threads(cpu_isa):
    args = sample(n=700, queries=1, m=500, dim=40)
    backward = backward_arguments(args)

    def compute():
        return (*FORWARD(*args), *BACKWARD(*backward))

    first, threads = compute(), torch.get_num_threads()
    try:
        for n in (1, 2, 3, 5, 2):
            torch.set_num_threads(n)
            for x, y in zip(compute(), first, strict=True):
                assert torch.equal(x, y)
    finally:
        torch.set_num_threads(threads)


def test_blocks_of_a_matrix_merge(cpu_isa):
    """Statistics of blocks give those of the whole; gradients of blocks, with the whole's maxima,
    sum to those of the whole."""
    args = sample(n=100, queries=1, m=150, dim=24, first_column=20)
    rows, columns, scale, bias, first, *flags = args
    whole = FORWARD(*args)
    backward = backward_arguments(args, float32_grads=True)
    of_sum, of_total, of_positive, of_column = backward[:4]
    row_max, column_max = whole[0], whole[4]
    gradients = [torch.zeros_like(x) for x in BACKWARD(*backward)]
    sums = torch.zeros(100), torch.zeros(150)
    for i in (slice(0, 33), slice(33, 100)):
        for j in (slice(0, 64), slice(64, 150)):
            block = (rows[i], columns[j], scale, bias, first + i.start - j.start)
            part = FORWARD(*block, *flags)
            sums[0][i] += part[1] * (part[0] - row_max[i]).exp()
            sums[1][j] += part[5] * (part[4] - column_max[j]).exp()
            grads = BACKWARD(
                *(of_sum[i], of_total[i], of_positive[i], of_column[j]),
                *(*block[:4], row_max[i], column_max[j], block[4], False, *(True,) * 5),
            )
            gradients[0][i] += grads[0]
            gradients[1][j] += grads[1]
            gradients[2] += grads[2]
            gradients[3] += grads[3]
    assert_close(sums[0], whole[1])
    assert_close(sums[1], whole[5])
    for x, y in zip(gradients, BACKWARD(*backward), strict=True):
        assert_close(x, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("n, m", [(1, 1), (1, 2), (2, 1), (0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_to_compare_with(n, m, dtype, cpu_isa):
    args = sample(True, n=n, m=m, first_column=0, dtype=dtype)
    ours = FORWARD(*args)
    exact = reference(*args)
    for x, y in zip(ours, exact, strict=True):
        assert_close(x, y)
    total = [sum(x.sum() for x in (out[1], out[2], out[3], out[5])) for out in (ours, exact)]
    gradients = [torch.autograd.grad(x, args[:3]) for x in total]
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y)


def test_the_first_of_equal_queries_gets_the_gradient(cpu_isa):
    rows = features(40, 1, 16).expand(40, 3, 16)
    columns = features(50, 16)
    args = (rows, columns, torch.tensor(5.0), None, 0, False, True)
    grad_rows, *_ = BACKWARD(*backward_arguments(args))
    assert grad_rows[:, 0].any() and not grad_rows[:, 1:].any()


def test_nan_is_not_lost(cpu_isa):
    args = sample(n=70, queries=1, m=100, dim=16, first_column=0)
    for tensor, index in ((0, (7, 0)), (1, (9,))):
        dirty = [x.clone() if isinstance(x, torch.Tensor) else x for x in args]
        dirty[tensor][index] = math.nan
        _, row_sum, _, _, _, column_sum = FORWARD(*dirty)
        assert row_sum.isnan().sum() == (1 if tensor == 0 else 70 - (9 < 70))
        assert column_sum.isnan().sum() == (1 if tensor == 1 else 100 - 1)


def test_logits_far_from_zero(cpu_isa):
    """Maxima that lie hundreds apart from row to row: a common one would underflow."""
    rows = features(70, 1, 16) * torch.linspace(1, 40, 70)[:, None, None]
    args = (rows, features(100, 16) + 0.5, torch.tensor(20.0), None, 3, False, True)
    exact = reference(*(x.double() if isinstance(x, torch.Tensor) else x for x in args))
    for x, y in zip(FORWARD(*args), exact, strict=True):
        assert_close(x, y.float(), rtol=1e-3, atol=1e-3)


def test_operators_guard_memory_against_any_caller():
    rows, columns, *rest = sample()
    for bad in (
        (rows[:, 0], columns, *rest),
        (rows, columns[:, :4], *rest),
        (rows, columns.half(), *rest),
        (rows.double(), columns.double(), *rest),
        (rows[:, :0], columns, *rest),
        (rows, columns, torch.ones(2), *rest[1:]),
        (rows, columns, rest[0], None, 0, True, True),
    ):
        with pytest.raises(RuntimeError):
            FORWARD(*bad)
    backward = backward_arguments(sample())
    for i in (0, 1, 2, 3, 8, 9):
        bad = list(backward)
        bad[i] = torch.ones(4)
        with pytest.raises(RuntimeError):
            BACKWARD(*bad)
