"""Inputs, calls and formulas of the `cross_attention` family."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench.cases import ImageAttentionCase
from bench.flash_attention import Inputs, make_call
from bench.measure import Work
from bench.peers import eager_image_attention, image_plan
from vlmfast.reference.cross_attention import cross_attention
from vlmfast.verify.common import SEEDS, relative_error

__all__ = ["chosen_backend", "make_call", "make_inputs", "reference", "work", "yardsticks"]


def make_inputs(
    case: ImageAttentionCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Inputs laid out as a model's projections leave them: key and value are slices of one.

    query is (B, H, T, D), key and value are (B, H, I, L, D).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    text = (case.batch, case.tokens, case.heads, case.head_dim)
    images = (case.batch, case.images, case.latents, 2, case.heads, case.head_dim)
    query, grad_out = (normal(*text).transpose(1, 2) for _ in range(2))
    key, value = normal(*images).permute(3, 0, 4, 1, 2, 5).unbind(0)
    needs_grad = mode != "fwd"
    query, key, value = (x.detach().requires_grad_(needs_grad) for x in (query, key, value))
    return Inputs(query, key, value, grad_out)


def chosen_backend(case: ImageAttentionCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    sources = (inputs.query, inputs.key, inputs.value)
    return vlmfast.explain(
        VF.image_cross_attention, *sources, image_plan(case, device=inputs.query.device)
    ).backend


def reference(case: ImageAttentionCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """What `make_call` of a perfect contestant returns, in float64, one head after the other."""
    heads = [
        _truth(case, _one_head(inputs, b, h), mode)
        for b in range(case.batch)
        for h in range(case.heads)
    ]
    grid = (case.batch, case.heads)
    return tuple(
        torch.cat(results).unflatten(0, grid).squeeze(2) for results in zip(*heads, strict=True)
    )


def yardsticks(case: ImageAttentionCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of the eager formula, one for each result of a call: the worst over eight seeds.

    One head for each seed: heads differ no more than seeds do.
    """
    eager = eager_image_attention(case)
    errors = []
    for seed in SEEDS:
        inputs = _one_head(make_inputs(case, dtype, mode, seed), 0, 0)
        results = make_call(eager, inputs, mode)()
        truths = _truth(case, inputs, mode)
        errors.append([relative_error(*pair) for pair in zip(results, truths, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


def _one_head(inputs: Inputs, b: int, h: int) -> Inputs:
    """The inputs of one head of one batch element, as leaves of their own."""
    return _map(inputs, lambda x: x.detach()[b : b + 1, h : h + 1])


def _truth(case: ImageAttentionCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """Image after image: the reference would hold the scores of every image for every token."""
    plan = image_plan(case, 1, inputs.query.device)
    scale = 1 / math.sqrt(case.head_dim)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        outs = []
        for image in range(case.images):
            begin, _, end = plan.segments[0, image].tolist()
            tokens = plan.order[0, begin:end].long()
            one = VF.cross_attention_plan(plan.image_index.new_ones(1, len(tokens)), 1)
            latents = (x[:, :, image : image + 1] for x in (key, value))
            outs.append(cross_attention(query[:, :, tokens], *latents, *one, scale)[0])
        return torch.cat(outs, 2)  # every token sees an image, and images are in order

    results = make_call(attention, _map(inputs, lambda x: x.detach().double()), mode)()
    return tuple(result.detach() for result in results)


def _map(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Applies `function` to every tensor; those that require a gradient still do."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    return Inputs(*(function(x).requires_grad_(x.requires_grad) for x in tensors))


def work(case: ImageAttentionCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without.

    With P = B * H * T * L pairs of a token and a latent of its image, forward is two products,
    4 P D; backward is five; each takes P exponentials. Forward reads query, key and value and
    writes the output, and the float32 logsumexp if there is a backward to come; backward reads all
    these and the output's gradient, and writes three gradients.
    """
    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[mode]
    pairs = case.batch * case.heads * case.tokens * case.latents
    width = case.batch * case.heads * case.head_dim * dtype.itemsize
    logsumexp = case.batch * case.heads * case.tokens * torch.float32.itemsize
    inputs = (case.tokens + 2 * case.images * case.latents) * width
    forward = inputs + case.tokens * width
    backward = inputs + 2 * case.tokens * width + logsumexp + inputs
    least_bytes = {
        "fwd": forward,
        "bwd": backward,
        "fwd+bwd": forward + logsumexp + backward,
    }[mode]
    passes = {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[mode]
    return Work(products * 2 * pairs * case.head_dim, least_bytes, passes * pairs)
