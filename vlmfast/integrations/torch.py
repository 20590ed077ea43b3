"""torch.nn: MultiheadAttention, and TransformerEncoderLayer, which would bypass it in inference."""

from __future__ import annotations

from torch import Tensor, nn

import vlmfast.nn as vnn
from vlmfast.integrations.rules import code_names, swap_class

__all__ = ["RULES", "TransformerEncoderLayer"]

FAMILY = "flash_attention"


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` without its fused inference path.

    In inference the original hands its weights to one C++ function and never calls `self_attn`.
    This one always calls it, and so runs whatever attention layer stands there. Sequences packed
    into a nested tensor, as `torch.nn.TransformerEncoder` passes on for padded batches, stay so.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(x + self._ff_block(x))


def _goes_past_attention(parent: nn.Module) -> bool:
    """Whether `parent` has the fused inference path, which wants batch_first.

    A subclass whose forward is its own, and does not ask super(), has it not.
    """
    return (
        isinstance(parent, nn.TransformerEncoderLayer)
        and getattr(getattr(parent, "self_attn", None), "batch_first", False)
        and not code_names(type(parent).forward).isdisjoint(
            ("_transformer_encoder_layer_fwd", "super")
        )
    )


RULES = (
    swap_class(
        FAMILY,
        nn.MultiheadAttention,
        vnn.MultiheadAttention,
        bypassed_by=_goes_past_attention,
    ),
    swap_class(FAMILY, nn.TransformerEncoderLayer, TransformerEncoderLayer),
)
