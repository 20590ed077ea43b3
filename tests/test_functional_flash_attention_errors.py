"""Calls of softmax attention that are refused: what is wrong, by the argument's name."""

import math

import pytest
import torch

import vlmfast.functional as VF
from tools.flash_attention import starts

sdpa = VF.scaled_dot_product_attention

pytestmark = pytest.mark.usefixtures("nan_in_new_memory")

# --- errors -------------------------------------------------------------------------------------

Q, K, V = torch.zeros(2, 4, 5, 8), torch.zeros(2, 4, 7, 8), torch.zeros(2, 4, 7, 8)

BAD_CALLS = [
    (TypeError, "query: expected a tensor, got list", lambda: sdpa([1.0], K, V)),
    (TypeError, "key: expected a floating dtype, got torch.int64", lambda: sdpa(Q, K.long(), V)),
    (TypeError, "value: expected the dtype of query", lambda: sdpa(Q, K, V.double())),
    (TypeError, "query: expected a floating dtype", lambda: sdpa(Q.cfloat(), K, V)),
    (TypeError, "query: expected a strided tensor", lambda: sdpa(Q.to_sparse(), K, V)),
    (ValueError, "key: expected the device of query", lambda: sdpa(Q, K.to("meta"), V)),
    (ValueError, "query: expected at least 2 dimensions", lambda: sdpa(Q[0, 0, 0], K, V)),
    (ValueError, "query: expected a head dim of at least 1", lambda: sdpa(Q[..., :0], K, V)),
    (ValueError, "value: expected a head dim of at least 1", lambda: sdpa(Q, K, V[..., :0])),
    (ValueError, "key: expected the head dim of query, 8", lambda: sdpa(Q, K[..., :4], V)),
    (ValueError, "value: expected the length of key, 7", lambda: sdpa(Q, K, V[:, :, :3])),
    (ValueError, "key: expected a number of heads", lambda: sdpa(Q, K[:, :2], V[:, :2])),
    (ValueError, "key: expected a batch size", lambda: sdpa(Q, K.repeat(2, 1, 1, 1), V)),
    (
        ValueError,
        "key: expected a number of heads that divides query's, 4, got 3",
        lambda: sdpa(Q, K[:, :3], V[:, :3], enable_gqa=True),
    ),
    (TypeError, "attn_mask: expected a tensor or None", lambda: sdpa(Q, K, V, [True])),
    (
        TypeError,
        "attn_mask: expected a bool or floating",
        lambda: sdpa(Q, K, V, torch.ones(5, 7).int()),
    ),
    (
        ValueError,
        r"attn_mask: expected a shape that broadcasts to \(2, 4, 5, 7\), got \(5, 6\)",
        lambda: sdpa(Q, K, V, torch.zeros(5, 6)),
    ),
    (ValueError, "attn_mask: expected a shape", lambda: sdpa(Q, K, V, torch.zeros(1, 2, 4, 5, 7))),
    (ValueError, "attn_mask: expected the device", lambda: sdpa(Q, K, V, Q.to("meta"))),
    (ValueError, "dropout_p: expected a probability", lambda: sdpa(Q, K, V, dropout_p=-0.1)),
    (ValueError, "dropout_p: expected a probability", lambda: sdpa(Q, K, V, dropout_p=1.5)),
    (ValueError, "dropout_p.*got nan", lambda: sdpa(Q, K, V, dropout_p=math.nan)),
    (TypeError, "dropout_p: expected a number", lambda: sdpa(Q, K, V, dropout_p="0")),
    (TypeError, "scale: expected a number or None", lambda: sdpa(Q, K, V, scale="1")),
    (ValueError, "backend: expected one of 'cpu'.*got 'gpu'", lambda: sdpa(Q, K, V, backend="gpu")),
]

# More than kernels count, in no memory.
LONG, WIDE = torch.zeros(1, 4, 1, 8).expand(2, 4, 2**31, 8), torch.zeros(1).expand(2, 4, 7, 2**17)
BAD_CALLS += [
    (
        ValueError,
        "query: expected at most 536870912 tokens, got 2147483648",
        lambda: sdpa(LONG, K, V),
    ),
    (ValueError, "value: expected at most 536870912 tokens", lambda: sdpa(Q, LONG, LONG)),
    (ValueError, "value: expected at most 65536 features of a", lambda: sdpa(Q, K, WIDE)),
]


