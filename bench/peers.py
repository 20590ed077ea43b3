"""Who races, by family: our own call and what it replaces. Each says what it cannot run and why."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmfast.functional as VF
from bench.cases import AttentionCase, WindowCase

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
    refusal: Callable[[Any, torch.dtype], str | None]
    prepare: Callable[[Any], Callable[..., Tensor]]


def _never(case: Any, dtype: torch.dtype) -> str | None:
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


# qkv (B, H, W, 3C), bias (heads, M, M), logit_scale (heads,) or None
WindowAttention = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _our_windows(case: WindowCase) -> WindowAttention:
    window, shift = (case.window, case.window), (case.shift, case.shift)

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        return VF.shifted_window_attention(
            qkv, case.heads, window, shift, bias, logit_scale=logit_scale
        )

    return attention


def _region_mask(case: WindowCase) -> Tensor | None:
    """(windows of a map, M, M): what a shifted layer adds to its logits."""
    if not case.shift:
        return None
    padded = -(-case.size // case.window) * case.window
    regions = torch.zeros(1, padded, padded, 1)
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
    region_mask = _region_mask(case)

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        batch = qkv.shape[0]
        mask = None if region_mask is None else region_mask.to(qkv.dtype)
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

CONTESTANTS = {
    "flash_attention": (FLASH_ATTENTION, SDPA, EAGER),
    "window_attention": (WINDOW_ATTENTION, WINDOW_SEQUENCE, WINDOW_SDPA),
}
"""By family; the first one is ours."""
