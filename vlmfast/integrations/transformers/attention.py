"""The attention of transformers that goes through `AttentionInterface`, and of BLIP's text model.

A layer that goes through the interface looks up its attention function by the name in its config,
and its model makes the mask by the name in the model's. Both names are registered here, as
"vlmfast". A patched layer gets a copy of its config that carries the name; the model keeps its own,
so that masks come out exactly as they did before. Layers that are left alone, and models that share
the config, see no change.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.blip import modeling_blip_text
from transformers.models.pix2struct import modeling_pix2struct

import vlmfast.functional as VF
from vlmfast.integrations.rules import (
    BACKEND,
    MARK,
    Rule,
    forward_arguments,
    leave_other_attention,
)
from vlmfast.integrations.transformers.common import (
    NAME,
    check_implementation,
    hook_model,
    model_config,
    named_arguments,
    swap_layer,
    weights_are_recorded,
)
from vlmfast.integrations.transformers.inspection import (
    eager_function,
    refusal,
    uses_interface,
    weights_used_by,
)
from vlmfast.parts.cross_attention import forget_media

__all__ = [
    "RULES",
    "BlipTextSelfAttention",
    "RestoreConfig",
    "attention_forward",
    "name_our_function",
]

FAMILY = "flash_attention"

# Set on the layers of an encoder that does not hand on to them that it returns their weights.
WEIGHTS_WANTED = "_vlmfast_weights_wanted"


# Keywords that reach an attention function and that neither sdpa nor an eager one reads.
_READ_BY_NONE = frozenset(
    (
        # What the mask says already, or the layer that cuts packed sequences apart. Flash attention
        # alone reads them.
        *("position_ids", "cache_position", "sliding_window"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "deterministic"),
        # What a model is to return, or how it takes its loss.
        *("use_cache", "return_dict", "num_items_in_batch"),
        *("output_hidden_states", "output_router_logits"),
    )
)
# Keywords that attention_forward understands.
_UNDERSTOOD = frozenset(("output_attentions", "position_bias"))


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers calls an attention function: (B, heads, L, D) in, (B, L, heads, D) out.

    The probabilities are computed, and returned, only if `output_attentions` asks for them; then
    the model's own eager function does all of the work. Whatever else a layer hands over (a paged
    cache, a soft cap, sinks, the choice of an indexer) is for the function that it called before.
    """
    config = model_config(module)
    check_implementation(config)
    eager = config._attn_implementation == "eager"
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # Made for sdpa, a mask that is only causal is None; made for eager, None masks nothing. One
    # query is the last token of a cache and sees all keys.
    is_causal = is_causal and not eager and attention_mask is None and query.shape[2] > 1

    arguments = {"scaling": scaling, "dropout": dropout, **kwargs}
    if (
        kwargs.get("output_attentions")
        or getattr(module, WEIGHTS_WANTED, False)
        or weights_are_recorded()
    ):
        if not eager:
            attention_mask = _additive_mask(attention_mask, query, key, is_causal)
        return eager_function(type(module))(module, query, key, value, attention_mask, **arguments)
    backend = getattr(module, BACKEND, None)
    unknown = [
        name
        for name, argument in kwargs.items()
        if argument is not None and name not in _READ_BY_NONE and name not in _UNDERSTOOD
    ]
    if unknown and backend is not None:
        raise NotImplementedError(
            f"{type(module).__name__}: no backend computes {', '.join(unknown)}, and "
            f"{backend!r} is forced"
        )
    if unknown and eager:
        return eager_function(type(module))(module, query, key, value, attention_mask, **arguments)
    if unknown:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, is_causal=is_causal, **arguments
        )
    if eager and attention_mask is not None and not attention_mask.is_floating_point():
        attention_mask = attention_mask.to(query.dtype)  # eager functions add whatever it is
    position_bias = kwargs.get("position_bias")  # T5 and its kin; it gets its gradient
    if position_bias is not None:
        attention_mask = create_position_bias_mask(
            position_bias, attention_mask, is_causal, query, key
        )
        is_causal = False
    out = VF.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        is_causal=is_causal,
        scale=scaling,
        enable_gqa=key.shape[1] != query.shape[1],
        backend=backend,
    )
    return out.transpose(1, 2).contiguous(), None