def varlen(cu_q=None, cu_k=None, max_q=4, max_k=5, query=None, key=None, value=None):
    def default(x, otherwise):
        return otherwise if x is None else x

    return VF.varlen_attention(
        default(query, torch.zeros(9, 4, 8)),
        default(key, torch.zeros(11, 2, 8)),
        default(value, torch.zeros(11, 2, 8)),
        default(cu_q, starts(4, 4)),
        default(cu_k, starts(5, 5)),
        max_q,
        max_k,
    )


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


ODD_DROPOUT = (
    torch.tensor(0.0),
    torch.zeros(2),
    torch.empty(0),
    torch.zeros((), device="meta"),
    0j,
)
BAD_CALLS += [
    (TypeError, "dropout_p: expected a number in", lambda p=p: sdpa(Q, K, V, dropout_p=p))
    for p in ODD_DROPOUT
]
BAD_CALLS += [
    (ValueError, "value: expected at least 2 dimensions", lambda: sdpa(Q, K, torch.tensor(1.0))),
    (TypeError, "query: expected a tensor, got NoneType", lambda: sdpa(None, K, V)),
    (TypeError, "scale: expected a number or None", lambda: sdpa(Q, K, V, scale=torch.ones(()))),
]
BAD_CALLS += [
    (ValueError, r"query: expected shape \(total", lambda: varlen(query=torch.zeros(1, 9, 4, 8))),
    (ValueError, "key: expected a number of heads", lambda: varlen(query=torch.zeros(9, 3, 8))),
    (ValueError, "value: expected total and heads", lambda: varlen(value=torch.zeros(10, 2, 8))),
    (TypeError, "cu_seqlens_q: expected a tensor", lambda: varlen([0, 9])),
    (TypeError, "cu_seqlens_q: expected dtype torch.int32", lambda: varlen(starts(4).long())),
    (ValueError, "cu_seqlens_q: expected shape", lambda: varlen(ints())),
    (ValueError, "cu_seqlens_q: expected the device", lambda: varlen(starts(4, 4).to("meta"))),
    (ValueError, "cu_seqlens_k: expected the shape", lambda: varlen(cu_k=starts(5))),
    (ValueError, "cu_seqlens_q: expected to start at 0, got 1", lambda: varlen(ints(1, 4, 8))),
    (ValueError, "cu_seqlens_k: expected lengths that never", lambda: varlen(cu_k=ints(0, 5, 3))),
    (
        ValueError,
        "cu_seqlens_k: expected to end at 11",
        lambda: varlen(cu_k=ints(0, 7, 12), max_k=9),
    ),
    (ValueError, "max_seqlen_q: expected at least 4", lambda: varlen(max_q=3)),
    (ValueError, "max_seqlen_k: expected at least 0, got -1", lambda: varlen(max_k=-1)),
    (TypeError, "max_seqlen_k: expected an int, got float", lambda: varlen(max_k=5.0)),
]

MASK = torch.zeros(5, 7)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SPARSE = starts(4, 4).to_sparse()
NESTED = torch.nested.nested_tensor([MASK, MASK[:3]])

