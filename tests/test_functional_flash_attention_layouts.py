"""Softmax attention with the calls of flash-attn, on packed sequences, and of xformers."""

import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import vlmfast.functional as VF
from tools.flash_attention import normal, packed, starts
from tools.gradients import assert_same
from vlmfast.reference.common import dropout_keep_mask

BACKENDS = ["cpu", "reference"]

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")


# --- varlen_attention ---------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("value_dim", [8, 6])
def test_varlen_attention_is_a_call_for_each_sequence(value_dim, is_causal, backend):
    inputs, lengths = packed(value_dim=value_dim)
    out, lse = VF.varlen_attention(
        *inputs, *lengths, is_causal=is_causal, return_lse=True, backend=backend
    )
    assert out.shape == (9, 4, value_dim) and out.is_contiguous()
    assert lse.shape == (4, 9) and lse.dtype == torch.float32
    outs, lses = [], []
    for i in range(4):
        q = inputs[0][lengths[0][i] : lengths[0][i + 1]].transpose(0, 1)
        k, v = (x[lengths[1][i] : lengths[1][i + 1]].transpose(0, 1) for x in inputs[1:])
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        if is_causal:
            visible = visible.tril(k.shape[1] - q.shape[1])
        outs.append(F.scaled_dot_product_attention(q, k, v, visible).transpose(0, 1))
        logits = (q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(~visible, -math.inf)
        lses.append(logits.detach().logsumexp(-1))
    assert_close(lse.detach(), torch.cat(lses, 1))
    assert_same(out, torch.cat(outs), inputs)
    alone = VF.varlen_attention(*inputs, *lengths, is_causal=is_causal, backend=backend)
    assert torch.equal(alone, out)


def test_gradient_of_the_logsumexp():
    inputs, lengths = packed()
    gradients = []
    for backend in BACKENDS:
        out, lse = VF.varlen_attention(*inputs, *lengths, return_lse=True, backend=backend)
        loss = out.sum() + lse[lse.isfinite()].sin().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for x, y in zip(*gradients, strict=True):
        assert_close(x, y)


def test_rows_beyond_the_last_sequence():
    inputs, _ = packed()
    lengths = (starts(3, 2), starts(5, 2), 3, 5)
    out, lse = VF.varlen_attention(*inputs, *lengths, return_lse=True)
    assert not out[5:].any() and lse[:, 5:].isneginf().all()
    gradients = torch.autograd.grad(out.sum(), inputs)
    assert not gradients[0][5:].any() and not gradients[1][7:].any() and not gradients[2][7:].any()


@pytest.mark.parametrize("empty", [(), (0,), (0, 0)])
def test_nothing_packed(empty):
    inputs = [torch.zeros(0, 2, 8, requires_grad=True) for _ in range(3)]
    out = VF.varlen_attention(*inputs, starts(*empty), starts(*empty), 0, 0)
    assert out.shape == (0, 2, 8)
    out.sum().backward()


# --- memory_efficient_attention -----------------------------------------------------------------


@pytest.fixture(scope="module")
def bias_classes():
    from xformers.ops.fmha import attn_bias

    return attn_bias


def by_formula(query, key, value, bias, scale=None):
    """xformers' own definition, for BMHK."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    logits = scale * query @ key.transpose(-2, -1)
    return ((logits + bias).softmax(-1) @ value).transpose(1, 2)


def bmhk(batch=2, queries=5, keys=7, heads=3):
    shapes = ((queries, heads, 8), (keys, heads, 8), (keys, heads, 6))
    return [normal(batch, *shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["LowerTriangularMask", "LowerTriangularFromBottomRightMask", "WithTensorBias"]
)
def test_triangular_biases(name, bias_classes, backend):
    inputs = bmhk()
    if name == "WithTensorBias":
        tensor = normal(2, 3, 5, 7).requires_grad_()
        bias = bias_classes.LowerTriangularMask().add_bias(tensor)
    else:
        bias, tensor = getattr(bias_classes, name)(), None
    theirs = by_formula(*inputs, bias.materialize((2, 3, 5, 7)), 0.4)
    ours = VF.memory_efficient_attention(*inputs, bias, scale=0.4, backend=backend)
    assert ours.is_contiguous()
    assert_same(ours, theirs, [*inputs, *([] if tensor is None else [tensor])])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["plain", "causal", "causal_from_bottomright"])
@pytest.mark.parametrize("layout", ["BMHK", "BMGHK"])
def test_block_diagonal_biases(form, layout, bias_classes, backend):
    bias = bias_classes.BlockDiagonalMask.from_seqlens([3, 1, 4], [5, 1, 6])
    if form != "plain":
        bias = getattr(bias, f"make_{form}")()
    inputs = bmhk(1, 8, 12, 4)
    theirs = by_formula(*inputs, bias.materialize((1, 4, 8, 12)))
    tensors = inputs if layout == "BMHK" else [x.unflatten(2, (2, 2)) for x in inputs]
    ours = VF.memory_efficient_attention(*tensors, bias, backend=backend)
    assert_same(ours.flatten(2, -2) if layout == "BMGHK" else ours, theirs, inputs)


def test_block_diagonal_of_a_list_of_tensors(bias_classes):
    tensors = [normal(1, length, 2, 8) for length in (3, 6, 2)]
    bias, joined = bias_classes.BlockDiagonalMask.from_tensor_list(tensors)
    outs = bias.split(VF.memory_efficient_attention(joined, joined, joined, bias))
    for out, x in zip(outs, tensors, strict=True):
        assert_close(out, VF.memory_efficient_attention(x, x, x))


def test_tensor_biases_in_every_layout():
    query, key, value = bmhk()
    for shape in ((2, 3, 5, 7), (1, 3, 1, 7), (5, 7)):
        bias = normal(*shape).requires_grad_()
        ours = VF.memory_efficient_attention(query, key, value, bias)
        assert_same(ours, by_formula(query, key, value, bias), [query, key, value, bias])
    one_head = [x[:, :, 0] for x in (query, key, value)]
    bias = normal(2, 5, 7).requires_grad_()
    theirs = by_formula(*(x[:, :, None] for x in one_head), bias[:, None])[:, :, 0]
    assert_same(VF.memory_efficient_attention(*one_head, bias), theirs, [query, key, value, bias])


@pytest.mark.parametrize("requires_grad", [False, True])
def test_groups_of_heads(requires_grad):
    query = normal(2, 5, 2, 3, 8).requires_grad_(requires_grad)
    key, value = (normal(2, 7, 2, 1, 8).requires_grad_(requires_grad) for _ in range(2))
    bias = normal(2, 2, 1, 5, 7).requires_grad_(requires_grad)
    wide = [x.expand(2, 7, 2, 3, 8) for x in (key, value)]
    ours = VF.memory_efficient_attention(query, *wide, bias)
    flat = [x.flatten(2, 3) for x in (query, *wide)]
    theirs = by_formula(*flat, bias.expand(2, 2, 3, 5, 7).flatten(1, 2)).unflatten(2, (2, 3))
    if requires_grad:
        assert_same(ours, theirs, [query, key, value, bias])
    else:
        assert_close(ours, theirs)


def test_dropout_of_packed_blocks(bias_classes):
    """The mask counts rows and columns of the whole tensors, in every block."""
    bias = bias_classes.BlockDiagonalMask.from_seqlens([3, 4], [5, 6])
    query, key = normal(1, 7, 2, 8), normal(1, 11, 2, 8)
    identity = torch.eye(11)[None, :, None].expand(1, 11, 2, 11)
    torch.manual_seed(5)
    seed = torch.randint(0, 2**62, (1,))
    torch.manual_seed(5)
    weights = VF.memory_efficient_attention(query, key, identity, bias, p=0.5).transpose(1, 2)
    visible = bias.materialize((7, 11)) == 0
    assert torch.equal(weights != 0, dropout_keep_mask(1, 2, 7, 11, 0.5, seed) & visible)


def test_unknown_biases_are_refused(bias_classes):
    inputs = bmhk(2, 5, 5)
    local = bias_classes.LowerTriangularFromBottomRightMask().make_local_attention(2)

    class Own(bias_classes.LowerTriangularMask):
        pass

    for bias in (local, Own(), object()):
        with pytest.raises(NotImplementedError, match=r"attn_bias.*BlockDiagonalCausalMask.*got"):
            VF.memory_efficient_attention(*inputs, bias)


def test_xformers_is_not_imported():
    code = (
        "import sys, torch, vlmfast.functional as VF; x = torch.randn(1, 4, 2, 8);"
        "VF.memory_efficient_attention(x, x, x, torch.zeros(1, 2, 4, 4));"
        "sys.exit('xformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
