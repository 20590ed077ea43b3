"""How ranks begin a call: each learns that all of them make the same one, and of what sizes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from vlmfast.checks import may_read_values, reject
from vlmfast.distributed.ranks import (
    Ranks,
    collective,
    device_types,
    outside_of_graphs,
    process_group,
)


@outside_of_graphs
def join(
    group: Any, check: Callable[[], tuple[Any, ...]], *facts: Any
) -> tuple[tuple[Any, ...], Ranks]:
    """Checks the arguments of a call on every rank, and that all ranks make the same call.

    Args:
        group: a process group or a `Ring`.
        check: checks and casts this rank's arguments; the first of them holds the rows of the
            batch. What it raises is raised on this rank, and ends the call on every other.
        facts: whatever else must be equal on all ranks.

    Returns:
        What `check` returned, and the ranks.

    Raises:
        TypeError: `group` is no process group.
        ValueError: the group does not fit, an argument was refused on another rank, or the ranks
            make different calls: of other shapes, scales or backends, or with other options. The
            value of a scale on a GPU is compared with VLMFAST_CHECKS=1 alone.
    """
    group, ring = process_group(group)
    error: Exception | None = None
    inputs: tuple[Any, ...] = ()
    rows, call = 0, ""
    try:
        inputs = check()
        _check_devices(group, inputs)
        rows = inputs[0].shape[0]
        call = " ".join(map(str, (*facts, "ring" if ring else "gather", *map(_describe, inputs))))
    except Exception as raised:
        error, call = raised, f"{type(raised).__name__}: {raised}"
    world = dist.get_world_size(group)
    rank = dist.get_rank(group)
    if world > 1:
        digest = int.from_bytes(hashlib.sha256(call.encode()).digest()[:7], "big")
        everyone = _exchange_numbers(group, (int(error is not None), rows, digest))
        if any(failed for failed, _, _ in everyone) or len({call for *_, call in everyone}) > 1:
            _refuse_together(group, error, [bool(failed) for failed, *_ in everyone], call)
        sizes = tuple(rows for _, rows, _ in everyone)
    elif error is not None:
        raise error
    else:
        sizes = (rows,)
    return inputs, Ranks(group, rank, sizes, ring)


def _check_devices(group: Any, inputs: Sequence[Any]) -> None:
    carried = device_types(group)
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.device.type not in carried:
            expected = f"one for {tensor.device.type} tensors, as the features are"
            reject("group", expected, f"one for {' and '.join(carried)} tensors")


def _describe(value: Any) -> str:
    """What must be equal on all ranks: of a tensor all but its first size, of a number itself."""
    if not isinstance(value, Tensor):
        return str(value)
    gradient = "with" if value.requires_grad and torch.is_grad_enabled() else "without"
    if value.dim() > 0:
        return f"{value.dtype} {('N', *value.shape[1:])} {gradient} gradient"
    number = value.item() if may_read_values(value) else "a number"
    return f"{value.dtype} {number} {gradient} gradient"


def _exchange_numbers(group: Any, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The numbers of every rank."""
    carried = device_types(group)
    # Where there is a choice, on the CPU: reading the result from a GPU would synchronise it.
    device = torch.device("cpu" if "cpu" in carried else carried[0])
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    all_of_them = own.new_empty((dist.get_world_size(group), len(numbers)))
    collective("all_gather_single")(all_of_them.view(-1), own, group=group)
    return [tuple(row) for row in all_of_them.tolist()]


def _refuse_together(
    group: Any, error: Exception | None, failed: list[bool], call: str
) -> NoReturn:
    calls: list[str] = [""] * len(failed)
    dist.all_gather_object(calls, call, group=group)
    if error is not None:
        raise error
    if any(failed):
        refused = (f"rank {rank}: {calls[rank]}" for rank, bad in enumerate(failed) if bad)
        reject("group", "right arguments on every rank", "errors on others\n" + "\n".join(refused))
    made = (f"rank {rank}: {call}" for rank, call in enumerate(calls))
    reject("group", "the same call on every rank", "unlike ones\n" + "\n".join(made))
