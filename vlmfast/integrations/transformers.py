"""transformers: every attention layer that goes through its `AttentionInterface`.

Such a layer looks up its attention function by the name in its config, and its model makes the
mask by the name in the model's. Both names are registered here, as "vlmfast". A patched layer gets
a copy of its config that carries the name; the model keeps its own, so that masks come out exactly
as they did before, and layers left alone, and other models made from the same config, see no
change.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.utils.output_capturing import _active_collector

import vlmfast.functional as VF
from vlmfast.integrations.rules import (
    BACKEND,
    MARK,
    Rule,
    code_names,
    computes_attention,
    leave_alone,
)

__all__ = ["NAME", "RULES", "attention_forward"]

NAME = "vlmfast"
FAMILY = "flash_attention"


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls an attention function: (B, heads, L, D) in, (B, L, heads, D) out.

    The probabilities are computed, and returned, only if `output_attentions` asks for them; then
    the model's own eager function does all of the work. What sdpa alone knows (a position bias, a
    paged cache) is left to transformers' sdpa function.
    """
    config = _model_config(module)
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        raise ValueError(
            f"attn_implementation: expected sdpa or eager, got {config._attn_implementation!r}, "
            "set after vlmfast.patch; call vlmfast.unpatch before"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Made for sdpa, a mask that is only causal is None; made for eager, None masks nothing. One
    # query is the last token of a cache and sees all keys.
    is_causal = (
        is_causal
        and config._attn_implementation != "eager"
        and attention_mask is None
        and query.shape[2] > 1
    )

    arguments = {"scaling": scaling, "dropout": dropout, **kwargs}
    if kwargs.get("output_attentions") or _weights_are_recorded():
        bias = _additive_mask(attention_mask, query, key, is_causal)
        return _eager_function(type(module))(module, query, key, value, bias, **arguments)
    unsupported = [name for name in ("cache", "softcap") if kwargs.get(name) is not None]
    backend = getattr(module, BACKEND, None)
    if unsupported and backend is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: no backend computes {', '.join(unsupported)}, and "
            f"{backend!r} is forced"
        )
    if unsupported:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **arguments
        )
    position_bias = kwargs.get("position_bias")  # T5 and its kin; it gets its gradient
    if position_bias is not None and attention_mask is None:
        attention_mask = position_bias
    elif position_bias is not None:
        attention_mask = create_position_bias_mask(position_bias, attention_mask, False, query, key)
    out = VF.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        backend=backend,
    )
    return out.transpose(1, 2).contiguous(), None


@dataclass
class _RestoreConfig:
    """The config of a patched layer before the patch, the one that its model holds."""

    original: Any

    def __call__(self, module: nn.Module) -> None:
        module.config = self.original


def _model_config(module: nn.Module) -> Any:
    mark = getattr(module, MARK, None)
    return module.config if mark is None else mark.restore.original


def _weights_are_recorded() -> bool:
    """Whether a model up the stack collects attention weights: not every layer is told of it."""
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def _additive_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool
) -> Tensor | None:
    """The mask as an eager attention function takes it."""
    if is_causal:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.is_floating_point():
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward method as it stands in the model's file, under any decorators."""
    return inspect.unwrap(cls.forward)


def _eager_function(cls: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    return _forward(cls).__globals__["eager_attention_forward"]


def _uses_interface(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation") and (
        "ALL_ATTENTION_FUNCTIONS" in code_names(type(module).forward)
    )


_EAGER_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask"),
    *("scaling", "dropout", "is_causal", "kwargs"),
}


def _refusal(module: nn.Module) -> str | None:
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {implementation!r}; only sdpa and eager are replaced"
    if "eager_attention_forward" not in code_names(type(module).forward):
        return "no eager_attention_forward to return attention weights"
    if implementation == "eager":
        if not _library_supports_sdpa(type(module)):
            return "its models do not support sdpa, so its eager attention is not the standard one"
        parameters = inspect.signature(_eager_function(type(module))).parameters
        special = sorted(set(parameters) - _EAGER_ARGUMENTS)
        if special:
            return f"its eager attention takes {', '.join(special)}"
    return None


def _library_supports_sdpa(cls: type[nn.Module]) -> bool:
    """Whether the models of the file that a layer comes from can run on sdpa."""
    home = sys.modules[_forward(cls).__module__]
    return any(
        isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == home.__name__
        and value._supports_sdpa
        for value in vars(home).values()
    )


def _replace(module: nn.Module) -> Callable[[nn.Module], None]:
    original: Any = module.config
    config = copy.copy(original)
    # The public setter would also reach the sub-configs, which the copy shares with the original.
    config._attn_implementation_internal = NAME
    module.config = config
    return _RestoreConfig(original)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

RULES = (
    Rule(
        family=FAMILY,
        what=f"attention function {NAME!r}",
        recognises=_uses_interface,
        refusal=_refusal,
        replace=_replace,
    ),
    leave_alone(
        FAMILY,
        partial(computes_attention, library="transformers"),
        "does not go through AttentionInterface",
    ),
)
