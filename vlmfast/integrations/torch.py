"""torch.nn: MultiheadAttention, and TransformerEncoderLayer, which would bypass it in inference."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

import vlmfast.nn as vnn
from vlmfast.integrations.rules import leave_alone, swap_class

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


def _is_subclass(original: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: (
        isinstance(module, original)
        and type(module) is not original
        and not isinstance(module, vnn.MultiheadAttention)
    )


_WHY_SUBCLASS = "a subclass may compute something else"

RULES = (
    swap_class(FAMILY, nn.MultiheadAttention, vnn.MultiheadAttention),
    swap_class(FAMILY, nn.TransformerEncoderLayer, TransformerEncoderLayer),
    leave_alone(FAMILY, _is_subclass(nn.MultiheadAttention), _WHY_SUBCLASS),
    leave_alone(FAMILY, _is_subclass(nn.TransformerEncoderLayer), _WHY_SUBCLASS),
)
