"""Contrastive losses whose batch is spread over the ranks of a torch.distributed process group.

Rank r holds n_r of the N pairs. It computes the n_r x N block of logits between its own rows and
the columns of all ranks, once: of each of its own rows it then knows everything, and what the
blocks say of a column is merged on the rank that owns it, from (maximum, sum) pairs. Backward goes
the same way in reverse, and a rank does 1 / W of the work of one process.

    statistic      gather (the default)                       `Ring`
    columns        all-gathered, kept for backward            passed around, in backward again
    of columns     all-to-all of (maximum, sum)               travel with their columns
    their gradient all-gathered (maximum, gradient of sum)    travel with their columns
    gradient to
    the columns    summed in float32 by reduce-scatter        summed in float32 as it travels

Nothing here is an engine of its own: all communication is torch.distributed's, so a rank that dies
or stays away ends the call by the timeout of the group. The functions below are what
`vlmfast.functional` is built on; users meet `Ring` alone.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmfast.checks import may_read_values, reject, reject_type
from vlmfast.functional import contrastive_loss as functional
from vlmfast.ops import contrastive_loss as ops
from vlmfast.reference.common import compute_dtype
from vlmfast.reference.contrastive_loss import contrastive_loss as reference

__all__ = ["Ranks", "Ring"]

_eager = torch.compiler.disable(
    reason="collectives of vlmfast.distributed run outside of compiled graphs"
)


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


# --- Who takes part ---


@_eager
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
    group, ring = _process_group(group)
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


def world_size(group: Any) -> int:
    """How many ranks a process group or `Ring` has. Raises as `join` does."""
    return dist.get_world_size(_process_group(group)[0])


def rank_in(group: Any) -> int:
    """This process's rank in a process group or `Ring`. Raises as `join` does."""
    return dist.get_rank(_process_group(group)[0])


def _process_group(group: Any) -> tuple[Any, bool]:
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


def _device_types(group: Any) -> list[str]:
    """Whose tensors the backends of a group carry."""
    config = dist.get_backend_config(group)  # "cpu:gloo,cuda:nccl"
    return [backend.partition(":")[0] for backend in config.split(",")]


def _check_devices(group: Any, inputs: Sequence[Any]) -> None:
    device_types = _device_types(group)
    for tensor in inputs:
        if isinstance(tensor, Tensor) and tensor.device.type not in device_types:
            expected = f"one for {tensor.device.type} tensors, as the features are"
            reject("group", expected, f"one for {' and '.join(device_types)} tensors")


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
    device_types = _device_types(group)
    # Where there is a choice, on the CPU: reading the result from a GPU would synchronise it.
    device = torch.device("cpu" if "cpu" in device_types else device_types[0])
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    all_of_them = own.new_empty((dist.get_world_size(group), len(numbers)))
    _collective("all_gather_single")(all_of_them.view(-1), own, group=group)
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


# --- What a loss is built of ---


@_eager
def everyone(own: Tensor, ranks: Ranks | None) -> Tensor:
    """The columns that `statistics` takes: those of all ranks, or in a ring this rank's own.

    Backward adds up in float32 what each rank's loss says of `own`.
    """
    if ranks is None or ranks.ring or ranks.size == 1:
        return own
    return _Gather.apply(own, ranks)


@_eager
def statistics(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    sigmoid: bool,
    column_statistics: bool,
    backend: str | None,
    ranks: Ranks,
) -> functional.Statistics:
    """`vlmfast.functional.contrastive_loss.statistics` of this rank's own rows and own columns.

    Row i and column i of a rank are a pair.

    Args:
        rows: this rank's.
        columns: what `everyone` returned.
        ranks: all of them take part.
    """
    if ranks.ring and ranks.size > 1:
        if rows.dim() == 2:
            rows = rows.unsqueeze(1)
        # Chosen once: use_backend may have ended when backward runs.
        chosen = functional.choose(rows, columns, backend)
        settings = _Settings(sigmoid, column_statistics, chosen)
        return functional.Statistics(
            *_RingStatistics.apply(rows, columns, scale, bias, settings, ranks)
        )
    block = functional.statistics(
        rows, columns, scale, bias, ranks.offset, sigmoid, column_statistics, backend
    )
    if ranks.size == 1 or not column_statistics:
        return block
    merged = _MergeColumns.apply(block.column_max, block.column_sum, ranks)
    return block._replace(column_max=merged[0], column_sum=merged[1])


