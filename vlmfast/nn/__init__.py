"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.cross_attention import (
    GatedCrossAttentionBlock,
    MaskedCrossAttention,
    PerceiverAttention,
    PerceiverResampler,
)
from vlmfast.nn.flash_attention import MultiheadAttention
from vlmfast.nn.window_attention import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = [
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "MultiheadAttention",
    "PerceiverAttention",
    "PerceiverResampler",
    "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2",
]
