"""What softmax attention runs on."""

import torch
from torch import Tensor

from vlmfast.backends.common import in_dtype, on_cpu, on_triton, with_head_dims


def cpu(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> list[str]:
    return _in_dtypes(query, attn_mask) + on_cpu(query)


def triton(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None) -> list[str]:
    reasons = on_triton("flash_attention", query) + _in_dtypes(query, attn_mask)
    return reasons + with_head_dims(query.shape[3], value.shape[3])


def sample_inputs(device: str) -> tuple[Tensor, Tensor, Tensor, None]:
    tensor = torch.empty(1, 1, 1, 64, device=device)
    return tensor, tensor, tensor, None


def _in_dtypes(query: Tensor, attn_mask: Tensor | None) -> list[str]:
    reasons = in_dtype(query)
    if attn_mask is not None and attn_mask.dtype == torch.float64:
        reasons.append("takes no attn_mask of dtype torch.float64")
    return reasons
