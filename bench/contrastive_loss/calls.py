"""Inputs, calls and formulas of the `contrastive_loss` family."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench import common
from bench.contrastive_loss.cases import BIAS, LossCase
from bench.contrastive_loss.peers import Loss, dense_loss
from bench.measure import Truth, Work
from vlmfast.verify.common import SEEDS

SCALE = {"clip": 100.0, "siglip": 10.0}
YARDSTICK_PAIRS = 1024
TRUTH_ELEMENTS = 2**22  # of the logits, held at once in float64

# (some rows of the logits, which ones) to the gradient of these logits
LogitGradient = Callable[[Tensor, slice], Tensor]


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
    normal = common.normal_numbers(seed, device)
    text, noise = (F.normalize(normal(case.pairs, case.dim), dim=-1) for _ in range(2))
    image = F.normalize(noise + 0.12 * text, dim=-1)
    tensors = (image.to(dtype), text.to(dtype), torch.tensor(SCALE[case.loss]))
    return Inputs(*(x.to(device).requires_grad_(mode != "fwd") for x in tensors))


def make_call(loss_of: Loss, inputs: Inputs, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed; its gradients are those of features and scale."""
    return common.make_call(lambda: loss_of(*inputs.sources), inputs.sources, None, mode)


def chosen_backend(case: LossCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    return vlmfast.explain(VF.clip_loss, *inputs.sources).backend


def reference(case: LossCase, inputs: Inputs, mode: str) -> tuple[Truth, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""
    image, text, scale = (x.detach().double() for x in inputs.sources)
    truth = _siglip_truth if case.loss == "siglip" else _clip_truth
    loss, gradient = truth(image, text, scale)
    gradients = _multiplied_out(gradient, image, text, scale) if mode != "fwd" else ()
    return gradients if mode == "bwd" else (loss, *gradients)


def _row_blocks(n: int) -> list[slice]:
    rows = max(1, TRUTH_ELEMENTS // n)
    return [slice(first, min(n, first + rows)) for first in range(0, n, rows)]


def _clip_truth(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Truth, LogitGradient]:
    n = image.shape[0]
    positive = scale * (image * text).sum(1)
    of_rows, of_columns, largest = [], [], []
    for block in _row_blocks(n):
        logits = scale * image[block] @ text.T
        of_rows.append(logits.logsumexp(1))
        of_columns.append(logits.logsumexp(0))
        largest.append(logits.square().amax(1))
    rows, columns = torch.cat(of_rows), torch.stack(of_columns).logsumexp(0)
    loss = (rows + columns - 2 * positive).mean() / 2

    def gradient(logits: Tensor, block: slice) -> Tensor:
        weights = (logits - rows[block, None]).exp() + (logits - columns).exp()
        weights[:, block].diagonal().sub_(2)
        return weights / (2 * n)

    return Truth(loss, _rounded(largest)), gradient


def _siglip_truth(image: Tensor, text: Tensor, scale: Tensor) -> tuple[Truth, LogitGradient]:
    n = image.shape[0]
    total, largest = torch.zeros_like(scale), []
    for block in _row_blocks(n):
        logits = scale * image[block] @ text.T + BIAS
        signs = torch.full_like(logits, -1.0)
        signs[:, block].diagonal().fill_(1.0)
        total -= F.logsigmoid(signs * logits).sum()
        largest.append(logits.square().amax(1))

    def gradient(logits: Tensor, block: slice) -> Tensor:
        weights = (logits + BIAS).sigmoid()
        weights[:, block].diagonal().sub_(1)
        return weights / n

    return Truth(total / n, _rounded(largest)), gradient


def _rounded(largest: list[Tensor]) -> float:
    """A row's loss is a difference of logits, and as large as these is their rounding."""
    squares = torch.cat(largest)
    return squares.sum().sqrt().item() / len(squares)


def _multiplied_out(
    gradient: LogitGradient, image: Tensor, text: Tensor, scale: Tensor
) -> tuple[Truth, Truth, Truth]:
    """Gradients of features and scale from that of the logits, some rows at a time.

    Their terms are those of `vlmfast.verify.contrastive_loss.summed_terms`, which needs the whole
    matrix of logits.
    """
    values = [torch.zeros_like(x) for x in (image, text, scale)]
    squares = torch.zeros(3, dtype=scale.dtype, device=scale.device)
    image_power, text_power = (x.square().sum(1) for x in (image, text))
    for block in _row_blocks(image.shape[0]):
        similarity = image[block] @ text.T
        weights = gradient(scale * similarity, block)
        values[0][block] = scale * weights @ text
        values[1] += scale * weights.T @ image[block]
        values[2] += (weights * similarity).sum()
        power = weights.square()
        squares[0] += scale.square() * (power @ text_power).sum()
        squares[1] += scale.square() * (power.T @ image_power[block]).sum()
        squares[2] += (weights * similarity).square().sum()
    of_image, of_text, of_scale = map(Truth, values, squares.sqrt().tolist())
    return of_image, of_text, of_scale


def yardsticks(case: LossCase, dtype: torch.dtype, mode: str, device: str = "cpu") -> list[float]:
    """The errors of the dense formula, one for each result of a call: the worst over eight seeds.

    With some of the pairs, since float64 takes its time. A scalar, loss or gradient of the scale,
    is a sum that rounds in proportion to the root of N; gradients of features err no more with N.
    """
    few = LossCase(case.name, case.source, min(case.pairs, YARDSTICK_PAIRS), case.dim, case.loss)
    dense = dense_loss(few)
    seeds = (make_inputs(few, dtype, mode, seed, device) for seed in SEEDS)
    errors = common.worst_errors(
        (make_call(dense, inputs, mode)(), reference(few, inputs, mode)) for inputs in seeds
    )
    growth = (case.pairs / few.pairs) ** 0.5
    grown = {"fwd": (growth,), "bwd": (1, 1, growth), "fwd+bwd": (growth, 1, 1, growth)}[mode]
    return [factor * error for factor, error in zip(grown, errors, strict=True)]


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
