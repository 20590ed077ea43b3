"""The blocks of timm's Swin transformers.

They roll, pad and cut the map, and hand windows to their attention. All of this is one kernel here,
so that the block is what is replaced. Its attention stays where it is, and holds the parameters,
but is not called.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.integrations.rules import leave_alone, swap_class
from vlmfast.integrations.timm.attention import attention_dropout
from vlmfast.parts.window_attention import (
    bias_from_table,
    clamped_logit_scale,
    continuous_bias_table,
    kept_table,
    padding_value,
    relative_position_index,
)

__all__ = [
    "RULES",
    "SwinTransformerBlock",
    "SwinTransformerV2Block",
    "SwinTransformerV2CrBlock",
]

FAMILY = "window_attention"


class SwinTransformerBlock(swin_transformer.SwinTransformerBlock):
    """timm's Swin block on vlmfast's kernels, whether or not `fused_attn` is set."""

    backend: str | None = None

    def _attn(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        bias = bias_from_table(attn.relative_position_bias_table, attn.relative_position_index)
        padding = padding_value(attn.qkv, x)
        return _attend_windows(self, attn.qkv(x), padding, bias, scale=attn.scale)


class SwinTransformerV2Block(swin_transformer_v2.SwinTransformerV2Block):
    """timm's Swin V2 block on vlmfast's kernels."""

    backend: str | None = None

    def _attn(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        if attn.q_bias is None:
            qkv, padding = attn.qkv(x), padding_value(attn.qkv, x)
        else:
            padding = bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
            if attn.qkv_bias_separate:
                qkv, padding = attn.qkv(x) + bias, padding_value(attn.qkv, x)
                padding = bias if padding is None else padding + bias
            else:
                qkv = F.linear(x, attn.qkv.weight, bias)
        table = continuous_bias_table(attn.cpb_mlp, attn.relative_coords_table)
        bias = bias_from_table(table, attn.relative_position_index)
        logit_scale = clamped_logit_scale(attn.logit_scale)
        return _attend_windows(self, qkv, padding, bias, logit_scale=logit_scale)


class SwinTransformerV2CrBlock(swin_transformer_v2_cr.SwinTransformerV2CrBlock):
    """timm's Swin V2 block after Christoph Reich on vlmfast's kernels."""

    backend: str | None = None

    def _shifted_window_attn(self, x: Tensor) -> Tensor:
        attn: Any = self.attn
        return _attend_windows(
            self,
            attn.qkv(x),
            padding_value(attn.qkv, x),
            _bias_by_pairs(attn) if _drops_pairs(attn.meta_mlp) else _bias_by_offsets(attn),
            logit_scale=clamped_logit_scale(attn.logit_scale),
        )


def _attend_windows(
    block: Any, qkv: Tensor, pad_value: Tensor | None, bias: Tensor, **logits: Any
) -> Tensor:
    """From the projected map (B, H, W, 3C) to what the block adds to its input, (B, H, W, C)."""
    attn = block.attn
    out = VF.shifted_window_attention(
        qkv,
        attn.num_heads,
        block.window_size,
        block.shift_size,
        bias,
        pad_value=pad_value,
        wrap="unpadded",
        dropout_p=attention_dropout(attn),
        backend=block.backend,
        **logits,
    )
    return attn.proj_drop(attn.proj(out))


def _drops_pairs(network: nn.Module) -> bool:
    """Whether the bias of equal offsets may differ: each pair of tokens has a dropout of its own.

    Of a network that is not timm's own nothing is known.
    """
    return type(network) is not Mlp or any(
        isinstance(layer, nn.Dropout) and layer.training and layer.p > 0
        for layer in network.modules()
    )


def _bias_by_pairs(attn: Any) -> Tensor:
    """The bias (heads, M, M) by one run of the network for each pair of tokens, as timm has it."""
    return attn._relative_positional_encodings()[0]


def _bias_by_offsets(attn: Any) -> Tensor:
    """The bias (heads, M, M) by one run of the network for each offset between two tokens."""
    network, every_pair = attn.meta_mlp, attn.relative_coordinates_log
    rows, columns = (
        torch.arange(1 - size, size, device=every_pair.device) for size in attn.window_size
    )
    width = attn.window_size[1]
    # A query and a key that are this far apart, as numbers of tokens
    query = (rows.clamp(min=0) * width)[:, None] + columns.clamp(min=0)
    key = ((-rows).clamp(min=0) * width)[:, None] + (-columns).clamp(min=0)
    pairs = query * (attn.window_size[0] * width) + key
    coordinates = every_pair[pairs.flatten()]
    table = kept_table(network, coordinates, lambda: network(coordinates), container=Mlp)
    index = relative_position_index(attn.window_size, every_pair.device)
    return bias_from_table(table, index)


def _swap_block(original: Any, replacement: type[nn.Module], attention: type[nn.Module]) -> Any:
    covers = {"attn": attention, "attn.attn_drop": nn.Dropout}
    if original is not swin_transformer_v2_cr.SwinTransformerV2CrBlock:
        covers["attn.softmax"] = nn.Softmax
    return swap_class(FAMILY, original, replacement, covers=covers)


_BLOCK_ATTENTION = (
    swin_transformer.WindowAttention,
    swin_transformer_v2.WindowAttention,
    swin_transformer_v2_cr.WindowMultiHeadAttention,
)

RULES = (
    *map(
        _swap_block,
        (
            swin_transformer.SwinTransformerBlock,
            swin_transformer_v2.SwinTransformerV2Block,
            swin_transformer_v2_cr.SwinTransformerV2CrBlock,
        ),
        (SwinTransformerBlock, SwinTransformerV2Block, SwinTransformerV2CrBlock),
        _BLOCK_ATTENTION,
    ),
    leave_alone(
        FAMILY,
        lambda module: isinstance(module, _BLOCK_ATTENTION),
        "replaced together with timm's block around it, or not at all",
    ),
)
