"""torch.nn: MultiheadAttention, and TransformerEncoderLayer, which would bypass it in inference.

And, for inference alone, Linear.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import vlmfast.nn as vnn
from vlmfast.integrations.rules import LINEAR, Rule, class_name, code_names, swap_class
from vlmfast.nn.common import Keeper, is_watched, may_be_kept

__all__ = ["RULES", "Linear", "TransformerEncoderLayer"]

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


# Beside the modules, not in them: packed tensors can be neither copied nor pickled.
_packed_weights: WeakKeyDictionary[nn.Module, Keeper[Tensor]] = WeakKeyDictionary()


class Linear(nn.Linear):
    """`torch.nn.Linear` on a weight that oneDNN has packed once, where no gradient is asked for.

    torch packs the weight anew in each call, and in float32 multiplies by MKL, which on AMD's
    processors stays at half their width. The packed weight takes as much memory as the weight. It
    is made anew when the weight is replaced or written to, and after a step of any optimiser of
    torch, but not when it is written to through `weight.data`.

    Gradients, GPUs, torch.compile, torch.func, dispatch modes, dtypes other than float32 and
    bfloat16, and weights whose changes torch does not record (made in inference mode, or in a
    process group of torch.distributed) take the way of torch.nn.Linear.
    """

    backend: str | None = None  # set by patch; no kernel of vlmfast's takes part

    def forward(self, input: Tensor) -> Tensor:
        dtype = input.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if not self._can_pack(input, dtype):
            return super().forward(input)
        bias = None if self.bias is None else self.bias.to(dtype)
        keeper = _packed_weights.setdefault(self, Keeper())
        packed = keeper.get((self.weight,), dtype, lambda: _pack(self.weight, dtype))
        return torch.ops.mkldnn._linear_pointwise(input.to(dtype), packed, bias, "none", [], "")

    def _can_pack(self, input: Tensor, dtype: torch.dtype) -> bool:
        sources = (input, self.weight) if self.bias is None else (input, self.weight, self.bias)
        return (
            not torch.compiler.is_compiling()
            and may_be_kept(*sources)
            and input.device.type == self.weight.device.type == "cpu"
            and is_watched(self.weight)
            and (dtype == torch.float32 or (dtype == torch.bfloat16 and _onednn_takes_bfloat16()))
            and (input.dtype == self.weight.dtype or torch.is_autocast_enabled("cpu"))
            and input.is_floating_point()
            and input.dtype != torch.float64
            and input.dim() >= 2
            and input.numel() > 0
            and input.shape[-1] == self.in_features
        )


def _onednn_takes_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))


def _use_packed(module: nn.Module) -> Callable[[nn.Module], None]:
    module.__class__ = Linear
    return _use_unpacked


def _use_unpacked(module: nn.Module) -> None:
    module.__class__ = nn.Linear
    _packed_weights.pop(module, None)


def _packing_refusal(module: nn.Module) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return None


RULES = (
    swap_class(
        FAMILY,
        nn.MultiheadAttention,
        vnn.MultiheadAttention,
        bypassed_by=_goes_past_attention,
    ),
    swap_class(FAMILY, nn.TransformerEncoderLayer, TransformerEncoderLayer),
    Rule(
        LINEAR,
        class_name(Linear),
        recognises=lambda module: type(module) is nn.Linear,
        refusal=_packing_refusal,
        replace=_use_packed,
    ),
)
