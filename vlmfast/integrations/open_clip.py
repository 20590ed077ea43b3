"""open_clip: its own `Attention` and its losses. The other towers hold torch.nn.MultiheadAttention,
timm or transformers models, which the rules of those libraries replace."""

from __future__ import annotations

import torch.nn.functional as F
from open_clip.loss import ClipLoss as OriginalClipLoss
from open_clip.loss import CoCaLoss as OriginalCoCaLoss
from open_clip.loss import SigLipLoss as OriginalSigLipLoss
from open_clip.transformer import Attention as OriginalAttention
from torch import Tensor, nn

import vlmfast.functional as VF
import vlmfast.nn as vnn
from vlmfast.integrations.rules import leave_other_attention, swap_class
from vlmfast.parts.flash_attention import is_causal_mask

__all__ = ["RULES", "Attention", "ClipLoss", "CoCaLoss", "SigLipLoss"]

FAMILY = "flash_attention"
LOSS_FAMILY = "contrastive_loss"


class Attention(OriginalAttention):
    """`open_clip.transformer.Attention` on vlmfast's kernels (all of it but `scaled_cosine`)."""

    backend: str | None = None

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        projected = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        # (N, L, 3 * heads * head_dim) -> three times (N, heads, L, head_dim), as views
        qkv = projected.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)

        is_causal = is_causal_mask(attn_mask)
        if is_causal:
            attn_mask = None
        elif attn_mask is not None:
            if attn_mask.ndim == 3:
                attn_mask = attn_mask.unflatten(0, (x.shape[0], self.num_heads))
            if not attn_mask.is_floating_point():
                # A mask here hides where it is True, one of the kernels keeps.
                attn_mask = ~attn_mask
        out = VF.scaled_dot_product_attention(
            self.ln_q(query),
            self.ln_k(key),
            value,
            attn_mask=attn_mask,
            dropout_p=self.attn_drop.p if self.training else 0.0,
            is_causal=is_causal,
            backend=self.backend,
        )
        if self.head_scale is not None:
            out = out * self.head_scale
        out = self.ln_inner(out.transpose(1, 2).flatten(2))
        return self.out_drop(self.out_proj(out))


def _refusal(module: nn.Module) -> str | None:
    if module.logit_scale is not None:
        return "scaled_cosine is not softmax(q k^T / sqrt(d)) v"
    return None


class ClipLoss(OriginalClipLoss):
    """`open_clip.loss.ClipLoss` on vlmfast's kernels."""

    backend: str | None = None
    forward = vnn.ClipLoss.forward


class CoCaLoss(OriginalCoCaLoss, ClipLoss):
    """`open_clip.loss.CoCaLoss`: its call of super() now finds vlmfast's `ClipLoss`."""


class SigLipLoss(OriginalSigLipLoss):
    """`open_clip.loss.SigLipLoss` on vlmfast's kernels."""

    backend: str | None = None
    forward = vnn.SigLipLoss.forward


def _loss_refusal(loss: nn.Module) -> str | None:
    return "ranks are those of torch.distributed, not horovod's" if loss.use_horovod else None


RULES = (
    swap_class(FAMILY, OriginalAttention, Attention, refusal=_refusal),
    swap_class(LOSS_FAMILY, OriginalCoCaLoss, CoCaLoss, refusal=_loss_refusal),
    swap_class(LOSS_FAMILY, OriginalClipLoss, ClipLoss, refusal=_loss_refusal),
    swap_class(LOSS_FAMILY, OriginalSigLipLoss, SigLipLoss),
    leave_other_attention("open_clip"),
)
