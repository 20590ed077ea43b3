"""What a replacement rule is. Each library's file holds a tuple `RULES` of them."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from vlmfast.parts.common import has_hooks

__all__ = [
    "LINEAR",
    "Replacement",
    "Restore",
    "Rule",
    "class_name",
    "code_names",
    "forward_arguments",
    "leave_alone",
    "leave_other_attention",
    "swap_class",
    "uncoverable",
]

# Makes a replaced module what it was before.
Restore = Callable[[nn.Module], None]

# The instance attributes that a replaced layer carries until `unpatch`.
MARK = "_vlmfast_replacement"
BACKEND = "backend"

# What `patch(inference=True)` replaces beside the kernel families.
LINEAR = "linear"

_ATTENTION_FUNCTIONS = (
    "softmax",
    "Softmax",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
    "shifted_window_attention",
)


@dataclass(frozen=True)
class Rule:
    """How one kind of layer is recognised and replaced. The first rule that recognises it holds.

    family: the kernel family, as users name it in `patch(families=...)`.
    what: the replacement, its class or what the report says of it; "" for a layer that stays.
    recognises: whether the rule is about this module.
    refusal: why this module must stay as it is, or None.
    refusal_within: why this module must stay because of its parent, or None: (parent, module).
    replace: changes the module in place and returns the function that changes it back, which must
        survive pickle and deepcopy together with the module.
    bypassed_by: whether a parent of the module may compute without calling it. Unless that parent
        is replaced, the module stays: what is reported as replaced must run.
    covers: names of submodules whose work the replacement does without calling them. Once it
        stands they are neither replaced nor reported; modules within them may be.
    """

    family: str
    what: type[nn.Module] | str
    recognises: Callable[[nn.Module], bool]
    refusal: Callable[[nn.Module], str | None]
    replace: Callable[[nn.Module], Restore]
    bypassed_by: Callable[[nn.Module], bool] = lambda parent: False
    covers: tuple[str, ...] = ()
    refusal_within: Callable[[nn.Module, nn.Module], str | None] = lambda parent, module: None


@dataclass
class Replacement:
    """What a replaced layer remembers.

    family, what, covers: of its rule; `what` as the report names it.
    original: the name of its class before.
    swapped_to: its class since, if that is a new one.
    restore: makes of it what it was before.
    """

    family: str
    what: str
    original: str
    swapped_to: type[nn.Module] | None
    restore: Restore
    covers: tuple[str, ...] = ()


def swap_class(
    family: str,
    original: type[nn.Module],
    replacement: type[nn.Module],
    refusal: Callable[[nn.Module], str | None] = lambda module: None,
    bypassed_by: Callable[[nn.Module], bool] = lambda parent: False,
    covers: Mapping[str, type[nn.Module]] = MappingProxyType({}),
) -> Rule:
    """A rule that turns every `original` into `replacement`, and leaves and reports subclasses.

    Only the class of the object changes, so parameters, buffers, hooks and flags stay what and
    where they are. `replacement` must be an importable subclass that adds no state.

    `covers` gives submodules whose work `replacement` does without calling them, and the class
    that each must be of. A layer stays as it is if one of them is something else or if it, or a
    module within it, has a hook, which would be called no more, or with tensors of other shapes.
    """

    def refuse(module: nn.Module) -> str | None:
        if type(module) is not original:
            return "a subclass may compute something else"
        if "forward" in vars(module):
            return "it has a forward of its own, not that of its class"
        for path, cls in covers.items():
            why = uncoverable(module, path, cls)
            if why is not None:
                return why
        return refusal(module)

    return Rule(
        family=family,
        what=replacement,
        recognises=lambda m: isinstance(m, original) and not isinstance(m, replacement),
        refusal=refuse,
        replace=partial(_set_class, replacement),
        bypassed_by=bypassed_by,
        covers=tuple(covers),
    )


def uncoverable(layer: nn.Module, path: str, cls: type[nn.Module]) -> str | None:
    """Why a submodule of a layer must go on being called, or None."""
    try:
        covered = layer.get_submodule(path)
    except AttributeError:
        return f"it has no {path}: another version of the library?"
    if type(covered) is not cls:
        return f"its {path} is a {class_name(type(covered))}"
    for name, module in covered.named_modules(prefix=path):
        if has_hooks(module):
            return f"a hook on its {name} would not see what it sees now"
    return None


def _set_class(new: type[nn.Module], module: nn.Module) -> Restore:
    old = type(module)
    module.__class__ = new
    return partial(_reset_class, old)


def _reset_class(old: type[nn.Module], module: nn.Module) -> None:
    module.__class__ = old


def leave_alone(family: str, recognises: Callable[[nn.Module], bool], why: str) -> Rule:
    """A rule for layers that are known, belong to `family`, and are not replaced."""

    def replace(module: nn.Module) -> Restore:
        raise AssertionError(f"{class_name(type(module))} is never replaced")

    return Rule(
        family=family, what="", recognises=recognises, refusal=lambda module: why, replace=replace
    )


def leave_other_attention(library: str, why: str = "no replacement for this attention") -> Rule:
    """A rule for the attention layers of a library that no rule before it has taken."""
    return leave_alone("flash_attention", partial(_computes_attention, library=library), why)


def _computes_attention(module: nn.Module, library: str) -> bool:
    """Whether a class of `library` is an attention layer, judged by its name and its code.

    Blocks that merely hold an attention layer, and gates called attention that take no softmax
    (squeeze-and-excitation), are none.
    """
    cls = type(module)
    if not cls.__module__.startswith(f"{library}.") or "Att" not in cls.__name__:
        return False
    methods = (value for value in vars(cls).values() if callable(value))
    names = frozenset[str]().union(*map(code_names, methods))
    return not names.isdisjoint(_ATTENTION_FUNCTIONS)


def class_name(cls: type) -> str:
    """The shortest name that it is importable by, as torch.nn.MultiheadAttention."""
    parts = cls.__module__.split(".")
    for count in range(1, len(parts)):
        package = ".".join(parts[:count])
        if package in sys.modules and vars(sys.modules[package]).get(cls.__name__) is cls:
            return f"{package}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def forward_arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what the forward of a class takes, self left out."""
    return tuple(inspect.signature(inspect.unwrap(cls.forward)).parameters)[1:]


def code_names(function: Callable[..., Any]) -> frozenset[str]:
    """The globals and attributes that a function names, under any decorators."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return frozenset(code.co_names if code is not None else ())
