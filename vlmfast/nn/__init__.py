"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.contrastive_loss import ClipLoss, NTXentLoss, SigLipLoss
from vlmfast.nn.cross_attention import (
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    PerceiverAttention,
    PerceiverResampler,
)
from vlmfast.nn.flash_attention import MultiheadAttention
from vlmfast.nn.window_attention import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = [
    "ClipLoss",
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "MultiheadAttention",
    "NTXentLoss",
    "PerceiverAttention",
    "PerceiverResampler",
    "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2",
    "SigLipLoss",
]
