"""transformers: a file for each kind of layer that `patch` replaces."""

from vlmfast.integrations.transformers import attention, cross_attention, losses, swin
from vlmfast.integrations.transformers.attention import BlipTextSelfAttention, attention_forward
from vlmfast.integrations.transformers.common import NAME
from vlmfast.integrations.transformers.cross_attention import (
    IdeficsAttention,
    IdeficsPerceiverAttention,
    MllamaTextCrossAttention,
)
from vlmfast.integrations.transformers.losses import CLIPModel, SiglipModel
from vlmfast.integrations.transformers.swin import Swin2SRLayer, SwinLayer, Swinv2Layer

__all__ = [
    "NAME",
    "RULES",
    "BlipTextSelfAttention",
    "CLIPModel",
    "IdeficsAttention",
    "IdeficsPerceiverAttention",
    "MllamaTextCrossAttention",
    "SiglipModel",
    "Swin2SRLayer",
    "SwinLayer",
    "Swinv2Layer",
    "attention_forward",
]

# The rules of `attention` come last: they take every attention layer that the others have not.
RULES = (*swin.RULES, *cross_attention.RULES, *losses.RULES, *attention.RULES)
