"""Shifted-window attention in plain PyTorch: what every window_attention kernel must compute."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.reference.common import compute_dtype, dropout_keep_mask


def _pad(tokens: Tensor, height: int, width: int, pad_value: Tensor | None) -> Tensor:
    """(B, H, W, C) to (B, height, width, C): new rows below and columns at the right."""
    bottom, right = height - tokens.shape[1], width - tokens.shape[2]
    padded = F.pad(tokens, (0, 0, 0, right, 0, bottom))
    if pad_value is None:
        return padded
    rows, columns = (torch.arange(size, device=tokens.device) for size in (height, width))
    is_token = (rows < tokens.shape[1])[:, None] & (columns < tokens.shape[2])
    return torch.where(is_token[:, :, None], padded, pad_value)


def _partition(tokens: Tensor, window_height: int, window_width: int, num_heads: int) -> Tensor:
    """(B, H, W, C) to (B, windows, heads, M, D)."""
    batch, height, width, channels = tokens.shape
    grid = (height // window_height, width // window_width)
    parts = tokens.reshape(
        batch, grid[0], window_height, grid[1], window_width, num_heads, channels // num_heads
    )
    return parts.permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5).flatten(1, 2)


def _reverse(windows: Tensor, height: int, width: int, window_height: int, window_width: int):
    """(B, windows, heads, M, D) to (B, height, width, C)."""
    batch, _, heads, _, dim = windows.shape
    grid = (height // window_height, width // window_width)
    parts = windows.reshape(batch, *grid, heads, window_height, window_width, dim)
    return parts.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, height, width, heads * dim)


def _regions(height: int, width: int, shift: tuple[int, int], device: torch.device) -> Tensor:
    """(height, width): which part of the unshifted map a place of the shifted one comes from."""
    rows, columns = (torch.arange(size, device=device) for size in (height, width))
    # rows >= height is never true: without a shift nothing wraps
    return 2 * (rows >= height - shift[0])[:, None] + (columns >= width - shift[1])


def window_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    num_heads: int,
    window_height: int,
    window_width: int,
    shift_height: int = 0,
    shift_width: int = 0,
    wrap_padded: bool = True,
    scale: float = 1.0,
    mask_value: float = -100.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention within the windows of a cyclically shifted map.

    The map is padded below and at the right to whole windows, rolled by minus the shift (before
    the padding where not `wrap_padded`) and cut into windows, row by row. In each window and head

        logits    = scale * query @ key^T + bias + mask
        logsumexp = log(sum_j exp(logits_j))
        out       = dropout(exp(logits - logsumexp)) @ value

    With `logit_scale`, `scale * query @ key^T` becomes logit_scale times the cosine of each query
    and key, x / max(|x|, 1e-12) being the normalised x. The mask is `mask_value` between tokens of
    different regions and 0 elsewhere: the last shift_height rows and the last shift_width columns
    of the shifted, padded map came from the other side. Padded tokens are keys like any other.
    Then windows, shift and padding are undone.

    Args:
        query: (B, H, W, C), any floating dtype; or (B, H, W, 3C), query, key and value in this
            order, where key and value are None. Each head has C // num_heads channels in a row.
        key: (B, H, W, C).
        value: (B, H, W, C).
        bias: (num_heads, M, M), M = window_height * window_width tokens in row-major order: added
            to the logit of (query, key).
        logit_scale: (num_heads,): cosine attention.
        pad_value: (3C,): query, key and value of padded tokens; zeros for None.
        num_heads: divides C.
        window_height: in tokens; it may exceed H.
        window_width: in tokens; it may exceed W.
        shift_height: below window_height.
        shift_width: below window_width.
        wrap_padded: the roll comes after the padding.
        scale: factor of the logits; unused with logit_scale.
        mask_value: added between regions; finite.
        dropout_p: probability with which a weight is dropped, after normalisation.
        dropout_seed: int64 (1,), the Philox key (see `reference.common.dropout_keep_mask`, whose
            batch is B * windows).

    Returns:
        out (B, H, W, C) in query's dtype; logsumexp (B, windows, num_heads, M), float32 or query's
        dtype if wider.

    Source: "Swin Transformer" (2021); logit_scale from "Swin Transformer V2" (2022); padding and
    regions as in torchvision (wrap_padded) and timm (not wrap_padded).
    """
    dtype, result_dtype = compute_dtype(query.dtype), query.dtype
    window, shift = (window_height, window_width), (shift_height, shift_width)
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=-1)
    batch, height, width, _ = query.shape
    padded_height = -(-height // window_height) * window_height
    padded_width = -(-width // window_width) * window_width
    pads = (None,) * 3 if pad_value is None else pad_value.to(dtype).chunk(3)

    def to_windows(tokens: Tensor, pad: Tensor | None) -> Tensor:
        tokens = tokens.to(dtype)
        back = (-shift_height, -shift_width)
        if wrap_padded:
            tokens = _pad(tokens, padded_height, padded_width, pad).roll(back, (1, 2))
        else:
            tokens = _pad(tokens.roll(back, (1, 2)), padded_height, padded_width, pad)
        return _partition(tokens, *window, num_heads)

    query, key, value = (to_windows(*x) for x in zip((query, key, value), pads, strict=True))
    if logit_scale is None:
        logits = scale * (query @ key.transpose(-2, -1))
    else:
        cosine = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        logits = logit_scale.to(dtype)[:, None, None] * cosine
    if bias is not None:
        logits = logits + bias.to(dtype)
    if shift_height or shift_width:
        regions = _regions(padded_height, padded_width, shift, query.device)
        regions = _partition(regions[None, :, :, None], *window, 1)[0, :, :, :, 0]
        is_other = regions[..., :, None] != regions[..., None, :]  # (windows, 1, M, M)
        logits = logits + mask_value * is_other.to(dtype)

    # The maximum only shifts exponents, so it carries no gradient.
    row_max = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - row_max)
    total = weights.sum(-1, keepdim=True)
    logsumexp = (total.log() + row_max).squeeze(-1)
    weights = weights / total
    if dropout_seed is not None:
        windows, tokens = weights.shape[1], weights.shape[-1]
        keep = dropout_keep_mask(
            batch * windows, num_heads, tokens, tokens, dropout_p, dropout_seed
        ).unflatten(0, (batch, windows))
        keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        weights = torch.where(keep, weights * keep_scale, 0.0)

    out = _reverse(weights @ value, padded_height, padded_width, *window)
    if wrap_padded:
        out = out.roll(shift, (1, 2))[:, :height, :width]
    else:
        out = out[:, :height, :width].roll(shift, (1, 2))
    return out.to(result_dtype).contiguous(), logsumexp
