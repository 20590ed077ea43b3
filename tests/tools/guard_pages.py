"""Tensors whose memory touches a page that nothing may read or write, and processes to use them."""

import ctypes
import mmap
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_PAGE, _PROT_NONE = mmap.PAGESIZE, 0
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

_mapped: dict[int, list[mmap.mmap]] = {}  # by the number of pages between the two forbidden ones


def guarded(tensor: Tensor, at_end: bool = True, strides: Sequence[int] | None = None) -> Tensor:
    """A copy whose last element lies before a forbidden page, or whose first lies behind one.

    A read or write of the element beyond ends the process. Gaps between elements are full of 0xFF,
    which is NaN in every floating dtype.

    Args:
        tensor: on the CPU.
        at_end: the page is behind the last element; for False, before the first.
        strides: of the copy; the tensor's own for None.
    """
    strides = tensor.stride() if strides is None else tuple(strides)
    if tensor.numel() == 0:
        return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype)
    span = 1 + sum((size - 1) * by for size, by in zip(tensor.shape, strides, strict=True))
    n_bytes = span * tensor.element_size()
    pages = -(-n_bytes // _PAGE)
    begin = _PAGE + (pages * _PAGE - n_bytes if at_end else 0)
    memory = _memory(pages)
    torch.frombuffer(memory, dtype=torch.uint8, count=n_bytes, offset=begin).fill_(0xFF)
    elements = torch.frombuffer(memory, dtype=tensor.dtype, count=span, offset=begin)
    copy = elements.as_strided(tensor.shape, strides)
    # Where elements share memory copy_ refuses to write more than one of them.
    once = tuple(slice(0, 1) if by == 0 else slice(None) for by in strides)
    copy[once].copy_(tensor.detach()[once])
    return copy


def _memory(pages: int) -> mmap.mmap:
    """Pages between two that are forbidden; those of tensors that are gone serve again."""
    mapped = _mapped.setdefault(pages, [])
    for i in range(len(mapped)):
        if sys.getrefcount(mapped[i]) == 2:  # this list's, and the call's own
            return mapped[i]
    memory = mmap.mmap(-1, (pages + 2) * _PAGE)
    start = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    for forbidden in (start, start + (pages + 1) * _PAGE):
        if _libc.mprotect(forbidden, _PAGE, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    mapped.append(memory)
    return memory


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function that can be imported in a process of its own, which must end well."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"
