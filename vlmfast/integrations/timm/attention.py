"""The attention of timm's vision transformers."""

from __future__ import annotations

from typing import Any

from timm.layers import Attention as OriginalAttention
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.integrations.rules import leave_other_attention, swap_class, uncoverable

__all__ = ["RULES", "Attention", "attention_dropout"]

FAMILY = "flash_attention"


class Attention(OriginalAttention):
    """`timm.layers.Attention` on vlmfast's kernels, whether or not `fused_attn` is set."""

    backend: str | None = None

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        # (B, N, 3 * heads * head_dim) -> three times (B, heads, N, head_dim), as views
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        out = VF.scaled_dot_product_attention(
            self.q_norm(query),
            self.k_norm(key),
            value,
            attn_mask=attn_mask,
            dropout_p=attention_dropout(self),
            is_causal=is_causal,
            backend=self.backend,
        )
        out = self.norm(out.transpose(1, 2).flatten(2))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(out))


def attention_dropout(attn: Any) -> float:
    """The dropout of the attention weights; unless `fused_attn` is set, attn_drop is called."""
    asked = attn if getattr(attn, "fused_attn", False) else attn.attn_drop
    return attn.attn_drop.p if asked.training else 0.0


def _called_dropout(attn: Any) -> str | None:
    """Why attn_drop must go on being called, as it is unless `fused_attn` is set, or None."""
    return None if attn.fused_attn else uncoverable(attn, "attn_drop", nn.Dropout)


RULES = (
    swap_class(FAMILY, OriginalAttention, Attention, refusal=_called_dropout),
    leave_other_attention("timm"),
)
