"""Who races, by family: our own call and what it replaces. Each says what it cannot run and why."""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlmfast.functional as VF
from bench.cases import AttentionCase, LossCase

OURS = "vlmfast"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image, text, scale


@dataclass(frozen=True)
class Contestant:
    """One way to compute a family's operation.

    Attributes:
        name: how tables call it.
        refusal: (case, dtype) -> why it cannot run that, or None.
        prepare: case -> the call to be timed. What a model would build once and keep, such as a
            causal mask, is built here and not timed.
        devices: where it races.
    """

    name: str
    refusal: Callable[[Any, torch.dtype], str | None]
    prepare: Callable[[Any], Callable[..., Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")


def _never(case: AttentionCase | LossCase, dtype: torch.dtype) -> str | None:
    return None


def _ours(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return VF.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def _sdpa(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def eager_attention(case: AttentionCase) -> Attention:
    """softmax(scale q k^T + mask) v with the scores in memory, each step torch's own."""
    scale = 1 / math.sqrt(case.head_dim)
    hidden: dict[torch.device, Tensor] = {}

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1)
        if case.is_causal:
            if query.device not in hidden:
                ones = query.new_ones(case.query_length, case.key_length, dtype=torch.bool)
                hidden[query.device] = ones.triu(1)
            scores = scores.masked_fill(hidden[query.device], -math.inf)
        return scores.softmax(dim=-1) @ value

    return attention


def _eager_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    # Scores, probabilities and the gradients of both are alive at once in backward.
    matrices = 4 * case.batch * case.heads * case.query_length * case.key_length * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"four score matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _forced_sdpa(backend: SDPBackend) -> Callable[[AttentionCase], Attention]:
    def prepare(case: AttentionCase) -> Attention:
        attention = _sdpa(case)

        def forced(*sources: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return attention(*sources)

        return forced

    return prepare


def _half_only(case: AttentionCase, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"does not take {dtype}"


def _compiled(case: AttentionCase) -> Attention:
    return torch.compile(eager_attention(case), fullgraph=True)


def _flex(case: AttentionCase) -> Attention:
    compiled = torch.compile(flex_attention, fullgraph=True)
    masks: dict[torch.device, BlockMask] = {}

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not case.is_causal:
            return compiled(query, key, value)
        if query.device not in masks:
            sizes = (None, None, case.query_length, case.key_length)
            masks[query.device] = create_block_mask(visible, *sizes, device=query.device)
        return compiled(query, key, value, block_mask=masks[query.device])

    return attention


def _xformers_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "not installed"
    return _half_only(case, dtype)


def _xformers(case: AttentionCase) -> Attention:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if case.is_causal else None

    def attention(*sources: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in sources)
        return memory_efficient_attention(query, key, value, bias).transpose(1, 2)

    return attention


FLASH_ATTENTION = Contestant(OURS, _never, _ours)
SDPA = Contestant("torch SDPA", _never, _sdpa)
EAGER = Contestant("eager", _eager_refusal, eager_attention)


def _our_loss(case: LossCase) -> Loss:
    if case.loss == "siglip":
        return lambda image, text, scale: VF.siglip_loss(image, text, scale, -10.0)
    return VF.clip_loss


def dense_loss(case: LossCase) -> Loss:
    """The loss by one matrix of logits, each step torch's own."""

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        labels = torch.arange(case.pairs, device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T - 10.0
        signs = 2 * torch.eye(case.pairs, dtype=logits.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * logits).sum() / case.pairs

    return siglip if case.loss == "siglip" else clip


def _logits_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    # Logits, softmaxes along rows and columns and their gradients are alive at once in backward.
    matrices = 5 * case.pairs**2 * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"five N x N matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _open_clip_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("open_clip") is None:
        return "not installed"
    return _logits_refusal(case, dtype)


def _open_clip(case: LossCase) -> Loss:
    from vlmfast._torchvision_ops import import_torchvision

    import_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "siglip":
        module = SigLipLoss()
        return lambda image, text, scale: module(image, text, scale, -10.0)
    return ClipLoss()


_GPU = ("cuda",)

CONTESTANTS: dict[str, Sequence[Contestant]] = {
    "flash_attention": (
        FLASH_ATTENTION,
        SDPA,
        EAGER,
        Contestant("SDPA flash", _half_only, _forced_sdpa(SDPBackend.FLASH_ATTENTION), _GPU),
        Contestant("SDPA efficient", _never, _forced_sdpa(SDPBackend.EFFICIENT_ATTENTION), _GPU),
        Contestant("SDPA cuDNN", _half_only, _forced_sdpa(SDPBackend.CUDNN_ATTENTION), _GPU),
        Contestant("torch.compile", _eager_refusal, _compiled, _GPU),
        Contestant("FlexAttention", _never, _flex, _GPU),
        Contestant("xformers", _xformers_refusal, _xformers, _GPU),
    ),
    "contrastive_loss": (
        Contestant(OURS, _never, _our_loss),
        Contestant("dense", _logits_refusal, dense_loss),
        Contestant("open_clip", _open_clip_refusal, _open_clip),
    ),
}
"""By family; the first one is ours. What must be compiled first races on GPUs alone."""
