"""The specification: against torch in float64, and against numerical gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.reference.common import dropout_keep_mask, philox
from vlmfast.reference.flash_attention import flash_attention


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def leaves(*shapes):
    return [normal(*shape).requires_grad_() for shape in shapes]


MASKS = {
    "none": None,
    "bool": lambda: torch.rand(2, 1, 5, 7) < 0.7,
    "float": lambda: normal(1, 4, 5, 7),
    "over keys": lambda: normal(2, 1, 1, 7),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_agrees_with_torch_in_float64(mask, kv_heads):
    inputs = leaves((2, 4, 5, 8), (2, kv_heads, 7, 8), (2, kv_heads, 7, 6))
    attn_mask = MASKS[mask]() if MASKS[mask] else None
    if mask in ("float", "over keys"):
        inputs.append(attn_mask.requires_grad_())
    scale = 0.3
    out, _ = flash_attention(*inputs[:3], attn_mask, scale=scale)
    expected = F.scaled_dot_product_attention(*inputs[:3], attn_mask, scale=scale, enable_gqa=True)
    assert_close(out, expected)
    grad = normal(*out.shape)
    gradients = torch.autograd.grad(out, inputs, grad)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, inputs, grad), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("rows, columns", [(5, 5), (5, 8), (8, 5), (1, 3)])
def test_causality_is_aligned_at_the_corner_that_it_names(rows, columns):
    query, key, value = normal(1, 2, rows, 4), normal(1, 2, columns, 4), normal(1, 2, columns, 4)
    i, j = torch.arange(rows)[:, None], torch.arange(columns)
    for causal, visible in ((1, j <= i), (2, j <= i + columns - rows)):
        out, logsumexp = flash_attention(query, key, value, causal=causal)
        masked, masked_logsumexp = flash_attention(query, key, value, visible)
        assert_close(out, masked)
        assert_close(logsumexp, masked_logsumexp)
    top_left, _ = flash_attention(query, key, value, causal=1)
    expected = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
    assert_close(top_left, expected)


def test_logsumexp_and_its_gradient():
    query, key, value = leaves((1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 4))
    _, logsumexp = flash_attention(query, key, value, scale=0.5)
    expected = torch.logsumexp(0.5 * query @ key.transpose(-2, -1), -1)
    assert_close(logsumexp, expected)
    grad = normal(1, 2, 3)
    ours = torch.autograd.grad(logsumexp, (query, key), grad)
    for x, y in zip(ours, torch.autograd.grad(expected, (query, key), grad), strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("causal", [0, 1, 2])
def test_gradients_are_right_numerically(causal):
    query, key, value, mask = leaves((1, 2, 4, 3), (1, 1, 3, 3), (1, 1, 3, 2), (1, 1, 4, 3))
    seed = torch.tensor([5])

    def function(query, key, value, mask):
        out, logsumexp = flash_attention(
            query, key, value, mask, causal=causal, dropout_p=0.4, dropout_seed=seed
        )
        return out, logsumexp.nan_to_num(neginf=0.0)

    assert torch.autograd.gradcheck(function, (query, key, value, mask))
    assert torch.autograd.gradgradcheck(function, (query, key, value, mask))


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_a_row_that_sees_nothing_is_zero_and_gives_no_gradient(kind):
    query, key, value = leaves((1, 1, 6, 4), (1, 1, 4, 4), (1, 1, 4, 4))
    visible = torch.ones(6, 4, dtype=torch.bool)
    visible[:2] = False
    mask, causal = None, 0
    if kind == "bool":
        mask = visible
    elif kind == "float":
        mask = torch.zeros(6, 4).double().masked_fill(~visible, -math.inf).requires_grad_()
    else:
        causal = 2  # 4 keys for 6 queries: the first two see none
    out, logsumexp = flash_attention(query, key, value, mask, causal=causal)
    assert torch.equal(out[:, :, :2], torch.zeros(1, 1, 2, 4).double())
    assert torch.equal(logsumexp[:, :, :2], torch.full((1, 1, 2), -math.inf).double())
    inputs = [x for x in (query, key, value, mask) if x is not None and x.requires_grad]
    gradients = torch.autograd.grad((out.sum(), logsumexp[:, :, 2:].sum()), inputs)
    assert all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][:, :, :2].any()


@pytest.mark.parametrize("shape", [(0, 2, 3, 3), (2, 0, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0)])
def test_empty_sizes(shape):
    batch, heads, rows, columns = shape
    inputs = leaves((batch, heads, rows, 4), (batch, heads, columns, 4), (batch, heads, columns, 4))
    out, logsumexp = flash_attention(*inputs)
    assert torch.equal(out, torch.zeros(batch, heads, rows, 4).double())
    assert logsumexp.shape == (batch, heads, rows)
    assert all(not x.any() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("causal", [0, 1, 2])
def test_packed_sequences_are_separate_calls(causal):
    lengths_q, lengths_k = [3, 0, 4, 2, 5], [4, 2, 4, 0, 3]
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    # two rows and three keys of no sequence at the end
    query, key, value = normal(1, 2, 16, 4), normal(1, 2, 16, 4), normal(1, 2, 16, 4)
    out, logsumexp = flash_attention(query, key, value, None, cu_q, cu_k, 5, 4, causal)
    for i in range(5):
        q, k = slice(cu_q[i], cu_q[i + 1]), slice(cu_k[i], cu_k[i + 1])
        expected = flash_attention(query[:, :, q], key[:, :, k], value[:, :, k], causal=causal)
        assert_close(out[:, :, q], expected[0])
        assert_close(logsumexp[:, :, q], expected[1])
    assert not out[:, :, cu_q[-1] :].any()
    assert logsumexp[:, :, cu_q[-1] :].isneginf().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    inputs = [normal(1, 2, 9, 8, dtype=dtype) for _ in range(3)]
    out, logsumexp = flash_attention(*inputs)
    exact, _ = flash_attention(*(x.float() for x in inputs))
    assert torch.equal(out, exact.to(dtype))
    assert logsumexp.dtype == torch.float32


# Known answers of the generator's authors (Random123, tests/kat_vectors, philox4x32 10).
@pytest.mark.parametrize(
    "counter, key, expected",
    [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (
            (0xFFFFFFFF,) * 4,
            -1,
            (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
        ),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor(word) for word in counter), torch.tensor([key]))
    assert tuple(word.item() for word in words) == expected


def test_dropout_mask_follows_its_formula():
    seed = torch.tensor([(123 << 32) + 456])
    keep = dropout_keep_mask(2, 3, 4, 6, 0.25, seed)
    for b, h, i, j in ((0, 0, 0, 0), (1, 2, 3, 5), (0, 1, 2, 4), (1, 0, 0, 3)):
        counter = (torch.tensor(j // 4), torch.tensor(i), torch.tensor(b * 3 + h), torch.tensor(0))
        assert keep[b, h, i, j].item() == (philox(counter, seed)[j % 4].item() >= 2**30)
    assert dropout_keep_mask(1, 1, 3, 5, 0.0, seed).all()
    assert not dropout_keep_mask(1, 1, 3, 5, 1.0, seed).any()


def test_dropout_drops_with_its_probability():
    p, count = 0.3, 4 * 8 * 64 * 64
    keep = dropout_keep_mask(4, 8, 64, 64, p, torch.tensor([99]))
    five_sigma = 5 * math.sqrt(p * (1 - p) / count)
    assert abs(1 - keep.double().mean().item() - p) < five_sigma


def test_dropout_scales_what_it_keeps():
    query, key = normal(1, 2, 4, 8), normal(1, 2, 6, 8)
    identity = torch.eye(6).double().expand(1, 2, 6, 6)
    seed = torch.tensor([7])
    weights, logsumexp = flash_attention(query, key, identity)
    dropped, same = flash_attention(query, key, identity, dropout_p=0.5, dropout_seed=seed)
    keep = dropout_keep_mask(1, 2, 4, 6, 0.5, seed)
    assert_close(dropped, torch.where(keep, 2 * weights, 0.0))
    assert torch.equal(logsumexp, same)
