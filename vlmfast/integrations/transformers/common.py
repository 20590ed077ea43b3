"""What the replacements of transformers' layers share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn
from transformers.utils.output_capturing import _active_collector

from vlmfast.integrations.rules import MARK, Restore, Rule, forward_arguments, swap_class

__all__ = [
    "NAME",
    "OTHER_VERSION",
    "check_implementation",
    "hook_model",
    "model_config",
    "named_arguments",
    "swap_layer",
    "weights_are_recorded",
]

# By which the configs of patched layers name our attention function.
NAME = "vlmfast"

# Why a layer stays whose forward is not the one that its replacement stands for.
OTHER_VERSION = "its arguments are not those that it has in transformers 5.23"


def model_config(module: nn.Module) -> Any:
    """The config that the model of an attention layer holds, also where the layer is patched."""
    mark = getattr(module, MARK, None)
    return module.config if mark is None else mark.restore.config


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


def swap_layer(
    family: str,
    original: type[nn.Module],
    replacement: type[nn.Module],
    covers: dict[str, type[nn.Module]],
    refusal: Callable[[nn.Module], str | None] = lambda module: None,
) -> Rule:
    """`swap_class` for a layer whose forward differs between versions of transformers."""
    same_call = forward_arguments(original) == forward_arguments(replacement)

    def refuse(module: nn.Module) -> str | None:
        return refusal(module) if same_call else OTHER_VERSION

    return swap_class(family, original, replacement, refusal=refuse, covers=covers)


def named_arguments(
    names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any]:
    """All that a forward is called with by name; `names` are those of its arguments, in order."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def hook_model(hooks: dict[str, Callable[..., Any]], module: nn.Module) -> Restore:
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
