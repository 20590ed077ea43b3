"""Who races, by family: our own call and what it replaces. Each says what it cannot run and why."""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlmfast.functional as VF
from bench.cases import AttentionCase, ImageAttentionCase, LossCase, WindowCase

OURS = "vlmfast"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image, text, scale


@dataclass(frozen=True)
class Contestant:
    """One way to compute a family's operation.

    Attributes:
        name: how tables call it.
        refusal: (case, dtype) -> why it cannot run that, or None.
        prepare: case -> the call to be timed. What a model would build once and keep, such as a
            causal mask, is built here and not timed.
        devices: where it races.
    """

    name: str
    refusal: Callable[[Any, torch.dtype], str | None]
    prepare: Callable[[Any], Callable[..., Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")


def _never(case: AttentionCase | LossCase, dtype: torch.dtype) -> str | None:
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

    @functools.cache
    def hidden(device: torch.device) -> Tensor:
        sizes = (case.query_length, case.key_length)
        return torch.ones(sizes, dtype=torch.bool, device=device).triu(1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1)
        if case.is_causal:
            scores = scores.masked_fill(hidden(query.device), -math.inf)
        return scores.softmax(dim=-1) @ value

    return attention


def _eager_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    # Scores, probabilities and the gradients of both are alive at once in backward.
    matrices = 4 * case.batch * case.heads * case.query_length * case.key_length * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"four score matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _forced_sdpa(backend: SDPBackend) -> Callable[[AttentionCase], Attention]:
    def prepare(case: AttentionCase) -> Attention:
        attention = _sdpa(case)

        def forced(*sources: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(*sources)

        return forced

    return prepare


def _half_only(case: AttentionCase, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"does not take {dtype}"


def _compiled(case: AttentionCase) -> Attention:
    return torch.compile(eager_attention(case), fullgraph=True)


def _flex(case: AttentionCase) -> Attention:
    compiled = torch.compile(flex_attention, fullgraph=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    @functools.cache
    def mask(device: torch.device) -> BlockMask:
        sizes = (None, None, case.query_length, case.key_length)
        return create_block_mask(visible, *sizes, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not case.is_causal:
            return compiled(query, key, value)
        return compiled(query, key, value, block_mask=mask(query.device))

    return attention


def _xformers_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "not installed"
    return _half_only(case, dtype)


def _xformers(case: AttentionCase) -> Attention:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if case.is_causal else None

    def attention(*sources: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in sources)
        return memory_efficient_attention(query, key, value, bias).transpose(1, 2)

    return attention


FLASH_ATTENTION = Contestant(OURS, _never, _ours)
SDPA = Contestant("torch SDPA", _never, _sdpa)
EAGER = Contestant("eager", _eager_refusal, eager_attention)


def image_plan(
    case: ImageAttentionCase, batch: int | None = None, device: torch.device | str = "cpu"
) -> VF.CrossAttentionPlan:
    """Of a text with its images at equal distances, the first at its start."""
    media = torch.zeros(batch or case.batch, case.tokens, dtype=torch.bool, device=device)
    media[:, [image * case.tokens // case.images for image in range(case.images)]] = True
    return VF.cross_attention_plan(VF.image_index(media), case.images)


def _image_mask(case: ImageAttentionCase, device: torch.device) -> Tensor:
    """(1, 1, T, I * L) bool: which latents each token sees."""
    phi = image_plan(case, 1, device).image_index
    images = torch.arange(1, case.images + 1, device=device).repeat_interleave(case.latents)
    return (phi[..., None] == images)[:, None]


def _our_image_attention(case: ImageAttentionCase) -> Attention:
    plan = functools.cache(lambda device: image_plan(case, device=device))
    return lambda q, k, v: VF.image_cross_attention(q, k, v, plan(q.device))


def _sdpa_image_attention(case: ImageAttentionCase) -> Attention:
    mask = functools.cache(functools.partial(_image_mask, case))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return F.scaled_dot_product_attention(query, key, value, mask(query.device))

    return attention


def eager_image_attention(case: ImageAttentionCase) -> Attention:
    """flamingo-pytorch's formula: every score, those of other images at the lowest float."""
    scale = 1 / math.sqrt(case.head_dim)
    hidden = functools.cache(lambda device: ~_image_mask(case, device))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.flatten(2, 3).transpose(-2, -1)
        scores = scores.masked_fill(hidden(query.device), -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return scores.softmax(dim=-1) @ value.flatten(2, 3)

    return attention


CROSS_ATTENTION = Contestant(OURS, _never, _our_image_attention)
IMAGE_SDPA = Contestant("torch SDPA, bool mask", _never, _sdpa_image_attention)
IMAGE_EAGER = Contestant("flamingo-pytorch", _never, eager_image_attention)

# qkv (B, H, W, 3C), bias (heads, M, M), logit_scale (heads,) or None
WindowAttention = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _our_windows(case: WindowCase) -> WindowAttention:
    window, shift = (case.window, case.window), (case.shift, case.shift)

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        return VF.shifted_window_attention(
            qkv, case.heads, window, shift, bias, logit_scale=logit_scale
        )

    return attention


def _region_mask(case: WindowCase, device: torch.device) -> Tensor | None:
    """(windows of a map, M, M): what a shifted layer adds to its logits."""
    if not case.shift:
        return None
    padded = -(-case.size // case.window) * case.window
    regions = torch.zeros(1, padded, padded, 1, device=device)
    regions[:, -case.shift :] += 2
    regions[:, :, -case.shift :] += 1
    regions = _cut(regions, case.window).squeeze(-1)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)


def _cut(tokens: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B * windows, M, C)."""
    batch, height, width, channels = tokens.shape
    grid = tokens.view(batch, height // window, window, width // window, window, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def _join(windows: Tensor, batch: int, size: int, window: int) -> Tensor:
    """(B * windows, M, C) to (B, size, size, C)."""
    grid = windows.view(batch, size // window, size // window, window, window, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, size, size, -1)


def window_sequence(case: WindowCase, with_sdpa: bool = False) -> WindowAttention:
    """torchvision's steps: pad, roll, cut, attend, join, roll back, crop.

    They begin at the output of the projection, as ours does, and so roll and cut its 3C channels.
    The libraries do that before they project, to C channels.
    """
    padding = -case.size % case.window
    region_mask = functools.cache(functools.partial(_region_mask, case))

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        batch = qkv.shape[0]
        mask = region_mask(qkv.device)
        mask = None if mask is None else mask.to(qkv.dtype)
        if padding:
            qkv = F.pad(qkv, (0, 0, 0, padding, 0, padding))
        if case.shift:
            qkv = qkv.roll((-case.shift, -case.shift), (1, 2))
        windows = _cut(qkv, case.window).unflatten(-1, (3, case.heads, case.head_dim))
        query, key, value = windows.permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            query = query * case.head_dim**-0.5
        else:
            query = F.normalize(query, dim=-1) * logit_scale[:, None, None]
            key = F.normalize(key, dim=-1)
        if with_sdpa:
            added = bias[None]
            if mask is not None:
                added = (added + mask[:, None]).repeat(batch, 1, 1, 1)
            out = F.scaled_dot_product_attention(query, key, value, added, scale=1.0)
        else:
            logits = query @ key.transpose(-2, -1) + bias
            if mask is not None:
                logits = logits.unflatten(0, (batch, -1)) + mask[:, None]
                logits = logits.flatten(0, 1)
            out = logits.softmax(-1) @ value
        out = _join(out.transpose(1, 2).flatten(2), batch, case.size + padding, case.window)
        if case.shift:
            out = out.roll((case.shift, case.shift), (1, 2))
        return out[:, : case.size, : case.size].contiguous() if padding else out

    return attention


def _window_sdpa(case: WindowCase) -> WindowAttention:
    return window_sequence(case, with_sdpa=True)


WINDOW_ATTENTION = Contestant(OURS, _never, _our_windows)
WINDOW_SEQUENCE = Contestant("torchvision's steps", _never, window_sequence)
WINDOW_SDPA = Contestant("steps with SDPA", _never, _window_sdpa)


def _our_loss(case: LossCase) -> Loss:
    if case.loss == "siglip":
        return lambda image, text, scale: VF.siglip_loss(image, text, scale, -10.0)
    return VF.clip_loss


def dense_loss(case: LossCase) -> Loss:
    """The loss by one matrix of logits, each step torch's own."""

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        labels = torch.arange(case.pairs, device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T - 10.0
        signs = 2 * torch.eye(case.pairs, dtype=logits.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * logits).sum() / case.pairs

    return siglip if case.loss == "siglip" else clip


def _logits_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    # Logits, softmaxes along rows and columns and their gradients are alive at once in backward.
    matrices = 5 * case.pairs**2 * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"five N x N matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _open_clip_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("open_clip") is None:
        return "not installed"
    return _logits_refusal(case, dtype)


def _open_clip(case: LossCase) -> Loss:
    from vlmfast._torchvision_ops import import_torchvision

    import_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "siglip":
        module = SigLipLoss()
        return lambda image, text, scale: module(image, text, scale, -10.0)
    return ClipLoss()


_GPU = ("cuda",)

CONTESTANTS: dict[str, Sequence[Contestant]] = {
    "flash_attention": (
        FLASH_ATTENTION,
        SDPA,
        EAGER,
        Contestant("SDPA flash", _half_only, _forced_sdpa(SDPBackend.FLASH_ATTENTION), _GPU),
        Contestant("SDPA efficient", _never, _forced_sdpa(SDPBackend.EFFICIENT_ATTENTION), _GPU),
        Contestant("SDPA cuDNN", _half_only, _forced_sdpa(SDPBackend.CUDNN_ATTENTION), _GPU),
        Contestant("torch.compile", _eager_refusal, _compiled, _GPU),
        Contestant("FlexAttention", _never, _flex, _GPU),
        Contestant("xformers", _xformers_refusal, _xformers, _GPU),
    ),
    "window_attention": (WINDOW_ATTENTION, WINDOW_SEQUENCE, WINDOW_SDPA),
    "cross_attention": (CROSS_ATTENTION, IMAGE_SDPA, IMAGE_EAGER),
    "contrastive_loss": (
        Contestant(OURS, _never, _our_loss),
        Contestant("dense", _logits_refusal, dense_loss),
        Contestant("open_clip", _open_clip_refusal, _open_clip),
    ),
}
"""By family; the first one is ours. What must be compiled first races on GPUs alone."""
