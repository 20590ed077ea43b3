"""Flamingo's layers, as flamingo-pytorch and OpenFlamingo have them.

Both libraries, and packages that have copied from them, hold one code under one set of names. So
the layers are recognised by what they are made of, wherever their classes come from, and neither
library is imported.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

import vlmfast.nn as vnn
from vlmfast.integrations.rules import Restore, Rule, forward_arguments
from vlmfast.parts.cross_attention import forget_media

__all__ = ["RULES", "GatedCrossAttentionBlockV1", "MaskedCrossAttentionV1"]

FAMILY = "cross_attention"


class _CallOfVersion1(nn.Module):
    """The call of OpenFlamingo 1, over a layer of vlmfast.nn."""

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        attend_previous: bool = True,
    ) -> Tensor:
        return super().forward(x, media, media_locations, attend_previous=attend_previous)


class MaskedCrossAttentionV1(_CallOfVersion1, vnn.MaskedCrossAttention):  # type: ignore[misc]
    """`vnn.MaskedCrossAttention` with the call of OpenFlamingo 1."""


class GatedCrossAttentionBlockV1(  # type: ignore[misc]
    _CallOfVersion1, vnn.GatedCrossAttentionBlock
):
    """`vnn.GatedCrossAttentionBlock` with the call of OpenFlamingo 1."""


def _swap_by_structure(
    replacement: type[nn.Module],
    children: set[str],
    parameters: set[str],
    attributes: set[str],
    calls: dict[tuple[str, ...], type[nn.Module]],
) -> Rule:
    """A rule for classes that bear the name of `replacement` and hold what it holds.

    Args:
        replacement: the layer of vlmfast.nn.
        children: names of the modules that the original holds.
        parameters: names of the parameters that it holds itself.
        attributes: names of the numbers and flags that its forward reads.
        calls: the class to swap to, by the arguments that the original's forward takes.
    """
    name = replacement.__name__

    def recognises(module: nn.Module) -> bool:
        return (
            any(cls.__name__ == name for cls in type(module).__mro__)
            and not isinstance(module, replacement)
            and children <= module._modules.keys()
            and attributes <= vars(module).keys()
        )

    def refusal(module: nn.Module) -> str | None:
        cls = type(module)
        if cls.__name__ != name or cls.__bases__ != (nn.Module,):
            return "a subclass may compute something else"
        held = {*module._modules, *module._parameters, *module._buffers}
        if held != children | parameters:
            others = sorted(held ^ (children | parameters))
            return f"it is not made as Flamingo's is: {', '.join(others)}"
        arguments = forward_arguments(cls)
        if arguments not in calls:
            return f"its forward takes {', '.join(arguments)}"
        if "forward" in vars(module):
            return "its forward was replaced by another"
        return None

    def replace(module: nn.Module) -> Restore:
        original = type(module)
        module.__class__ = calls[forward_arguments(original)]
        return partial(_restore, original)

    return Rule(
        family=FAMILY,
        what=replacement,
        recognises=recognises,
        refusal=refusal,
        replace=replace,
    )


def _restore(original: type[nn.Module], module: nn.Module) -> None:
    forget_media(module)
    module.__class__ = original


_TEXT_AND_MEDIA = ("x", "media", "media_locations")

RULES = (
    _swap_by_structure(
        vnn.MaskedCrossAttention,
        children={"norm", "to_q", "to_kv", "to_out"},
        parameters=set(),
        attributes={"heads", "scale", "only_attend_immediate_media"},
        calls={
            _TEXT_AND_MEDIA: vnn.MaskedCrossAttention,
            (*_TEXT_AND_MEDIA, "use_cached_media"): vnn.MaskedCrossAttention,
            (*_TEXT_AND_MEDIA, "attend_previous"): MaskedCrossAttentionV1,
        },
    ),
    _swap_by_structure(
        vnn.GatedCrossAttentionBlock,
        children={"attn", "ff"},
        parameters={"attn_gate", "ff_gate"},
        attributes=set(),
        calls={
            _TEXT_AND_MEDIA: vnn.GatedCrossAttentionBlock,
            (*_TEXT_AND_MEDIA, "use_cached_media"): vnn.GatedCrossAttentionBlock,
            (*_TEXT_AND_MEDIA, "attend_previous"): GatedCrossAttentionBlockV1,
        },
    ),
    _swap_by_structure(
        vnn.PerceiverAttention,
        children={"norm_media", "norm_latents", "to_q", "to_kv", "to_out"},
        parameters=set(),
        attributes={"heads", "scale"},
        calls={("x", "latents"): vnn.PerceiverAttention},
    ),
)
