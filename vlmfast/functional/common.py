"""What the functions of all families share: argument checks, autocast, dropout's seed.

Every check raises a ValueError or TypeError that names the argument, what was expected and what was
got, and none of them reads a tensor's values, but where it says so.
"""

import math
import operator
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import torch
from torch import Tensor

from vlmfast import backends
from vlmfast.ops.common import EXTENSION_ERROR, call_eagerly, is_eager
from vlmfast.ops.common import call as ops_call
from vlmfast.reference.common import compute_dtype

_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that a mode makes, such as FakeTensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
MOST_INT32 = 2**31 - 1
_MOST_FLOAT32 = torch.finfo(torch.float32).max


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
    """The results of an operator; None where it fails, for checks of the caller's to say why.

    What passes them is called again, and what then fails is raised.
    """
    try:
        return call_eagerly(operator, *args)
    except RuntimeError:
        return None


def call(operator: Any, args: Sequence[Any], names: Mapping[str, str] | None = None) -> Any:
    """The results of an operator; what it refuses by its own checks is raised as a ValueError.

    Args:
        operator: of `vlmfast.ops`.
        args: its arguments.
        names: what the caller calls those that have other names there.
    """
    try:
        return ops_call(operator, *args)
    except RuntimeError as error:
        refusal = re.search(r"([a-z]\w*(?:, \w+)*)(: expected .*)", str(error))
        if refusal is None:
            raise
    arguments, says = refusal.groups()
    called = (names.get(name, name) if names else name for name in arguments.split(", "))
    raise ValueError(", ".join(called) + says)


def check_floating_tensor(argument: str, tensor: Any) -> None:
    """Raises TypeError unless `tensor` is a strided, real, floating tensor of 16 bits or more."""
    check_strided(argument, tensor)
    if tensor.dtype not in FLOATING:
        reject_type(argument, f"a {floating_dtype(tensor)}", tensor.dtype)


def floating_dtype(got: Tensor) -> str:
    """What is expected where the dtype of `got` is none of FLOATING."""
    return f"floating dtype{' of 16 to 64 bits' if got.is_floating_point() else ''}"


def check_strided(argument: str, tensor: Any, expected: str = "a tensor") -> None:
    """Raises TypeError unless `tensor` is a tensor, with one stride for each dimension."""
    if not isinstance(tensor, Tensor):
        reject_type(argument, expected, type(tensor).__name__)
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
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        reject_type(argument, "a number in [0, 1]", type(p).__name__)
    if not 0.0 <= p <= 1.0:
        reject(argument, "a probability in [0, 1]", p)
    return float(p)


def softmax_scale(scale: Any, head_dim: int, dtype: torch.dtype = torch.float32) -> float:
    """The factor of the logits of `dtype`: 1 / sqrt(head_dim) for None. 0 is legal."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return check_number("scale", scale, dtype, "a number or None")


def plain_scale(scale: Any, head_dim: int) -> float | None:
    """`softmax_scale` where it need not check, and None where it must."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return scale if is_plain_number(scale) else None


def is_plain_number(number: Any) -> bool:
    """Whether `check_number` would return the number as it is."""
    return type(number) is float and -_MOST_FLOAT32 <= number <= _MOST_FLOAT32


def is_plain_integer(number: Any) -> bool:
    """Whether `check_integer` would return the number as it is."""
    return type(number) is int and 0 <= number <= MOST_INT32


def check_number(
    argument: str, number: Any, dtype: torch.dtype = torch.float32, expected: str = "a number"
) -> float:
    """A finite number; raises unless it is one, also in the dtype in which `dtype` is computed."""
    if isinstance(number, (torch.SymInt, torch.SymFloat)):
        return number  # type: ignore[return-value]
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        reject_type(argument, expected, type(number).__name__)
    most = torch.finfo(compute_dtype(dtype)).max
    if not -most <= number <= most:
        reject(argument, f"a finite number, of at most {most:.4g}", number)
    return float(number)


def check_integer(argument: str, number: Any, least: int = 0, most: int = MOST_INT32) -> int:
    """An integer from `least` to `most`; raises TypeError or ValueError unless it is one."""
    if isinstance(number, torch.SymInt):
        return number  # type: ignore[return-value]
    if isinstance(number, bool):
        reject_type(argument, "an int", "bool")
    try:
        value = operator.index(number)  # NumPy's integers, too
    except TypeError:
        reject_type(argument, "an int", type(number).__name__)
    if value < least:
        reject(argument, f"at least {least}", value)
    if value > most:
        reject(argument, f"at most {most}", value)
    return value


def check_flag(argument: str, flag: Any) -> bool:
    """True or False; raises TypeError for anything else, which would count as one of them."""
    if not isinstance(flag, (bool, torch.SymBool)):
        reject_type(argument, "True or False", type(flag).__name__)
    return flag  # type: ignore[return-value]


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
    if type(tensor) not in _PLAIN or tensor._is_zerotensor():  # which has no memory
        return False
    return tensor.device.type == "cpu" or (
        tensor.device.type != "meta" and os.environ.get("VLMFAST_CHECKS") == "1"
    )