BAD_CALLS += [
    *(
        (TypeError, f"{name}: .*floating dtype of 16 to 64 bits, got {dtype}", call)
        for dtype in FLOAT8
        for name, call in (
            ("query", lambda dtype=dtype: sdpa(Q.to(dtype), K.to(dtype), V.to(dtype))),
            ("attn_mask", lambda dtype=dtype: sdpa(Q, K, V, MASK.to(dtype))),
            ("attn_bias", lambda dtype=dtype: mea(X, X, X, torch.zeros(5, 5).to(dtype))),
        )
    ),
    (TypeError, "attn_mask: expected a strided", lambda: sdpa(Q, K, V, MASK.to_sparse())),
    (TypeError, "attn_mask: expected a strided", lambda: sdpa(Q, K, V, MASK.to_sparse_csr())),
    (TypeError, "attn_mask: expected a strided", lambda: sdpa(Q, K, V, NESTED)),
    (TypeError, "cu_seqlens_q: expected a strided tensor", lambda: varlen(SPARSE)),
    (TypeError, "cu_seqlens_k: expected a strided tensor", lambda: varlen(cu_k=NESTED.int())),
    (ValueError, "max_seqlen_q: expected at most", lambda: varlen(max_q=2**63)),
    (ValueError, "scale: expected a finite number.*got 1e.39", lambda: sdpa(Q, K, V, scale=1e39)),
    (ValueError, "scale: expected a finite number", lambda: sdpa(Q, K, V, scale=10**400)),
    (ValueError, "scale: expected a finite number", lambda: sdpa(Q, K, V, scale=math.nan)),
    (TypeError, "scale: expected a number or None", lambda: sdpa(Q, K, V, scale=True)),
    (TypeError, "is_causal: expected True or False", lambda: sdpa(Q, K, V, is_causal="no")),
    (TypeError, "enable_gqa: expected True or False", lambda: sdpa(Q, K, V, enable_gqa=None)),
]

mea = VF.memory_efficient_attention
X = torch.zeros(2, 5, 4, 8)

BAD_CALLS += [
    (ValueError, "query: expected layout BMHK", lambda: mea(X[0, 0], X[0, 0], X[0, 0])),
    (ValueError, "key: expected batch and heads of query", lambda: mea(X, X[:, :, :2], X)),
    (ValueError, "key: expected batch and heads of query", lambda: mea(X, X[:1], X)),
    (ValueError, "value: expected the length of key", lambda: mea(X, X, X[:, :4])),
    (ValueError, "attn_bias: expected a shape", lambda: mea(X, X, X, torch.zeros(2, 4, 5, 4))),
    (TypeError, "attn_bias: expected a floating", lambda: mea(X, X, X, torch.zeros(5, 5).bool())),
    (ValueError, "p: expected a probability", lambda: mea(X, X, X, p=2.0)),
]


@pytest.mark.parametrize(
    "error, message, call", BAD_CALLS, ids=lambda x: x if isinstance(x, str) else ""
)
def test_bad_input(error, message, call):
    with pytest.raises(error, match=message):
        call()


def test_nested_tensors_are_refused():
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(
            [torch.zeros(3, 4, 8), torch.zeros(2, 4, 8)], layout=layout
        )
        with pytest.raises(TypeError, match="varlen_attention"):
            sdpa(nested, nested, nested)


def test_block_diagonal_bias_that_does_not_fit():
    from xformers.ops.fmha import attn_bias

    bias = attn_bias.BlockDiagonalMask.from_seqlens([2, 3])
    with pytest.raises(ValueError, match="query: expected a batch of 1"):
        mea(X, X, X, bias)
    with pytest.raises(ValueError, match="key: expected 5 tokens, as attn_bias has"):
        mea(X[:1], X[:1, :4], X[:1, :4], bias)


def test_starts_of_a_block_diagonal_bias_are_checked():
    from xformers.ops.fmha import attn_bias

    x = torch.randn(1, 5, 2, 8)
    for seqstart, error, says in (
        (torch.tensor([0, 2, 5]), TypeError, "attn_bias: expected dtype torch.int32"),
        (torch.tensor([0, 2, 1, 5]).int(), ValueError, "attn_bias: expected lengths that never"),
        (torch.tensor([0, 2, 6]).int(), ValueError, "attn_bias: expected at least 4"),
        (torch.tensor([1, 2, 5]).int(), ValueError, "attn_bias: expected to start at 0, got 1"),
    ):
        bias = attn_bias.BlockDiagonalMask.from_seqlens([2, 3])
        bias.q_seqinfo.seqstart = seqstart
        with pytest.raises(error, match=says):
            mea(x, x, x, bias)


def test_a_call_beyond_the_limits_draws_no_dropout_seed():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="value: expected at most 65536 features"):
        sdpa(Q, K, WIDE, dropout_p=0.5)
    assert torch.equal(torch.get_rng_state(), state)
