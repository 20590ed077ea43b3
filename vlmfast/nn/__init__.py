"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.flash_attention import MultiheadAttention
from vlmfast.nn.window_attention import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = ["MultiheadAttention", "ShiftedWindowAttention", "ShiftedWindowAttentionV2"]
