"""Gradients of per-image cross-attention.

There are no atomics: an image's gradients come from its own list of tokens. Where its latents fit
on chip and tokens see one image at most, the queries' gradients come from the same pass; elsewhere
from a kernel of their own.
"""

import torch

from vlmfast.kernels.cross_attention.backward_key_value import key_value_gradients
from vlmfast.kernels.cross_attention.backward_query import query_gradient
from vlmfast.kernels.cross_attention.images import Plan
from vlmfast.kernels.cross_attention.problem import Problem, images_like
from vlmfast.kernels.launch import dense_like, saved_for_backward, with_positive_scale


def backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    image_index: torch.Tensor,
    visible: torch.Tensor | None,
    order: torch.Tensor,
    segments: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
    query_grad: bool,
    key_value_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each of shape (0,) where it is not asked for.

    Takes what `forward` took and gave, grad_out (B, Hq, T, Dv) of any strides and grad_logsumexp
    (B, Hq, T).
    """
    plan = Plan(image_index, visible, order, segments, image_lengths)
    problem, query_factor = with_positive_scale(Problem(query, key, value, plan, scale))
    saved = saved_for_backward(out, logsumexp, grad_out, grad_logsumexp)
    # No program comes by the tokens that see no image.
    grad_query = dense_like(query, query.shape).zero_() if query_grad else query.new_empty(0)
    grad_key, grad_value = (
        images_like(tensor) if key_value_grad else tensor.new_empty(0) for tensor in (key, value)
    )
    if problem.heads == 0:  # of the queries: no key head has a group of them
        return grad_query, grad_key.zero_(), grad_value.zero_()
    whole = query_grad and key_value_grad and takes_whole_images(problem)
    if key_value_grad:
        key_value_gradients(problem, saved, grad_query, grad_key, grad_value, whole)
    if query_grad and not whole:
        query_gradient(problem, saved, grad_query)
    if query_grad and query_factor != 1.0:
        grad_query *= query_factor
    return grad_query, grad_key, grad_value


def takes_whole_images(problem: Problem) -> bool:
    """Whether one program should give all gradients of an image and its tokens."""
    if problem.several:
        return False
    launch = problem.find_launch("cross_attention_bwd_whole", problem.latents)
    return launch is not None and problem.latents <= launch.block_n