@_eager
def mean_over_ranks(loss: Tensor, ranks: Ranks) -> Tensor:
    """The mean of all ranks' losses; each of them gets the mean of the gradients."""
    return _Mean.apply(loss, ranks, True)


@_eager
def mean_gradient(tensor: Tensor, ranks: Ranks) -> Tensor:
    """`tensor` itself; in backward, the mean of all ranks' gradients."""
    return _Mean.apply(tensor, ranks, False)


@_eager
def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """`tensor` itself; in backward, `factor` times its gradient."""
    return _ScaleGradient.apply(tensor, factor)


# --- Gathering ---


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return _all_gather(own, ranks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # Summed as kernels sum: in float32, and rounded once.
        wide = gradient.to(compute_dtype(gradient.dtype))
        return _reduce_scatter(wide, ctx.ranks).to(gradient.dtype), None


class _MergeColumns(torch.autograd.Function):
    """From this rank's statistics of all columns to all ranks' statistics of its own columns."""

    @staticmethod
    def forward(ctx: Any, maxima: Tensor, sums: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        blocks = _all_to_all(torch.stack((maxima, sums), -1), ranks).unbind(-1)
        own_max, own_sum = functional.merge(*blocks)
        ctx.ranks = ranks
        ctx.save_for_backward(maxima, own_max)
        ctx.mark_non_differentiable(own_max)
        return own_max, own_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: Any, gradient: Tensor) -> Any:
        maxima, own_max = ctx.saved_tensors
        merged = _all_gather(torch.stack((own_max, gradient), -1), ctx.ranks)
        return None, _relative_to(maxima, *merged.unbind(-1)), None


def _relative_to(maxima: Tensor, merged_maxima: Tensor, gradient: Tensor) -> Tensor:
    """The gradient of a block's sums, which count from its own maxima, from that of merged sums."""
    return gradient * torch.exp(maxima - merged_maxima)


class _Mean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, of_values: bool) -> Tensor:
        ctx.ranks = ranks
        return _mean(tensor, ranks) if of_values else tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _mean(gradient, ctx.ranks), None, None


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient * ctx.factor, None


# --- The ring ---


class _Settings(NamedTuple):
    sigmoid: bool
    column_statistics: bool
    backend: str


