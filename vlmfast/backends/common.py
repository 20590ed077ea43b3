"""Reasons why a backend cannot run a call, for the predicates of all families."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from vlmfast.families import FAMILIES
from vlmfast.ops.common import EXTENSION_ERROR

HALF_OR_FLOAT = (torch.float32, torch.bfloat16, torch.float16)


def is_installed(module: str) -> bool:
    """Whether a module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # an import hook that hides a module may raise instead of finding nothing
        return False


_TRITON_INSTALLED = is_installed("triton")
_TRITON_FAMILIES = frozenset(
    family for family in FAMILIES if is_installed(f"vlmfast.kernels.{family}.forward")
)


def on_cpu(tensor: Tensor) -> list[str]:
    """Reasons that hold for every C++ kernel."""
    reasons = []
    if not (tensor.is_cpu or tensor.is_meta):
        reasons.append(f"takes CPU tensors, got {tensor.device.type}")
    if EXTENSION_ERROR is not None:
        reasons.append(EXTENSION_ERROR)
    return reasons


def on_triton(family: str, tensor: Tensor) -> list[str]:
    """Reasons that hold for every Triton kernel."""
    device = tensor.device
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
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reasons.append("needs a GPU of compute capability 8.0 or later")
    return reasons


def no_cuda_kernel(*inputs: Any) -> list[str]:
    return ["no CUDA C++ kernel of this family exists; triton serves CUDA tensors"]


def always(*inputs: Any) -> list[str]:
    return []


def in_dtype(tensor: Tensor) -> list[str]:
    if tensor.dtype in HALF_OR_FLOAT:
        return []
    return [f"computes in float32, bfloat16 or float16, got {tensor.dtype}"]


def with_head_dims(query_dim: int, value_dim: int) -> list[str]:
    if max(query_dim, value_dim) <= 256:
        return []
    return [f"takes head dims up to 256, got {query_dim} (query) and {value_dim} (value)"]
