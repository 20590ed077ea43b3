"""Cases of per-image cross-attention, and the norms of the terms that it sums."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmfast.functional.cross_attention import CrossAttentionPlan, cross_attention_plan
from vlmfast.ops import cross_attention as ops
from vlmfast.reference.cross_attention import DENSE, UNIFORM
from vlmfast.reference.cross_attention import cross_attention as reference
from vlmfast.verify.common import Case, Inputs, Tensors, softmax_terms


def attention_weights(inputs: Inputs, plan: CrossAttentionPlan) -> Tensor:
    """(B, Hq, T, I * L) float64 weights of every latent for every token."""
    query, key = inputs["query"].double(), inputs["key"].double()
    batch, heads, images, latents, _ = key.shape
    identity = torch.eye(images * latents, dtype=torch.float64, device=key.device)
    identity = identity.view(images, latents, images * latents).expand(batch, heads, -1, -1, -1)
    weights, _ = reference(query, key, identity, *plan, _scale(inputs))
    return weights


def summed_terms(inputs: Inputs, grads: Tensors) -> dict[str, float]:
    """Norms of the terms whose sums the outputs and gradients are; everything in float64.

    With weights P, out sums P V, grad_value P dO, and the others terms of P `softmax_terms`.
    """
    plan = inputs["plan"]
    query, key, value = (inputs[name].double() for name in ("query", "key", "value"))
    group = query.shape[1] // key.shape[1]
    key, value = (x.flatten(2, 3).repeat_interleave(group, 1) for x in (key, value))
    weights = attention_weights(inputs, plan)
    attends = (plan.image_index != UNIFORM)[:, None, :, None]  # a mean has no logits
    reached = softmax_terms(weights, value, grads["out"], grads["logsumexp"])
    products = weights * reached * attends

    def norm(equation: str, *tensors: Tensor) -> float:
        return torch.einsum(f"{equation}->", *(x.square() for x in tensors)).sqrt().item()

    scale = abs(_scale(inputs))
    return {
        "out": norm("bhij,bhjd", weights, value),
        "logsumexp": 0.0,
        "grad_query": scale * norm("bhij,bhjd", products, key),
        "grad_key": scale * norm("bhij,bhid", products, query),
        "grad_value": norm("bhij,bhid", weights, grads["out"]),
    }


def _scale(inputs: Inputs) -> float:
    return inputs.get("scale", inputs["query"].shape[-1] ** -0.5)


def _outputs(inputs: Inputs, compute: Callable[..., tuple[Tensor, Tensor]]) -> Tensors:
    tensors = (inputs["query"], inputs["key"], inputs["value"])
    out, logsumexp = compute(*tensors, *inputs["plan"], _scale(inputs))
    return {"out": out, "logsumexp": _where_finite(logsumexp)}


def _where_finite(logsumexp: Tensor) -> Tensor:
    """The same with 0 for rows that see nothing, whose gradient would be infinity times 0."""
    return torch.where(logsumexp.isfinite(), logsumexp, 0.0)


def _by_reference(inputs: Inputs) -> Tensors:
    return _outputs(inputs, reference)


def _by_kernel(inputs: Inputs, backend: str) -> Tensors:
    return _outputs(inputs, ops.FORWARD[backend])


def visible_latents(plan: CrossAttentionPlan, latents: int) -> Tensor:
    """(B, T, I * L) bool: what torch's attention would take as its mask."""
    images, device = plan.num_images, plan.image_index.device
    if plan.visible is not None:
        sees = plan.visible
    else:
        sees = plan.image_index[..., None] == torch.arange(1, images + 1, device=device)
    mask = sees[..., None].expand(-1, -1, -1, latents)
    if plan.image_lengths is not None:
        exists = torch.arange(latents, device=device) < plan.image_lengths[..., None]
        mask = mask & (exists[:, None] | (plan.image_index == DENSE)[..., None, None])
    return mask.flatten(2)


