"""The one way from checked arguments to a family's results: by the backend that runs them."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from vlmfast import backends, checks
from vlmfast.families import rows
from vlmfast.ops import common as ops

_OPERATORS = rows("vlmfast.ops")
_REFERENCES = rows("vlmfast.reference")


def run(
    family: str,
    args: Sequence[Any],
    backend: str | None,
    inputs: Sequence[Any],
    dropout_p: float | None = None,
    out_like_query: bool = False,
    limits: Sequence[tuple[str, Tensor, checks.Limits]] = (),
) -> Any:
    """What the operators of a family return, and its reference with the same arguments.

    Args:
        family: its name.
        args: of the operator, the tensor that says where it runs first.
        backend: what the caller passed as `backend=`.
        inputs: what the predicates of the family look at.
        dropout_p: where the operator takes a seed as its last argument: it is drawn here, for a
            call that is refused or explained must not draw it.
        out_like_query: the first result lies in memory as the first argument does, (B, H, L, D)
            both, so that a view that one backend allows the others allow, too. Kernels do that
            themselves.
        limits: by the names of arguments, the sizes that the C++ kernels can count.

    Raises:
        ValueError: a size is above its limit.
        NotImplementedError: the forced backend cannot run the inputs.
    """
    first = args[0]
    device_type = "cpu" if first.is_cpu else first.device.type  # a string that costs
    chosen = backends.choose(family, backend, device_type, *inputs)
    if chosen == "cpu" and device_type == "cpu":
        for argument, tensor, sizes in limits:
            checks.check_sizes(argument, tensor, sizes)
    if dropout_p is not None:
        args = (*args, _draw_seed(first.device) if dropout_p > 0.0 else None)
    if chosen != "reference":
        return ops.call(_OPERATORS[family].FORWARD[chosen], *args)
    with no_autocast(device_type):
        out, *others = getattr(_REFERENCES[family], family)(*args)
    if out_like_query and ops.heads_inside_tokens(first):
        out = out.transpose(1, 2).contiguous().transpose(1, 2)
    return out, *others


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context without autocast, for a reference: it rounds nothing that it was not given."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _draw_seed(device: torch.device) -> Tensor:
    """The key of a dropout mask, drawn from torch's generator: int64 (1,)."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)
