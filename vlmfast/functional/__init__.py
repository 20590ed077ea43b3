"""Functions computed by fused kernels; where a library has the same function, with its call."""

from vlmfast.functional.contrastive_loss import (
    clip_loss,
    itc_loss,
    ntxent_loss,
    siglip_loss,
)
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
from vlmfast.functional.window_attention import shifted_window_attention

__all__ = [
    "CrossAttentionPlan",
    "clip_loss",
    "cross_attention_plan",
    "image_cross_attention",
    "image_index",
    "itc_loss",
    "memory_efficient_attention",
    "ntxent_loss",
    "scaled_dot_product_attention",
    "shifted_window_attention",
    "siglip_loss",
    "varlen_attention",
]
