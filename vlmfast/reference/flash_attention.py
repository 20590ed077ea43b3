"""Softmax attention in plain PyTorch: what every flash_attention kernel must compute."""

import torch
from torch import Tensor

from vlmfast.reference.common import compute_dtype, dropout_keep_mask


def _invisible_by_causality(rows: Tensor, columns: Tensor, offset: Tensor | int) -> Tensor:
    return columns[None, :] > rows[:, None] + offset


def _invisible_when_packed(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, rows: Tensor, columns: Tensor, causal: int
) -> Tensor:
    """(total_q, total_k) bool: True where a key lies outside the query's segment or its past."""
    segments = cu_seqlens_q.numel() - 1
    segment_q = torch.searchsorted(cu_seqlens_q[1:].contiguous(), rows.int(), right=True)
    segment_k = torch.searchsorted(cu_seqlens_k[1:].contiguous(), columns.int(), right=True)
    # Beyond the last segment both count as segment number `segments`; there nobody sees anything.
    outside = (segment_q[:, None] != segment_k[None, :]) | (segment_q >= segments)[:, None]
    if causal == 0 or segments == 0:
        return outside
    start_q = cu_seqlens_q.long()[segment_q.clamp(max=segments)]
    start_k = cu_seqlens_k.long()[segment_k.clamp(max=segments)]
    local_q, local_k = rows - start_q, columns - start_k
    if causal == 2:
        lengths = cu_seqlens_k.long().diff() - cu_seqlens_q.long().diff()
        local_q = local_q + lengths[segment_q.clamp(max=segments - 1)]
    return outside | (local_k[None, :] > local_q[:, None])


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    causal: int = 0,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with masks, causality, grouped heads, dropout and packed sequences.

        logits    = scale * query @ key^T + attn_mask
        logsumexp = log(sum_j exp(logits_j))
        out       = dropout(exp(logits - logsumexp)) @ value

    A row that sees no key has out 0, logsumexp -inf and gradients 0.

    Args:
        query: (B, Hq, L, D), any floating dtype.
        key: (B, Hkv, S, D); query head h reads head h // (Hq // Hkv).
        value: (B, Hkv, S, Dv).
        attn_mask: broadcastable to (B, Hq, L, S); bool (True = visible) or floating, added.
        cu_seqlens_q: int32 (segments + 1,): packed sequences. B is 1, and rows
            cu_seqlens_q[n] to cu_seqlens_q[n + 1] see keys cu_seqlens_k[n] to cu_seqlens_k[n + 1];
            rows of no segment see nothing.
        cu_seqlens_k: int32 (segments + 1,).
        max_seqlen_q: unused here; kernels size their grids by it.
        max_seqlen_k: unused here.
        causal: 0 = none; 1 = key j is visible to query i iff j <= i; 2 = iff j <= i + S - L.
            With packed sequences indices and lengths are those within the segment.
        scale: factor of the logits.
        dropout_p: probability with which a weight is dropped, after normalisation.
        dropout_seed: int64 (1,), the Philox key (see `reference.common.dropout_keep_mask`).

    Returns:
        out (B, Hq, L, Dv) in query's dtype; logsumexp (B, Hq, L), float32 or query's if wider.

    Source: "Attention Is All You Need" (2017); logsumexp and recomputation as in "FlashAttention-2"
    (2023).
    """
    batch, heads, rows, _ = query.shape
    columns = key.shape[2]
    dtype = compute_dtype(query.dtype)
    if key.shape[1] != heads:
        group = heads // key.shape[1]
        key = key.repeat_interleave(group, dim=1)
        value = value.repeat_interleave(group, dim=1)

    logits = scale * (query.to(dtype) @ key.to(dtype).transpose(-2, -1))
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attn_mask, -torch.inf)
        else:
            logits = logits + attn_mask.to(dtype)
    row_index = torch.arange(rows, device=query.device)
    column_index = torch.arange(columns, device=query.device)
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        invisible = _invisible_when_packed(
            cu_seqlens_q, cu_seqlens_k, row_index, column_index, causal
        )
        logits = logits.masked_fill(invisible, -torch.inf)
    elif causal:
        offset = columns - rows if causal == 2 else 0
        invisible = _invisible_by_causality(row_index, column_index, offset)
        logits = logits.masked_fill(invisible, -torch.inf)

    # The maximum only shifts exponents, so it carries no gradient; a row of -inf is shifted by 0.
    if columns:
        row_max = logits.detach().amax(-1, keepdim=True)
        row_max = row_max.masked_fill(row_max == -torch.inf, 0.0)
    else:
        row_max = logits.new_zeros(batch, heads, rows, 1)
    weights = torch.exp(logits - row_max)
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    logsumexp = (total.log() + row_max).masked_fill(empty, -torch.inf).squeeze(-1)
    weights = weights / total
    if dropout_seed is not None:
        keep = dropout_keep_mask(batch, heads, rows, columns, dropout_p, dropout_seed)
        keep_scale = 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
        weights = torch.where(keep, weights * keep_scale, 0.0)
    return (weights @ value.to(dtype)).to(query.dtype), logsumexp
