"""What the layers of several families need: checks of arguments, and results of plain modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn

from vlmfast.checks import check_device, check_integer, reject_type
from vlmfast.kept import Copied, Keepers, can_be_copied

__all__ = [
    "check_fits_weight",
    "forget_result",
    "has_hooks",
    "is_linear",
    "is_plain",
    "kept_result",
    "positive_int",
]

Result = TypeVar("Result")


def positive_int(argument: str, number: Any) -> int:
    """An argument of a constructor that is a number of at least 1."""
    return check_integer(argument, number, least=1)


def check_fits_weight(argument: str, tensor: Tensor, weight: Tensor) -> None:
    """Whether a projection can take `tensor`, at the one place where its weight is read.

    Reading it a second time would run its parametrisation, if it has one, a second time.
    """
    check_device(argument, tensor, "the weights", weight)
    if tensor.dtype == weight.dtype:
        return
    device_type = tensor.device.type
    autocast = device_type != "meta" and torch.is_autocast_enabled(device_type)
    if not autocast or torch.float64 in (tensor.dtype, weight.dtype):  # it never casts float64
        reject_type(argument, f"the dtype of the weights, {weight.dtype}", tensor.dtype)


def is_linear(projection: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is torch's linear layer, or the one that `patch` puts in its place."""
    cls = type(projection)
    return cls is nn.Linear or (
        issubclass(cls, nn.Linear) and cls.__module__.startswith("vlmfast.")
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class says."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )


def is_plain(module: nn.Module, classes: tuple[type[nn.Module], ...] = ()) -> bool:
    """Whether a module is a function of its input and its parameters, and nobody watches it.

    Such are linear layers and those of `classes`, without hooks; not a dropout that drops.
    """
    if has_hooks(module) or not (is_linear(module) or type(module) in classes):
        return False
    return not (isinstance(module, nn.Dropout) and module.training and module.p > 0)


def kept_result(
    owner: nn.Module,
    modules: tuple[nn.Module, ...],
    input: Tensor,
    compute: Callable[[], Result],
    classes: tuple[type[nn.Module], ...] = (),
) -> Result:
    """`compute()`, or what it gave last time for `owner`, while its sources are unchanged.

    It must be a function of `input`, of `modules` and of what never changes in `owner`. Nothing is
    kept where one of the modules, or one within them, is not plain (see `is_plain`).
    """
    if torch.compiler.is_compiling():
        return compute()
    # A module, or a parameter, that stands in two places counts twice.
    called = [x for module in modules for x in module.named_modules(remove_duplicate=False)]
    tensors = (x for _, m in called for x in (*m._parameters.values(), *m._buffers.values()))
    sources = (input, *(x for x in tensors if x is not None))
    if all(is_plain(module, classes) for _, module in called) and can_be_copied(*sources):
        structure = tuple((name, type(module)) for name, module in called)
        return _kept[owner].get(Copied, sources, structure, compute)
    _kept.forget(owner)
    return compute()


def forget_result(owner: nn.Module) -> None:
    """Drops what `kept_result` has kept for a module."""
    _kept.forget(owner)


_kept: Keepers[Any] = Keepers()
