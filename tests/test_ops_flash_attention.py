"""The operators, and through them the CPU kernels, in every instruction set of this machine."""

import gc
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tools.budget import assert_keeps_budget
from tools.memory import peak_memory
from vlmfast.ops import flash_attention as ops
from vlmfast.reference.flash_attention import flash_attention as reference
from vlmfast.verify.flash_attention import (
    CASES,
    dense_case,
    normal_bias,
    packed_case,
    random_mask,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORWARD, BACKWARD = ops.FORWARD["cpu"], ops.BACKWARD["cpu"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


def arguments(query, key, value, attn_mask=None, **options):
    """The operator's arguments, in order."""
    defaults = {
        "cu_seqlens_q": None,
        "cu_seqlens_k": None,
        "max_seqlen_q": 0,
        "max_seqlen_k": 0,
        "causal": 0,
        "scale": 0.3,
        "dropout_p": 0.0,
        "dropout_seed": None,
    }
    assert options.keys() <= defaults.keys()
    return (query, key, value, attn_mask, *{**defaults, **options}.values())


def backward_arguments(args, grad_out, grad_logsumexp=None, wanted=(True, True, True)):
    query, key, value, attn_mask, *rest = args
    out, logsumexp = FORWARD(*args)
    return (grad_out, grad_logsumexp, query, key, value, attn_mask, out, logsumexp, *rest, *wanted)


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype)


def cu_seqlens(*lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


OPTIONS = {
    "plain": {},
    "causal": {"causal": 1},
    "bottom-right": {"causal": 2},
    "dropout": {"dropout_p": 0.4, "dropout_seed": torch.tensor([11])},
    "packed": {
        "cu_seqlens_q": cu_seqlens(2, 0, 3),
        "cu_seqlens_k": cu_seqlens(4, 1, 2),
        "max_seqlen_q": 3,
        "max_seqlen_k": 4,
        "causal": 2,
    },
}


def sample(options, requires_grad=False, mask=None):
    """Small inputs with heads inside tokens, grouped heads and a value dim of its own."""
    batch = 1 if options == "packed" else 2
    query = normal(batch, 5, 4, 8).transpose(1, 2)
    key, value = normal(batch, 2, 7, 8), normal(batch, 2, 7, 6)
    tensors = [query, key, value] if mask is None else [query, key, value, mask]
    tensors = [x.requires_grad_(requires_grad and x.is_floating_point()) for x in tensors]
    return arguments(*tensors, **OPTIONS[options])


# --- what torch asks of an operator -------------------------------------------------------------


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_forward(options, requires_grad):
    torch.library.opcheck(FORWARD, sample(options, requires_grad))


@pytest.mark.parametrize("mask", ["bool", "float", "half"])
def test_opcheck_forward_with_mask(mask):
    attn_mask = {
        "bool": torch.rand(2, 1, 5, 7) < 0.6,
        "float": normal(1, 4, 1, 7),
        "half": normal(1, 1, 5, 7, dtype=torch.bfloat16),
    }[mask]
    torch.library.opcheck(FORWARD, sample("plain", True, attn_mask))


@pytest.mark.parametrize("options", OPTIONS)
def test_opcheck_backward(options):
    mask = None if options == "packed" else normal(1, 4, 5, 1)
    args = sample(options, mask=mask)
    out, logsumexp = FORWARD(*args)
    grad_out, grad_logsumexp = torch.randn_like(out), torch.randn_like(logsumexp)
    torch.library.opcheck(BACKWARD, backward_arguments(args, grad_out, grad_logsumexp))
    few = backward_arguments(args, grad_out, None, (False, True, False))
    torch.library.opcheck(BACKWARD, few)


@pytest.mark.parametrize("heads_inside", [False, True])
@pytest.mark.parametrize("layout", ["dense", "sliced", "expanded", "reversed"])
def test_output_strides_follow_the_rule_and_not_the_input(heads_inside, layout):
    def make(length, dim):
        if layout == "sliced":
            x = normal(2, length, 3, 2 * dim) if heads_inside else normal(2, 3, length, 2 * dim)
            x = x[..., ::2]
        elif layout == "expanded":
            shape = (2, length, 3, dim)
            x = normal(1, 1, 3, dim).expand(shape) if heads_inside else normal(dim).expand(shape)
        elif layout == "reversed":
            x = normal(dim, length, 3, 2).permute(3, 1, 2, 0)
        else:
            x = normal(2, length, 3, dim) if heads_inside else normal(2, 3, length, dim)
            return x.transpose(1, 2) if heads_inside else x
        return x.transpose(1, 2) if heads_inside or layout in ("expanded", "reversed") else x

    def expected(like: Tensor, shape):
        _, heads, length, dim = shape
        if like.stride(1) < like.stride(2):
            return (length * heads * dim, dim, heads * dim, 1)
        return (heads * length * dim, length * dim, dim, 1)

    args = arguments(make(5, 8), make(7, 8), make(7, 4))
    query, key, value = args[:3]
    out, logsumexp = FORWARD(*args)
    assert out.stride() == expected(query, (2, 3, 5, 4))
    assert logsumexp.is_contiguous()
    gradients = BACKWARD(*backward_arguments(args, torch.randn_like(out)))
    for gradient, tensor in zip(gradients, (query, key, value), strict=False):
        assert gradient.stride() == expected(tensor, tensor.shape)
    truth = reference(*(x.double() for x in (query, key, value)), scale=0.3)
    assert_close(out, truth[0].float())
    meta = FORWARD(*(x.to("meta") for x in (query, key, value)), *args[3:])
    assert meta[0].shape == out.shape and meta[1].shape == logsumexp.shape


def test_gradients_that_are_not_wanted_are_empty():
    args = sample("plain", mask=normal(1, 1, 5, 7))
    out, _ = FORWARD(*args)
    full = BACKWARD(*backward_arguments(args, torch.ones_like(out)))
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        gradients = BACKWARD(*backward_arguments(args, torch.ones_like(out), None, wanted))
        query_wanted, key_value_wanted, mask_wanted = wanted
        flags = (query_wanted, key_value_wanted, key_value_wanted, mask_wanted)
        for gradient, whole, flag in zip(gradients, full, flags, strict=True):
            if flag:
                assert_close(gradient, whole)
            else:
                assert gradient.shape == (0,) and gradient.dtype == whole.dtype


def test_nothing_is_saved_without_gradients():
    args = sample("plain", True)
    with torch.no_grad():
        assert FORWARD(*args)[0].grad_fn is None
    with torch.inference_mode():
        assert FORWARD(*args)[0].is_inference()
    detached = sample("plain")
    assert FORWARD(*detached)[0].grad_fn is None
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: saved.append(x.shape) or x, lambda x: x
    ):
        FORWARD(*detached)
        with torch.no_grad():
            FORWARD(*args)
        assert not saved
        FORWARD(*args)
    assert len(saved) == 5  # query, key, value, out, logsumexp; and no L x S weights
    del args
    gc.collect()


def test_second_derivatives_fail_clearly_and_first_ones_with_create_graph_do_not():
    args = sample("plain", True)
    out, _ = FORWARD(*args)
    (gradient,) = torch.autograd.grad(out.sin().sum(), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not implemented"):
        gradient.sum().backward()


def test_forward_mode_fails_clearly():
    query, key, value = (x.detach() for x in sample("plain")[:3])
    function = lambda query: FORWARD(*arguments(query, key, value))[0]  # noqa: E731
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(function, (query,), (query,))


@pytest.mark.filterwarnings("error")
def test_functional_transforms():
    query, key, value = normal(3, 2, 4, 5, 8), normal(3, 2, 4, 7, 8), normal(3, 2, 4, 7, 8)

    def loss(query, key, value):
        return FORWARD(*arguments(query, key, value))[0].sin().sum()

    def exact(query, key, value):
        return reference(query, key, value, scale=0.3)[0].sin().sum()

    assert_close(torch.vmap(loss)(query, key, value), torch.vmap(exact)(query, key, value))
    gradients = torch.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(query, key, value)
    expected = torch.vmap(torch.func.grad(exact, argnums=(0, 1, 2)))(query, key, value)
    for ours, theirs in zip(gradients, expected, strict=True):
        assert_close(ours, theirs)
    through_vmap = torch.func.grad(lambda q: torch.vmap(loss)(q, key, value).sum())(query)
    assert_close(through_vmap, gradients[0])
    # in_dims: one key and value for all
    shared = torch.vmap(loss, in_dims=(0, None, None))(query, key[0], value[0])
    assert_close(shared[1], loss(query[1], key[0], value[0]))
    with pytest.raises(NotImplementedError, match="vmap over a dimension of size 0"):
        torch.vmap(loss)(query[:0], key[:0], value[:0])


@pytest.mark.parametrize("options", ["plain", "packed"])
def test_flops_count_what_torch_counts(options):
    args = sample(options, True)
    with FlopCounterMode(display=False) as counter:
        out, _ = FORWARD(*args)
    # (pairs of query and key) x 4 heads; head dims 8 and 6
    pairs = 4 * (2 * 5 * 7 if options == "plain" else 2 * 4 + 0 * 1 + 3 * 2)
    assert counter.get_total_flops() == 2 * pairs * (8 + 6)
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (3 * 8 + 2 * 6)


def test_flops_equal_those_of_torch_attention():
    query, key, value = (normal(2, 4, 6, 8).requires_grad_() for _ in range(3))
    counts = []
    for function in (
        lambda: FORWARD(*arguments(query, key, value))[0],
        lambda: torch.nn.functional.scaled_dot_product_attention(query, key, value),
    ):
        with (
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            FlopCounterMode(display=False) as counter,
        ):
            function()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


# --- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_kernels_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


# Lengths around the tiles of every variant, ragged both ways, and head dims of every kind.
SHAPES = [
    dense_case("one query", (2, 3, 1, 16), (2, 3, 90)),
    dense_case("two keys", (2, 3, 50, 16), (2, 3, 2)),
    dense_case("ViT head", (1, 2, 197, 64)),
    dense_case("one query beyond all vectors", (1, 4, 257, 80), (1, 2, 257)),
    dense_case("head dim 88", (1, 1, 65, 88), (1, 1, 129)),
    dense_case("head dim 104", (1, 1, 15, 104), (1, 1, 17)),
    dense_case("head dims 256 and 8", (1, 1, 31, 256), (1, 1, 33), 8),
    dense_case("head dim 5", (1, 2, 13, 5), (1, 2, 9), 3),
    # Sums of thousands of terms, where one running sum in float32 would lose digits.
    dense_case("many keys", (1, 1, 8, 64), (1, 1, 2048)),
    dense_case("many queries", (1, 1, 2048, 64), (1, 1, 8)),
    dense_case("many queries of a group", (1, 8, 577, 64), (1, 1, 577)),
    dense_case("several tiles and panels", (1, 2, 150, 256), (1, 1, 900)),
    dense_case("causal, several panels", (1, 1, 700, 256), is_causal=True),
    dense_case("causal, more keys", (1, 2, 50, 32), (1, 2, 130), is_causal=True),
    dense_case("causal, fewer keys", (1, 2, 130, 32), (1, 2, 50), is_causal=True),
    dense_case("causal bias", (1, 2, 66, 32), mask=normal_bias(1, 2, 66, 66), is_causal=True),
    # Constant along a row a bias changes nothing: its gradient is a sum that cancels wholly.
    dense_case("bias of one number", (2, 2, 20, 32), mask=normal_bias(1, 1, 1, 1), bias_dtype=None),
    dense_case("bias over queries", (2, 2, 20, 32), mask=normal_bias(1, 2, 20, 1), bias_dtype=None),
    dense_case(
        "bias over queries, many keys", (1, 2, 20, 32), (1, 2, 300), mask=normal_bias(1, 2, 20, 1)
    ),
    dense_case("bias over batches", (3, 2, 20, 32), mask=normal_bias(3, 1, 20, 20)),
    dense_case("bias, grouped heads", (2, 4, 20, 32), (2, 2, 30), mask=normal_bias(1, 4, 20, 30)),
    dense_case("causal mask", (2, 2, 70, 32), mask=random_mask(1, 1, 70, 70), is_causal=True),
    dense_case("scale 0", (1, 2, 33, 32), scale=0.0),
    dense_case("negative scale", (1, 2, 33, 32), scale=-0.2),
    dense_case("negative scale, causal", (1, 1, 150, 32), is_causal=True, scale=-3.0),
    dense_case("dropout, grouped heads", (2, 4, 37, 24), (2, 2, 51), dropout_p=0.5),
    packed_case("packed, one sequence", [(70, 70)], (1, 1), 32, True),
    packed_case("packed, heads of one", [(3, 200), (100, 7), (0, 0), (16, 16)], (6, 1), 72),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=lambda case: case.name)
def test_odd_shapes_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


def strided(shape, strides: str, dtype=torch.float32):
    """A random tensor of a shape whose memory is laid out in one of several ways."""
    if strides == "expanded":
        return normal(*shape[:2], 1, shape[3], dtype=dtype).expand(shape)
    if strides == "last":
        return normal(shape[0], shape[1], shape[3], shape[2], dtype=dtype).transpose(2, 3)
    if strides == "steps":
        return normal(*(2 * size for size in shape), dtype=dtype)[::2, ::2, ::2, ::2]
    if strides == "offset":
        return normal(*(size + 3 for size in shape), dtype=dtype)[1:-2, 2:-1, 1:-2, 2:-1]
    if strides == "tokens":
        return normal(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
    return normal(*shape, dtype=dtype)


STRIDES = ["dense", "tokens", "expanded", "last", "steps", "offset"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_and_strides(data):
    """Whatever the layout, forward and backward are bit for bit those of the dense copy."""
    draw = data.draw
    batch, kv_heads, group = (
        draw(st.integers(1, 2)),
        draw(st.integers(1, 2)),
        draw(st.integers(1, 3)),
    )
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    dim, value_dim = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    dtype = draw(st.sampled_from(DTYPES))
    layout = st.sampled_from(STRIDES)
    heads = kv_heads * group
    query = strided((batch, heads, rows, dim), draw(layout), dtype)
    key = strided((batch, kv_heads, columns, dim), draw(layout), dtype)
    value = strided((batch, kv_heads, columns, value_dim), draw(layout), dtype)
    grad_out = strided((batch, heads, rows, value_dim), draw(layout), dtype)
    mask_shape = [draw(st.sampled_from([1, n])) for n in (batch, heads, rows, columns)]
    mask = draw(st.sampled_from([None, torch.bool, torch.float32, torch.bfloat16]))
    if mask is not None:
        floats = strided(mask_shape, draw(layout))
        mask = floats > -0.5 if mask == torch.bool else floats.to(mask)
    options = {"causal": draw(st.integers(0, 2))}

    def compute(*tensors):
        query, key, value, grad_out, mask = tensors
        args = arguments(query, key, value, mask, **options)
        wanted = (True, True, mask is not None and mask.is_floating_point())
        out, logsumexp = FORWARD(*args)
        return out, logsumexp, *BACKWARD(*backward_arguments(args, grad_out, None, wanted))

    tensors = (query, key, value, grad_out, mask)
    ours = compute(*tensors)
    dense = compute(*(None if x is None else x.contiguous().clone() for x in tensors))
    for x, y in zip(ours, dense, strict=True):
        assert torch.equal(x, y)
        assert not x.isnan().any()


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape_keeps_the_budget(data):
    draw = data.draw
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    rows, columns = draw(st.integers(1, 150)), draw(st.integers(1, 150))
    query_shape = (2, kv_heads * group, rows, draw(st.integers(4, 130)))
    options = {"is_causal": draw(st.booleans())}
    mask = draw(st.sampled_from([None, random_mask, normal_bias]))
    if mask is not None:
        # along the keys at least: constant over them, a bias has no gradient
        leading = [draw(st.sampled_from([1, size])) for size in query_shape[:3]]
        options["mask"] = mask(*leading, columns)
    case = dense_case(
        f"{query_shape}, {columns} keys, {options}",
        query_shape,
        (2, kv_heads, columns),
        draw(st.integers(4, 130)),
        **options,
    )
    assert_keeps_budget(case, draw(st.sampled_from(DTYPES)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_a_plain_sum(dtype, cpu_isa):
    """out.sum().backward() hands over a gradient of strides 0."""
    tensors = [normal(2, 2, n, 16, dtype=dtype).requires_grad_() for n in (35, 50, 50)]
    out, _ = FORWARD(*arguments(*tensors))
    expanded = torch.autograd.grad(out.sum(), tensors, retain_graph=True)
    dense = torch.autograd.grad(out, tensors, torch.ones_like(out).contiguous())
    for x, y in zip(expanded, dense, strict=True):
        assert torch.equal(x, y)


def test_logsumexp_is_differentiable_alone_and_beside_out(cpu_isa):
    tensors = [normal(2, 2, n, 16).requires_grad_() for n in (35, 50, 50)]
    exact = [x.detach().double().requires_grad_() for x in tensors]
    out, logsumexp = FORWARD(*arguments(*tensors))
    true_out, true_logsumexp = reference(*exact, scale=0.3)
    weight = normal(2, 2, 35)
    for loss, truth in (
        (logsumexp.sin().sum(), true_logsumexp.sin().sum()),
        ((logsumexp * weight).sum() + out.sum(), (true_logsumexp * weight).sum() + true_out.sum()),
    ):
        ours = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(truth, exact, retain_graph=True, materialize_grads=True)
        for x, y in zip(ours, theirs, strict=True):
            assert_close(x, y.float())


@pytest.mark.parametrize("kind", ["bool", "float", "bottom-right", "packed"])
def test_rows_that_see_nothing(kind, cpu_isa):
    query, key, value = (normal(1, 2, n, 16).requires_grad_() for n in (40, 24, 24))
    blind = torch.zeros(40, dtype=torch.bool)
    mask, options = None, {}
    if kind in ("bool", "float"):
        blind[::3] = True
        mask = (~blind)[None, None, :, None].expand(1, 1, 40, 24)
        if kind == "float":
            mask = torch.zeros(1, 1, 40, 24).masked_fill(~mask, -math.inf).requires_grad_()
    elif kind == "bottom-right":
        blind[: 40 - 24] = True
        options = {"causal": 2}
    else:
        blind[10:30] = True  # a sequence without keys, and rows of no sequence
        blind[35:] = True
        options = {"cu_seqlens_q": cu_seqlens(10, 20, 5), "cu_seqlens_k": cu_seqlens(12, 0, 12)}
    out, logsumexp = FORWARD(*arguments(query, key, value, mask, **options))
    assert not out[:, :, blind].any()
    assert torch.equal(logsumexp.isneginf()[0, 0], blind)
    inputs = [x for x in (query, key, value, mask) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad((out.sum(), logsumexp.sum()), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, blind].any()


@pytest.mark.parametrize(
    "shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (2, 2, 0, 0)]
)
def test_empty_sizes(shape, cpu_isa):
    batch, heads, rows, columns = shape
    query = normal(batch, heads, rows, 8).requires_grad_()
    key, value = (normal(batch, heads, columns, 8).requires_grad_() for _ in range(2))
    bias = normal(1, heads, rows, columns).requires_grad_()
    out, logsumexp = FORWARD(*arguments(query, key, value, bias))
    assert torch.equal(out, torch.zeros_like(query))
    assert logsumexp.isneginf().all()
    gradients = torch.autograd.grad(out.sum() + logsumexp.sum(), (query, key, value, bias))
    for gradient, tensor in zip(gradients, (query, key, value, bias), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_nan_stays_in_its_batch_and_head(cpu_isa):
    query, key, value = (normal(2, 3, n, 16) for n in (40, 50, 50))
    clean, _ = FORWARD(*arguments(query, key, value))
    for tensor in (query, key, value):
        dirty = tensor.clone()
        dirty[1, 2, 7] = math.nan
        args = [dirty if x is tensor else x for x in (query, key, value)]
        out, logsumexp = FORWARD(*arguments(*args))
        gradients = BACKWARD(*backward_arguments(arguments(*args), torch.ones_like(out)))
        assert out[1, 2].isnan().any()
        for result in (out, logsumexp, *gradients[:3]):
            result = result.clone()
            result[1, 2] = 0.0
            assert result.isfinite().all()
        assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :2], clean[1, :2])


@pytest.mark.parametrize("kind", ["causal", "bool mask", "packed"])
def test_nan_does_not_reach_queries_that_cannot_see_it(kind, cpu_isa):
    """A hidden key's logit is replaced, not added to. A hidden value has weight 0, and 0 x NaN is
    NaN, as in torch; but another sequence's value is not even read."""
    query, key, value = (normal(1, 2, 100, 16) for _ in range(3))
    mask, options, spoilt = None, {}, slice(60, 61)
    if kind == "causal":
        options = {"causal": 1}
    elif kind == "bool mask":
        mask = torch.ones(100, 100, dtype=torch.bool)
        mask[:60, 60] = False
        mask = mask[None, None]
    else:
        options = {"cu_seqlens_q": cu_seqlens(30, 30, 20), "cu_seqlens_k": cu_seqlens(40, 20, 20)}
        spoilt = slice(70, 90, 15)  # key 70 is of the last sequence, key 85 of none
    hidden_from = slice(0, 60)
    clean, _ = FORWARD(*arguments(query, key, value, mask, **options))
    for tensor in (key, value) if kind == "packed" else (key,):
        dirty = tensor.clone()
        dirty[:, :, spoilt] = math.nan
        args = [dirty if x is tensor else x for x in (query, key, value)]
        out, _ = FORWARD(*arguments(*args, mask, **options))
        assert torch.equal(out[:, :, hidden_from], clean[:, :, hidden_from])


def test_gradients_with_a_single_key(cpu_isa):
    """The softmax of one logit is constant: gradients to query and key cancel, up to the rounding
    of the two dot products over the value's dim that are subtracted."""
    query, key, value = normal(2, 3, 5, 16), normal(2, 3, 1, 16), normal(2, 3, 1, 8)
    args = arguments(query, key, value)
    grad_out = normal(2, 3, 5, 8)
    grad_query, grad_key, grad_value, _ = BACKWARD(*backward_arguments(args, grad_out))
    eps = torch.finfo(torch.float32).eps
    dot = (grad_out.abs() * value.abs()).sum(-1, keepdim=True)  # (B, H, L, 1)
    bound = 2 * (8 + 1) * eps * 0.3 * dot  # of each dot product: terms x eps x sum |x| |y|
    assert (grad_query.abs() <= bound * key.abs()).all()
    assert (grad_key.abs() <= (bound * query.abs()).sum(2, keepdim=True)).all()
    assert_close(grad_value, grad_out.sum(2, keepdim=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"dropout_p": 0.3}], ids=str)
def test_rows_of_a_bias_s_gradient_cancel(options, dtype, cpu_isa):
    """What is the same for all keys changes nothing, also where a bias holds it for each of them:
    300 keys are several blocks, and the output's rounding must not show in the sums."""
    case = dense_case("", (1, 1, 150, 32), (1, 1, 300), mask=normal_bias(1, 1, 150, 1), **options)

    def by_a_whole_bias(inputs):
        bias = inputs["attn_mask"].expand(1, 1, 150, 300)
        return case.kernel({**inputs, "attn_mask": bias}, "cpu")

    assert_keeps_budget(case, dtype, kernel=by_a_whole_bias)


def test_gradient_of_a_bias_over_queries_is_that_of_the_logsumexp(cpu_isa):
    query, key, value = (normal(2, 3, n, 8) for n in (5, 120, 120))
    for shape in ((2, 3, 5, 1), (1, 3, 1, 1), (1, 1, 5, 1)):
        bias = normal(*shape)
        bias[:, :, -1:] = -math.inf  # hides its rows: nothing of theirs counts
        args = arguments(query, key, value, bias)
        grad_logsumexp = normal(2, 3, 5)
        gradient = BACKWARD(*backward_arguments(args, normal(2, 3, 5, 8), grad_logsumexp))[3]
        seen = grad_logsumexp.masked_fill(bias[..., 0].expand(2, 3, 5) == -math.inf, 0.0)
        assert_close(gradient, seen.unsqueeze(3).sum_to_size(shape))


def huge_case(name, query_shape, key_shape, **options):
    """Logits of 1e9 and beyond: one key of a row has all the weight."""
    return dense_case(name, query_shape, key_shape, scale=1e9, **options)


EXTREMES = [
    huge_case("logits of billions", (1, 2, 40, 16), (1, 2, 50)),
    huge_case("logits of billions, many keys", (1, 2, 40, 16), (1, 2, 300)),
    huge_case("logits of billions, causal", (1, 2, 130, 16), (1, 2, 130), is_causal=True),
    # dS vanishes where one key has all the weight: what is left is rounding, times the scale.
    dense_case("enormous negative scale", (1, 1, 20, 72), (1, 1, 130), scale=-1e7),
    huge_case("logits of billions, one key", (1, 2, 40, 16), (1, 2, 1)),
    # Far beyond what exp takes: the softmax is one-hot.
    dense_case("huge logits", (1, 2, 40, 16), (1, 2, 50), scale=100.0),
    dense_case("huge negative scale", (1, 2, 40, 16), (1, 2, 50), scale=-100.0),
    # A maximum taken over padding of zeros would lose every weight.
    dense_case(
        "all logits far below 0",
        (1, 2, 40, 16),
        (1, 2, 50),
        mask=lambda generator: torch.randn((1, 1, 1, 50), generator=generator) - 1e4,
    ),
    dense_case(
        "all logits far above 0",
        (1, 2, 40, 16),
        (1, 2, 50),
        mask=lambda generator: torch.randn((1, 1, 1, 50), generator=generator) + 1e4,
    ),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", EXTREMES, ids=lambda case: case.name)
def test_extreme_logits_keep_the_budget(case, dtype, cpu_isa):
    assert_keeps_budget(case, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [40, 150])
def test_scale_0_forgets_scores_of_any_size(length, dtype, cpu_isa):
    query, key = (1e17 * normal(1, 2, length, 16, dtype=dtype) for _ in range(2))
    value = normal(1, 2, length, 16, dtype=dtype)
    out, logsumexp, *_ = FORWARD(*arguments(query, key, value, scale=0.0, causal=1))
    counts = torch.arange(1.0, length + 1)
    expected = value.float().cumsum(-2) / counts[:, None]
    tolerance = 2 ** (-7 if dtype == torch.bfloat16 else -20)
    torch.testing.assert_close(out.float(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(logsumexp, counts.log().expand(1, 2, -1))


def test_bits_repeat_from_run_to_run(cpu_isa):
    args = arguments(
        *(normal(2, 4, n, 32) for n in (150, 170, 170)),
        normal(1, 4, 150, 170),
        dropout_p=0.2,
        dropout_seed=torch.tensor([3]),
    )
    grad_out = normal(2, 4, 150, 32)

    def compute():
        return (*FORWARD(*args), *BACKWARD(*backward_arguments(args, grad_out)))

    first = compute()
    for _ in range(4):
        for x, y in zip(compute(), first, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_mask_is_that_of_the_reference(p, cpu_isa):
    """With value = identity the output is the dropped weights themselves."""
    query, key = normal(2, 3, 33, 16), normal(2, 3, 45, 16)
    identity = torch.eye(45).expand(2, 3, 45, 45)
    options = {"dropout_p": p, "dropout_seed": torch.tensor([2**40 + 17])}
    weights, _ = FORWARD(*arguments(query, key, identity, **options))
    expected, _ = reference(query, key, identity, scale=0.3, **options)
    assert torch.equal(weights == 0, expected == 0)
    assert_close(weights, expected)


def test_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("VLMFAST_CPU_ISA", "mmx")
    with pytest.raises(RuntimeError, match=r"VLMFAST_CPU_ISA.*base.*mmx"):
        FORWARD(*sample("plain"))


def test_operators_guard_memory_against_any_caller():
    query, key, value = (normal(1, 2, 5, 8) for _ in range(3))
    for bad in (
        arguments(query, key[:, :, :, :4], value),
        arguments(query, key, value[:, :, :3]),
        arguments(query, key[:, :1], value),
        arguments(query, key.to(torch.bfloat16), value),
        arguments(query, key, value, torch.zeros(1, 1, 5, 4)),
        arguments(query, key, value, cu_seqlens_q=cu_seqlens(9), cu_seqlens_k=cu_seqlens(5)),
    ):
        with pytest.raises(RuntimeError):
            FORWARD(*bad)


MEMORY_SETUP = """
import torch
from vlmfast.functional import scaled_dot_product_attention

x = [torch.randn(1, 1, 256, 64, requires_grad=True) for _ in range(3)]
scaled_dot_product_attention(*x).sum().backward()
inputs = [torch.randn(1, 1, 32768, 64, requires_grad=True) for _ in range(3)]
for tensor in inputs:
    tensor.grad = torch.zeros_like(tensor)
"""


def test_memory_of_a_long_sequence():
    """L = S = 32768, d = 64: an L x S buffer of bytes alone would be 1 GiB."""
    added = peak_memory(MEMORY_SETUP, "scaled_dot_product_attention(*inputs).sum().backward()")
    assert added < 256


def test_sizes_without_work_take_no_time():
    """2**27 batch elements without queries, or without keys, or without either."""
    many = normal(1, 1, 1, 8).expand(2**27, 1, 1, 8)
    empty = many[:, :, :0]
    for query, key in ((empty, empty), (empty, many)):
        start = time.process_time()
        args = arguments(query, key, key)
        out, logsumexp = FORWARD(*args)
        assert out.shape == query.shape and logsumexp.shape == (2**27, 1, 0)
        BACKWARD(*backward_arguments(args, out, None, (True, False, False)))
        assert time.process_time() - start < 1.0


def test_sizes_that_cannot_be_served_are_named():
    x = normal(1, 1, 1, 8)
    for shape in ((1, 1, 2**30, 8), (1, 2**30, 1, 8)):
        with pytest.raises(RuntimeError, match="query, key, value: expected at most"):
            FORWARD(*arguments(x.expand(shape), x.expand(shape), x.expand(shape)))
    with pytest.raises(RuntimeError, match=r"cannot allocate.*\(1048576, 32, 536870912, 8\)"):
        shape = (2**20, 2**5, 2**29, 8)
        FORWARD(*arguments(x.expand(shape), x.expand(shape), x.expand(shape)))


OUT_OF_MEMORY = """
import resource, torch
from vlmfast.ops import flash_attention as ops

torch.set_num_threads(2)
x = torch.zeros(1, 1, 1, 1).expand(4, 1, 96, 65536)  # keys are packed: 24 MiB
value = torch.zeros(4, 1, 96, 1)
arguments = (None, None, None, 0, 0, 0, 1.0, 0.0, None)
ops.FORWARD["cpu"](x[..., :8], x[..., :8], value, *arguments)  # starts the threads
used = 4096 * int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), -1))
try:
    ops.FORWARD["cpu"](x, x, value, *arguments)
except RuntimeError as error:
    print(error)
"""


def test_threads_without_memory_say_so():
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs Linux's /proc")
    command = [sys.executable, "-c", OUT_OF_MEMORY]
    child = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "out of memory: cannot allocate" in child.stdout, child.stdout + child.stderr
    assert "bytes of scratch for each of 2 threads" in child.stdout


@pytest.mark.parametrize("which", ["out", "logsumexp", "both"])
def test_checkpoints_that_are_not_reentrant(which):
    args = sample("packed", True)

    def loss(query, key, value):
        out, logsumexp = FORWARD(query, key, value, *args[3:])
        terms = {"out": out.sin(), "logsumexp": logsumexp[..., :5].sin()}
        return sum(x.sum() for name, x in terms.items() if which in (name, "both"))

    plain, again = (
        torch.autograd.grad(call(), args[:3], allow_unused=True)
        for call in (
            lambda: loss(*args[:3]),
            lambda: checkpoint(loss, *args[:3], use_reentrant=False),
        )
    )
    for x, y in zip(plain, again, strict=True):
        assert torch.equal(x, y)
