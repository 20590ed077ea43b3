"""Who takes part in a call: the ranks of a process group, or of a ring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from vlmfast.checks import reject, reject_type

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Ring:
    """Given as `group`: pass columns around the ranks, instead of gathering them on each.

    A rank then holds the columns of two ranks at a time, O(N / W * D) in place of O(N * D), for
    half as much traffic again: backward passes the columns around a second time. The numbers are
    the same but for rounding.

        loss = VF.clip_loss(image, text, scale, group=vlmfast.distributed.Ring())

    Attributes:
        group: the process group; None for the default one.
    """

    group: Any = None


@dataclass(frozen=True)
class Ranks:
    """The ranks that take part in one call, and how many rows of the batch each one holds."""

    group: Any
    rank: int
    sizes: tuple[int, ...]
    ring: bool

    @property
    def size(self) -> int:
        return len(self.sizes)

    @property
    def total(self) -> int:
        """Rows of the whole batch."""
        return sum(self.sizes)

    @property
    def offset(self) -> int:
        """Where this rank's rows begin within the whole batch."""
        return sum(self.sizes[: self.rank])

    @property
    def weight(self) -> float:
        """What makes the mean over ranks of local means the mean over the whole batch."""
        return self.sizes[self.rank] * self.size / self.total


def world_size(group: Any) -> int:
    """How many ranks a process group or `Ring` has. Raises as `join` does."""
    return dist.get_world_size(process_group(group)[0])


def rank_in(group: Any) -> int:
    """This process's rank in a process group or `Ring`. Raises as `join` does."""
    return dist.get_rank(process_group(group)[0])


def process_group(group: Any) -> tuple[Any, bool]:
    """The process group that is meant, and whether columns are passed around it."""
    ring = isinstance(group, Ring)
    if ring:
        group = group.group
    if not dist.is_available() or not dist.is_initialized():
        reject("group", "None, unless torch.distributed.init_process_group was called", group)
    if group is None:
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        reject("group", "a group that this process belongs to", "one of other processes")
    if not isinstance(group, dist.ProcessGroup):
        expected = "a torch.distributed.ProcessGroup, a vlmfast.distributed.Ring or None"
        reject_type("group", expected, type(group).__name__)
    return group, ring


def device_types(group: Any) -> list[str]:
    """Whose tensors the backends of a group carry."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    return [backend.partition(":")[0] for backend in config.split(",")]


_NAMES_BEFORE_TORCH_2_13 = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


def collective(name: str) -> Callable[..., Any]:
    """A collective of torch.distributed by the name that it has in this version."""
    return getattr(dist, name if hasattr(dist, name) else _NAMES_BEFORE_TORCH_2_13[name])


def outside_of_graphs(function: _Function) -> _Function:
    """A decorator that keeps torch.compile out of what communicates. Loads torch._dynamo."""
    reason = "collectives of vlmfast.distributed run outside of compiled graphs"
    return torch.compiler.disable(function, reason=reason)
