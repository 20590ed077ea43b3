"""What the layers of all families share."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from vlmfast.checks import check_device, check_integer, reject_type

__all__ = [
    "check_fits_weight",
    "has_hooks",
    "is_linear",
    "positive_int",
]


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
    """Whether it is torch's linear layer, or `patch`'s, which computes the same."""
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
