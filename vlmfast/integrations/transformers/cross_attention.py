"""The layers of IDEFICS and Mllama that attend to images.

Those that go through `AttentionInterface` get a class of their own as well. It sees from the mask
of images, which their model hands on, what a token attends to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.idefics import modeling_idefics
from transformers.models.idefics import perceiver as idefics_perceiver
from transformers.models.mllama import modeling_mllama

import vlmfast.functional as VF
from vlmfast.functional.cross_attention import CrossAttentionPlan
from vlmfast.integrations.rules import Rule, forward_arguments, swap_class
from vlmfast.integrations.transformers.attention import (
    RestoreConfig,
    attention_forward,
    name_our_function,
)
from vlmfast.integrations.transformers.common import (
    OTHER_VERSION,
    hook_model,
    named_arguments,
    weights_are_recorded,
)
from vlmfast.integrations.transformers.inspection import refusal
from vlmfast.parts.common import kept_result
from vlmfast.parts.cross_attention import (
    KeyValue,
    attend_to_two,
    kept_plan,
    project_two,
)

__all__ = [
    "IMAGE_MASK",
    "RULES",
    "IdeficsAttention",
    "IdeficsPerceiverAttention",
    "MllamaTextCrossAttention",
]

FAMILY = "cross_attention"

# The argument by which a model hands its layers what it lets each token see: (B, T, I).
IMAGE_MASK = "vlmfast_image_mask"


class IdeficsAttention(modeling_idefics.IdeficsAttention):
    """IDEFICS' cross-attention: each token attends to the images that it sees, and no others.

    What else the original does (dropout, attention weights, masks that do not come by way of
    IdeficsModel) is left to it, and to `attention_forward`.
    """

    backend: str | None = None
    image_mask = "image_attention_mask"  # the name by which users know it

    def forward(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        sees = kwargs.pop(IMAGE_MASK, None)
        if (
            sees is None
            or key_value_states is None
            or past_key_values is not None
            or not _kernel_suffices(self, kwargs)
            or attention_mask is None
            or attention_mask.shape[-1] != key_value_states.shape[1]  # the original says so itself
        ):
            return super().forward(
                hidden_states,
                key_value_states,
                attention_mask,
                position_ids,
                past_key_values,
                **kwargs,
            )
        query = self.q_proj(hidden_states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        if self.qk_layer_norms:
            query = self.q_layer_norm(query)
        key, value = self._key_value(key_value_states)
        # (B, heads, I * L, head_dim) -> (B, heads, I, L, head_dim)
        key, value = (x.unflatten(2, (sees.shape[-1], -1)) for x in (key, value))
        out = _attend_to_images(self, query, key, value, sees, empty_rows="zero")
        return self.o_proj(out), None

    def _key_value(self, media: Tensor) -> KeyValue:
        """(B, heads, I * L, head_dim), kept while a model generates and hands on equal media."""
        modules: tuple[nn.Module, ...] = (self.k_proj, self.v_proj)
        if self.qk_layer_norms:
            modules = (*modules, self.k_layer_norm)

        def project() -> KeyValue:
            key, value = (
                projection(media).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for projection in modules[:2]
            )
            return self.k_layer_norm(key) if self.qk_layer_norms else key, value

        return kept_result(self, modules, media, project, (modeling_idefics.IdeficsRMSNorm,))


class IdeficsPerceiverAttention(idefics_perceiver.IdeficsPerceiverAttention):
    """The attention of IDEFICS' resampler: context and latents are not concatenated."""

    backend: str | None = None

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        context = self.context_layer_norm(context)
        latents = self.latents_layer_norm(latents)

        def heads(projected: Tensor) -> Tensor:
            return projected.unflatten(-1, (self.n_heads, -1))

        def key_value(tokens: Tensor) -> KeyValue:
            key, value = heads(self.k_proj(tokens)), heads(self.v_proj(tokens))
            return self.k_layer_norm(key) if self.qk_layer_norms else key, value

        query = heads(self.q_proj(latents))
        modules: tuple[nn.Module, ...] = (self.k_proj, self.v_proj)
        if self.qk_layer_norms:
            query = self.q_layer_norm(query)
            modules = (*modules, self.k_layer_norm)
        sources = project_two(context, latents, modules, key_value, classes=(nn.LayerNorm,))
        out = attend_to_two(query, *sources, scale=self.qk_scale, backend=self.backend)
        return self.output_proj(out.flatten(-2))


