"""A try, and how it ended."""

from __future__ import annotations

import collections.abc
import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import vlmfast.functional as VF
from tools.hostile.calls import Call, calls
from tools.hostile.values import (
    ALIENS,
    TENSOR_VARIANTS,
    TRANSFORMS,
    Impossible,
    faked,
    frozen,
    variants,
)

TOO_LARGE = re.compile("you tried to allocate|cannot allocate|size calculation overflowed")
REFUSALS = (ValueError, TypeError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Try:
    call: Call
    argument: str  # or "" where all tensors are changed together
    label: str
    run: Callable[[], str]  # the outcome

    @property
    def name(self) -> str:
        return f"{self.call.name}: {self.argument or 'all tensors'} = {self.label}"


def tries(plant: bool = False) -> list[Try]:
    found = []
    for call in calls(plant):
        base = call.make()
        check_valid(call)
        for argument in arguments_of(call):
            here = [(label, lambda alien=alien: alien) for label, alien in ALIENS]
            here += variants(lambda call=call, argument=argument: call.make()[argument])
            for label, make in here:
                run = replaced(call, argument, make, grad=label != "inference tensor")
                found.append(Try(call, argument, label, run))
            if call.on_reference and isinstance(base[argument], Tensor):
                for transform in TRANSFORMS:
                    run = transformed(call, argument, transform)
                    found.append(Try(call, argument, f"under {transform}", run))
        if call.on_reference and any(isinstance(x, Tensor) for x in base.values()):
            for label, change in TENSOR_VARIANTS:
                found.append(Try(call, "", label, changed_together(call, change)))
    return found


def arguments_of(call: Call) -> list[str]:
    """The arguments of a call, which must be all that its signature has."""
    parameters = inspect.signature(call.signature or call.function).parameters.values()
    named = {
        p.name
        for p in parameters
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    assert named == set(call.make()), f"{call.name}: its call lacks {named ^ set(call.make())}"
    return [name for name in call.make()]


def check_valid(call: Call) -> None:
    outcome = judge(call, call.make(), tuple(call.make()))
    assert outcome in ("right", "as torch"), f"{call.name}: its valid call {outcome}"


def replaced(
    call: Call, argument: str, make: Callable[[], Any], grad: bool = True
) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        try:
            arguments[argument] = make()
        except Impossible:
            return "impossible"
        if argument in ("filter", "fn") and callable(arguments[argument]):
            return "impossible"  # to be told from a right one, but by what it raises itself
        with torch.set_grad_enabled(grad):
            return judge(call, arguments, (argument,))

    return run


def changed_together(call: Call, change: Callable[[Tensor], Any]) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        if change is faked:  # of one mode, as tensors of one program are
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            arguments = {
                name: mode.from_tensor(x) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
            return judge(call, arguments, tuple(arguments))
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                try:
                    arguments[name] = change(value)
                except (RuntimeError, TypeError, ValueError, IndexError):
                    return "impossible"
        with torch.set_grad_enabled(change is not frozen):
            return judge(call, arguments, tuple(arguments))

    return run


def judge(call: Call, arguments: dict[str, Any], suspects: tuple[str, ...]) -> str:
    """How a call ends: "right", "refused", "as torch" or what is wrong with it."""
    ours = attempt(call.function, arguments)
    if isinstance(ours, Exception):
        fitting = all(fits(annotations(call).get(name, Any), arguments[name]) for name in suspects)
        if is_refusal(ours, suspects) or (
            fitting and type(ours) is ValueError and is_refusal(ours, tuple(arguments))
        ):
            return "refused"
        if TOO_LARGE.search(str(ours)):
            return "as torch"
        if call.like_torch is not None:
            theirs = attempt(call.like_torch, arguments)
            if type(theirs) is type(ours) and str(theirs) == str(ours):
                return "as torch"
        return f"raised {type(ours).__name__}: {shortened(ours)}"
    if call.like_torch is not None and agree(ours, attempt(call.like_torch, arguments)) == "":
        return "as torch"
    for name in suspects:
        if not fits(annotations(call).get(name, Any), arguments[name]):  # torch's are bare
            return f"took {type(arguments[name]).__name__} for {name}"
    if call.on_reference is None:
        return "right" if is_whole(ours) else "returned what is not whole"
    plain = {name: made_plain(value) for name, value in arguments.items()}
    if "backend" in plain:
        plain["backend"] = "reference"
    wanted = attempt(call.on_reference, plain)
    if isinstance(wanted, Exception):
        return f"returned, where plain tensors raise {type(wanted).__name__}: {shortened(wanted)}"
    if len(suspects) == 1 and isinstance(arguments[suspects[0]], VF.CrossAttentionPlan):
        # Made by hand, its members may contradict each other, and backends read different ones.
        difference = agree(ours, wanted, in_value=False)
        return f"wrong: {difference}" if difference else "right"
    difference = agree(ours, wanted, hides=call.hides) or agree(
        gradients(ours, arguments), gradients(wanted, plain), hides=call.hides
    )
    return f"wrong: {difference}" if difference else "right"


def transformed(call: Call, argument: str, transform: str) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        x = arguments.pop(argument)
        others = arguments | {name: "reference" for name in arguments if name == "backend"}

        def value(function: Callable[..., Any], more: dict[str, Any]) -> Callable[[Tensor], Any]:
            return lambda t: first_floating(function(**more, **{argument: t}))

        def total(function: Any, more: dict[str, Any]) -> Callable[[Tensor], Any]:
            return lambda t: value(function, more)(t).sum()

        if transform != "vmap" and not x.is_floating_point():
            return "impossible"
        if transform == "func.grad":
            ours = attempt(lambda: torch.func.grad(total(call.function, arguments))(x), {})
            wanted = torch.func.grad(total(call.on_reference, others))(x)
        else:
            pair = torch.stack((x, x.flip(0) if x.is_floating_point() else x))
            ours_of, wanted_of = (
                (value(call.function, arguments), value(call.on_reference, others))
                if transform == "vmap"
                else (
                    torch.func.grad(total(call.function, arguments)),
                    torch.func.grad(total(call.on_reference, others)),
                )
            )
            ours = attempt(lambda: torch.vmap(ours_of)(pair), {})
            wanted = torch.stack([wanted_of(t) for t in pair])
        if isinstance(ours, Exception):
            if is_refusal(ours, (argument,)):
                return "refused"
            return f"raised {type(ours).__name__}: {shortened(ours)}"
        difference = agree(ours, wanted)
        return f"wrong: {difference}" if difference else "right"

    return run


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The result, or the exception in its place."""
    torch.manual_seed(0)  # of dropout
    try:
        return function(**arguments)
    except Exception as error:
        return error


def is_refusal(error: Exception, suspects: tuple[str, ...]) -> bool:
    return isinstance(error, REFUSALS) and any(
        re.search(rf"\b{name}\b", str(error)) for name in suspects
    )


def shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def annotations(call: Call) -> dict[str, Any]:
    return typing.get_type_hints(call.signature or call.function)


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value is of the type that a signature asks for."""
    if isinstance(value, np.generic):
        value = value.item()  # numpy's scalars are numbers
    if annotation is Any:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in of)
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is tuple:
        # A list stands for a tuple, as it does in torch.
        return (
            isinstance(value, (tuple, list)) and len(value) == len(of) and all(map(fits, of, value))
        )
    if origin in (collections.abc.Sequence, collections.abc.Iterable):
        try:
            return isinstance(value, origin) and all(fits(of[0], x) for x in value)
        except (TypeError, RuntimeError):  # a tensor that cannot be iterated over
            return False
    if origin is collections.abc.Callable:
        return callable(value)
    return isinstance(value, annotation)


def made_plain(value: Any) -> Any:
    """The same numbers, in plain dense tensors and in Python's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        parts = [made_plain(x) for x in value]
        return type(value)(*parts) if hasattr(value, "_replace") else type(value)(parts)
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, TwoTensor):
        value = value.a
    if value.is_meta or isinstance(value, FakeTensor):
        return value
    grad = value.requires_grad
    if type(value) is not Tensor:
        value = value.detach().as_subclass(Tensor)
    value = value.detach().resolve_neg()
    if value.layout is torch.strided and not value.is_nested:
        plain = torch.empty(value.shape, dtype=value.dtype)
        value = plain.copy_(value)
    return value.requires_grad_(grad)


def leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        result = tuple(result.values())
    return list(result) if isinstance(result, (tuple, list)) else [result]


def first_floating(result: Any) -> Tensor:
    return next(x for x in leaves(result) if isinstance(x, Tensor))


def agree(ours: Any, wanted: Any, in_value: bool = True, hides: bool = False) -> str:
    """What is different; empty where nothing is."""
    if isinstance(wanted, Exception):
        return "an error was wanted"
    ours, wanted = leaves(ours), leaves(wanted)
    if len(ours) != len(wanted):
        return f"{len(ours)} results, wanted {len(wanted)}"
    for mine, theirs in zip(ours, wanted, strict=True):
        if not isinstance(theirs, Tensor):
            if mine is not theirs and mine != theirs:
                return f"{mine!r}, wanted {theirs!r}"
            continue
        if not isinstance(mine, Tensor):
            return f"{mine!r}, wanted a tensor"
        if isinstance(mine, TwoTensor):
            mine = mine.a
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{mine.dtype} {tuple(mine.shape)}, wanted {theirs.dtype} {tuple(theirs.shape)}"
        if mine.is_meta or isinstance(mine, FakeTensor) or not in_value:
            continue
        difference = unlike(mine, theirs, hides)
        if difference:
            return difference
    return ""


def unlike(mine: Tensor, theirs: Tensor, hides: bool) -> str:
    """How numbers differ. What is not finite need only be so in both."""
    mine, theirs = (x.detach().as_subclass(Tensor) for x in (mine, theirs))
    if not mine.is_floating_point():
        return "" if torch.equal(mine, theirs) else "other integers"
    finite = theirs.isfinite()
    if hides:  # a NaN that is hidden may reach the reference's results
        finite |= theirs.isnan()
        mine = torch.where(theirs.isnan(), 0.0, mine)
        theirs = theirs.nan_to_num(0.0, float("inf"), float("-inf"))
    if not mine[finite].isfinite().all():
        return f"{int((~mine[finite].isfinite()).sum())} numbers that are not finite"
    if mine[~finite].isfinite().any():
        return "finite numbers, wanted inf or NaN"
    mine, theirs = mine[finite], theirs[finite]
    # assert_close is for numbers of the size of 1.
    size = theirs.abs().max().clamp(min=1.0) if theirs.numel() else 1.0
    try:
        torch.testing.assert_close(mine / size, theirs / size)
    except AssertionError as error:
        return shortened(error)
    return ""


def gradients(result: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Those of the leaves among the arguments, to the sum of all results."""
    total = [x.sum() for x in leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    flat = [y for x in arguments.values() for y in (x if type(x) is tuple else (x,))]
    wanted = [x for x in flat if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
    if not total or not wanted or any(x.is_meta or isinstance(x, FakeTensor) for x in wanted):
        return []
    found = torch.autograd.grad(sum(total), wanted, allow_unused=True)
    pairs = zip(found, wanted, strict=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in pairs]


def is_whole(result: Any) -> bool:
    if isinstance(result, nn.Module):
        return all(p.is_meta or bool(p.isfinite().all()) for p in result.parameters())
    return True
