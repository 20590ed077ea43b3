"""What takes the place of an argument: aliens, and what resembles the right value."""

from __future__ import annotations

import fractions
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

Variant = tuple[str, Callable[[], Any]]


ALIENS: tuple[tuple[str, Any], ...] = (
    ("None", None),
    ("a string", "abc"),
    ("an empty string", ""),
    ("bytes", b"padded"),
    ("an empty list", []),
    ("a list of floats", [1.0, 2.0]),
    ("a tuple of ints", (1, 1)),
    ("a triple of ints", (2, 2, 2)),
    ("a nested list", [[True, False]]),
    ("a dict", {}),
    ("a set", {1}),
    ("an object", object()),
    ("a class", int),
    ("a function", len),
    ("a module", torch),
    ("a dtype", torch.float32),
    ("a device", torch.device("cpu")),
    ("True", True),
    ("False", False),
    ("nan", float("nan")),
    ("inf", float("inf")),
    ("-inf", float("-inf")),
    ("1e39", 1e39),
    ("-1e39", -1e39),
    ("1e300", 1e300),
    ("1e-60", 1e-60),
    ("-0.0", -0.0),
    ("0.5", 0.5),
    ("1.0", 1.0),
    ("1.5", 1.5),
    ("-0.5", -0.5),
    ("10**400", 10**400),
    ("-10**400", -(10**400)),
    ("-1", -1),
    ("0", 0),
    ("1", 1),
    ("2**31 - 1", 2**31 - 1),
    ("2**31", 2**31),
    ("2**32 + 1", 2**32 + 1),
    ("2**63 - 1", 2**63 - 1),
    ("2**63", 2**63),
    ("2**64 + 1", 2**64 + 1),
    ("-2**63 - 1", -(2**63) - 1),
    ("a complex number", 1j),
    ("a fraction", fractions.Fraction(1, 2)),
    ("numpy.float32", np.float32(0.5)),
    ("numpy.float64", np.float64(0.5)),
    ("numpy.float64 nan", np.float64("nan")),
    ("numpy.int64", np.int64(1)),
    ("numpy.int64 -1", np.int64(-1)),
    ("numpy.uint64 2**63", np.uint64(2**63)),
    ("numpy.bool_", np.bool_(True)),
    ("numpy.str_", np.str_("abc")),
    ("a numpy array", np.ones((5, 8), np.float32)),
    ("a numpy 0-d array", np.array(1)),
    ("a 0-d tensor", torch.tensor(0.5)),
    ("a 0-d int tensor", torch.tensor(1)),
    ("a bool tensor", torch.tensor([True, False])),
    ("a float tensor", torch.ones(3)),
    ("a complex 0-d tensor", torch.tensor(1j)),
    ("a sparse tensor", torch.eye(3).to_sparse()),
    ("a nested tensor", torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])),
    ("an empty tensor", torch.empty(0)),
    ("a meta scalar", torch.tensor(0.5, device="meta")),
)

DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


class Subclass(Tensor):
    pass


class FunctionSubclass(Tensor):
    """One that torch's functions are handed to, as libraries that carry units or metadata make."""

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, kinds, args, kwargs or {})


def grown(x: Tensor, dim: int) -> Tensor:
    return torch.cat((x, x.narrow(dim, 0, 1)), dim)


def expanded(x: Tensor, dim: int, size: int) -> Tensor:
    return x.narrow(dim, 0, 1).expand(*x.shape[:dim], size, *x.shape[dim + 1 :])


