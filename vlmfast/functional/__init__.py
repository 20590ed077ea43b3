"""Functions with the calls of torch and its libraries, computed by fused kernels."""

from vlmfast.functional.contrastive_loss import (
    clip_loss,
    itc_loss,
    ntxent_loss,
    siglip_loss,
)
from vlmfast.functional.flash_attention import (
    memory_efficient_attention,
    scaled_dot_product_attention,
    varlen_attention,
)

__all__ = [
    "clip_loss",
    "itc_loss",
    "memory_efficient_attention",
    "ntxent_loss",
    "scaled_dot_product_attention",
    "siglip_loss",
    "varlen_attention",
]
