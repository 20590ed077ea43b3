"""Checks of arguments, for whatever is public.

Each of them raises a ValueError or TypeError that names the argument, what was expected and what
was got, and none reads a tensor's values, except where it says so.
"""

import math
import operator
import os
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from vlmfast.reference.common import compute_dtype

_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that a mode makes, such as FakeTensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGER = (
    *(torch.int8, torch.int16, torch.int32, torch.int64),
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
)
MOST_INT32 = 2**31 - 1
MOST_INT64 = 2**63 - 1


class Limits(NamedTuple):
    """What each dimension of a tensor counts, and the most of it that kernels can count."""

    counted: tuple[str, ...]
    most: tuple[int, ...]


def reject(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises ValueError."""
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def reject_type(argument: str, expected: str, got: Any) -> NoReturn:
    """Raises TypeError."""
    raise TypeError(f"{argument}: expected {expected}, got {got}")


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


def check_memory(argument: str, tensor: Tensor) -> None:
    """Raises ValueError for a zero tensor of torch's autograd, whose numbers lie nowhere."""
    if not torch.compiler.is_compiling() and tensor._is_zerotensor():
        reject(argument, "a tensor that has memory", "a zero tensor")


def check_alike(argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """Raises unless `tensor` has the dtype (TypeError) and device (ValueError) of `other`."""
    if tensor.dtype != other.dtype:
        reject_type(argument, f"the dtype of {other_argument}, {other.dtype}", tensor.dtype)
    check_device(argument, tensor, other_argument, other)


def check_device(argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """Raises ValueError unless `tensor` is on the device of `other`."""
    if tensor.is_cpu and other.is_cpu:  # cheaper than comparing devices
        return
    if tensor.device != other.device:
        reject(argument, f"the device of {other_argument}, {other.device}", tensor.device)


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in autocast's dtype, as torch casts its own attention: all but float64."""
    if not torch._C._is_any_autocast_enabled():
        return tensors
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in tensors
    )


def cast_alike(names: Sequence[str], tensors: Sequence[Any]) -> tuple[Tensor, ...]:
    """Floating tensors in autocast's dtype; raises unless they agree in dtype and device."""
    for name, tensor in zip(names, tensors, strict=True):
        check_floating_tensor(name, tensor)
    tensors = autocast(*tensors)
    first, *others = tensors
    for name, tensor in zip(names[1:], others, strict=True):
        check_alike(name, tensor, names[0], first)
    return tensors


def check_head_dims(query: torch.Size, key: torch.Size, value: torch.Size) -> None:
    """Raises ValueError unless shapes of query and key agree in the last size, and none is 0."""
    dim = query[-1]
    if dim == 0:
        reject("query", "a head dim of at least 1", tuple(query))
    if value[-1] == 0:
        reject("value", "a head dim of at least 1", tuple(value))
    if key[-1] != dim:
        reject("key", f"the head dim of query, {dim}", tuple(key))


def check_group(argument: str, heads: int, kv_heads: int) -> None:
    """Raises ValueError unless each head of the argument serves as many heads of query."""
    if heads % kv_heads if kv_heads else heads:
        reject(argument, f"a number of heads that divides query's, {heads}", kv_heads)


def check_sizes(argument: str, tensor: Tensor, limits: Limits) -> None:
    """Raises ValueError where a size is larger than its limit."""
    if torch.compiler.is_compiling():  # sizes that are free would be bound
        return
    if any(map(operator.gt, tensor.shape, limits.most)):
        for what, most, size in zip(*limits, tensor.shape, strict=True):
            if size > most:
                reject(argument, f"at most {most} {what}", size)


def check_fraction(argument: str, number: Any, expected: str = "a number in [0, 1]") -> float:
    """A number in [0, 1]; raises TypeError or ValueError unless it is one."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        reject_type(argument, "a number in [0, 1]", type(number).__name__)
    if not 0.0 <= number <= 1.0:
        reject(argument, expected, number)
    return float(number)


def check_dropout(argument: str, p: Any) -> float:
    """The dropout probability; raises TypeError or ValueError unless it is a number in [0, 1]."""
    return check_fraction(argument, p, "a probability in [0, 1]")


def check_choice(argument: str, choice: Any, choices: Collection[str]) -> None:
    """Raises TypeError unless `choice` is a string, ValueError unless it is one of the choices."""
    if not isinstance(choice, str):
        reject_type(argument, "a string", type(choice).__name__)
    if choice not in choices:
        reject(argument, f"one of {', '.join(map(repr, choices))}", repr(choice))


def softmax_scale(scale: Any, head_dim: int, dtype: torch.dtype = torch.float32) -> float:
    """The factor of the logits of `dtype`: 1 / sqrt(head_dim) for None. 0 is legal."""
    if scale is None:
        return 1.0 / math.sqrt(head_dim)
    return check_number("scale", scale, dtype, "a number or None")


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
