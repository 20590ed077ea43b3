"""Gradients of softmax attention, from stages that recompute its weights tile by tile.

None has atomics, hence one result on one machine. Where a head's keys fit on chip,
`flash_attention_bwd_whole_kernel` walks the queries once and gives all three gradients (five
products a tile); elsewhere key/value and query gradients come from two kernels (seven products).
"""

import torch

from vlmfast.kernels.flash_attention.backward_key_value import key_value_gradients
from vlmfast.kernels.flash_attention.backward_mask import mask_gradient, row_mask_gradient
from vlmfast.kernels.flash_attention.backward_query import query_gradient
from vlmfast.kernels.flash_attention.backward_statistics import row_statistics
from vlmfast.kernels.flash_attention.backward_whole import takes_whole_heads, whole_gradients
from vlmfast.kernels.flash_attention.problem import Problem
from vlmfast.kernels.launch import (
    check_lengths,
    dense_like,
    saved_for_backward,
    with_positive_scale,
)


def backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    query_grad: bool,
    key_value_grad: bool,
    mask_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value and mask, each of shape (0,) where it is not asked for.

    Takes what `forward` took and gave, grad_out (B, Hq, L, Dv) of any strides and grad_logsumexp
    (B, Hq, L). grad_mask is contiguous, in the mask's shape and dtype, and sums over the dimensions
    that the mask broadcasts over.
    """
    problem, query_factor = with_positive_scale(
        Problem(
            query,
            key,
            value,
            attn_mask,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            dropout_p,
            dropout_seed,
        )
    )
    check_lengths(query=query.shape[2], key=key.shape[2])
    saved = saved_for_backward(out, logsumexp, grad_out, grad_logsumexp)
    grad_query = gradient_like(query, problem) if query_grad else query.new_empty(0)
    grad_key, grad_value = (
        gradient_like(tensor, problem) if key_value_grad else tensor.new_empty(0)
        for tensor in (key, value)
    )
    grad_mask = (query if attn_mask is None else attn_mask).new_empty(0)

    whole = query_grad and key_value_grad and takes_whole_heads(problem)
    if whole:
        whole_gradients(problem, saved, grad_query, grad_key, grad_value)
    if mask_grad and attn_mask.shape[3] == 1:
        grad_mask = row_mask_gradient(attn_mask, saved)
        mask_grad = False
    if mask_grad or ((query_grad or key_value_grad) and not whole):
        # Of float32 outputs rounding takes no more than of the gradient itself.
        exact_delta = mask_grad and query.dtype != torch.float32
        statistics = row_statistics(problem, saved, exact_delta)
    if key_value_grad and not whole:
        key_value_gradients(problem, saved, statistics, grad_key, grad_value)
    if query_grad and not whole:
        query_gradient(problem, saved, statistics, grad_query)
    if mask_grad:
        grad_mask = mask_gradient(problem, saved, statistics)
    if query_grad and query_factor != 1.0:
        grad_query *= query_factor
    return grad_query, grad_key, grad_value, grad_mask


def gradient_like(tensor: torch.Tensor, problem: Problem) -> torch.Tensor:
    gradient = dense_like(tensor, tuple(tensor.shape))
    return gradient.zero_() if problem.packed else gradient
