"""Watches interpreted Triton kernels for what a GPU would let pass silently.

`guarded()` raises where a program

- loads or stores outside the tensors that the launch was given (their views, not their storage),
- stores to an element that another program of the same launch stores to,

and makes what a GPU leaves undefined show in the numbers: lanes that a load masks off without
`other=` become NaN, and programs run in a shuffled order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

Builder = triton_interpreter.InterpreterBuilder
Executor = triton_interpreter.GridExecutor
Handle = triton_interpreter.TensorHandle


class OutOfBoundsError(IndexError):
    """A program touched memory that no argument of its launch covers."""


class WriteRaceError(RuntimeError):
    """Two programs of one launch stored to the same address."""


@dataclass
class _Launch:
    """What is known of the launch that runs: its tensors' extents, and who stored where."""

    regions: list[tuple[int, int, str]] = field(default_factory=list)
    writers: dict[int, tuple[int, ...]] = field(default_factory=dict)


def _extent(tensor: torch.Tensor, name: str) -> tuple[int, int, str]:
    span = 1 + sum(
        (n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size(), name


def _regions(arguments: Any) -> list[tuple[int, int, str]]:
    found = []
    for name, value in arguments:
        if isinstance(value, tuple):
            found += _regions((f"{name}[{i}]", item) for i, item in enumerate(value))
        else:
            tensor = getattr(value, "base", value)
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                found.append(_extent(tensor, name))
    return found


def _touched(pointers: Any, mask: Any) -> np.ndarray:
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    lanes = np.broadcast_to(mask.data.astype(bool), shape)
    return np.broadcast_to(pointers.data, shape)[lanes]


def _check_bounds(launch: _Launch, builder: Any, pointers: Any, mask: Any, what: str) -> np.ndarray:
    addresses = _touched(pointers, mask)
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    inside = np.zeros(addresses.shape, dtype=bool)
    for begin, end, _ in launch.regions:
        inside |= (addresses >= begin) & (addresses + size <= end)
    if not inside.all():
        address = int(addresses[~inside][0])
        begin, end, name = min(
            launch.regions, key=lambda r: min(abs(address - r[0]), abs(address - r[1]))
        )
        raise OutOfBoundsError(
            f"{what} by program {tuple(builder.grid_idx)}: {int((~inside).sum())} lanes, the first "
            f"at byte {address - begin} of {name}, which has {end - begin}"
        )
    return addresses


def _note_writers(launch: _Launch, builder: Any, addresses: np.ndarray) -> None:
    program = tuple(builder.grid_idx)
    for address in addresses.tolist():
        writer = launch.writers.setdefault(address, program)
        if writer != program:
            raise WriteRaceError(f"programs {writer} and {program} store to the same address")


def _poison(pointers: Any) -> Any:
    element = pointers.get_element_ty()
    if not element.is_floating():
        return None
    dtype = triton_interpreter._get_np_dtype(element)
    nan = 0x7FC0 if element == tl.bfloat16 else np.nan
    return Handle(np.full(pointers.data.shape, nan, dtype=dtype), element)


@contextmanager
def guarded(seed: int = 0) -> Iterator[None]:
    """Watches every launch in the block; `seed` shuffles the order of programs."""
    originals = {
        "launch": Executor._init_args_hst,
        "load": Builder.create_masked_load,
        "store": Builder.create_masked_store,
        "program": Builder.set_grid_idx,
    }
    launch = _Launch()

    def init_args(self: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = originals["launch"](self, args, kwargs)
        launch.regions = _regions([*zip(self.arg_names, args, strict=False), *kwargs.items()])
        launch.writers = {}
        return args, kwargs

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        _check_bounds(launch, self, pointers, mask, "load")
        if other is None:
            other = _poison(pointers)
        return originals["load"](self, pointers, mask, other, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        _note_writers(launch, self, _check_bounds(launch, self, pointers, mask, "store"))
        return originals["store"](self, pointers, value, mask, *rest)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, columns, layers = self.grid_dim
        order = np.random.default_rng(seed).permutation(int(np.prod(self.grid_dim)))
        index = int(order[(x * columns + y) * layers + z])
        row, rest = divmod(index, columns * layers)
        originals["program"](self, row, *divmod(rest, layers))

    Executor._init_args_hst = init_args
    Builder.create_masked_load, Builder.create_masked_store = masked_load, masked_store
    Builder.set_grid_idx = set_grid_idx
    try:
        yield
    finally:
        Executor._init_args_hst = originals["launch"]
        Builder.create_masked_load = originals["load"]
        Builder.create_masked_store = originals["store"]
        Builder.set_grid_idx = originals["program"]
