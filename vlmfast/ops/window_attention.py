"""Operators of shifted-window attention: schemas, fakes, autograd and FLOP formulas.

What the arguments mean is written once, at `vlmfast.reference.window_attention`. Beyond that:

- query, key, value are float32, bfloat16 or float16, all of one dtype; strides are free, and
  nothing is copied to make them dense. key and value are both None where query holds all three.
- bias, logit_scale and pad_value are each float32, bfloat16 or float16, whatever query is.
- out is contiguous, and so is logsumexp, which is float32, not differentiable, and anything where
  the query is a padded token.
- gradients are contiguous and in the dtype of what they belong to. grad_query has the shape of
  query; where query is packed, grad_key and grad_value are empty.
- a gradient that is not asked for is an empty tensor of shape (0,).
"""

from typing import Any

import torch
from torch import Tensor

from vlmfast.ops import common

_COMMON = (
    "int num_heads, SymInt window_height, SymInt window_width, SymInt shift_height, "
    "SymInt shift_width, bool wrap_padded, float scale, float mask_value, float dropout_p, "
    "Tensor? dropout_seed"
)
_TENSORS = (
    "Tensor query, Tensor? key, Tensor? value, Tensor? bias, Tensor? logit_scale, Tensor? pad_value"
)
_SCHEMA = f"({_TENSORS}, {_COMMON}) -> (Tensor out, Tensor logsumexp)"
_BACKWARD_SCHEMA = (
    f"(Tensor grad_out, {_TENSORS}, Tensor out, Tensor logsumexp, {_COMMON}, "
    "bool qkv_grad, bool bias_grad, bool logit_scale_grad, bool pad_grad) "
    "-> (Tensor grad_query, Tensor grad_key, Tensor grad_value, Tensor grad_bias, "
    "Tensor grad_logit_scale, Tensor grad_pad_value)"
)


def _channels(query: Tensor, key: Tensor | None) -> int:
    return query.shape[3] // 3 if key is None else query.shape[3]


def _windows(query: Tensor, window_height: int, window_width: int) -> int:
    """How many windows cover the map."""
    return -(-query.shape[1] // window_height) * -(-query.shape[2] // window_width)


def _fake_forward(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    num_heads: int,
    window_height: int,
    window_width: int,
    *rest: Any,
) -> tuple[Tensor, Tensor]:
    windows = _windows(query, window_height, window_width)
    rows = (query.shape[0], windows, num_heads, window_height * window_width)
    out = query.new_empty((*query.shape[:3], _channels(query, key)))
    return out, query.new_empty(rows, dtype=torch.float32)


def _fake_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    qkv_grad, bias_grad, logit_scale_grad, pad_grad = rest[-4:]

    def gradient(tensor: Tensor | None, wanted: bool) -> Tensor:
        if tensor is None:
            return query.new_empty(0)
        return tensor.new_empty(tensor.shape if wanted else 0)

    return (
        gradient(query, qkv_grad),
        gradient(key, qkv_grad),
        gradient(value, qkv_grad),
        gradient(bias, bias_grad),
        gradient(logit_scale, logit_scale_grad),
        gradient(pad_value, pad_grad),
    )


def _autograd_function(forward_op: Any, backward_op: Any) -> type[torch.autograd.Function]:
    class WindowAttention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
            out, logsumexp = common.call_in_forward(forward_op, *args)
            ctx.mark_non_differentiable(logsumexp)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*args[:6], out, logsumexp, args[-1])
            ctx.numbers = args[6:-1]
            return out, logsumexp

        @staticmethod
        def backward(ctx: Any, grad_out: Tensor | None, grad_logsumexp: None) -> Any:
            if grad_out is None:
                return (None,) * 16
            *tensors, seed = ctx.saved_tensors
            needs = ctx.needs_input_grad[:6]
            wanted = (any(needs[:3]), *needs[3:])
            gradients = common.call(backward_op, grad_out, *tensors, *ctx.numbers, seed, *wanted)
            return (
                *(x if need else None for x, need in zip(gradients, needs, strict=True)),
                *(None,) * 10,
            )

    return WindowAttention


def _score_elements(
    query: Tensor, num_heads: int, window_height: int, window_width: int, *rest: Any
) -> int:
    """Query-key pairs over all windows and heads, padded tokens among them."""
    windows = query.shape[0] * _windows(query, window_height, window_width)
    return windows * num_heads * (window_height * window_width) ** 2


def _flops(*args: Any, **_: Any) -> int:
    query, key, num_heads = args[0], args[1], args[6]
    head_dim = _channels(query, key) // num_heads
    # query @ key^T, weights @ value
    return 2 * 2 * head_dim * _score_elements(query, *args[6:])


def _backward_flops(*args: Any, **_: Any) -> int:
    query, key, num_heads, qkv_grad = args[1], args[2], args[9], args[-4]
    head_dim = _channels(query, key) // num_heads
    # query @ key^T again and grad_out @ value^T; then the gradients of query, key and value
    products = 5 if qkv_grad else 2
    return 2 * products * head_dim * _score_elements(query, *args[9:])


FORWARD, BACKWARD = common.register_family(
    "window_attention",
    (_SCHEMA, _BACKWARD_SCHEMA),
    (_fake_forward, _fake_backward),
    _autograd_function,
    (_flops, _backward_flops),
)
