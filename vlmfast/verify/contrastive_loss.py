"""Cases of the contrastive losses, and the norms of the terms that they sum."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.functional import contrastive_loss as functional
from vlmfast.verify.common import Case, Inputs, Tensors

Makes = Callable[[torch.Generator], Tensors]
Operands = Callable[[Inputs], list[tuple[Tensor, Tensor]]]
LossOf = Callable[[list[Tensor], Inputs], Tensor]


def _cross_entropy(logits: Tensor, **options: Any) -> Tensor:
    labels = torch.arange(logits.shape[0], device=logits.device)
    return F.cross_entropy(_wide(logits), labels, **options)


def _wide(logits: Tensor) -> Tensor:
    """Half-precision logits in float32, as autocast hands them to a loss."""
    return logits if logits.dtype == torch.float64 else logits.float()


# --- each loss as matrices whose products are logits, and a function of the logits ---------------


def _clip_of(logits: list[Tensor], inputs: Inputs) -> Tensor:
    return (_cross_entropy(logits[0]) + _cross_entropy(logits[0].T)) / 2


def _siglip_of(logits: list[Tensor], inputs: Inputs) -> Tensor:
    x = _wide(logits[0])
    labels = 2 * torch.eye(x.shape[0], dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(labels * x).sum() / x.shape[0]


def _ntxent_of(logits: list[Tensor], inputs: Inputs) -> Tensor:
    x = _wide(logits[0])
    n = x.shape[0]
    itself = torch.eye(n, dtype=torch.bool, device=x.device)
    labels = (torch.arange(n, device=x.device) + n // 2) % n
    return F.cross_entropy(x.masked_fill(itself, -torch.inf), labels)


def _itc_of(logits: list[Tensor], inputs: Inputs) -> Tensor:
    """ALBEF's and BLIP's; the momentum features' logits follow those of the features."""
    alpha, smoothing = inputs.get("alpha", 0.0), inputs.get("label_smoothing", 0.0)
    losses = []
    for x, momentum in zip(map(_wide, logits[:2]), map(_wide, logits[2:]), strict=True):
        targets = alpha * momentum.detach().softmax(1)
        targets.diagonal().add_(1 - alpha)
        losses.append(F.cross_entropy(x, targets, label_smoothing=smoothing))
    return (losses[0] + losses[1]) / 2


def _blip2_of(logits: list[Tensor], inputs: Inputs) -> Tensor:
    smoothing = inputs.get("label_smoothing", 0.0)
    most = logits[0].max(-1).values  # (image, text)
    losses = [_cross_entropy(x, label_smoothing=smoothing) for x in (most, most.T)]
    return (losses[0] + losses[1]) / 2


