"""Who else computes masked per-image cross-attention."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlmfast.functional as VF
from bench.common import Attention
from bench.contestant import GPU, OURS, Contestant, compiled, forced, half_only, never
from bench.cross_attention.cases import ImageAttentionCase


def media_locations(
    batch: int, tokens: int, images: int, device: torch.device | str = "cpu"
) -> Tensor:
    """(B, T) bool: where the images of a text stand, at equal distances, the first at its start."""
    media = torch.zeros(batch, tokens, dtype=torch.bool, device=device)
    media[:, [image * tokens // images for image in range(images)]] = True
    return media


def image_plan(
    case: ImageAttentionCase, batch: int | None = None, device: torch.device | str = "cpu"
) -> VF.CrossAttentionPlan:
    """Which image each token of a case sees; `batch` in place of its own."""
    media = media_locations(batch or case.batch, case.tokens, case.images, device)
    return VF.cross_attention_plan(VF.image_index(media), case.images)


def _image_mask(case: ImageAttentionCase, device: torch.device) -> Tensor:
    """(1, 1, T, I * L) bool: which latents each token sees."""
    phi = image_plan(case, 1, device).image_index
    images = torch.arange(1, case.images + 1, device=device).repeat_interleave(case.latents)
    return (phi[..., None] == images)[:, None]


def _ours(case: ImageAttentionCase) -> Attention:
    plan = functools.cache(lambda device: image_plan(case, device=device))
    return lambda q, k, v: VF.image_cross_attention(q, k, v, plan(q.device))


def _sdpa(case: ImageAttentionCase) -> Attention:
    mask = functools.cache(functools.partial(_image_mask, case))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return F.scaled_dot_product_attention(query, key, value, mask(query.device))

    return attention


def eager_attention(case: ImageAttentionCase) -> Attention:
    """flamingo-pytorch's formula: every score, those of other images at the lowest float."""
    scale = 1 / math.sqrt(case.head_dim)
    hidden = functools.cache(lambda device: ~_image_mask(case, device))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.flatten(2, 3).transpose(-2, -1)
        scores = scores.masked_fill(hidden(query.device), -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return scores.softmax(dim=-1) @ value.flatten(2, 3)

    return attention


def _flex(case: ImageAttentionCase) -> Attention:
    attend = torch.compile(flex_attention, fullgraph=True)

    @functools.cache
    def mask(device: torch.device) -> BlockMask:
        phi = image_plan(case, 1, device).image_index[0]

        def visible(b: Tensor, h: Tensor, token: Tensor, latent: Tensor) -> Tensor:
            return phi[token] == 1 + latent // case.latents

        sizes = (None, None, case.tokens, case.images * case.latents)
        return create_block_mask(visible, *sizes, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return attend(query, key, value, block_mask=mask(query.device))

    return attention


CONTESTANTS = (
    Contestant(OURS, never, _ours),
    Contestant("torch SDPA, bool mask", never, _sdpa),
    Contestant("flamingo-pytorch's steps", never, eager_attention),
    Contestant("SDPA efficient", never, forced(_sdpa, SDPBackend.EFFICIENT_ATTENTION), GPU),
    Contestant("SDPA cuDNN", half_only, forced(_sdpa, SDPBackend.CUDNN_ATTENTION), GPU),
    Contestant("torch.compile", never, compiled(eager_attention), compiles=True),
    Contestant("FlexAttention", never, _flex, compiles=True),
)
