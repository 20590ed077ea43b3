"""Every call into torch.distributed that moves features or statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vlmfast.distributed.ranks import Ranks, collective


def all_gather(own: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, in the order of ranks."""
    largest = max(ranks.sizes)
    padded = _padded(own, largest)
    gathered = own.new_empty((ranks.size, largest, *own.shape[1:]))
    collective("all_gather_single")(gathered.flatten(0, 1), padded, group=ranks.group)
    if min(ranks.sizes) == largest:
        return gathered.flatten(0, 1)
    return torch.cat([block[:size] for block, size in zip(gathered, ranks.sizes, strict=True)])


def reduce_scatter(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of this rank's own rows of `tensor`."""
    if tensor.device.type == "cpu":
        # gloo's reduce-scatter is an all-reduce underneath, of twice the traffic; and its sums
        # are taken in an order of its own.
        return all_to_all(tensor, ranks).sum(0)
    largest = max(ranks.sizes)
    if min(ranks.sizes) < largest:
        tensor = torch.cat([_padded(block, largest) for block in tensor.split(list(ranks.sizes))])
    summed = tensor.new_empty((largest, *tensor.shape[1:]))
    collective("reduce_scatter_single")(summed, tensor.contiguous(), group=ranks.group)
    return summed[: ranks.sizes[ranks.rank]]


def all_to_all(tensor: Tensor, ranks: Ranks) -> Tensor:
    """What each rank has to say of this rank's own rows: (ranks, rows, ...)."""
    size = ranks.sizes[ranks.rank]
    received = tensor.new_empty((ranks.size, size, *tensor.shape[1:]))
    dist.all_to_all_single(
        received.flatten(0, 1),
        tensor.contiguous(),
        output_split_sizes=[size] * ranks.size,
        input_split_sizes=list(ranks.sizes),
        group=ranks.group,
    )
    return received


def mean(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The mean over ranks."""
    total = tensor.clone()
    dist.all_reduce(total, group=ranks.group)
    return total / ranks.size


def _padded(tensor: Tensor, length: int) -> Tensor:
    if tensor.shape[0] == length:
        return tensor.contiguous()
    filler = tensor.new_zeros((length - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat((tensor, filler))


@dataclass
class Passing:
    """A tensor on its way to the next rank, while one from the rank before comes in."""

    outgoing: Tensor  # alive until it is sent
    incoming: Tensor
    requests: list[Any]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.incoming


def pass_on(outgoing: Tensor, ranks: Ranks, incoming_owner: int, dim: int) -> Passing:
    """Starts to pass a tensor on; what comes in has as many rows, along `dim`, as its owner has."""
    shape = list(outgoing.shape)
    shape[dim] = ranks.sizes[incoming_owner]
    outgoing, incoming = outgoing.contiguous(), outgoing.new_empty(shape)
    after, before = ((ranks.rank + step) % ranks.size for step in (1, -1))
    operations = [
        dist.P2POp(operation, tensor, dist.get_global_rank(ranks.group, peer), ranks.group)
        for operation, tensor, peer in (
            (dist.isend, outgoing, after),
            (dist.irecv, incoming, before),
        )
    ]
    return Passing(outgoing, incoming, dist.batch_isend_irecv(operations))


def owner_after(owner: int, ranks: Ranks) -> int:
    """Whose columns come here after those of `owner`."""
    return (owner - 1) % ranks.size


def circulate(own: Tensor, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its tensor, this rank first; the next one comes in while one is used."""
    block, owner = own, ranks.rank
    for _ in range(ranks.size - 1):
        passing = pass_on(block, ranks, owner_after(owner, ranks), dim=0)
        yield owner, block
        block, owner = passing.wait(), owner_after(owner, ranks)
    yield owner, block