class _RingStatistics(torch.autograd.Function):
    """`statistics`, one rank's columns at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        columns: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        settings: _Settings,
        ranks: Ranks,
    ) -> tuple[Tensor, ...]:
        of_rows: list[Tensor] = []
        passed: _Passing | None = None
        for owner, block in _circulate(columns, ranks):
            first_column = _first_column(owner, block, ranks)
            part = functional.statistics(rows, block, scale, bias, first_column, *settings)
            if not of_rows:
                of_rows = [part.row_max, part.row_sum, part.row_total, part.positive]
            else:
                of_rows[:2] = _merge(of_rows[0], of_rows[1], part.row_max, part.row_sum)
                of_rows[2] += part.row_total
                of_rows[3] += part.positive
            if settings.column_statistics:
                of_columns = torch.stack((part.column_max, part.column_sum))
                if passed is not None:
                    of_columns = torch.stack(_merge(*passed.wait().unbind(), *of_columns.unbind()))
                passed = _pass_on(of_columns, ranks, _owner_after(owner, ranks), dim=1)
        if passed is None:
            own_max = own_sum = of_rows[0].new_empty(0)
        else:
            own_max, own_sum = passed.wait().unbind()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows, columns, scale, bias, of_rows[0], own_max)
        ctx.mark_non_differentiable(of_rows[0], own_max)
        ctx.settings, ctx.ranks = settings, ranks
        return (*of_rows, own_max, own_sum)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _row_max: None,
        grad_row_sum: Tensor | None,
        grad_row_total: Tensor | None,
        grad_positive: Tensor | None,
        _column_max: None,
        grad_column_sum: Tensor | None,
    ) -> Any:
        rows, columns, scale, bias, row_max, column_max = ctx.saved_tensors
        ranks: Ranks = ctx.ranks
        wanted = ctx.needs_input_grad[:4]
        of_all_columns: Iterator[Any] = repeat((None, None))
        if grad_column_sum is not None:
            own_columns = torch.stack((column_max, grad_column_sum), -1)
            of_all_columns = (x.unbind(-1) for _, x in _circulate(own_columns, ranks))
        sums: list[Tensor | None] = [None] * 4
        passed: _Passing | None = None
        for owner, block in _circulate(columns, ranks):
            block_max, grad_block_sum = next(of_all_columns)
            gradients: Any = _block_backward(
                (grad_row_sum, grad_row_total, grad_positive, grad_block_sum),
                (rows, block, scale, bias),
                (row_max, column_max if block_max is None else block_max),
                _first_column(owner, block, ranks),
                ctx.settings,
                wanted,
            )
            for index in (0, 2, 3):
                if wanted[index]:
                    sums[index] = _add(sums[index], gradients[index])
            if wanted[1]:
                passed = _pass_on(
                    _add(None if passed is None else passed.wait(), gradients[1]),
                    ranks,
                    _owner_after(owner, ranks),
                    dim=0,
                )
            del gradients  # before the next block's are made
        if passed is not None:
            sums[1] = passed.wait()
        inputs = (rows, columns, scale, bias)
        rounded = [x if x is None else x.to(y.dtype) for x, y in zip(sums, inputs, strict=True)]
        return (*rounded, None, None)


def _first_column(owner: int, columns: Tensor, ranks: Ranks) -> int:
    """Rows have their pairs among this rank's own columns; in others' they have none."""
    return 0 if owner == ranks.rank else columns.shape[0]


def _merge(*maxima_and_sums: Tensor) -> tuple[Tensor, Tensor]:
    maxima, sums = maxima_and_sums[::2], maxima_and_sums[1::2]
    return functional.merge(torch.stack(maxima), torch.stack(sums))


def _add(so_far: Tensor | None, more: Tensor) -> Tensor:
    return more if so_far is None else so_far.add_(more)


def _block_backward(
    gradients: tuple[Tensor | None, ...],
    inputs: tuple[Tensor, Tensor, Tensor, Tensor | None],
    maxima: tuple[Tensor, Tensor],
    first_column: int,
    settings: _Settings,
    wanted: Sequence[bool],
) -> Sequence[Any]:
    """Gradients of a block's rows, columns, scale and bias; float32 for half precision.

    Args:
        gradients: of row_sum, row_total, positive and column_sum, counted from `maxima`.
        inputs: rows, columns, scale, bias.
        maxima: of rows and columns over all blocks.
        wanted: which gradients.
    """
    rows = inputs[0]
    if settings.backend != "reference":
        return ops.BACKWARD[settings.backend](
            *gradients, *inputs, *maxima, first_column, settings.sigmoid, *wanted, True
        )
    # The reference is differentiable, but has maxima of its own.
    dtype = compute_dtype(rows.dtype)
    leaves: list[Any] = [
        None if x is None else x.detach().to(dtype).requires_grad_(needed)
        for x, needed in zip(inputs, wanted, strict=True)
    ]
    with torch.enable_grad():
        row_max, row_sum, row_total, positive, column_max, column_sum = reference(
            leaves[0],
            leaves[1],
            leaves[2],
            leaves[3],
            first_column,
            settings.sigmoid,
            settings.column_statistics,
        )
    grad_row_sum, grad_row_total, grad_positive, grad_column_sum = gradients
    if grad_row_sum is not None:
        grad_row_sum = _relative_to(row_max, maxima[0], grad_row_sum)
    if grad_column_sum is not None:
        grad_column_sum = _relative_to(column_max, maxima[1], grad_column_sum)
    outputs = (row_sum, row_total, positive, column_sum)
    given = (grad_row_sum, grad_row_total, grad_positive, grad_column_sum)
    pairs = [(out, grad) for out, grad in zip(outputs, given, strict=True) if grad is not None]
    needed_leaves = [x for x in leaves if x is not None and x.requires_grad]
    found = iter(
        torch.autograd.grad(
            [out for out, _ in pairs],
            needed_leaves,
            [grad for _, grad in pairs],
            materialize_grads=True,
        )
    )
    return [next(found) if needed else None for needed in wanted]


# --- Communication: every call into torch.distributed that moves features or statistics ---

_NAMES_BEFORE_TORCH_2_13 = {
    "all_gather_single": "all_gather_into_tensor",
    "reduce_scatter_single": "reduce_scatter_tensor",
}


def _collective(name: str) -> Callable[..., Any]:
    """A collective of torch.distributed by the name that it has in this version."""
    return getattr(dist, name if hasattr(dist, name) else _NAMES_BEFORE_TORCH_2_13[name])


def _all_gather(own: Tensor, ranks: Ranks) -> Tensor:
    """The rows of all ranks, in the order of ranks."""
    largest = max(ranks.sizes)
    padded = _padded(own, largest)
    gathered = own.new_empty((ranks.size, largest, *own.shape[1:]))
    _collective("all_gather_single")(gathered.flatten(0, 1), padded, group=ranks.group)
    if min(ranks.sizes) == largest:
        return gathered.flatten(0, 1)
    return torch.cat([block[:size] for block, size in zip(gathered, ranks.sizes, strict=True)])


def _reduce_scatter(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over ranks of this rank's own rows of `tensor`."""
    if tensor.device.type == "cpu":
        # gloo's reduce-scatter is an all-reduce underneath, of twice the traffic; and its sums
        # are taken in an order of its own.
        return _all_to_all(tensor, ranks).sum(0)
    largest = max(ranks.sizes)
    if min(ranks.sizes) < largest:
        tensor = torch.cat([_padded(block, largest) for block in tensor.split(list(ranks.sizes))])
    summed = tensor.new_empty((largest, *tensor.shape[1:]))
    _collective("reduce_scatter_single")(summed, tensor.contiguous(), group=ranks.group)
    return summed[: ranks.sizes[ranks.rank]]


