"""What the functions of all families share: argument checks, autocast, dropout's seed.

Every check raises a ValueError or TypeError that names the argument, what was expected and what was
got, and none of them reads a tensor's values, but where it says so.
"""

import math
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmfast import backends
from vlmfast.ops.common import EXTENSION_ERROR, call_eagerly, is_eager

_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that a mode makes, such as FakeTensor


def reject(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def reject_type(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises TypeError."""
    raise TypeError(f"{argument}: expected {expected}, got {got}")


def may_run_unchecked(
    backend: str | None, tensors: Sequence[Any], optional: Sequence[Any] = ()
) -> bool:
    """Whether a call may go to the CPU's operator first and be checked only if that refuses.

    The operator checks all that could touch foreign memory, in less time than Python takes to look
    at the tensors: that is 0.1 ms where a model's other layers have taken the cache meanwhile. Here
    it need only be certain that it is this operator, on values, that will be called.
    """
    return (
        backend is None
        and EXTENSION_ERROR is None
        and backends.is_free()
        and is_eager()
        and not torch.is_autocast_enabled("cpu")
        and all(map(_holds_values, tensors))
        and all(tensor is None or _holds_values(tensor) for tensor in optional)
        and tensors[0].dtype in backends.HALF_OR_FLOAT
    )


def _holds_values(tensor: Any) -> bool:
    return type(tensor) in _PLAIN and tensor.is_cpu and not tensor.is_nested


def call_unchecked(operator: Any, *args: Any) -> Any:
    """The results of an operator; None where it refuses, for checks of the caller's to say why."""
    try:
        return call_eagerly(operator, *args)
    except NotImplementedError:  # no strided tensors
        return None
    except RuntimeError as error:
        if ": expected" not in str(error):  # which is how the operators refuse
            raise
        return None


def check_floating_tensor(argument: str, tensor: Any) -> None:
    """Raises TypeError unless `tensor` is a strided, real, floating tensor."""
    if not isinstance(tensor, Tensor):
        reject_type(argument, "a tensor", type(tensor).__name__)
    if not tensor.is_floating_point():
        reject_type(argument, "a floating dtype", tensor.dtype)
    if tensor.is_nested:
        expected = "a strided tensor (ragged batches: see varlen_attention)"
        reject_type(argument, expected, "a nested tensor")
    if tensor.layout is not torch.strided:
        reject_type(argument, "a strided tensor", tensor.layout)


def check_alike(argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """Raises unless `tensor` has the dtype (TypeError) and device (ValueError) of `other`."""
    if tensor.dtype != other.dtype:
        reject_type(argument, f"the dtype of {other_argument}, {other.dtype}", tensor.dtype)
    check_device(argument, tensor, other_argument, other)


def check_device(argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """Raises ValueError unless `tensor` is on the device of `other`."""
    if tensor.device != other.device:
        reject(argument, f"the device of {other_argument}, {other.device}", tensor.device)


def check_dropout(argument: str, p: Any) -> float:
    """The dropout probability; raises TypeError or ValueError unless it is a number in [0, 1]."""
    if not isinstance(p, (int, float)):
        reject_type(argument, "a number in [0, 1]", type(p).__name__)
    if not 0.0 <= p <= 1.0:
        reject(argument, "a probability in [0, 1]", p)
    return float(p)


def softmax_scale(scale: Any, head_dim: int) -> float:
    """The factor of the logits: 1 / sqrt(head_dim) for None. 0 is legal."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    if not isinstance(scale, (int, float, torch.SymInt, torch.SymFloat)):
        reject_type("scale", "a number or None", type(scale).__name__)
    return scale if isinstance(scale, torch.SymFloat) else float(scale)  # type: ignore[return-value]


def draw_seed(device: torch.device) -> Tensor:
    """The key of a dropout mask, drawn from torch's generator: int64 (1,)."""
    return torch.randint(0, 2**62, (1,), dtype=torch.int64, device=device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, as torch casts its own attention: all but float64."""
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def no_autocast(device_type: str) -> AbstractContextManager[None]:
    """A context without autocast, for a reference: it rounds nothing that it was not given."""
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def may_read_values(tensor: Tensor) -> bool:
    """Whether a check may look at the values of a tensor.

    It may on the CPU; on a GPU, where that would synchronise, only with VLMFAST_CHECKS=1; and never
    while a graph is traced, or under vmap, where there are no values.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.is_batchedtensor(tensor):
        return False
    if type(tensor) not in _PLAIN:
        return False
    return tensor.device.type == "cpu" or (
        tensor.device.type != "meta" and os.environ.get("VLMFAST_CHECKS") == "1"
    )
