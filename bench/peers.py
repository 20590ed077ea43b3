"""Who races, by family: our own call and what it replaces. Each says what it cannot run and why."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmfast.functional as VF
from bench.cases import AttentionCase, ImageAttentionCase

OURS = "vlmfast"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute a family's operation.

    Attributes:
        name: how tables call it.
        refusal: (case, dtype) -> why it cannot run that, or None.
        prepare: case -> the call to be timed. What a model would build once and keep, such as a
            causal mask, is built here and not timed.
    """

    name: str
    refusal: Callable[[AttentionCase, torch.dtype], str | None]
    prepare: Callable[[AttentionCase], Attention]


def _never(case: AttentionCase, dtype: torch.dtype) -> str | None:
    return None


def _ours(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return VF.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def _sdpa(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def eager_attention(case: AttentionCase) -> Attention:
    """softmax(scale q k^T + mask) v with the scores in memory, each step torch's own."""
    scale = 1 / math.sqrt(case.head_dim)
    hidden = torch.ones(case.query_length, case.key_length, dtype=torch.bool).triu(1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1)
        if case.is_causal:
            scores = scores.masked_fill(hidden, -math.inf)
        return scores.softmax(dim=-1) @ value

    return attention


def _eager_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    # Scores, probabilities and the gradients of both are alive at once in backward.
    matrices = 4 * case.batch * case.heads * case.query_length * case.key_length * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"four score matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


FLASH_ATTENTION = Contestant(OURS, _never, _ours)
SDPA = Contestant("torch SDPA", _never, _sdpa)
EAGER = Contestant("eager", _eager_refusal, eager_attention)


def image_plan(case: ImageAttentionCase, batch: int | None = None) -> VF.CrossAttentionPlan:
    """Of a text with its images at equal distances, the first at its start."""
    media = torch.zeros(batch or case.batch, case.tokens, dtype=torch.bool)
    media[:, [image * case.tokens // case.images for image in range(case.images)]] = True
    return VF.cross_attention_plan(VF.image_index(media), case.images)


def _image_mask(case: ImageAttentionCase) -> Tensor:
    """(1, 1, T, I * L) bool: which latents each token sees."""
    phi = image_plan(case, batch=1).image_index
    images = torch.arange(1, case.images + 1).repeat_interleave(case.latents)
    return (phi[..., None] == images)[:, None]


def _our_image_attention(case: ImageAttentionCase) -> Attention:
    plan = image_plan(case)
    return lambda query, key, value: VF.image_cross_attention(query, key, value, plan)


def _sdpa_image_attention(case: ImageAttentionCase) -> Attention:
    mask = _image_mask(case)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return F.scaled_dot_product_attention(query, key, value, mask)

    return attention


def eager_image_attention(case: ImageAttentionCase) -> Attention:
    """flamingo-pytorch's formula: every score, those of other images at the lowest float."""
    scale, hidden = 1 / math.sqrt(case.head_dim), ~_image_mask(case)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.flatten(2, 3).transpose(-2, -1)
        scores = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return scores.softmax(dim=-1) @ value.flatten(2, 3)

    return attention


CROSS_ATTENTION = Contestant(OURS, _never, _our_image_attention)
IMAGE_SDPA = Contestant("torch SDPA, bool mask", _never, _sdpa_image_attention)
IMAGE_EAGER = Contestant("flamingo-pytorch", _never, eager_image_attention)

CONTESTANTS = {
    "flash_attention": (FLASH_ATTENTION, SDPA, EAGER),
    "cross_attention": (CROSS_ATTENTION, IMAGE_SDPA, IMAGE_EAGER),
}
"""By family; the first one is ours."""
