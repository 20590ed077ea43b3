"""What layers do around attention to images: projections, kept where they can be, and plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.functional.cross_attention import CrossAttentionPlan
from vlmfast.kept import Copied, Keeper, Watched, can_be_copied, can_be_watched
from vlmfast.parts.common import forget_result, is_plain

__all__ = [
    "KeyValue",
    "attend_to_two",
    "forget_media",
    "kept_plan",
    "project_two",
]

KeyValue = tuple[Tensor, Tensor]


def project_two(
    features: Tensor,
    latents: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[Tensor], KeyValue],
    classes: tuple[type[nn.Module], ...] = (),
) -> tuple[KeyValue, KeyValue]:
    """Key and value of two sources, (N, tokens, H, D) each, by `project`, which calls `modules`.

    Each source is projected alone where that shows nowhere: modules that are not plain (see
    `is_plain`, also of `classes`) get both sources as one tensor.
    """
    if all(is_plain(module, classes) for module in modules):
        return project(features), project(latents)
    key, value = project(torch.cat((features, latents), dim=-2))
    sizes = [features.shape[-2], latents.shape[-2]]
    (key, key_of_latents), (value, value_of_latents) = (x.split(sizes, 1) for x in (key, value))
    return (key, value), (key_of_latents, value_of_latents)


def attend_to_two(
    query: Tensor, first: KeyValue, second: KeyValue, *, scale: float, backend: str | None
) -> Tensor:
    """Attention to the keys of two sources, one softmax over both, and neither copied.

    Each source is attended to alone; their results, weighted by the shares that they have of the
    sum of exponentials, add up to the whole:

        out = w * out_1 + (1 - w) * out_2,   w = sigmoid(logsumexp_1 - logsumexp_2)

    Shapes: query (N, L, H, D); key and value of each source (N, tokens, H, D); out (N, L, H, D).
    """

    def attend(source: KeyValue) -> tuple[Tensor, Tensor]:
        key, value = source
        queries, keys = query.shape[1], key.shape[1]
        sequences = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device)
        out, logsumexp = VF.varlen_attention(
            query.flatten(0, 1),
            key.flatten(0, 1),
            value.flatten(0, 1),
            sequences * queries,
            sequences * keys,
            queries,
            keys,
            scale=scale,
            return_lse=True,
            backend=backend,
        )
        return out, logsumexp.transpose(0, 1).unsqueeze(-1)

    (out, logsumexp), (other, other_logsumexp) = attend(first), attend(second)
    weight = torch.sigmoid(logsumexp - other_logsumexp)
    merged = torch.lerp(other.to(weight.dtype), out.to(weight.dtype), weight)
    return merged.to(out.dtype).unflatten(0, query.shape[:2])


def forget_media(layer: nn.Module) -> None:
    """Drops the projected media that are kept for a layer, and the plan that is kept for all."""
    forget_result(layer)
    _last_plan.forget()


def kept_plan(
    source: Tensor, context: Hashable, make: Callable[[], CrossAttentionPlan]
) -> CrossAttentionPlan:
    """`make()`, a function of `source` and `context`, made once for all layers of a model.

    One mask is handed to all of them in turn, so only the last plan is kept.
    """
    if can_be_copied(source):
        return _last_plan.get(Copied, (source,), context, make)
    if can_be_watched(source):
        return _last_plan.get(Watched, (source,), context, make)
    return make()


_last_plan: Keeper[CrossAttentionPlan] = Keeper()