def _by_torch(inputs: Inputs) -> Tensors:
    plan, latents = inputs["plan"], inputs["key"].shape[3]
    query, key, value = inputs["query"], inputs["key"].flatten(2, 3), inputs["value"].flatten(2, 3)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    mask = visible_latents(plan, latents)[:, None]
    uniform = (plan.image_index == UNIFORM)[:, None, :, None]
    logits = query @ key.transpose(-2, -1) * _scale(inputs)
    logits = torch.where(uniform, torch.zeros_like(logits), logits)
    logits = logits.masked_fill(~(mask | uniform), -torch.inf)
    empty = ~(mask | uniform).any(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    logsumexp = logits.float().masked_fill(empty, 0.0).logsumexp(-1)
    return {"out": weights @ value, "logsumexp": logsumexp.masked_fill(empty.squeeze(-1), 0.0)}


def image_case(
    name: str,
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int],
    value_dim: int | None = None,
    phi: Callable[[torch.Generator], Tensor] | None = None,
    lengths: tuple[int, ...] | None = None,
    differentiable: tuple[str, ...] = ("query", "key", "value"),
    **options: Any,
) -> Case:
    """A call of `image_cross_attention` with the logsumexp.

    Args:
        name: of the case.
        query_shape: (B, Hq, T, D).
        key_shape: (Hkv, I, L).
        value_dim: Dv; D for None.
        phi: makes image_index, int or bool; for None random numbers in increasing order, from no
            image to one more than there are.
        lengths: image_lengths of every batch element.
        differentiable: the inputs whose gradients are compared.
        options: mode, empty_rows, overflow of the plan; scale.
    """
    batch, _, tokens, dim = query_shape
    images = key_shape[1]
    scale = {"scale": options.pop("scale")} if "scale" in options else {}

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        if phi is None:
            numbers = torch.randint(0, images + 2, (batch, tokens), generator=generator)
            index = numbers.sort(-1).values
        else:
            index = phi(generator)
        image_lengths = None
        if lengths is not None:
            image_lengths = torch.tensor(lengths, dtype=torch.int64, device=device).expand(
                batch, -1
            )
        plan = cross_attention_plan(
            index.to(device), images, image_lengths=image_lengths, **options
        )
        return {
            "query": normal(*query_shape),
            "key": normal(batch, *key_shape, dim),
            "value": normal(batch, *key_shape, value_dim or dim),
            "plan": plan,
            **scale,
        }

    return Case(name, make, differentiable, _by_kernel, _by_torch, _by_reference, summed_terms)


def shuffled(batch: int, tokens: int, most: int) -> Callable[[torch.Generator], Tensor]:
    """Makes a Phi in no order, of numbers up to `most`."""
    return lambda generator: torch.randint(0, most + 1, (batch, tokens), generator=generator)


def random_bits(batch: int, tokens: int, images: int) -> Callable[[torch.Generator], Tensor]:
    """Makes a bool image_index that lets a token see two images of five."""
    return lambda generator: torch.rand((batch, tokens, images), generator=generator) < 0.4


CASES = [
    image_case("last", (2, 3, 90, 64), (3, 4, 64)),
    image_case("last, grouped heads, head dims 72 and 40", (1, 4, 45, 72), (2, 3, 30), 40),
    image_case("last, no order", (2, 2, 70, 32), (2, 5, 17), phi=shuffled(2, 70, 6)),
    image_case(
        "last, uniform rows, lengths",
        (2, 2, 60, 40),
        (1, 3, 21),
        lengths=(21, 4, 0),
        empty_rows="uniform",
        overflow="uniform",
    ),
    image_case("last, dense rows", (1, 2, 50, 64), (2, 3, 40), empty_rows="dense"),
    image_case("all previous", (2, 2, 65, 64), (2, 4, 64), mode="all_previous"),
    image_case(
        "several images, dense rows, lengths",
        (2, 4, 40, 80),
        (2, 3, 35),
        phi=random_bits(2, 40, 3),
        lengths=(35, 9, 20),
        empty_rows="dense",
    ),
    image_case("long images", (1, 2, 40, 64), (2, 2, 300)),
    image_case("decoding", (2, 4, 1, 64), (4, 5, 64)),
    # The Triton kernels' grad_key and grad_value of a single token average nothing of what their
    # recomputed weights have lost to rounding.
    image_case(
        "decoding, all previous",
        (2, 4, 1, 64),
        (4, 5, 64),
        differentiable=("query",),
        mode="all_previous",
    ),
]
