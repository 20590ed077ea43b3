"""Tensors whose memory touches a page that nothing may read or write, and processes to use them."""

import ctypes
import mmap
import multiprocessing
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_PRIVATE_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def guarded(tensor: Tensor, at_end: bool = True) -> Tensor:
    """A copy of the same strides whose last byte (or first) lies beside an inaccessible page.

    Whoever reads or writes beyond it ends the process: see `run_alone`. What lies between the
    elements of `tensor` is copied, too.
    """
    if tensor.numel() == 0:
        return tensor.detach().clone()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    buffer = _bytes_beside_a_guard(span * tensor.element_size(), at_end)
    flat = torch.frombuffer(buffer, dtype=tensor.dtype)
    flat.copy_(tensor.detach().as_strided((span,), (1,)))
    return flat.as_strided(tensor.shape, tensor.stride())


def _bytes_beside_a_guard(count: int, at_end: bool) -> ctypes.Array:
    """Memory that is given back with the last tensor that holds it."""
    page = mmap.PAGESIZE
    inside = -(-count // page) * page
    base = _libc.mmap(
        None, inside + 2 * page, mmap.PROT_READ | mmap.PROT_WRITE, _PRIVATE_ANONYMOUS, -1, 0
    )
    if base in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), "mmap failed")
    for guard in (base, base + page + inside):
        if _libc.mprotect(guard, page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    first = base + page + (inside - count if at_end else 0)
    buffer = (ctypes.c_char * count).from_address(first)
    weakref.finalize(buffer, _libc.munmap, base, inside + 2 * page)
    return buffer


def run_alone(function: Callable[..., None], *arguments: Any) -> None:
    """Calls a function that can be imported in a process of its own, which must end well."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    process.start()
    process.join(timeout=300)
    process.kill()
    assert process.exitcode == 0, f"{function.__name__} ended with {process.exitcode}"
