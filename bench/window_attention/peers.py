"""Who else computes shifted-window attention."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

import vlmfast.functional as VF
from bench.contestant import GPU, OURS, Contestant, compiled, forced, half_only, needs, never
from bench.window_attention.cases import WindowCase
from vlmfast._torchvision_ops import import_torchvision

# qkv (B, H, W, 3C), bias (heads, M, M), logit_scale (heads,) or None
WindowAttention = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _ours(case: WindowCase) -> WindowAttention:
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


def torchvision_steps(case: WindowCase, with_sdpa: bool = False) -> WindowAttention:
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


def _steps_with_sdpa(case: WindowCase) -> WindowAttention:
    return torchvision_steps(case, with_sdpa=True)


def _uneven(case: WindowCase, dtype: torch.dtype) -> str | None:
    if case.size % case.window:
        return "shifts before it pads, ours here after"
    return None


def _timm_steps(case: WindowCase) -> WindowAttention:
    """The steps of timm's blocks, with its own functions that cut and join windows."""
    import_torchvision()
    from timm.models.swin_transformer import window_partition, window_reverse

    window = (case.window, case.window)
    region_mask = functools.cache(functools.partial(_region_mask, case))

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        mask = region_mask(qkv.device)
        mask = None if mask is None else mask.to(qkv.dtype)
        if case.shift:
            qkv = qkv.roll((-case.shift, -case.shift), (1, 2))
        windows = window_partition(qkv, window).flatten(1, 2)
        windows = windows.unflatten(-1, (3, case.heads, case.head_dim))
        query, key, value = windows.permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            logits = (query * case.head_dim**-0.5) @ key.transpose(-2, -1)
        else:
            cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
            logits = cosines * logit_scale[:, None, None]
        logits = logits + bias
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        out = out.unflatten(1, window)
        out = window_reverse(out, window, case.size, case.size)
        return out.roll((case.shift, case.shift), (1, 2)) if case.shift else out

    return attention


CONTESTANTS = (
    Contestant(OURS, never, _ours),
    Contestant("torchvision's steps", never, torchvision_steps),
    Contestant("steps with SDPA", never, _steps_with_sdpa),
    Contestant("timm's steps", needs("timm", _uneven), _timm_steps),
    Contestant(
        "steps, SDPA efficient",
        never,
        forced(_steps_with_sdpa, SDPBackend.EFFICIENT_ATTENTION),
        GPU,
    ),
    Contestant(
        "steps, SDPA cuDNN", half_only, forced(_steps_with_sdpa, SDPBackend.CUDNN_ATTENTION), GPU
    ),
    Contestant("torch.compile", never, compiled(torchvision_steps), compiles=True),
)

REMARK = (
    "every contestant begins at the projected qkv, whose 3C channels the libraries' steps then "
    "shift and cut; the libraries themselves do that before they project, on C channels: for a "
    "whole layer see layers"
)
