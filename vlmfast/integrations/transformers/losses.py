"""The contrastive losses of CLIPModel and SiglipModel.

They compute their loss, if `return_loss` asks for it, without the matrix of logits. Their output
holds the logits all the same: they are computed when read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import CLIPModel as OriginalCLIPModel
from transformers import SiglipModel as OriginalSiglipModel
from transformers.models.clip.modeling_clip import CLIPOutput, _get_vector_norm
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.utils.generic import can_return_tuple

import vlmfast.functional as VF
from vlmfast.integrations.rules import code_names, swap_class

__all__ = ["RULES", "CLIPModel", "SiglipModel"]

FAMILY = "contrastive_loss"


class _LogitsUnread:
    """An output whose logits are computed when they are read, by whatever path.

    Whatever is not known to leave the logits alone computes them first; from then on the object is
    one of the library's own class, as if they had been there from the start. Until then the keys
    stand in place, with no values behind them.
    """

    __slots__ = ()
    original: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Generic code builds outputs like a given one, type(output)(...), of what it has read.
        return cls.original(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return type(self).original
        if name not in _LEAVES_LOGITS_ALONE:
            _compute_logits(self)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _LEAVES_LOGITS_ALONE:
            _compute_logits(self)
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        if key == 0:  # as in a tuple
            key = "loss"
        return getattr(self, key) if key in _VALUES else _compute_logits(self)[key]

    def get(self, key: Any, default: Any = None) -> Any:
        return getattr(self, key) if key in _VALUES else _compute_logits(self).get(key, default)


_VALUES = ("loss", "text_embeds", "image_embeds", "text_model_output", "vision_model_output")
_LEAVES_LOGITS_ALONE = frozenset((*_VALUES, "keys", "get", "__dataclass_fields__"))


def _after_computing(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(_compute_logits(self), name)(*args)

    return method


# Python looks these up on the class, past __getattribute__.
for _name in (
    *("__setitem__", "__delattr__", "__eq__", "__ne__", "__or__", "__ror__", "__ior__"),
    *("__repr__", "__reduce__", "__reduce_ex__"),
):
    setattr(_LogitsUnread, _name, _after_computing(_name))


class _CLIPOutput(_LogitsUnread, CLIPOutput):
    original = CLIPOutput


class _SiglipOutput(_LogitsUnread, SiglipOutput):
    original = SiglipOutput


def _output_with_unread_logits(
    cls: type[_LogitsUnread], logits_per_text: Callable[[], Tensor], loss: Tensor, **values: Any
) -> Any:
    """An output of `cls.original` whose logits `logits_per_text` computes when they are read.

    It does so as it would have now: with this grad mode, under this autocast.
    """
    output = cls.original(
        loss=loss,
        logits_per_image=logits_per_text,
        logits_per_text=logits_per_text,
        **values,
    )
    vars(output)[_COMPUTE] = _in_present_modes(logits_per_text, output.text_embeds.device.type)
    output.__class__ = cls
    return output


_COMPUTE = "_compute_logits_per_text"


def _compute_logits(output: Any) -> Any:
    attributes = object.__getattribute__(output, "__dict__")
    if _COMPUTE in attributes:
        logits_per_text = attributes[_COMPUTE]()
        object.__setattr__(output, "__class__", type(output).original)
        del attributes[_COMPUTE]
        output["logits_per_image"] = logits_per_text.t()
        output["logits_per_text"] = logits_per_text
    return output


def _in_present_modes(function: Callable[[], Tensor], device_type: str) -> Callable[[], Tensor]:
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)

    def run() -> Tensor:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast(device_type, dtype=dtype, enabled=autocast),
        ):
            return function()

    return run


class _LossWithoutLogits:
    """The forward of a two-tower model: the library's own, unless a loss is asked for."""

    backend: str | None = None
    _forward_with_loss: Callable[..., Any]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        images = {
            "pixel_values": pixel_values,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if return_loss and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return self._forward_with_loss(images, texts, **kwargs)
        library: Any = super()
        return library.forward(**images, **texts, return_loss=return_loss, **kwargs)


class CLIPModel(_LossWithoutLogits, OriginalCLIPModel):
    """`transformers.CLIPModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    @can_return_tuple
    def _forward_with_loss(
        self, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any
    ) -> Any:
        vision = self.get_image_features(**images, **kwargs)
        text = self.get_text_features(**texts, **kwargs)
        image_embeds = vision.pooler_output / _get_vector_norm(vision.pooler_output)
        text_embeds = text.pooler_output / _get_vector_norm(text.pooler_output)
        near_images = image_embeds.to(text_embeds.device)
        scale = self.logit_scale.exp().to(text_embeds.device)
        return _output_with_unread_logits(
            _CLIPOutput,
            lambda: torch.matmul(text_embeds, near_images.t()) * scale,
            loss=VF.clip_loss(near_images, text_embeds, scale, backend=self.backend),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class SiglipModel(_LossWithoutLogits, OriginalSiglipModel):
    """`transformers.SiglipModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    @can_return_tuple
    def _forward_with_loss(
        self, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any
    ) -> Any:
        vision = self.vision_model(**images, **kwargs)
        text = self.text_model(**texts, **kwargs)
        image_embeds = vision.pooler_output / vision.pooler_output.norm(dim=-1, keepdim=True)
        text_embeds = text.pooler_output / text.pooler_output.norm(dim=-1, keepdim=True)
        near_images = image_embeds.to(text_embeds.device)
        scale = self.logit_scale.exp().to(text_embeds.device)
        # A copy: the optimiser may change the parameter before the logits are read.
        bias = self.logit_bias.to(text_embeds.device, copy=True)
        return _output_with_unread_logits(
            _SiglipOutput,
            lambda: torch.matmul(text_embeds, near_images.t()) * scale + bias,
            loss=VF.siglip_loss(near_images, text_embeds, scale, bias, backend=self.backend),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


_LIBRARY_FORWARD = {
    OriginalCLIPModel: {
        *("get_image_features", "get_text_features", "pooler_output", "_get_vector_norm"),
        *("matmul", "logit_scale", "exp", "image_text_contrastive_loss", "CLIPOutput"),
    },
    OriginalSiglipModel: {
        *("vision_model", "text_model", "pooler_output", "norm", "matmul"),
        *("logit_scale", "exp", "logit_bias", "logsigmoid", "SiglipOutput"),
    },
}


def _loss_refusal(model: nn.Module) -> str | None:
    cls = type(model)
    if _LIBRARY_FORWARD[cls] <= code_names(cls.forward):
        return None
    return "this version of transformers computes its forward in another way"


RULES = (
    swap_class(FAMILY, OriginalCLIPModel, CLIPModel, refusal=_loss_refusal),
    swap_class(FAMILY, OriginalSiglipModel, SiglipModel, refusal=_loss_refusal),
)
