"""Kernels compiled for a GPU that this process does not use, into Triton's cache.

The launchers run on meta tensors under a driver that only names an architecture. What they compile
is what a call on that GPU takes, with the same configurations, strides and alignments.
"""

import contextlib
import importlib
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import vlmfast
from vlmfast.backends import selection
from vlmfast.kernels import launch

OPERATORS = (("_backward_triton", "backward"), ("_triton", "forward"))  # endings of their names


class CompileOnlyDriver:
    """What Triton asks of a driver before a launch, answered for a GPU that is not there."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch  # compiled kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


class _KernelsOnMeta(TorchDispatchMode):
    """Our Triton operators on meta tensors call their launchers, in place of their fakes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "vlmfast":
            for ending, function in OPERATORS:
                if name.endswith(ending):
                    family = name.removesuffix(ending)
                    module = importlib.import_module(f"vlmfast.kernels.{family}.{function}")
                    return getattr(module, function)(*args)
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Started:
    """A launch that was compiled and did not run."""

    name: str
    compiled: Any
    programs: int
    arguments: Mapping[str, Any]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Those among its arguments, in tuples, too."""
        return [x for value in self.arguments.values() for x in leaves(value) if _is_tensor(x)]

    def scalars(self, parameters: Sequence[tuple[str, str]]) -> dict[str, Any]:
        """The numbers among its arguments by their names in the compiled text.

        Args:
            parameters: these names, and the parameter that each is a part of: parts that are None,
                and numbers 1 that Triton has compiled in, have none.
        """
        found: dict[str, Any] = {}
        for parameter in dict.fromkeys(base for _, base in parameters):
            names = [name for name, base in parameters if base == parameter]
            parts = [x for x in leaves(self.arguments[parameter]) if x is not None]
            if len(parts) != len(names):
                parts = [x for x in parts if _is_tensor(x) or x != 1]
            if len(parts) == len(names):
                found |= {n: x for n, x in zip(names, parts, strict=True) if not _is_tensor(x)}
        return found


def leaves(value: Any) -> Iterator[Any]:
    """What a kernel's argument consists of."""
    if isinstance(value, tuple):
        for part in value:
            yield from leaves(part)
    else:
        yield value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@contextlib.contextmanager
def compile_only(arch: int, multiprocessors: int) -> Iterator[list[Started]]:
    """Within the block our calls on meta tensors compile what they would launch; nothing runs.

    Args:
        arch: as `kernels/launch.py` numbers it, 90 for sm_90.
        multiprocessors: of that GPU: some launchers count them.

    Yields:
        The kernels that were compiled or found in the cache.
    """
    started: list[Started] = []
    run = JITFunction.run

    def compile_kernel(self, *, grid, warmup, **kwargs):
        compiled = run(self, grid=grid, warmup=True, **kwargs)
        started.append(Started(self.__name__, compiled, math.prod(grid), kwargs))

    with contextlib.ExitStack() as stack:
        # reset_active() would look for a real driver, and there may be none.
        stack.enter_context(mock.patch.object(driver, "_active", CompileOnlyDriver(arch)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_kernel))
        stack.enter_context(mock.patch.object(launch, "architecture", lambda device: arch))
        fills = mock.patch.object(
            launch.Problem, "fills_device", lambda self, programs: 2 * programs >= multiprocessors
        )
        stack.enter_context(fills)
        for module in _that_count():
            patch = mock.patch.object(module, "multiprocessors", lambda device: multiprocessors)
            stack.enter_context(patch)
        for predicates in selection.PREDICATES.values():
            stack.enter_context(mock.patch.dict(predicates, triton=lambda *inputs: []))
        stack.enter_context(vlmfast.use_backend("triton"))
        stack.enter_context(_KernelsOnMeta())
        yield started


def _that_count() -> list[Any]:
    """The modules of kernels that ask how many multiprocessors there are."""
    importlib.import_module("vlmfast.kernels.window_attention.problem")
    modules = [x for name, x in sys.modules.items() if name.startswith("vlmfast.kernels.")]
    return [module for module in modules if hasattr(module, "multiprocessors")]
