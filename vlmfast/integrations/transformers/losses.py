"""The contrastive losses of CLIPModel and SiglipModel, without the matrix of logits.

With `return_loss=True` the library's models return the loss and the logits that it came from. Ours
compute the loss without logits, and return an output that holds them nevertheless:

- It passes for one of the library's class: `isinstance`, `__class__`, keys, length and order.
- The loss, the embeddings and the outputs of the towers are read as they stand, by attribute, key,
  `get` or, for the loss, index 0.
- Whatever else is done to the output computes the logits first, once. From then on it is an object
  of the library's class, as if they had been there from the start.
- The logits are those that the forward pass would have computed: in its grad mode and inference
  mode, under its autocast, of its parameters.
- Only the raw methods of dict, as `dict.items(output)`, go past this, and find a function.
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

_VALUES = ("loss", "text_embeds", "image_embeds", "text_model_output", "vision_model_output")
_LEAVES_LOGITS_ALONE = frozenset((*_VALUES, "keys", "get", "__dataclass_fields__"))

# Where an output holds the function that computes its logits.
_COMPUTE = "_compute_logits_per_text"


class _UnreadLogits:
    """An output whose logits are computed when they are read; over the class of the library's."""

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


def _after_computing(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(_compute_logits(self), name)(*args)

    return method


# Python looks these up on the class, past __getattribute__.
for _name in (
    *("__setitem__", "__delattr__", "__eq__", "__ne__", "__or__", "__ror__", "__ior__"),
    *("__repr__", "__reduce__", "__reduce_ex__"),
):
    setattr(_UnreadLogits, _name, _after_computing(_name))


class _CLIPOutput(_UnreadLogits, CLIPOutput):
    original = CLIPOutput


class _SiglipOutput(_UnreadLogits, SiglipOutput):
    original = SiglipOutput


def _compute_logits(output: Any) -> Any:
    """The output with its logits, of the library's class."""
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
    """The forward of a model of two towers: the library's own, unless a loss is asked for.

    A subclass says how its library runs the towers and normalises what they return, and gives the
    loss and a function that computes the logits (texts, images).
    """

    backend: str | None = None
    output: ClassVar[type[_UnreadLogits]]
    logit_scale: Any
    _run_towers: Callable[..., tuple[Any, Any]]
    _norm: Callable[[Tensor], Tensor]
    _loss_and_logits: Callable[..., tuple[Tensor, Callable[[], Tensor]]]

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

    @can_return_tuple
    def _forward_with_loss(
        self, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any
    ) -> Any:
        vision, text = self._run_towers(images, texts, kwargs)
        image_embeds = vision.pooler_output / self._norm(vision.pooler_output)
        text_embeds = text.pooler_output / self._norm(text.pooler_output)
        device = text_embeds.device
        loss, compute_logits = self._loss_and_logits(
            image_embeds.to(device), text_embeds, self.logit_scale.exp().to(device)
        )
        output: Any = self.output.original(
            loss=loss,
            logits_per_image=compute_logits,  # keys without values, until the logits are read
            logits_per_text=compute_logits,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )
        vars(output)[_COMPUTE] = _in_present_modes(compute_logits, device.type)
        output.__class__ = self.output
        return output


class CLIPModel(_LossWithoutLogits, OriginalCLIPModel):
    """`transformers.CLIPModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    output = _CLIPOutput
    _norm = staticmethod(_get_vector_norm)

    def _run_towers(self, images: Any, texts: Any, kwargs: Any) -> tuple[Any, Any]:
        vision = self.get_image_features(**images, **kwargs)
        return vision, self.get_text_features(**texts, **kwargs)

    def _loss_and_logits(
        self, images: Tensor, texts: Tensor, scale: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        loss = VF.clip_loss(images, texts, scale, backend=self.backend)
        return loss, lambda: torch.matmul(texts, images.t()) * scale


class SiglipModel(_LossWithoutLogits, OriginalSiglipModel):
    """`transformers.SiglipModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    output = _SiglipOutput

    def _run_towers(self, images: Any, texts: Any, kwargs: Any) -> tuple[Any, Any]:
        vision = self.vision_model(**images, **kwargs)
        return vision, self.text_model(**texts, **kwargs)

    @staticmethod
    def _norm(pooled: Tensor) -> Tensor:
        return pooled.norm(dim=-1, keepdim=True)

    def _loss_and_logits(
        self, images: Tensor, texts: Tensor, scale: Tensor
    ) -> tuple[Tensor, Callable[[], Tensor]]:
        # A copy: the optimiser may change the parameter before the logits are read.
        bias = self.logit_bias.to(texts.device, copy=True)
        loss = VF.siglip_loss(images, texts, scale, bias, backend=self.backend)
        return loss, lambda: torch.matmul(texts, images.t()) * scale + bias


# What the library's forward names where it computes what the classes above do.
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


def _refusal(model: nn.Module) -> str | None:
    cls = type(model)
    if _LIBRARY_FORWARD[cls] <= code_names(cls.forward):
        return None
    return "this version of transformers computes its forward in another way"


RULES = (
    swap_class(FAMILY, OriginalCLIPModel, CLIPModel, refusal=_refusal),
    swap_class(FAMILY, OriginalSiglipModel, SiglipModel, refusal=_refusal),
)
