"""Results that are kept while what they were computed from stays the same.

One rule: a kept result is given again only where any change of its sources would have shown.

On a CPU the sources are compared with copies, value by value (`Copied`): whatever wrote to them, it
shows. That costs one reading of both, and the memory of the copies.

Where that would cost as much as it saves, or would wait for a GPU, torch's count of the writes to a
tensor is what tells (`Watched`). It misses writes that torch does not record: through `.data`,
NumPy or DLPack, by kernels that are handed a pointer, by a replayed CUDA graph. Tensors to which
others write as a matter of course are not watched: nothing is kept of them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import _has_any_global_hook
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ["Copied", "Keeper", "Keepers", "Watched", "can_be_copied", "can_be_watched"]

Result = TypeVar("Result")


def can_be_copied(*sources: Tensor) -> bool:
    """Whether a result of these tensors may be kept, by comparing them with copies."""
    return _may_be_kept(sources) and all(x.device.type == "cpu" for x in sources)


def can_be_watched(*sources: Tensor) -> bool:
    """Whether a result of these tensors may be kept, by torch's count of writes to them.

    Tensors made in inference mode have no such count. Other processes and the collectives of
    torch.distributed leave it as it is.
    """
    if not _may_be_kept(sources) or (dist.is_available() and dist.is_initialized()):
        return False
    if any(x.is_inference() for x in sources):
        return False
    if sources[0].is_cuda:
        return not torch.cuda.is_current_stream_capturing()
    return all(x.device.type == "cpu" and not x.is_shared() for x in sources)


def _may_be_kept(sources: tuple[Tensor, ...]) -> bool:
    """Not where a gradient is needed, nor where a graph is traced, which must hold the computation
    itself, nor where a hook on all modules, or a mode, watches it or changes it.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active() or _has_any_global_hook():
        return False
    if _get_current_dispatch_mode() is not None:  # fake tensors, or somebody counts
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.is_nested for x in sources):
        return False
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in sources))


class _Source(Protocol):
    """A tensor at one moment; `shows` tells whether another is that one, unchanged."""

    def __init__(self, tensor: Tensor): ...

    def shows(self, tensor: Tensor) -> bool: ...


class Copied:
    """A source on a CPU, by its values."""

    def __init__(self, tensor: Tensor):
        self._copy = tensor.detach().clone()

    def shows(self, tensor: Tensor) -> bool:
        copy = self._copy
        return (
            tensor.device.type == "cpu"
            and tensor.dtype == copy.dtype
            and tensor.shape == copy.shape
            and _same_values(tensor, copy)
        )


def _same_values(one: Tensor, other: Tensor) -> bool:
    """Bit by bit where that can be, in words of eight bytes: up to four times as fast."""
    size = one.element_size()
    if all(
        x.is_contiguous() and x.numel() * size % 8 == 0 and x.storage_offset() * size % 8 == 0
        for x in (one, other)
    ):
        one, other = (x.detach().view(-1).view(torch.int64) for x in (one, other))
    return torch.equal(one, other)


class Watched:
    """A source by its identity and by torch's count of writes, which its views share."""

    def __init__(self, tensor: Tensor):
        _count_optimizer_steps()
        self._layout = _layout(tensor)
        # Held, so that no other tensor can take its identity.
        self._owner = _owner(tensor)
        self._version = tensor._version
        # `tensor.data = other` counts up no version, and memory that it frees is soon given out
        # again, at the same address. A weak reference keeps the identity alone.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._optimizer_steps = _optimizer_steps

    def shows(self, tensor: Tensor) -> bool:
        return (
            _owner(tensor) is self._owner
            and tensor._version == self._version
            and tensor.untyped_storage()._cdata == self._storage.cdata
            and _layout(tensor) == self._layout
            and _optimizer_steps == self._optimizer_steps
        )


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    # What one stream of a GPU has computed is not there yet for another.
    stream = torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else None
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), stream


def _owner(tensor: Tensor) -> Tensor:
    """The tensor that a view looks at: models make a new view of one tensor at every step."""
    base = tensor._base if tensor._is_view() else None
    return tensor if base is None else base


_optimizer_steps = 0


@functools.cache
def _count_optimizer_steps() -> None:
    """From now on a step of any optimizer counts: torch's fused ones leave versions as they are."""

    def count(*_: Any) -> None:
        global _optimizer_steps
        _optimizer_steps += 1

    register_optimizer_step_post_hook(count)


class Keeper(Generic[Result]):
    """Keeps the last result of a computation while the tensors that it came from stay the same."""

    def __init__(self) -> None:
        self._last: tuple[list[_Source], Hashable, Result] | None = None

    def get(
        self,
        how: type[_Source],
        sources: tuple[Tensor, ...],
        context: Hashable,
        compute: Callable[[], Result],
    ) -> Result:
        """`compute()`, or what it gave last time.

        Args:
            how: Copied or Watched; `can_be_copied` or `can_be_watched` has said yes.
            sources, context: what the result is a function of, together with autocast.
            compute: makes the result.
        """
        context = (context, how, _autocast_dtype(sources[0]))
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
            # Before the result: what is written meanwhile must show.
            seen_now = [how(source) for source in sources]
            result = compute()
        self._last = seen_now, context, result
        return result

    def forget(self) -> None:
        """Drops what is kept."""
        self._last = None


class Keepers(Generic[Result]):
    """A keeper for each module, beside it: copies and pickles of a module do not carry it."""

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[nn.Module, Keeper[Result]] = WeakKeyDictionary()

    def __getitem__(self, module: nn.Module) -> Keeper[Result]:
        return self._of.setdefault(module, Keeper())

    def __len__(self) -> int:
        return len(self._of)

    def forget(self, module: nn.Module) -> None:
        """Drops what is kept for a module."""
        self._of.pop(module, None)


def _autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    device_type = tensor.device.type
    enabled = torch.is_autocast_enabled(device_type)
    return torch.get_autocast_dtype(device_type) if enabled else None
