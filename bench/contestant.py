"""Who races: a name, what it cannot run and why, and the call to be timed; what several share."""

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel

OURS = "vlmfast"
GPU = ("cuda",)

Refusal = Callable[[Any, torch.dtype], str | None]
Prepare = Callable[[Any], Callable[..., Any]]


@dataclass(frozen=True)
class Contestant:
    """One way to compute a family's operation.

    Attributes:
        name: how tables call it.
        refusal: (case, dtype) -> why it cannot run that, or None.
        prepare: case -> the call to be timed. What a model would build once and keep, such as a
            causal mask, is built here and not timed.
        devices: where it races.
        compiles: it compiles for every shape first, which takes up to a minute, and is left out
            unless asked for.
    """

    name: str
    refusal: Refusal
    prepare: Prepare
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False


def never(case: Any, dtype: torch.dtype) -> str | None:
    """The refusal of who can run everything."""
    return None


def half_only(case: Any, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"does not take {dtype}"


def needs(package: str, *further: Refusal) -> Refusal:
    """Refuses where a package is missing, and then where one of `further` does."""

    def refusal(case: Any, dtype: torch.dtype) -> str | None:
        if not is_installed(package):
            return "not installed"
        return next(filter(None, (why(case, dtype) for why in further)), None)

    return refusal


def beyond_memory(what: str, size: int) -> str | None:
    """Refuses tensors of `size` bytes if they would take more than half of the machine's memory."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory // 2:
        return f"{what} take {size / 2**30:.1f} GiB, over half of the memory"
    return None


@functools.cache
def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def forced(prepare: Prepare, backend: SDPBackend) -> Prepare:
    """Binds the torch attention that a contestant calls to one of its backends."""

    def prepare_forced(case: Any) -> Callable[..., Tensor]:
        attention = prepare(case)

        def call(*sources: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return attention(*sources)

        return call

    return prepare_forced


def compiled(prepare: Prepare) -> Prepare:
    """Compiles what a contestant calls by torch.compile."""

    def prepare_compiled(case: Any) -> Callable[..., Any]:
        functorch_config.donated_buffer = False  # backward alone keeps its graph
        return torch.compile(prepare(case), fullgraph=True)

    return prepare_compiled
