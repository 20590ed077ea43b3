"""What the replacements of transformers' layers share."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.utils.output_capturing import _active_collector

from vlmfast.integrations.rules import MARK

__all__ = [
    "NAME",
    "OTHER_VERSION",
    "check_implementation",
    "forward_arguments",
    "hook_model",
    "model_config",
    "unwrapped_forward",
    "weights_are_recorded",
]

# By which the configs of patched layers name our attention function.
NAME = "vlmfast"

# Why a layer stays whose forward is not the one that its replacement stands for.
OTHER_VERSION = "its arguments are not those that it has in transformers 5.23"


def model_config(module: nn.Module) -> Any:
    """The config that the model of an attention layer holds, also where the layer is patched."""
    mark = getattr(module, MARK, None)
    return module.config if mark is None else mark.restore.original


def check_implementation(config: Any) -> None:
    """Raises ValueError where the implementation was changed after the patch."""
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        raise ValueError(
            f"attn_implementation: expected sdpa or eager, got {config._attn_implementation!r}, "
            "set after vlmfast.patch; call vlmfast.unpatch before"
        )


def weights_are_recorded() -> bool:
    """Whether a model up the stack collects attention weights: not every layer is told of it."""
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


def unwrapped_forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward method as it stands in the model's file, under any decorators."""
    return inspect.unwrap(cls.forward)


def forward_arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a layer or model takes, self left out."""
    return tuple(inspect.signature(unwrapped_forward(cls)).parameters)[1:]


def hook_model(
    hooks: dict[str, Callable[..., Any]], module: nn.Module
) -> Callable[[nn.Module], None]:
    """Adds hooks to submodules, by path."""
    for path, hook in hooks.items():
        module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    return partial(_unhook_model, hooks)


def _unhook_model(hooks: dict[str, Callable[..., Any]], module: nn.Module) -> None:
    for path, hook in hooks.items():
        hooked = module.get_submodule(path)
        for key in [key for key, value in hooked._forward_pre_hooks.items() if value is hook]:
            del hooked._forward_pre_hooks[key]
            hooked._forward_pre_hooks_with_kwargs.pop(key, None)
