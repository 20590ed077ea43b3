"""Which backend runs a call: selection, refusal and explanation from one set of predicates.

A predicate exists for each (family, backend). It lists the reasons why the backend cannot run the
given inputs; an empty list means that it can. Selection is a pure function of the inputs, of what
is built, and of what the caller forces, in this order of precedence: the argument `backend=`, a
`use_backend` block, the environment variable VLMFAST_BACKEND as it was when this was imported. A
forced backend that refuses raises; nothing falls back silently.
"""

import importlib.metadata
import importlib.util
import os
import platform
import threading
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import vlmfast
from vlmfast.ops.common import EXTENSION_ERROR, EXTENSION_FILE

BACKENDS = ("cpu", "triton", "cuda", "reference")

# Tensors without data are shaped by the operators of the CPU.
_DEFAULT_ORDER = {
    "cpu": ("cpu", "reference"),
    "meta": ("cpu", "reference"),
    "cuda": ("cuda", "triton", "reference"),
}

_OPTIONAL_LIBRARIES = (
    "triton",
    "torchvision",
    "timm",
    "transformers",
    "open_clip",
    "flamingo_pytorch",
    "xformers",
)


class _State(threading.local):
    # In __init__, which runs once a thread: class attributes would break torch.compile's guards.
    def __init__(self) -> None:
        self.forced: str | None = None  # by use_backend
        self.explaining: bool = False


_state = _State()
_FROM_ENVIRONMENT = os.environ.get("VLMFAST_BACKEND")


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
    if _FROM_ENVIRONMENT:
        return check_backend("VLMFAST_BACKEND", _FROM_ENVIRONMENT), "VLMFAST_BACKEND"
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
    predicates = _PREDICATES[family]
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
    for name, predicate in _PREDICATES[family].items():
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


HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook that hides a module may raise instead of finding nothing
        return False


_TRITON_INSTALLED = _installed("triton")
_TRITON_FAMILIES = frozenset(
    family
    for family in ("flash_attention", "window_attention", "cross_attention", "contrastive_loss")
    if _installed(f"vlmfast.kernels.{family}")
)


def _dtype(dtype: torch.dtype) -> list[str]:
    if dtype in HALF_OR_FLOAT:
        return []
    return [f"computes in float32, bfloat16 or float16, got {dtype}"]


def _dtype_and_mask(query: Tensor, attn_mask: Tensor | None) -> list[str]:
    reasons = _dtype(query.dtype)
    if attn_mask is not None and attn_mask.dtype == torch.float64:
        reasons.append("takes no attn_mask of dtype torch.float64")
    return reasons


def _head_dims(query_dim: int, value_dim: int) -> list[str]:
    if max(query_dim, value_dim) <= 256:
        return []
    return [f"takes head dims up to 256, got {query_dim} (query) and {value_dim} (value)"]


def _cpu(device: torch.device) -> list[str]:
    """Reasons that hold for every C++ kernel."""
    reasons = []
    if device.type not in ("cpu", "meta"):
        reasons.append(f"takes CPU tensors, got {device.type}")
    if EXTENSION_ERROR is not None:
        reasons.append(EXTENSION_ERROR)
    return reasons


def _triton(family: str, device: torch.device) -> list[str]:
    """Reasons that hold for every Triton kernel."""
    reasons = []
    if not _TRITON_INSTALLED:
        reasons.append("triton is not installed")
    elif family not in _TRITON_FAMILIES:
        reasons.append(f"this installation lacks vlmfast.kernels.{family}")
    if device.type == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            reasons.append("takes CPU tensors only under TRITON_INTERPRET=1")
    elif device.type != "cuda":
        reasons.append(f"takes CUDA tensors, got {device.type}")
    elif _capability(device) < (8, 0):
        reasons.append("needs a GPU of compute capability 8.0 or later")
    return reasons


