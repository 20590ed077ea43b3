"""Drop-in modules on fused kernels: same constructor arguments, state-dict keys and numbers."""

from vlmfast.nn.flash_attention import MultiheadAttention

__all__ = ["MultiheadAttention"]