def with_element(x: Tensor, number: float) -> Tensor:
    x = x.clone()
    x.view(-1)[x.numel() // 2] = number
    return x


def overlapping(x: Tensor) -> Tensor:
    """Rows that lie one number apart."""
    strides = tuple(1 for _ in x.shape)
    return x.flatten().as_strided(x.shape, strides)


def sliced(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def without_memory(x: Tensor) -> Tensor:
    if x.numel() == 1:
        raise ValueError("torch's own product of such a one and a number is of a wrong dtype")
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def frozen(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def in_bits(x: Tensor) -> Tensor:
    return x.to(torch.uint8).view(torch.bits8)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.5, 1, torch.quint8)


def quantized_int32(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint32)


def faked(x: Tensor) -> Tensor:
    # Mixed with true tensors, as constants in a traced program are.
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


TENSOR_VARIANTS: tuple[tuple[str, Callable[[Tensor], Any]], ...] = (
    *((str(dtype), lambda x, dtype=dtype: x.to(dtype)) for dtype in DTYPES),
    ("quint8", quantized),
    ("qint32", quantized_int32),
    ("bits8", in_bits),
    ("on meta", lambda x: x.to("meta")),
    ("sparse COO", lambda x: x.to_sparse()),
    ("sparse CSR", lambda x: x.to_sparse_csr()),
    ("mkldnn", lambda x: x.to_mkldnn()),
    ("nested, strided", lambda x: torch.nested.nested_tensor(list(x))),
    ("nested, jagged", lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)),
    ("one dimension more", lambda x: x[None]),
    ("one dimension less", lambda x: x[0]),
    ("0-d", lambda x: x.flatten()[0]),
    ("1-d", lambda x: x.flatten()),
    ("seven dimensions", lambda x: x[(None,) * (7 - x.dim())]),
    ("transposed in memory", transposed),
    ("every other number", sliced),
    ("overlapping", overlapping),
    ("negated view", lambda x: torch._neg_view(-x)),
    ("zero tensor", without_memory),
    ("inference tensor", frozen),
    ("Parameter", lambda x: nn.Parameter(x)),
    ("requires_grad", lambda x: x.requires_grad_()),
    ("subclass", lambda x: x.as_subclass(Subclass)),
    ("subclass with __torch_function__", lambda x: x.as_subclass(FunctionSubclass)),
    ("subclass with __torch_dispatch__", lambda x: TwoTensor(x, x.clone())),
    ("FakeTensor", faked),
    ("as a numpy array", lambda x: x.numpy()),
    ("as a list", lambda x: x.tolist()),
    *(
        (f"with {number}", lambda x, number=number: with_element(x, number))
        for number in (float("nan"), float("inf"), float("-inf"), 1e15, 1e-40, -1, 2**31 - 1, 2**40)
    ),
    ("uint64 of 2**63", lambda x: with_element(x.to(torch.int64), -(2**63)).view(torch.uint64)),
    ("negative infinity throughout", lambda x: torch.full_like(x, float("-inf"))),
    ("int32 of huge numbers", lambda x: torch.full_like(x, 2**31 - 1, dtype=torch.int32)),
    ("int32 of negative numbers", lambda x: torch.full_like(x, -7, dtype=torch.int32)),
)
SIZE_VARIANTS: tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...] = (
    ("of size 0", lambda x, dim: x.narrow(dim, 0, 0)),
    ("one larger", grown),
    ("of size 1", lambda x, dim: x.narrow(dim, 0, 1)),
    ("of size 2**31", lambda x, dim: expanded(x, dim, 2**31)),
    ("of size 2**40", lambda x, dim: expanded(x, dim, 2**40)),
)
TRANSFORMS = ("vmap", "func.grad", "vmap of func.grad")


class Impossible(Exception):
    """A variant that torch itself cannot make of this tensor."""


def variants(make: Callable[[], Any]) -> Iterator[Variant]:
    """What resembles a valid value, and is made anew at each call."""
    base = make()

    def of_tensor(change: Callable[..., Any], *more: Any) -> Callable[[], Any]:
        def variant() -> Any:
            try:
                return change(make(), *more)
            except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise Impossible from error

        return variant

    if isinstance(base, Tensor):
        for label, change in TENSOR_VARIANTS:
            yield label, of_tensor(change)
        for dim in range(base.dim()):
            for label, change in SIZE_VARIANTS:
                yield f"dimension {dim} {label}", of_tensor(change, dim)
    elif isinstance(base, (tuple, list)):
        is_named = hasattr(base, "_replace")

        def rebuilt(parts: list[Any]) -> Any:
            return type(base)(*parts) if is_named else type(base)(parts)

        for index, part in enumerate(base):
            place = base._fields[index] if is_named else index
            inner = variants(lambda index=index: make()[index])
            aliens = ((label, lambda alien=alien: alien) for label, alien in ALIENS)
            for label, make_part in (*aliens, *inner):
                if type(part) is str:
                    continue

                def variant(index: int = index, make_part: Any = make_part) -> Any:
                    parts = list(make())
                    parts[index] = make_part()
                    return rebuilt(parts)

                yield f"[{place}] {label}", variant
        if not is_named:
            yield "shorter", lambda: type(base)(list(make())[:-1])
            yield "longer", lambda: type(base)([*make(), make()[0]])