def _flash_attention_cpu(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> list[str]:
    return _dtype_and_mask(query, attn_mask) + _cpu(query.device)


def _flash_attention_triton(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None
) -> list[str]:
    reasons = _triton("flash_attention", query.device) + _dtype_and_mask(query, attn_mask)
    return reasons + _head_dims(query.shape[3], value.shape[3])


def _most_tokens(window_size: tuple[int, int], most: int) -> list[str]:
    height, width = window_size
    if height * width <= most:
        return []
    return [f"takes windows of up to {most} tokens, got {height} x {width}"]


def _window_attention_dtypes(query: Tensor, *others: Tensor | None) -> list[str]:
    reasons = _dtype(query.dtype)
    names = ("relative_position_bias", "logit_scale", "pad_value")
    for name, tensor in zip(names, others, strict=True):
        if tensor is not None and tensor.dtype not in HALF_OR_FLOAT:
            reasons.append(f"takes {name} in float32, bfloat16 or float16, got {tensor.dtype}")
    return reasons


def _window_attention_cpu(
    query: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    head_dim: int,
    window_size: tuple[int, int],
) -> list[str]:
    reasons = _window_attention_dtypes(query, bias, logit_scale, pad_value)
    return reasons + _most_tokens(window_size, 1 << 14) + _cpu(query.device)


def _window_attention_triton(
    query: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    head_dim: int,
    window_size: tuple[int, int],
) -> list[str]:
    reasons = _triton("window_attention", query.device)
    if head_dim > 128:
        reasons.append(f"takes head dims up to 128, got {head_dim}")
    # The kernels unroll their loop over the keys of a window.
    reasons += _most_tokens(window_size, 1 << 10)
    return reasons + _window_attention_dtypes(query, bias, logit_scale, pad_value)


def _cross_attention_cpu(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return _dtype(query.dtype) + _cpu(query.device)


def _cross_attention_triton(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = _triton("cross_attention", query.device) + _dtype(query.dtype)
    return reasons + _head_dims(query.shape[3], value.shape[4])


def _no_cuda_kernel(*inputs: Any) -> list[str]:
    return ["no CUDA C++ kernel of this family exists; triton serves CUDA tensors"]


def _contrastive_loss_cpu(rows: Tensor, columns: Tensor) -> list[str]:
    return _dtype(rows.dtype) + _cpu(rows.device)


def _contrastive_loss_triton(rows: Tensor, columns: Tensor) -> list[str]:
    return _triton("contrastive_loss", rows.device) + _dtype(rows.dtype)


def _always(*inputs: Any) -> list[str]:
    return []


_PREDICATES: dict[str, dict[str, Callable[..., list[str]]]] = {
    "flash_attention": {
        "cpu": _flash_attention_cpu,
        "triton": _flash_attention_triton,
        "cuda": _no_cuda_kernel,
        "reference": _always,
    },
    "window_attention": {
        "cpu": _window_attention_cpu,
        "triton": _window_attention_triton,
        "cuda": _no_cuda_kernel,
        "reference": _always,
    },
    "cross_attention": {
        "cpu": _cross_attention_cpu,
        "triton": _cross_attention_triton,
        "cuda": _no_cuda_kernel,
        "reference": _always,
    },
    "contrastive_loss": {
        "cpu": _contrastive_loss_cpu,
        "triton": _contrastive_loss_triton,
        "cuda": _no_cuda_kernel,
        "reference": _always,
    },
}


def _version(library: str) -> str | None:
    """The version of an installed library, without importing it."""
    if not _installed(library):
        return None
    try:
        distributions = importlib.metadata.packages_distributions().get(library, [library])
        return importlib.metadata.version(distributions[0])
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _sample_inputs(family: str, device: str) -> tuple[Any, ...]:
    """Inputs of a family that its predicates look at: plain float32, of no particular size."""
    if family == "flash_attention":
        tensor = torch.empty(1, 1, 1, 64, device=device)
        return tensor, tensor, tensor, None
    if family == "window_attention":
        return torch.empty(1, 7, 7, 96, device=device), None, None, None, 32, (7, 7)
    if family == "cross_attention":
        images = torch.empty(1, 1, 1, 1, 64, device=device)
        return torch.empty(1, 1, 1, 64, device=device), images, images
    if family == "contrastive_loss":
        tensor = torch.empty(1, 1, 64, device=device)
        return tensor, tensor[0]
    raise ValueError(f"family: expected one of {', '.join(_PREDICATES)}, got {family!r}")


def refusals(family: str, device: str) -> dict[str, list[str]]:
    """Each backend's reasons not to run plain float32 inputs of a family on a device."""
    inputs = _sample_inputs(family, device)
    return {name: predicate(*inputs) for name, predicate in _PREDICATES[family].items()}


def info() -> dict[str, Any]:
    """Prints and returns what is built, found and usable on this machine.

    Libraries are looked up, not imported. The keys are vlmfast, python, torch, machine, extension,
    cpu_isa, cpu_isas, gpus, libraries, environment and families.
    """
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    built = EXTENSION_ERROR is None
    found: dict[str, Any] = {
        "vlmfast": vlmfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "extension": EXTENSION_ERROR or EXTENSION_FILE,
        "cpu_isa": torch.ops.vlmfast.cpu_isa() if built else None,
        "cpu_isas": torch.ops.vlmfast.cpu_isas().split(",") if built else [],
        "gpus": [
            f"{torch.cuda.get_device_name(i)} (sm_{''.join(map(str, _capability(i)))})"
            for i in range(torch.cuda.device_count())
        ],
        "libraries": {name: _version(name) for name in _OPTIONAL_LIBRARIES},
        "environment": {
            **{name: value for name, value in os.environ.items() if name.startswith("VLMFAST_")},
            "VLMFAST_BACKEND": _FROM_ENVIRONMENT,  # that counts
        },
        "families": {
            family: {device: refusals(family, device) for device in devices}
            for family in _PREDICATES
        },
    }
    print(_format_info(found))
    return found


def _capability(device: int | torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _format_info(found: dict[str, Any]) -> str:
    lines = [f"{name:10} {found[name]}" for name in ("vlmfast", "python", "torch", "machine")]
    lines.append(f"{'extension':10} {found['extension']}")
    if found["cpu_isas"]:
        isas = ", ".join(found["cpu_isas"])
        lines.append(f"{'CPU':10} {found['cpu_isa']} (this machine runs {isas})")
    lines.append(f"{'GPU':10} {', '.join(found['gpus']) or 'none'}")
    for name, version in found["libraries"].items():
        lines.append(f"{name:16} {version or 'not found'}")
    for name, value in found["environment"].items():
        if value is None:
            continue
        lines.append(f"{name}={value}")
    for family, devices in found["families"].items():
        for device, reasons_of in devices.items():
            lines.append(f"{family} on {device} tensors")
            for name, reasons in reasons_of.items():
                lines.append(f"  {name:10} {'; '.join(reasons) or 'usable'}")
    return "\n".join(lines)
