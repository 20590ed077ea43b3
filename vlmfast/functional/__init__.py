"""Functions with the calls of torch, flash-attn and xformers, computed by fused kernels."""

from vlmfast.functional.cross_attention import (
    CrossAttentionPlan,
    cross_attention_plan,
    image_cross_attention,
    image_index,
)
from vlmfast.functional.flash_attention import (
    memory_efficient_attention,
    scaled_dot_product_attention,
    varlen_attention,
)

__all__ = [
    "CrossAttentionPlan",
    "cross_attention_plan",
    "image_cross_attention",
    "image_index",
    "memory_efficient_attention",
    "scaled_dot_product_attention",
    "varlen_attention",
]
