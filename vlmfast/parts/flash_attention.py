"""What layers of softmax attention do around it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["is_causal_mask"]


def is_causal_mask(mask: Tensor | None) -> bool:
    """Whether `mask` (L, L), in torch.nn.MultiheadAttention's convention, is just the causal mask.

    Models hand their causal mask around as a dense tensor; knowing it saves half the work and all
    the reads of the mask. The values are looked at where that is cheap and allowed: not on a GPU,
    where it would synchronise, and not while a graph is captured, which must not depend on them.
    """
    if mask is None or mask.dim() != 2 or mask.shape[0] != mask.shape[1] or mask.shape[0] < 2:
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch._C._are_functorch_transforms_active():  # vmap cannot branch on values
        return False
    if type(mask) not in (Tensor, nn.Parameter) or mask.device.type != "cpu" or mask.requires_grad:
        return False
    hidden = mask if mask.dtype == torch.bool else mask == float("-inf")
    # Two corners reject nearly every mask that is not causal, before the whole is compared.
    if not hidden[0, -1] or hidden[-1, 0]:
        return False
    if not torch.equal(hidden, torch.ones_like(hidden).triu_(1)):
        return False
    return mask.dtype == torch.bool or not mask.tril().any()