def _additive_mask(
    mask: Tensor | None, query: Tensor, key: Tensor, is_causal: bool
) -> Tensor | None:
    """The mask as an eager attention function takes it."""
    if is_causal:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    if mask is None or mask.is_floating_point():
        return mask
    zero = torch.zeros((), dtype=query.dtype, device=query.device)
    return torch.where(mask, zero, torch.finfo(query.dtype).min)


@dataclass
class RestoreConfig:
    """Gives a layer back the config that its model holds, and its class where that was swapped."""

    config: Any
    cls: type[nn.Module] | None = None

    def __call__(self, module: nn.Module) -> None:
        module.config = self.config
        vars(module).pop(WEIGHTS_WANTED, None)
        if self.cls is not None:
            forget_media(module)
            module.__class__ = self.cls


def name_our_function(module: nn.Module) -> RestoreConfig:
    """Gives a layer a config of its own, by which it finds `attention_forward`."""
    restore = RestoreConfig(module.config)
    config = copy.copy(restore.config)
    # The public setter would also reach the sub-configs, which the copy shares with the original.
    config._attn_implementation_internal = NAME
    module.config = config
    return restore


class BlipTextSelfAttention(modeling_blip_text.BlipTextSelfAttention):
    """The attention of BLIP's text model, to itself or to the image.

    The probabilities are computed, and returned, only if `output_attentions` asks for them; then
    the original does all of the work.
    """

    backend: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if kwargs.get("output_attentions") or weights_are_recorded():
            return super().forward(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                past_key_values,
                **kwargs,
            )

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

        cross = encoder_hidden_states is not None
        states = encoder_hidden_states if cross else hidden_states
        cache, is_updated = past_key_values, None
        if isinstance(past_key_values, EncoderDecoderCache):
            is_updated = past_key_values.is_updated.get(self.layer_idx)
            cache = (
                past_key_values.cross_attention_cache
                if cross
                else past_key_values.self_attention_cache
            )
        if cross and is_updated:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            key, value = heads(self.key(states)), heads(self.value(states))
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if cross and isinstance(past_key_values, EncoderDecoderCache):
                    past_key_values.is_updated[self.layer_idx] = True
        out = VF.scaled_dot_product_attention(
            heads(self.query(hidden_states)),
            key,
            value,
            attn_mask=encoder_attention_mask if cross else attention_mask,
            dropout_p=self.dropout.p if self.dropout.training else 0.0,
            backend=self.backend,
        )
        return out.transpose(1, 2).flatten(2), None


def _tell_of_weights(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before Pix2Struct's encoder runs, which collects weights that it does not ask its layers for.

    On eager they return them always.
    """
    given = named_arguments(_ENCODER_ARGUMENTS, args, kwargs)
    for layer in encoder.layer:
        if MARK in vars(layer.attention):
            setattr(layer.attention, WEIGHTS_WANTED, bool(given.get("output_attentions")))


_ENCODER_ARGUMENTS = forward_arguments(modeling_pix2struct.Pix2StructVisionEncoder)

AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

RULES = (
    swap_layer(
        FAMILY,
        modeling_blip_text.BlipTextSelfAttention,
        BlipTextSelfAttention,
        covers={"dropout": nn.Dropout},
    ),
    Rule(
        family=FAMILY,
        what="tells its layers when it is to return their weights",
        recognises=lambda module: type(module) is modeling_pix2struct.Pix2StructVisionEncoder,
        refusal=lambda module: None,
        replace=partial(hook_model, {"": _tell_of_weights}),
    ),
    Rule(
        family=FAMILY,
        what=f"attention function {NAME!r}",
        recognises=uses_interface,
        refusal=refusal,
        replace=name_our_function,
        refusal_within=weights_used_by,
    ),
    leave_other_attention("transformers", "does not go through AttentionInterface"),
)
