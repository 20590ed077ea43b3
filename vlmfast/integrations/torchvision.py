"""torchvision. Its ViT holds torch.nn.MultiheadAttention, which the rules of torch replace."""

from __future__ import annotations

from functools import partial

from vlmfast.integrations.rules import computes_attention, leave_alone

__all__ = ["RULES"]

RULES = (
    leave_alone(
        "flash_attention",
        partial(computes_attention, library="torchvision"),
        "no replacement for this attention",
    ),
)