class MllamaTextCrossAttention(modeling_mllama.MllamaTextCrossAttention):
    """Mllama's cross-attention, on a mask of one bit for each tile of an image.

    Such a mask (B, T, tiles) comes by way of MllamaModel. A token that sees no tile sees all of
    them, as in the original. With a mask of another kind the original does the work.
    """

    backend: str | None = None
    image_mask = "cross_attention_mask"

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_states: Tensor | None = None,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        if attention_mask is None or attention_mask.dim() != 3:
            return super().forward(
                hidden_states,
                cross_attention_states,
                past_key_values,
                attention_mask,
                use_cache,
                **kwargs,
            )
        query = self.q_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        query = self.q_norm(query)
        if cross_attention_states is not None:
            shape = (len(hidden_states), -1, self.num_key_value_heads, self.head_dim)
            key = self.k_norm(self.k_proj(cross_attention_states).view(shape).transpose(1, 2))
            value = self.v_proj(cross_attention_states).view(shape).transpose(1, 2)
            if past_key_values is not None:
                key, value = past_key_values.update(key, value, self.layer_idx)
        else:
            layer = past_key_values.layers[self.layer_idx]
            key, value = layer.keys, layer.values

        tiles = attention_mask.shape[-1]
        if not _kernel_suffices(self, kwargs):
            out, weights = attention_forward(
                self,
                query,
                key,
                value,
                _mask_of_tiles(attention_mask, key.shape[2] // tiles, query.dtype),
                dropout=self.dropout if self.training else 0.0,
                scaling=self.scaling,
                **kwargs,
            )
            return self.o_proj(out.flatten(2)), weights
        key, value = (x.unflatten(2, (tiles, -1)) for x in (key, value))
        out = _attend_to_images(self, query, key, value, attention_mask, empty_rows="dense")
        return self.o_proj(out), None


def _kernel_suffices(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the kernels of cross_attention compute what a layer is asked for."""
    drops = module.training and module.dropout > 0
    return not (drops or kwargs.get("output_attentions") or weights_are_recorded())


def _attend_to_images(
    module: Any, query: Tensor, key: Tensor, value: Tensor, sees: Tensor, empty_rows: str
) -> Tensor:
    """From projections to the input of the output projection, (B, T, heads * head_dim)."""
    shape = (query.shape[0], query.shape[2], sees.shape[-1])
    if sees.shape[0] not in (1, shape[0]) or sees.shape[1] not in (1, shape[1]):
        raise ValueError(
            f"{module.image_mask}: expected a row for each of {shape[1]} tokens of {shape[0]} "
            f"texts, got {tuple(sees.shape[:2])[::-1]}"
        )

    def make() -> CrossAttentionPlan:
        index = sees.bool().expand(shape)
        return VF.cross_attention_plan(index, shape[-1], empty_rows=empty_rows)

    plan = kept_plan(sees, (*shape, empty_rows), make)
    out = VF.image_cross_attention(
        query, key, value, plan, scale=module.scaling, backend=module.backend
    )
    return out.transpose(1, 2).flatten(2)  # type: ignore[union-attr]


def _mask_of_tiles(sees: Tensor, latents: int, dtype: torch.dtype) -> Tensor:
    """(B, T, tiles) as the additive mask (B, 1, T, tiles * latents) that Mllama makes of it."""
    hidden = ~sees & sees.any(-1, keepdim=True)
    mask = torch.zeros(hidden.shape, dtype=dtype, device=sees.device)
    mask = mask.masked_fill(hidden, torch.finfo(dtype).min)
    return mask.repeat_interleave(latents, dim=-1).unsqueeze(1)


def _hand_on_image_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before IdeficsModel expands its mask: hands the layers the mask as it comes, (B, T, I)."""
    if not any(isinstance(x.cross_attn, IdeficsAttention) for x in model.gated_cross_attn_layers):
        return None
    given = named_arguments(_IDEFICS_ARGUMENTS, args, kwargs)
    return args, {**kwargs, IMAGE_MASK: given.get("image_attention_mask")}


def _hand_on_tile_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before MllamaModel expands its mask: takes it away, if no layer needs it expanded."""
    given = named_arguments(_MLLAMA_ARGUMENTS, args, kwargs)
    mask = given.get("cross_attention_mask")
    if mask is None or not all(
        isinstance(layer.cross_attn, MllamaTextCrossAttention)
        for layer in model.language_model.layers
        if isinstance(layer, modeling_mllama.MllamaCrossAttentionDecoderLayer)
    ):
        return None
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given.get("inputs_embeds")
    if tokens is None:  # the model itself refuses that, and a number of tiles that does not fit
        return None
    pixels, states = given.get("pixel_values"), given.get("cross_attention_states")
    tiles = len(tokens) * mask.shape[2:].numel()
    if pixels is not None and pixels.shape[:3].numel() != tiles:
        return None
    if states is not None and len(states) != tiles:
        return None
    count = tokens.shape[1]
    if mask.shape[1] != count:  # the mask of all tokens, of which a cache holds the first
        past = given.get("past_key_values")
        start = int(past.get_seq_length()) if past is not None else 0
        mask = mask[:, start : start + count]
    given |= {"cross_attention_mask": None, IMAGE_MASK: (mask == 1).flatten(2)}
    return (), given


def _take_tile_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before MllamaTextModel hands masks to its layers: these take one bit for each tile."""
    sees = kwargs.pop(IMAGE_MASK, None)
    if sees is None:
        return None
    rows = sees.any(-1)[:, None, :, None].to(model.dtype)
    return args, {
        **kwargs,
        "cross_attention_mask": sees,
        "full_text_row_masked_out_mask": rows,
    }


_IDEFICS_ARGUMENTS = forward_arguments(modeling_idefics.IdeficsModel)
_MLLAMA_ARGUMENTS = forward_arguments(modeling_mllama.MllamaModel)


def _swap_interface_layer(
    original: type[nn.Module],
    replacement: type[nn.Module],
    concerns: Callable[[Any], bool] = lambda module: True,
) -> Rule:
    """A rule for a layer that goes through the interface, and whose class is swapped as well."""
    same_call = forward_arguments(original) == forward_arguments(replacement)

    def replace(module: nn.Module) -> RestoreConfig:
        restore = name_our_function(module)
        restore.cls = original
        module.__class__ = replacement
        return restore

    return Rule(
        family=FAMILY,
        what=replacement,
        recognises=lambda module: type(module) is original and concerns(module),
        refusal=lambda module: refusal(module) if same_call else OTHER_VERSION,
        replace=replace,
    )


def _pass_on_masks(original: type[nn.Module], hooks: dict[str, Callable[..., Any]]) -> Rule:
    """A rule for a model that gives its layers masks, so that they get them in another form."""

    def refusal(module: nn.Module) -> str | None:
        if type(module) is not original:
            return "a subclass may compute something else"
        if not all(
            "kwargs" in forward_arguments(type(module.get_submodule(path)))
            for path in hooks  # without kwargs, a model passes on what it knows alone
        ):
            return OTHER_VERSION
        return None

    return Rule(
        family=FAMILY,
        what="hands its layers one bit for each image",
        recognises=lambda module: isinstance(module, original),
        refusal=refusal,
        replace=partial(hook_model, hooks),
    )


RULES = (
    _pass_on_masks(modeling_idefics.IdeficsModel, {"": _hand_on_image_mask}),
    _pass_on_masks(
        modeling_mllama.MllamaModel,
        {"": _hand_on_tile_mask, "language_model": _take_tile_mask},
    ),
    _swap_interface_layer(
        modeling_idefics.IdeficsAttention,
        IdeficsAttention,
        concerns=lambda module: module.is_cross_attention,
    ),
    _swap_interface_layer(modeling_mllama.MllamaTextCrossAttention, MllamaTextCrossAttention),
    swap_class(
        FAMILY,
        idefics_perceiver.IdeficsPerceiverAttention,
        IdeficsPerceiverAttention,
    ),
)
