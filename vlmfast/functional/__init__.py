"""Functions with the calls of torch, flash-attn and xformers, computed by fused kernels."""

from vlmfast.functional.flash_attention import (
    memory_efficient_attention,
    scaled_dot_product_attention,
    varlen_attention,
)

__all__ = [
    "memory_efficient_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
