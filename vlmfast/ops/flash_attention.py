"""Operators of softmax attention: schemas, fakes, autograd and FLOP formulas.

What the arguments mean is written once, at `vlmfast.reference.flash_attention`. Beyond that:

- query, key, value are float32, bfloat16 or float16, attn_mask bool or any of these; strides are
  free, and nothing is copied to make them dense.
- logsumexp is float32 and contiguous. It is differentiable.
- out and grad_query are laid out like query, grad_key like key, grad_value like value
  (`ops.common.dense_like`). grad_mask has attn_mask's shape and dtype and is contiguous.
- a gradient that is not asked for is an empty tensor of shape (0,).
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vlmfast.ops import common

_COMMON = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "int causal, float scale, float dropout_p, Tensor? dropout_seed"
)
_SCHEMA = (
    f"(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, {_COMMON}) "
    "-> (Tensor out, Tensor logsumexp)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
    f"Tensor? attn_mask, Tensor out, Tensor logsumexp, {_COMMON}, "
    "bool query_grad, bool key_value_grad, bool mask_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_mask)"
)


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, length, _ = query.shape
    out = common.dense_like(query, (batch, heads, length, value.shape[3]))
    return out, query.new_empty((batch, heads, length), dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    query_grad, key_value_grad, mask_grad = rest[-3:]

    def gradient(tensor: Tensor, wanted: bool) -> Tensor:
        return common.dense_like(tensor, tensor.shape) if wanted else tensor.new_empty(0)

    grad_mask = query.new_empty(0)
    if attn_mask is not None:
        grad_mask = attn_mask.new_empty(attn_mask.shape if mask_grad else 0)
    return (
        gradient(query, query_grad),
        gradient(key, key_value_grad),
        gradient(value, key_value_grad),
        grad_mask,
    )


def _autograd_function(forward_op: Any, backward_op: Any) -> type[torch.autograd.Function]:
    class FlashAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            query, key, value, attn_mask, cu_seqlens_q, cu_seqlens_k, *numbers, seed = args
            out, logsumexp = common.call_in_forward(forward_op, *args)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(
                query, key, value, attn_mask, out, logsumexp, cu_seqlens_q, cu_seqlens_k, seed
            )
            ctx.numbers = numbers
            return out, logsumexp

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> Any:
            *tensors, cu_seqlens_q, cu_seqlens_k, seed = ctx.saved_tensors
            out = tensors[4]
            if grad_out is None:
                if grad_logsumexp is None:
                    return (None,) * 12
                grad_out = out.new_zeros(()).expand(out.shape)
            if grad_logsumexp is not None:
                grad_logsumexp = grad_logsumexp.contiguous()
            needs_query, needs_key, needs_value, needs_mask = ctx.needs_input_grad[:4]
            grad_query, grad_key, grad_value, grad_mask = common.call(
                backward_op,
                grad_out,
                grad_logsumexp,
                *tensors,
                cu_seqlens_q,
                cu_seqlens_k,
                *ctx.numbers,
                seed,
                needs_query,
                needs_key or needs_value,
                needs_mask,
            )
            return (
                grad_query if needs_query else None,
                grad_key if needs_key else None,
                grad_value if needs_value else None,
                grad_mask if needs_mask else None,
                *(None,) * 8,
            )

    return FlashAttention


def _segment_lengths(cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    # Without values each segment counts as the longest, as torch's own formulas have it.
    if isinstance(cu_seqlens, FakeTensor) or cu_seqlens.is_meta:
        return [max_seqlen] * (cu_seqlens.shape[0] - 1)
    return cu_seqlens.diff().tolist()


def _score_elements(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> int:
    """Query-key pairs over all heads. Causality does not count, as in torch's own formulas."""
    batch, heads, length, _ = query.shape
    if cu_seqlens_q is None or cu_seqlens_k is None:
        return batch * heads * length * key.shape[2]
    lengths_q = _segment_lengths(cu_seqlens_q, max_seqlen_q)
    lengths_k = _segment_lengths(cu_seqlens_k, max_seqlen_k)
    return heads * sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))


def _flops(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **_: Any
) -> int:
    # query @ key^T, weights @ value
    return 2 * _score_elements(query, key, *rest[:4]) * (query.shape[3] + value.shape[3])


def _backward_flops(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    **_: Any,
) -> int:
    query_grad, key_value_grad, _mask_grad = rest[-3:]
    dim, value_dim = query.shape[3], value.shape[3]
    columns = dim + value_dim  # query @ key^T again, grad_out @ value^T
    if key_value_grad:
        columns += dim + value_dim
    if query_grad:
        columns += dim
    return 2 * _score_elements(query, key, *rest[:4]) * columns


FORWARD, BACKWARD = common.register_family(
    "flash_attention",
    (_SCHEMA, _BACKWARD_SCHEMA),
    (_fake_forward, _fake_backward),
    _autograd_function,
    (_flops, _backward_flops),
)