def _all_to_all(tensor: Tensor, ranks: Ranks) -> Tensor:
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


def _mean(tensor: Tensor, ranks: Ranks) -> Tensor:
    total = tensor.clone()
    dist.all_reduce(total, group=ranks.group)
    return total / ranks.size


def _padded(tensor: Tensor, length: int) -> Tensor:
    if tensor.shape[0] == length:
        return tensor.contiguous()
    filler = tensor.new_zeros((length - tensor.shape[0], *tensor.shape[1:]))
    return torch.cat((tensor, filler))


@dataclass
class _Passing:
    """A tensor on its way to the next rank, while one from the rank before comes in."""

    outgoing: Tensor  # alive until it is sent
    incoming: Tensor
    requests: list[Any]

    def wait(self) -> Tensor:
        for request in self.requests:
            request.wait()
        return self.incoming


def _pass_on(outgoing: Tensor, ranks: Ranks, incoming_owner: int, dim: int) -> _Passing:
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
    return _Passing(outgoing, incoming, dist.batch_isend_irecv(operations))


def _owner_after(owner: int, ranks: Ranks) -> int:
    """Whose columns come here after those of `owner`."""
    return (owner - 1) % ranks.size


def _circulate(own: Tensor, ranks: Ranks) -> Iterator[tuple[int, Tensor]]:
    """Each rank and its tensor, this rank first; the next one comes in while one is used."""
    block, owner = own, ranks.rank
    for _ in range(ranks.size - 1):
        passing = _pass_on(block, ranks, _owner_after(owner, ranks), dim=0)
        yield owner, block
        block, owner = passing.wait(), _owner_after(owner, ranks)
    yield owner, block
