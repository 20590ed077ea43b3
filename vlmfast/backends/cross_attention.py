"""What per-image cross-attention runs on."""

import torch
from torch import Tensor

from vlmfast.backends.common import in_dtype, on_cpu, on_triton, with_head_dims


def cpu(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    return in_dtype(query) + on_cpu(query)


def triton(query: Tensor, key: Tensor, value: Tensor) -> list[str]:
    reasons = on_triton("cross_attention", query) + in_dtype(query)
    return reasons + with_head_dims(query.shape[3], value.shape[4])


def sample_inputs(device: str) -> tuple[Tensor, Tensor, Tensor]:
    images = torch.empty(1, 1, 1, 1, 64, device=device)
    return torch.empty(1, 1, 1, 64, device=device), images, images
