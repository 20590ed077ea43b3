"""What the layers of all families share."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeGuard, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils.weak import WeakTensorKeyDictionary

from vlmfast.functional.common import check_device, reject, reject_type

__all__ = [
    "Keeper",
    "check_fits_weight",
    "has_hooks",
    "is_linear",
    "is_watched",
    "may_be_kept",
    "positive_int",
]

Result = TypeVar("Result")


def positive_int(argument: str, number: Any) -> int:
    """An argument of a constructor that is a number of at least 1."""
    try:
        value = operator.index(number)
    except TypeError:
        reject_type(argument, "an int", type(number).__name__)
    if value < 1:
        reject(argument, "at least 1", value)
    return value


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


def may_be_kept(*sources: Tensor) -> bool:
    """Whether a result of these tensors may be given again.

    Not where it needs a gradient, nor where a graph is traced or captured, which must hold the
    computation itself, nor where a hook on all modules watches it, or changes it.
    """
    if torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    if _has_any_global_hook():
        return False
    if _get_current_dispatch_mode() is not None:  # fake tensors, or somebody counts
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.device.type == "meta" for x in sources):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in sources):
        return False
    if sources[0].device.type == "cpu":
        return True
    if not all(map(is_watched, sources)):  # to compare values would synchronise
        return False
    return not (sources[0].is_cuda and torch.cuda.is_current_stream_capturing())


def is_watched(tensor: Tensor) -> bool:
    """Whether all that torch writes to a tensor counts up its version.

    Tensors made in inference mode have none, and the collectives of torch.distributed count none.
    """
    return not (tensor.is_inference() or (dist.is_available() and dist.is_initialized()))


class _Snapshot:
    """A tensor at one moment. Identity and version tell whether another is that one, unchanged.

    Operations of torch that write to a tensor count up its version, which its views share. Where
    they do not, values are compared with a copy, on a CPU; and those of masks always, which are
    small.
    """

    def __init__(self, tensor: Tensor):
        self._layout = _layout(tensor)
        self._copy = tensor.clone() if _is_compared_by_value(tensor) else None
        # Held, so that no other tensor can take its identity.
        self._owner = None if self._copy is not None else _owner(tensor)
        self._version = 0 if self._copy is not None else tensor._version
        # `tensor.data = other` counts up no version, and memory that it frees is soon given out
        # again, at the same address. A weak reference keeps the identity alone.
        self._storage = StorageWeakRef(tensor.untyped_storage())

    def shows(self, tensor: Tensor) -> bool:
        by_value = _is_compared_by_value(tensor)
        if _layout(tensor) != self._layout or by_value != (self._copy is not None):
            return False
        if self._copy is not None:
            return torch.equal(self._copy, tensor)
        return (
            _owner(tensor) is self._owner
            and tensor._version == self._version
            and tensor.untyped_storage()._cdata == self._storage.cdata
        )


def _is_compared_by_value(tensor: Tensor) -> bool:
    return not is_watched(tensor) or (
        tensor.device.type == "cpu" and not tensor.is_floating_point()
    )


# One copy of a tensor serves all layers.
_copies: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _snapshot(tensor: Tensor) -> _Snapshot:
    if not _is_compared_by_value(tensor):
        return _Snapshot(tensor)
    copied = _copies.get(tensor)
    if copied is None or not copied.shows(tensor):
        copied = _copies[tensor] = _Snapshot(tensor)
    return copied


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that a view looks at: models make a new view of one tensor at every step."""
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None else base


class Keeper(Generic[Result]):
    """Keeps the last result of a computation while the tensors that it came from stay the same."""

    def __init__(self) -> None:
        self._last: tuple[list[_Snapshot], Hashable, Result] | None = None

    def get(
        self, sources: tuple[Tensor, ...], context: Hashable, compute: Callable[[], Result]
    ) -> Result:
        """`compute()`, a function of `sources` and `context`, or what it gave last time."""
        _count_optimizer_steps()
        context = (context, _optimizer_steps)
        last = self._last
        if (
            last is not None
            and last[1] == context
            and len(last[0]) == len(sources)
            and all(seen.shows(source) for seen, source in zip(last[0], sources, strict=True))
        ):
            return last[2]
        # An inference tensor could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            result = compute()
        self._last = [_snapshot(source) for source in sources], context, result
        return result

    def forget(self) -> None:
        """Drops what is kept."""
        self._last = None


_optimizer_steps = 0


@functools.cache
def _count_optimizer_steps() -> None:
    """From now on a step of any optimizer counts: torch's fused ones leave versions as they are."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)
