"""torchvision: the attention of its Swin and Swin V2.

Its ViT holds torch.nn.MultiheadAttention, which the rules of torch replace.
"""

from __future__ import annotations

from torchvision.models import swin_transformer
from torchvision.models.video.swin_transformer import ShiftedWindowAttention3d

import vlmfast.nn as vnn
from vlmfast.integrations.rules import leave_alone, leave_other_attention, swap_class

__all__ = ["RULES", "ShiftedWindowAttention", "ShiftedWindowAttentionV2"]

FAMILY = "window_attention"


class ShiftedWindowAttention(vnn.ShiftedWindowAttention, swin_transformer.ShiftedWindowAttention):
    """`vnn.ShiftedWindowAttention` that still is torchvision's."""


class ShiftedWindowAttentionV2(
    vnn.ShiftedWindowAttentionV2, swin_transformer.ShiftedWindowAttentionV2
):
    """`vnn.ShiftedWindowAttentionV2` that still is torchvision's."""


RULES = (
    swap_class(FAMILY, swin_transformer.ShiftedWindowAttentionV2, ShiftedWindowAttentionV2),
    swap_class(FAMILY, swin_transformer.ShiftedWindowAttention, ShiftedWindowAttention),
    leave_alone(
        FAMILY,
        lambda module: isinstance(module, ShiftedWindowAttention3d),
        "no replacement for windows of three dimensions",
    ),
    leave_other_attention("torchvision"),
)
