"""Which backend runs a call: selection, refusal and explanation from one set of predicates.

A predicate exists for each (family, backend). It lists the reasons why the backend cannot run the
given inputs; an empty list means that it can. Selection is a pure function of the inputs, of what
is built, and of what the caller forces, in this order of precedence: the argument `backend=`, a
`use_backend` block, the environment variable VLMFAST_BACKEND as it was when this was imported. A
forced backend that refuses raises; nothing falls back silently.
"""

import os
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any

from vlmfast.backends.common import always, no_cuda_kernel
from vlmfast.families import rows

BACKENDS = ("cpu", "triton", "cuda", "reference")

PREDICATES: dict[str, dict[str, Callable[..., list[str]]]] = {
    family: {
        "cpu": row.cpu,
        "triton": row.triton,
        "cuda": no_cuda_kernel,
        "reference": always,
    }
    for family, row in rows("vlmfast.backends").items()
}

# Tensors without data are shaped by the operators of the CPU.
_DEFAULT_ORDER = {
    "cpu": ("cpu", "reference"),
    "meta": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}


class _State(threading.local):
    # In __init__, which runs once a thread: class attributes would break torch.compile's guards.
    def __init__(self) -> None:
        self.forced: str | None = None  # by use_backend
        self.explaining: bool = False


_state = _State()
FROM_ENVIRONMENT = os.environ.get("VLMFAST_BACKEND")


class use_backend(ContextDecorator):
    """Forces a backend for a block: `with vlmfast.use_backend("reference"): ...`.

    It holds for calls made in the block by the same thread; `backend=` of a call takes precedence.
    An instance may also decorate a function.

    Raises:
        TypeError: `backend` is no string.
        ValueError: `backend` is no name of a backend.
    """

    def __init__(self, backend: str):
        self.backend = check_backend("backend", backend)
        self._outer: list[str | None] = []

    def __enter__(self) -> "use_backend":
        self._outer.append(_state.forced)
        _state.forced = self.backend
        return self

    def __exit__(self, *exc_info: object) -> None:
        _state.forced = self._outer.pop()


def check_backend(argument: str, backend: Any) -> str:
    """The name of a backend; raises TypeError unless it is a string, ValueError if unknown."""
    if not isinstance(backend, str):
        raise TypeError(f"{argument}: expected a string, got {type(backend).__name__}")
    if backend not in BACKENDS:
        names = ", ".join(repr(name) for name in BACKENDS)
        raise ValueError(f"{argument}: expected one of {names}, got {backend!r}")
    return backend


def _forced(backend: str | None) -> tuple[str | None, str]:
    """The backend that is forced and by what."""
    if backend is not None:
        return check_backend("backend", backend), "the argument backend="
    if _state.forced is not None:
        return _state.forced, "use_backend"
    if FROM_ENVIRONMENT:
        return check_backend("VLMFAST_BACKEND", FROM_ENVIRONMENT), "VLMFAST_BACKEND"
    return None, ""


def choose(family: str, backend: str | None, device_type: str, *inputs: Any) -> str:
    """The backend that runs a call of a family.

    Args:
        family: name of the kernel family.
        backend: what the caller passed as `backend=`.
        device_type: where the inputs are.
        inputs: what the predicates of the family look at.

    Raises:
        ValueError: an unknown backend is forced.
        NotImplementedError: the forced backend cannot run the inputs; lists every reason.
    """
    forced, source = _forced(backend)
    predicates = PREDICATES[family]
    if _state.explaining:
        raise _Explained(_explanation(family, forced, source, device_type, inputs))
    if forced is None:
        for name in _DEFAULT_ORDER.get(device_type, ("reference",)):
            if not predicates[name](*inputs):
                return name
    else:
        reasons = predicates[forced](*inputs)
        if not reasons:
            return forced
        raise NotImplementedError(
            f"{family}: the backend {forced!r}, forced by {source}, cannot run this call:\n"
            + "\n".join(f"  - {reason}" for reason in reasons)
        )
    raise NotImplementedError(f"{family}: no backend can run this call")


@dataclass(frozen=True)
class Explanation:
    """What would run a call, and why the other backends would not.

    Attributes:
        family: the kernel family that the call belongs to.
        backend: the backend that would run; None where the forced one refuses.
        refusals: for each backend that cannot run the call, its reasons.
        forced_by: what forces the backend; empty where the choice is automatic.
    """

    family: str
    backend: str | None
    refusals: dict[str, list[str]]
    forced_by: str = ""

    def __str__(self) -> str:
        forced = f", forced by {self.forced_by}" if self.forced_by else ""
        lines = [f"{self.family}: {self.backend or 'nothing'} would run{forced}"]
        for name in BACKENDS:
            if name in self.refusals:
                lines += [f"  {name} cannot: {reason}" for reason in self.refusals[name]]
            elif name != self.backend:
                lines.append(f"  {name} could")
        return "\n".join(lines)


class _Explained(BaseException):
    """Carries an explanation out of the call that it explains."""

    def __init__(self, explanation: Explanation):
        super().__init__(explanation)
        self.explanation = explanation


def _explanation(
    family: str, forced: str | None, source: str, device_type: str, inputs: tuple[Any, ...]
) -> Explanation:
    refusals = {}
    for name, predicate in PREDICATES[family].items():
        reasons = predicate(*inputs)
        if reasons:
            refusals[name] = reasons
    order = (forced,) if forced else _DEFAULT_ORDER.get(device_type, ("reference",))
    backend = next((name for name in order if name not in refusals), None)
    return Explanation(family, backend, refusals, source)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says what `fn(*args, **kwargs)` would run, without running a kernel.

    Args:
        fn: a function of `vlmfast.functional`, or anything that calls one, such as a module; the
            first kernel that it reaches is explained.

    Raises:
        TypeError: `fn` cannot be called.
        ValueError: `fn` returned without reaching a kernel of this package, or raised it itself
            because an argument is wrong.
    """
    if not callable(fn):
        raise TypeError(f"fn: expected a callable, got {type(fn).__name__}")
    outer = _state.explaining
    _state.explaining = True
    try:
        fn(*args, **kwargs)
    except _Explained as explained:
        return explained.explanation
    finally:
        _state.explaining = outer
    raise ValueError(f"fn: expected a call that reaches a vlmfast kernel, got {fn!r}")
