"""What layers do around attention to images: projections, kept where they can be, and plans."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.functional.cross_attention import CrossAttentionPlan
from vlmfast.kept import Copied, Keeper, Keepers, Watched, can_be_copied, can_be_watched
from vlmfast.parts.common import has_hooks, is_linear

__all__ = [
    "KeyValue",
    "attend_to_two",
    "forget_media",
    "kept_key_value",
    "kept_plan",
    "project_two",
]

KeyValue = tuple[Tensor, Tensor]


def project_two(
    features: Tensor,
    latents: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[Tensor], KeyValue],
    plain: tuple[type[nn.Module], ...] = (),
) -> tuple[KeyValue, KeyValue]:
    """Key and value of two sources, (N, tokens, H, D) each, by `project`, which calls `modules`.

    Each source is projected alone, if it shows nowhere: modules that are neither linear layers nor
    of a class of `plain`, and those with hooks, get both sources as one tensor.
    """
    if _are_plain(modules, plain):
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


def kept_key_value(
    layer: nn.Module,
    media: Tensor,
    modules: tuple[nn.Module, ...],
    project: Callable[[], KeyValue],
    plain: tuple[type[nn.Module], ...] = (),
) -> KeyValue:
    """`project()`, key and value of the media, or what it gave `layer` last time.

    It must be a function of `media`, of `modules` and of what never changes in `layer`. Modules
    that are neither linear layers nor of a class of `plain` may be more than their parameters say,
    and so may those with hooks: nothing is kept of them.
    """
    if torch.compiler.is_compiling():
        return project()
    sources = (media, *(p for module in modules for p in module.parameters()))
    if _are_plain(modules, plain) and can_be_copied(*sources):
        return _kept_media[layer].get(Copied, sources, None, project)
    _kept_media.forget(layer)
    return project()


def _are_plain(modules: tuple[nn.Module, ...], plain: tuple[type[nn.Module], ...]) -> bool:
    """Whether the modules are what their parameters say, and nobody watches them."""
    return all(is_linear(m) or type(m) in plain for m in modules) and not any(
        map(has_hooks, modules)
    )


def forget_media(layer: nn.Module) -> None:
    """Drops what `kept_key_value` has kept for a layer, and the plan that `kept_plan` has kept."""
    _kept_media.forget(layer)
    _last_plan.forget()


def kept_plan(
    source: Tensor, context: Hashable, make: Callable[[], CrossAttentionPlan]
) -> CrossAttentionPlan:
    """`make()`, a function of `source` and `context`, made once for all layers of a model.

    They are handed the same mask one after the other, so only the last plan is kept.
    """
    if can_be_copied(source):
        return _last_plan.get(Copied, (source,), context, make)
    if can_be_watched(source):
        return _last_plan.get(Watched, (source,), context, make)
    return make()


_kept_media: Keepers[KeyValue] = Keepers()
_last_plan: Keeper[CrossAttentionPlan] = Keeper()
