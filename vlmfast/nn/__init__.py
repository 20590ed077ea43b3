"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.contrastive_loss import ClipLoss, NTXentLoss, SigLipLoss
from vlmfast.nn.flash_attention import MultiheadAttention
from vlmfast.nn.window_attention import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = [
    "ClipLoss",
    "MultiheadAttention",
    "NTXentLoss",
    "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2",
    "SigLipLoss",
]
