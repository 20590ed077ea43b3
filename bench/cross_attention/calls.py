"""Inputs, calls and formulas of the `cross_attention` family."""

import math
from dataclasses import replace

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench import common
from bench.common import AttentionInputs, attention_work, by_heads, head_errors
from bench.common import attention_call as make_call
from bench.cross_attention.cases import ImageAttentionCase
from bench.cross_attention.peers import eager_attention, image_plan
from bench.measure import Truth, Work
from vlmfast.reference.cross_attention import cross_attention
from vlmfast.verify.common import SEEDS

__all__ = ["chosen_backend", "make_call", "make_inputs", "reference", "work", "yardsticks"]


def make_inputs(
    case: ImageAttentionCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> AttentionInputs:
    """Inputs laid out as a model's projections leave them: key and value are slices of one.

    query is (B, H, T, D), key and value are (B, H, I, L, D).
    """
    numbers = common.normal_numbers(seed, device)

    def normal(*shape: int) -> Tensor:
        return numbers(*shape).to(dtype)

    text = (case.batch, case.tokens, case.heads, case.head_dim)
    images = (case.batch, case.images, case.latents, 2, case.heads, case.head_dim)
    query, grad_out = (normal(*text).transpose(1, 2) for _ in range(2))
    key, value = normal(*images).permute(3, 0, 4, 1, 2, 5).unbind(0)
    needs_grad = mode != "fwd"
    query, key, value = (x.detach().requires_grad_(needs_grad) for x in (query, key, value))
    return AttentionInputs(query, key, value, grad_out)


def chosen_backend(case: ImageAttentionCase, inputs: AttentionInputs) -> str:
    """The backend that our own call runs on."""
    plan = image_plan(case, device=inputs.query.device)
    return vlmfast.explain(VF.image_cross_attention, *inputs.sources, plan).backend


def reference(case: ImageAttentionCase, inputs: AttentionInputs, mode: str) -> tuple[Truth, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""
    return by_heads(inputs, lambda head: _truth(case, head, mode))


def yardsticks(
    case: ImageAttentionCase, dtype: torch.dtype, mode: str, device: str = "cpu"
) -> list[float]:
    """The errors of the eager formula, one for each result of a call: the worst over eight seeds.

    One head for each seed: heads differ no more than seeds do, nor batch elements.
    """
    case = replace(case, batch=1)
    eager = eager_attention(case)
    heads = (make_inputs(case, dtype, mode, seed, device).head(0, 0) for seed in SEEDS)
    return head_errors(heads, eager, lambda head: _truth(case, head, mode), mode)


def _truth(case: ImageAttentionCase, inputs: AttentionInputs, mode: str) -> tuple[Tensor, ...]:
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

    results = make_call(attention, inputs.double(), mode)()
    return tuple(result.detach() for result in results)


def work(case: ImageAttentionCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without: a token's pairs are the latents of its image."""
    heads = case.batch * case.heads
    pairs = heads * case.tokens * case.latents
    keys = heads * case.images * case.latents
    return attention_work(pairs, heads * case.tokens, keys, case.head_dim, dtype, mode)
