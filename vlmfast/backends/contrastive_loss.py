"""What the contrastive losses run on."""

import torch
from torch import Tensor

from vlmfast.backends.common import in_dtype, on_cpu, on_triton


def cpu(rows: Tensor, columns: Tensor) -> list[str]:
    return in_dtype(rows) + on_cpu(rows)


def triton(rows: Tensor, columns: Tensor) -> list[str]:
    return on_triton("contrastive_loss", rows) + in_dtype(rows)


def sample_inputs(device: str) -> tuple[Tensor, Tensor]:
    tensor = torch.empty(1, 1, 64, device=device)
    return tensor, tensor[0]
