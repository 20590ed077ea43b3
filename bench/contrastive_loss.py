"""Inputs, calls and formulas of the `contrastive_loss` family."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench.cases import LossCase
from bench.measure import Work
from bench.peers import Loss, dense_loss
from vlmfast.verify.common import SEEDS, relative_error

SCALE = {"clip": 100.0, "siglip": 10.0}
BIAS = -10.0
YARDSTICK_PAIRS = 1024
TRUTH_ELEMENTS = 2**22  # of the logits, held at once in float64


@dataclass(frozen=True)
class Inputs:
    """Features (N, D), and the scale of their similarities, float32."""

    image: Tensor
    text: Tensor
    scale: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return (self.image, self.text, self.scale)


def make_inputs(
    case: LossCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Normalised features whose pairs have a cosine near 0.12, as early in training.

    Data that is too easy would make gradients nothing but rounding.
    """
    generator = torch.Generator().manual_seed(seed)
    text, noise = (
        F.normalize(torch.randn((case.pairs, case.dim), generator=generator), dim=-1)
        for _ in range(2)
    )
    image = F.normalize(noise + 0.12 * text, dim=-1)
    tensors = (image.to(dtype), text.to(dtype), torch.tensor(SCALE[case.loss]))
    return Inputs(*(x.to(device).requires_grad_(mode != "fwd") for x in tensors))


def make_call(loss_of: Loss, inputs: Inputs, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed, without arguments.

    It returns (loss,) for "fwd", the gradients of features and scale for "bwd" (of a forward pass
    done here, once), and all four for "fwd+bwd".
    """
    sources = inputs.sources

    def forward() -> tuple[Tensor, ...]:
        return (loss_of(*sources),)

    def both() -> tuple[Tensor, ...]:
        loss = loss_of(*sources)
        return (loss, *torch.autograd.grad(loss, sources))

    if mode == "fwd":
        return forward
    if mode == "fwd+bwd":
        return both

    loss = loss_of(*sources)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, sources, retain_graph=True)

    return backward


def chosen_backend(case: LossCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    return vlmfast.explain(VF.clip_loss, *inputs.sources).backend


def reference(case: LossCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""
    image, text, scale = (x.detach().double() for x in inputs.sources)
    results = (
        _siglip_truth(image, text, scale)
        if case.loss == "siglip"
        else _clip_truth(image, text, scale)
    )
    return {"fwd": results[:1], "bwd": results[1:], "fwd+bwd": results}[mode]


def _row_blocks(n: int) -> list[slice]:
    rows = max(1, TRUTH_ELEMENTS // n)
    return [slice(first, min(n, first + rows)) for first in range(0, n, rows)]


def _clip_truth(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    n = image.shape[0]
    blocks = _row_blocks(n)
    positive = scale * (image * text).sum(1)
    of_rows, of_columns = [], []
    for block in blocks:
        logits = scale * image[block] @ text.T
        of_rows.append(logits.logsumexp(1))
        of_columns.append(logits.logsumexp(0))
    rows, columns = torch.cat(of_rows), torch.stack(of_columns).logsumexp(0)
    loss = (rows + columns - 2 * positive).mean() / 2

    def gradient(logits: Tensor, block: slice) -> Tensor:
        weights = (logits - rows[block, None]).exp() + (logits - columns).exp()
        weights[:, block].diagonal().sub_(2)
        return weights / (2 * n)

    return (loss, *_multiplied_out(gradient, image, text, scale, blocks))


def _siglip_truth(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    n = image.shape[0]
    blocks = _row_blocks(n)
    total = torch.zeros_like(scale)
    for block in blocks:
        signs = torch.full(
            (block.stop - block.start, n), -1.0, dtype=image.dtype, device=image.device
        )
        signs[:, block].diagonal().fill_(1.0)
        total -= F.logsigmoid(signs * (scale * image[block] @ text.T + BIAS)).sum()

    def gradient(logits: Tensor, block: slice) -> Tensor:
        weights = (logits + BIAS).sigmoid()
        weights[:, block].diagonal().sub_(1)
        return weights / n

    return (total / n, *_multiplied_out(gradient, image, text, scale, blocks))


def _multiplied_out(
    gradient: Callable[[Tensor, slice], Tensor],
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    blocks: list[slice],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of features and scale from that of the logits, some rows at a time."""
    grad_image, grad_text = torch.empty_like(image), torch.zeros_like(text)
    grad_scale = torch.zeros_like(scale)
    for block in blocks:
        similarity = image[block] @ text.T
        weights = gradient(scale * similarity, block)
        grad_image[block] = scale * weights @ text
        grad_text += scale * weights.T @ image[block]
        grad_scale += (weights * similarity).sum()
    return grad_image, grad_text, grad_scale


def yardsticks(case: LossCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of the dense formula, one for each result of a call: the worst over eight seeds.

    With some of the pairs, since float64 takes its time: a sum of N terms rounds in proportion to
    the root of N.
    """
    few = LossCase(case.name, case.source, min(case.pairs, YARDSTICK_PAIRS), case.dim, case.loss)
    dense = dense_loss(few)
    errors = []
    for seed in SEEDS:
        inputs = make_inputs(few, dtype, mode, seed)
        results, truths = make_call(dense, inputs, mode)(), reference(few, inputs, mode)
        errors.append([relative_error(*pair) for pair in zip(results, truths, strict=True)])
    growth = (case.pairs / few.pairs) ** 0.5
    return [growth * max(column) for column in zip(*errors, strict=True)]


def work(case: LossCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without.

    Forward is one product of N x N x D; backward three: the logits again and both gradients. Each
    of the two passes takes an exponential for a row's and one for a column's softmax. Both towers
    are read once in either pass, and gradients written in backward.
    """
    pairs = case.pairs**2
    features = 2 * case.pairs * case.dim * dtype.itemsize
    exponentials = pairs * (1 if case.loss == "siglip" else 2)
    products, passes, traffic = {
        "fwd": (1, 1, features),
        "bwd": (3, 1, 2 * features),
        "fwd+bwd": (4, 2, 3 * features),
    }[mode]
    return Work(products * 2 * pairs * case.dim, traffic, passes * exponentials)
