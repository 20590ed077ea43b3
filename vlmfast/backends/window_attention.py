"""What shifted-window attention runs on."""

from typing import Any

import torch
from torch import Tensor

from vlmfast.backends.common import HALF_OR_FLOAT, in_dtype, on_cpu, on_triton


def cpu(
    query: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    head_dim: int,
    window_size: tuple[int, int],
) -> list[str]:
    reasons = _in_dtypes(query, bias, logit_scale, pad_value)
    return reasons + _of_at_most(1 << 14, window_size) + on_cpu(query)


def triton(
    query: Tensor,
    bias: Tensor | None,
    logit_scale: Tensor | None,
    pad_value: Tensor | None,
    head_dim: int,
    window_size: tuple[int, int],
) -> list[str]:
    reasons = on_triton("window_attention", query)
    if head_dim > 128:
        reasons.append(f"takes head dims up to 128, got {head_dim}")
    # The kernels unroll their loop over the keys of a window.
    reasons += _of_at_most(1 << 10, window_size)
    return reasons + _in_dtypes(query, bias, logit_scale, pad_value)


def sample_inputs(device: str) -> tuple[Any, ...]:
    return torch.empty(1, 7, 7, 96, device=device), None, None, None, 32, (7, 7)


def _of_at_most(tokens: int, window_size: tuple[int, int]) -> list[str]:
    height, width = window_size
    if height * width <= tokens:
        return []
    return [f"takes windows of up to {tokens} tokens, got {height} x {width}"]


def _in_dtypes(query: Tensor, *others: Tensor | None) -> list[str]:
    reasons = in_dtype(query)
    names = ("relative_position_bias", "logit_scale", "pad_value")
    for name, tensor in zip(names, others, strict=True):
        if tensor is not None and tensor.dtype not in HALF_OR_FLOAT:
            reasons.append(f"takes {name} in float32, bfloat16 or float16, got {tensor.dtype}")
    return reasons
