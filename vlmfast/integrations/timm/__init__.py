"""timm: the attention of its vision transformers, and the blocks of its Swin transformers."""

from vlmfast.integrations.timm import attention, swin
from vlmfast.integrations.timm.attention import Attention
from vlmfast.integrations.timm.swin import (
    SwinTransformerBlock,
    SwinTransformerV2Block,
    SwinTransformerV2CrBlock,
)

__all__ = [
    "RULES",
    "Attention",
    "SwinTransformerBlock",
    "SwinTransformerV2Block",
    "SwinTransformerV2CrBlock",
]

# The rules of `attention` come last: they know every attention layer that the others do not take.
RULES = (*swin.RULES, *attention.RULES)
