"""Gradients of shifted-window attention.

Where a head's window fits on chip, one kernel gives them all; elsewhere kernels of their own give
those of queries, of the bias, and of keys and values.
"""

import torch

from vlmfast.kernels.window_attention.backward_bias import bias_gradient
from vlmfast.kernels.window_attention.backward_key_value import key_value_gradients
from vlmfast.kernels.window_attention.backward_query import query_gradient
from vlmfast.kernels.window_attention.problem import WHOLE_KERNEL, Gradients, make_problem


def backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    bias: torch.Tensor | None,
    logit_scale: torch.Tensor | None,
    pad_value: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    num_heads: int,
    window_height: int,
    window_width: int,
    shift_height: int,
    shift_width: int,
    wrap_padded: bool,
    scale: float,
    mask_value: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    qkv_grad: bool,
    bias_grad: bool,
    logit_scale_grad: bool,
    pad_grad: bool,
) -> tuple[torch.Tensor, ...]:
    """Gradients of query, key, value, bias, logit_scale and pad_value.

    Takes what `forward` took and gave, and grad_out (B, H, W, C) of any strides. Each gradient is
    contiguous, in the shape and dtype of what it belongs to, and of shape (0,) where it is not
    asked for or there is nothing that it would belong to.
    """
    problem = make_problem(
        query,
        key,
        value,
        bias,
        logit_scale,
        pad_value,
        num_heads,
        window_height,
        window_width,
        shift_height,
        shift_width,
        wrap_padded,
        scale,
        mask_value,
        dropout_p,
        dropout_seed,
    )
    grad_query, grad_key, grad_value = (
        query.new_empty(x.shape if qkv_grad and x is not None else 0) for x in (query, key, value)
    )
    map_gradients: tuple[torch.Tensor | None, ...] = (None, None, None)
    if qkv_grad:
        packed = key is None or value is None
        map_gradients = grad_query.chunk(3, 3) if packed else (grad_query, grad_key, grad_value)
    wanted = (bias_grad, logit_scale_grad, pad_grad)
    added_gradients = tuple(
        None if tensor is None or not is_wanted else tensor.new_zeros(tensor.shape)
        for tensor, is_wanted in zip((bias, logit_scale, pad_value), wanted, strict=True)
    )
    if problem.num_windows > 0:
        gradients = Gradients(*map_gradients, *added_gradients)
        grad_out = grad_out.to(query.dtype)
        statistics = None
        if problem.find_launch(WHOLE_KERNEL, problem.tokens) is None:
            statistics = query_gradient(problem, out, grad_out, gradients)
            if gradients.bias is not None:
                bias_gradient(problem, statistics, grad_out, gradients.bias)
        key_value_gradients(problem, statistics, grad_out, gradients)
    return (
        grad_query,
        grad_key,
        grad_value,
        *(
            (query if tensor is None else tensor).new_empty(0) if gradient is None else gradient
            for tensor, gradient in zip(
                (bias, logit_scale, pad_value), added_gradients, strict=True
            )
        ),
    )
