"""torch.nn: MultiheadAttention, TransformerEncoderLayer, which would bypass it in inference, and,
for inference alone, Linear.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

import vlmfast.nn as vnn
from vlmfast.integrations.rules import LINEAR, Restore, Rule, class_name, code_names, swap_class
from vlmfast.kept import Keepers, Watched, can_be_copied, can_be_watched

__all__ = ["RULES", "Linear", "TransformerEncoderLayer"]

FAMILY = "flash_attention"


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """`torch.nn.TransformerEncoderLayer` without its fused inference path.

    In inference the original hands its weights to one C++ function and never calls `self_attn`.
    This one calls it, and so runs whatever attention layer stands there. Sequences packed into a
    nested tensor, as `torch.nn.TransformerEncoder` passes on for padded batches, stay so.

    The fused path reads the weights of the other submodules as well, and drops nothing out. Where
    to call them would give something else, the original does all of the work.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        drops = (self.dropout.training, self.dropout1.training, self.dropout2.training)
        if not self.training and (any(drops) or _only_read(self) is not None):
            return super().forward(src, src_mask, src_key_padding_mask, is_causal)

        def attend(x: Tensor) -> Tensor:
            return self._sa_block(x, src_mask, src_key_padding_mask, is_causal)

        if self.norm_first:
            x = src + attend(self.norm1(src))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(src + attend(src))
        return self.norm2(x + self._ff_block(x))


def _only_read(layer: nn.TransformerEncoderLayer) -> str | None:
    """A submodule that the fused path reads, and that would give something else if called.

    None where there is none, or no fused path. What has no weight to read, such as a quantised
    Linear, that path cannot take; it is called.
    """
    if not getattr(layer.self_attn, "batch_first", False) or not layer.activation_relu_or_gelu:
        return None
    for name, classes in _READ_AS_CALLED.items():
        module = getattr(layer, name)
        if isinstance(module, nn.Module) and type_before_parametrizations(module) not in classes:
            weights = (getattr(module, weight, None) for weight in ("weight", "in_proj_weight"))
            if name in _WITHOUT_WEIGHTS or any(isinstance(weight, Tensor) for weight in weights):
                return name
    return "activation" if getattr(layer.activation, "approximate", "none") != "none" else None


def _refusal(layer: nn.Module) -> str | None:
    assert isinstance(layer, nn.TransformerEncoderLayer)
    name = _only_read(layer)
    if name is None:
        return None
    what = class_name(type(getattr(layer, name)))
    return f"in inference it reads the weights of its {name}, and does not call that {what}"


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


_packed_weights: Keepers[Tensor] = Keepers()


class _StandsForLinear(type):
    """The class of `Linear`, which equals torch's: tools of torch look layers up by their class.

    So torch.ao.quantization quantises and fuses a packed Linear as it would the original.
    """

    def __eq__(cls, other: object) -> bool:
        return cls is other or (cls is Linear and other is nn.Linear)

    def __hash__(cls) -> int:
        return hash(nn.Linear)


class Linear(nn.Linear, metaclass=_StandsForLinear):
    """`torch.nn.Linear` on a weight that oneDNN has packed once, where no gradient is asked for.

    torch packs the weight anew in each call, and in float32 multiplies by MKL, which on AMD's
    processors stays at half their width. The packed weight takes as much memory as the weight. It
    is made anew when the weight is replaced or written to, and after a step of any optimiser of
    torch, but not when it is written to in a way that torch does not record (see `vlmfast.kept`).

    Gradients, GPUs, torch.compile, torch.func, dispatch modes, dtypes other than float32 and
    bfloat16, nested tensors, and weights that are computed from others or that others may write to
    (in shared memory, made in inference mode, or in a process group of torch.distributed)
    take the way of torch.nn.Linear.
    """

    backend: str | None = None  # set by patch; no kernel of vlmfast's takes part

    def forward(self, input: Tensor) -> Tensor:
        # A weight that is computed from others (by pruning, or a parametrisation) is none of these.
        own = type(self) is Linear and self._parameters.keys() >= {"weight", "bias"}
        if torch.compiler.is_compiling() or not own:
            return super().forward(input)
        weight, dtype = self.weight, input.dtype
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        if not _can_pack(input, weight, bias, dtype):
            return super().forward(input)
        packed = _packed_weights[self].get(Watched, (weight,), dtype, lambda: _pack(weight, dtype))
        if bias is not None:
            bias = bias.to(dtype)
        return torch.ops.mkldnn._linear_pointwise(input.to(dtype), packed, bias, "none", [], "")


def _can_pack(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    sources = (input, weight) if bias is None else (input, weight, bias)
    return (
        can_be_copied(*sources)
        and can_be_watched(weight)
        and (dtype == torch.float32 or (dtype == torch.bfloat16 and _onednn_takes_bfloat16()))
        and (input.dtype == weight.dtype or torch.is_autocast_enabled("cpu"))
        and input.is_floating_point()
        and input.dtype != torch.float64
        and input.dim() >= 2
        and input.numel() > 0
        and input.shape[-1] == weight.shape[-1]
    )


def _onednn_takes_bfloat16() -> bool:
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _pack(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(dtype))


def _use_packed(module: nn.Module) -> Restore:
    module.__class__ = Linear
    return _use_unpacked


def _use_unpacked(module: nn.Module) -> None:
    module.__class__ = nn.Linear
    _packed_weights.forget(module)


def _packing_refusal(module: nn.Module) -> str | None:
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return None


# Of which classes a submodule gives, when called, what the fused path makes of its weights
_WITHOUT_WEIGHTS: dict[str, tuple[type[nn.Module], ...]] = {
    "dropout": (nn.Dropout, nn.Identity),
    "dropout1": (nn.Dropout, nn.Identity),
    "dropout2": (nn.Dropout, nn.Identity),
    "activation": (nn.ReLU, nn.GELU),
}
_READ_AS_CALLED: dict[str, tuple[type[nn.Module], ...]] = {
    "self_attn": (nn.MultiheadAttention, vnn.MultiheadAttention),
    "linear1": (nn.Linear, Linear),
    "linear2": (nn.Linear, Linear),
    "norm1": (nn.LayerNorm,),
    "norm2": (nn.LayerNorm,),
    **_WITHOUT_WEIGHTS,
}

RULES = (
    swap_class(
        FAMILY,
        nn.MultiheadAttention,
        vnn.MultiheadAttention,
        bypassed_by=_goes_past_attention,
    ),
    swap_class(FAMILY, nn.TransformerEncoderLayer, TransformerEncoderLayer, refusal=_refusal),
    Rule(
        LINEAR,
        Linear,
        recognises=lambda module: type(module) is nn.Linear,
        refusal=_packing_refusal,
        replace=_use_packed,
    ),
)