def _pairs(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    return [(inputs["image"], inputs["text"])]


def _views(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    z = F.normalize(torch.cat((inputs["image"], inputs["text"])), dim=-1)
    return [(z, z)]


def _keys(inputs: Inputs) -> list[tuple[Tensor, Tensor]]:
    image_keys = torch.cat((inputs["image_momentum"], inputs["image_queue"]))
    text_keys = torch.cat((inputs["text_momentum"], inputs["text_queue"]))
    return [
        (inputs["image"], text_keys),
        (inputs["text"], image_keys),
        (inputs["image_momentum"], text_keys),
        (inputs["text_momentum"], image_keys),
    ]


def _logits(x: Tensor, y: Tensor, inputs: Inputs) -> Tensor:
    """(rows, columns), or (rows, columns, queries) for rows (n, queries, D)."""
    logits = inputs["scale"] * x @ y.T
    if "bias" in inputs:
        logits = logits + inputs["bias"]
    return logits.transpose(1, 2) if logits.dim() == 3 else logits


def summed_terms(
    inputs: Inputs,
    grads: Tensors,
    operands: Operands,
    loss_of: LossOf,
) -> dict[str, float]:
    """Norms of the terms whose sums the loss and its gradients are; everything in float64.

    With G the gradient of the logits, features get sums of G times the other side's features,
    scale and bias sums of G times similarities and of G.
    """
    pairs = operands(inputs)
    logits = [_logits(x, y, inputs).requires_grad_() for x, y in pairs]
    loss = loss_of(logits, inputs)
    gradients = torch.autograd.grad(loss, logits, grads["loss"], allow_unused=True)
    scale, n = inputs["scale"].square().item(), inputs["image"].shape[0]
    squares = dict.fromkeys(("loss", "grad_image", "grad_text", "grad_scale", "grad_bias"), 0.0)
    for (x, y), logit, gradient in zip(pairs, logits, gradients, strict=True):
        if gradient is None:  # of momentum features
            continue
        if gradient.dim() == 3:
            x, gradient = x.flatten(0, 1), gradient.transpose(1, 2).flatten(0, 1)
        power = gradient.square()
        of_rows = scale * power @ y.square().sum(1)
        of_columns = scale * power.T @ x.square().sum(1)
        if operands is _views:
            # Either side of the logits is a view; its gradient is divided by its length.
            lengths = torch.cat((inputs["image"], inputs["text"])).square().sum(1)
            both = (of_rows + of_columns) / lengths
            of_rows, of_columns = both[:n], both[n:]
        if operands is not _keys:
            squares["grad_image"] += of_rows.sum().item()
            squares["grad_text"] += of_columns.sum().item()
        else:
            squares["grad_image" if x is inputs["image"] else "grad_text"] += of_rows.sum().item()
        squares["grad_scale"] += (power * (x @ y.T).square()).sum().item()
        squares["grad_bias"] += power.sum().item()
        # A row's loss is a difference of logits, and as large as these is their rounding.
        largest = logit.detach().flatten(1).square().amax(1)
        squares["loss"] += (grads["loss"].square() * largest.sum()).item() / n**2
    return {name: square**0.5 for name, square in squares.items()}


def loss_case(
    name: str,
    function: Callable[..., Tensor],
    make: Makes,
    operands: Operands,
    loss_of: LossOf,
    scale: float,
    bias: float | None = None,
    **numbers: float,
) -> Case:
    """One loss on one kind of data.

    Args:
        name: of the case.
        function: of `vlmfast.functional`.
        make: makes image and text, and further tensors, which are options of the function.
        operands: inputs to the pairs of matrices whose products are the logits.
        loss_of: the loss, of the logits.
        scale: of the logits; float32, with gradient.
        bias: likewise.
        numbers: further options of the function.
    """

    def inputs(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        made: Inputs = {key: x.to(dtype).to(device) for key, x in make(generator).items()}
        made["scale"] = torch.tensor(scale, device=device)
        if bias is not None:
            made["bias"] = torch.tensor(bias, device=device)
        return {**made, **numbers}

    def call(inputs: Inputs, backend: str) -> Tensors:
        options = {key: inputs[key] for key in inputs.keys() - {"image", "text", "scale", "bias"}}
        scalars = [inputs[key] for key in ("scale", "bias") if key in inputs]
        if function is functional.ntxent_loss:
            scalars = [1.0 / inputs["scale"]]
        loss = function(inputs["image"], inputs["text"], *scalars, **options, backend=backend)
        return {"loss": loss}

    def by_torch(inputs: Inputs) -> Tensors:
        return {"loss": loss_of([_logits(x, y, inputs) for x, y in operands(inputs)], inputs)}

    differentiable = ("image", "text", "scale") + (("bias",) if bias is not None else ())
    return Case(
        name,
        inputs,
        differentiable,
        call,
        by_torch,
        lambda inputs: call(inputs, "reference"),
        lambda inputs, grads: summed_terms(inputs, grads, operands, loss_of),
    )


def _unit(generator: torch.Generator, *shape: int) -> Tensor:
    return F.normalize(torch.randn(shape, generator=generator), dim=-1)


def random_pairs(n: int, dim: int) -> Makes:
    """Features that know nothing of each other, as before training."""
    return lambda generator: {"image": _unit(generator, n, dim), "text": _unit(generator, n, dim)}


def aligned_pairs(n: int, dim: int, lowest: float, highest: float) -> Makes:
    """Pairs whose cosines are spread evenly between two numbers."""

    def make(generator: torch.Generator) -> Tensors:
        text = _unit(generator, n, dim)
        noise = torch.randn((n, dim), generator=generator)
        noise = F.normalize(noise - (noise * text).sum(1, keepdim=True) * text, dim=-1)
        cosine = torch.linspace(lowest, highest, n)[:, None]
        return {"image": cosine * text + (1 - cosine.square()).sqrt() * noise, "text": text}

    return make


def duplicated_pairs(n: int, dim: int) -> Makes:
    """Every pair twice: half of each row's and column's gradient cancels the other half."""

    def make(generator: torch.Generator) -> Tensors:
        pairs = aligned_pairs(n, dim, 0.3, 0.9)(generator)
        return {name: x.repeat(2, 1) for name, x in pairs.items()}

    return make


def momentum_pairs(n: int, queue: int, dim: int) -> Makes:
    """Features, momentum features near them, and queues."""

    def make(generator: torch.Generator) -> Tensors:
        tensors = aligned_pairs(n, dim, 0.3, 0.9)(generator)
        for name in ("image", "text"):
            noise = torch.randn((n, dim), generator=generator)
            tensors[f"{name}_momentum"] = F.normalize(tensors[name] + 0.02 * noise, dim=-1)
            tensors[f"{name}_queue"] = _unit(generator, queue, dim)
        return tensors

    return make


def query_pairs(n: int, queries: int, dim: int) -> Makes:
    """Images of several queries."""
    return lambda generator: {
        "image": _unit(generator, n, queries, dim),
        "text": _unit(generator, n, dim),
    }


def clip_case(name: str, make: Makes, scale: float = 100.0) -> Case:
    """A call of `clip_loss`."""
    return loss_case(name, functional.clip_loss, make, _pairs, _clip_of, scale)


def siglip_case(
    name: str,
    make: Makes,
    scale: float = 10.0,
    bias: float = -10.0,
) -> Case:
    """A call of `siglip_loss`."""
    return loss_case(name, functional.siglip_loss, make, _pairs, _siglip_of, scale, bias)


def ntxent_case(name: str, make: Makes, temperature: float = 0.1) -> Case:
    """A call of `ntxent_loss`."""
    scale = 1.0 / temperature
    return loss_case(name, functional.ntxent_loss, make, _views, _ntxent_of, scale)


def itc_case(name: str, make: Makes, **numbers: float) -> Case:
    """A call of `itc_loss` with momentum features and queues."""
    return loss_case(name, functional.itc_loss, make, _keys, _itc_of, 1 / 0.07, **numbers)


def blip2_case(name: str, make: Makes, **numbers: float) -> Case:
    """A call of `itc_loss` with several queries an image."""
    return loss_case(name, functional.itc_loss, make, _pairs, _blip2_of, 1 / 0.07, **numbers)


CASES = [
    clip_case("clip, random", random_pairs(130, 72)),
    clip_case("clip, near convergence", aligned_pairs(200, 64, 0.3, 0.9)),
    clip_case("clip, converged", aligned_pairs(100, 64, 0.95, 1.0)),
    clip_case("clip, duplicates", duplicated_pairs(50, 64)),
    clip_case("clip, anti-parallel", aligned_pairs(97, 64, -1.0, -1.0)),
    siglip_case("siglip", aligned_pairs(110, 48, 0.0, 0.9)),
    ntxent_case("ntxent", aligned_pairs(75, 40, 0.3, 0.9)),
    itc_case("itc, soft targets", momentum_pairs(40, 90, 32), alpha=0.4),
    blip2_case("itc, queries", query_pairs(40, 5, 32), label_smoothing=0.1),
]
