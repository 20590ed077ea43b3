"""Who else computes contrastive losses."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmfast.functional as VF
from bench.contestant import GPU, OURS, Contestant, beyond_memory, compiled, needs, never
from bench.contrastive_loss.cases import BIAS, LossCase
from vlmfast._torchvision_ops import import_torchvision

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image, text, scale


def _ours(case: LossCase) -> Loss:
    if case.loss == "siglip":
        return lambda image, text, scale: VF.siglip_loss(image, text, scale, BIAS)
    return VF.clip_loss


def dense_loss(case: LossCase) -> Loss:
    """The loss by one matrix of logits, each step torch's own."""

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        labels = torch.arange(case.pairs, device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T + BIAS
        signs = 2 * torch.eye(case.pairs, dtype=logits.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * logits).sum() / case.pairs

    return siglip if case.loss == "siglip" else clip


def _logits_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    # Logits, softmaxes along rows and columns and their gradients are alive at once in backward.
    return beyond_memory("five N x N matrices", 5 * case.pairs**2 * dtype.itemsize)


def _open_clip(case: LossCase) -> Loss:
    import_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "siglip":
        module = SigLipLoss()
        return lambda image, text, scale: module(image, text, scale, BIAS)
    return ClipLoss()


def _no_siglip(case: LossCase, dtype: torch.dtype) -> str | None:
    return "computes a softmax, not SigLIP's sigmoids" if case.loss == "siglip" else None


def _linear_cross_entropy_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it"
    return _no_siglip(case, dtype)


def _linear_cross_entropy(case: LossCase) -> Loss:
    """Images as weights of the texts' classifier and the other way round, some rows at a time."""
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    entropy = functools.partial(F.linear_cross_entropy, options=options)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(case.pairs, device=image.device)
        return (entropy(scale * image, text, labels) + entropy(scale * text, image, labels)) / 2

    return loss


def _inf_cl_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if case.dim % 256:
        return "takes features in pieces of 256"
    return _no_siglip(case, dtype)


def _inf_cl(case: LossCase) -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        losses = (cal_flash_loss(x, y, scale=scale) for x, y in ((image, text), (text, image)))
        return sum(x.mean() for x in losses) / 2

    return loss


CONTESTANTS = (
    Contestant(OURS, never, _ours),
    Contestant("dense", _logits_refusal, dense_loss),
    Contestant("open_clip", needs("open_clip", _logits_refusal), _open_clip),
    Contestant("linear_cross_entropy", _linear_cross_entropy_refusal, _linear_cross_entropy),
    Contestant("torch.compile", _logits_refusal, compiled(dense_loss), compiles=True),
    Contestant("inf-cl", needs("inf_cl", _inf_cl_refusal), _inf_cl, GPU),
)
