"""Operators of per-image cross-attention: schemas, fakes, autograd and FLOP formulas.

What the arguments mean is written once, at `vlmfast.reference.cross_attention`. Beyond that:

- query, key, value are float32, bfloat16 or float16; strides are free, and nothing is copied to
  make them dense. Tensors of integers and bools are contiguous.
- logsumexp is float32 and contiguous. It is differentiable.
- out and grad_query are laid out like query (`ops.common.dense_like`), grad_key like key and
  grad_value like value (`images_like`).
- a gradient that is not asked for is an empty tensor of shape (0,).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from vlmfast.ops import common

_PLAN = "Tensor image_index, Tensor? visible, Tensor order, Tensor segments, Tensor? image_lengths"
_SCHEMA = (
    f"(Tensor query, Tensor key, Tensor value, {_PLAN}, float scale) "
    "-> (Tensor out, Tensor logsumexp)"
)
_BACKWARD_SCHEMA = (
    "(Tensor grad_out, Tensor? grad_logsumexp, Tensor query, Tensor key, Tensor value, "
    f"Tensor out, Tensor logsumexp, {_PLAN}, float scale, bool query_grad, bool key_value_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def images_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty, dense (B, H, I, L, D) tensor in the dimension order of `tensor`.

    Memory order is (B, I, L, H, D) where the heads of `tensor` lie inside its latents, as a
    projection leaves them, otherwise (B, H, I, L, D).
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    batch, heads, images, latents, dim = shape
    if guard_or_false(tensor.stride(1) < tensor.stride(3)):
        return tensor.new_empty((batch, images, latents, heads, dim)).permute(0, 3, 1, 2, 4)
    return tensor.new_empty((batch, heads, images, latents, dim))


def _fake_forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, heads, tokens, _ = query.shape
    out = common.dense_like(query, (batch, heads, tokens, value.shape[4]))
    return out, query.new_empty((batch, heads, tokens), dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    query_grad, key_value_grad = rest[-2:]
    if key_value_grad:
        grad_key, grad_value = images_like(key, key.shape), images_like(value, value.shape)
    else:
        grad_key, grad_value = key.new_empty(0), value.new_empty(0)
    grad_query = common.dense_like(query, query.shape) if query_grad else query.new_empty(0)
    return grad_query, grad_key, grad_value


def _autograd_function(forward_op: Any, backward_op: Any) -> type[torch.autograd.Function]:
    class CrossAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            query, key, value, *plan, scale = args
            out, logsumexp = common.call_in_forward(forward_op, *args)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(query, key, value, out, logsumexp, *plan)
            ctx.scale = scale
            return out, logsumexp

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: Tensor | None) -> Any:
            # Once: a non-reentrant checkpoint drops what it recomputed when it is read.
            saved = ctx.saved_tensors
            out = saved[3]
            if grad_out is None:
                if grad_logsumexp is None:
                    return (None,) * 9
                grad_out = out.new_zeros(()).expand(out.shape)
            if grad_logsumexp is not None:
                grad_logsumexp = grad_logsumexp.contiguous()
            needs_query, needs_key, needs_value = ctx.needs_input_grad[:3]
            grad_query, grad_key, grad_value = common.call(
                backward_op,
                grad_out,
                grad_logsumexp,
                *saved,
                ctx.scale,
                needs_query,
                needs_key or needs_value,
            )
            return (
                grad_query if needs_query else None,
                grad_key if needs_key else None,
                grad_value if needs_value else None,
                *(None,) * 6,
            )

    return CrossAttention


def _pairs(query: Tensor, key: Tensor, visible: Tensor | None, segments: Tensor) -> int:
    """Token-latent pairs over all heads."""
    batch, heads, tokens, _ = query.shape
    images, latents = key.shape[2:4]
    # Without values every token counts as seeing an image, or all of them.
    if isinstance(segments, FakeTensor) or segments.is_meta:
        seen = batch * tokens * (min(images, 1) if visible is None else images)
    else:
        seen = int((segments[..., 2] - segments[..., 0]).sum())
    return heads * seen * latents


def _flops(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    image_index: Tensor,
    visible: Tensor | None,
    order: Tensor,
    segments: Tensor,
    *rest: Any,
    **_: Any,
) -> int:
    # query @ key^T, weights @ value
    return 2 * _pairs(query, key, visible, segments) * (query.shape[3] + value.shape[4])


def _backward_flops(
    grad_out: Tensor,
    grad_logsumexp: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    image_index: Tensor,
    visible: Tensor | None,
    order: Tensor,
    segments: Tensor,
    *rest: Any,
    **_: Any,
) -> int:
    query_grad, key_value_grad = rest[-2:]
    dim, value_dim = query.shape[3], value.shape[4]
    columns = dim + value_dim  # query @ key^T again, grad_out @ value^T
    if key_value_grad:
        columns += dim + value_dim
    if query_grad:
        columns += dim
    return 2 * _pairs(query, key, visible, segments) * columns


FORWARD, BACKWARD = common.register_family(
    "cross_attention",
    (_SCHEMA, _BACKWARD_SCHEMA),
    (_fake_forward, _fake_backward),
    _autograd_function,
    (_flops, _backward_flops),
)
