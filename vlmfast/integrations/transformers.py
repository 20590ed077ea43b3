"""transformers: the layers of Swin and Swin V2, and every attention layer of other models that goes
through its `AttentionInterface`.

Swin's layers roll, pad and cut the map, and hand windows to their attention. All of this is one
kernel here, so that the layer is what is replaced. Its attention stays where it is, and holds the
parameters, but is called only for attention weights.

A layer that goes through the interface looks up its attention function by the name in its config,
and its model makes the mask by the name in the model's. Both names are registered here, as
"vlmfast". A patched layer gets a copy of its config that carries the name; the model keeps its own,
so that masks come out exactly as they did before, and layers left alone, and other models made from
the same config, see no change.

The layers that attend to images get a class of their own as well. It sees from the mask of images,
which their model hands on, what a token attends to.

CLIPModel and SiglipModel compute their contrastive loss, if `return_loss` asks for it, without the
matrix of logits. Their output holds the logits all the same: they are computed when read.
"""

from __future__ import annotations

import ast
import copy
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers import CLIPModel as OriginalCLIPModel
from transformers import SiglipModel as OriginalSiglipModel
from transformers.cache_utils import EncoderDecoderCache
from transformers.integrations.sdpa_attention import (
    create_position_bias_mask,
    sdpa_attention_forward,
)
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.blip import modeling_blip_text
from transformers.models.clip.modeling_clip import CLIPOutput, _get_vector_norm
from transformers.models.idefics import modeling_idefics
from transformers.models.idefics import perceiver as idefics_perceiver
from transformers.models.mllama import modeling_mllama
from transformers.models.pix2struct import modeling_pix2struct
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.models.swin import modeling_swin
from transformers.models.swin2sr import modeling_swin2sr
from transformers.models.swinv2 import modeling_swinv2
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import _active_collector

import vlmfast.functional as VF
from vlmfast.functional.cross_attention import CrossAttentionPlan
from vlmfast.integrations.rules import (
    BACKEND,
    MARK,
    Rule,
    class_name,
    code_names,
    computes_attention,
    leave_alone,
    swap_class,
)
from vlmfast.nn.cross_attention import (
    KeyValue,
    attend_to_two,
    forget_media,
    kept_key_value,
    kept_plan,
    project_two,
)
from vlmfast.nn.window_attention import (
    bias_from_table,
    clamped_logit_scale,
    continuous_bias_table,
    padding_value,
)

__all__ = [
    "NAME",
    "RULES",
    "BlipTextSelfAttention",
    "CLIPModel",
    "IdeficsAttention",
    "IdeficsPerceiverAttention",
    "MllamaTextCrossAttention",
    "SiglipModel",
    "Swin2SRLayer",
    "SwinLayer",
    "Swinv2Layer",
    "attention_forward",
]

NAME = "vlmfast"
FAMILY = "flash_attention"
WINDOW_FAMILY = "window_attention"
CROSS_FAMILY = "cross_attention"

# The argument by which a model hands its layers what it lets each token see: (B, T, I).
IMAGE_MASK = "vlmfast_image_mask"
LOSS_FAMILY = "contrastive_loss"

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
    config = _model_config(module)
    _check_implementation(config)
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
        or _weights_are_recorded()
    ):
        if not eager:
            attention_mask = _additive_mask(attention_mask, query, key, is_causal)
        return _eager_function(type(module))(module, query, key, value, attention_mask, **arguments)
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
        return _eager_function(type(module))(module, query, key, value, attention_mask, **arguments)
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


@dataclass
class _RestoreConfig:
    """The config of a patched layer before the patch, the one that its model holds.

    And its class, where that was swapped, too.
    """

    original: Any
    cls: type[nn.Module] | None = None

    def __call__(self, module: nn.Module) -> None:
        module.config = self.original
        vars(module).pop(WEIGHTS_WANTED, None)
        if self.cls is not None:
            forget_media(module)
            module.__class__ = self.cls


def _model_config(module: nn.Module) -> Any:
    mark = getattr(module, MARK, None)
    return module.config if mark is None else mark.restore.original


def _check_implementation(config: Any) -> None:
    if config._attn_implementation not in ("sdpa", "eager", NAME):
        raise ValueError(
            f"attn_implementation: expected sdpa or eager, got {config._attn_implementation!r}, "
            "set after vlmfast.patch; call vlmfast.unpatch before"
        )


def _weights_are_recorded() -> bool:
    """Whether a model up the stack collects attention weights: not every layer is told of it."""
    collected = _active_collector.get()
    return collected is not None and any("attentions" in name for name in collected)


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
        """(B, heads, I * L, head_dim), kept while a model generates: it hands on the same media."""
        modules: tuple[nn.Module, ...] = (self.k_proj, self.v_proj)
        if self.qk_layer_norms:
            modules = (*modules, self.k_layer_norm)

        def project() -> KeyValue:
            key, value = (
                projection(media).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
                for projection in modules[:2]
            )
            return self.k_layer_norm(key) if self.qk_layer_norms else key, value

        return kept_key_value(self, media, modules, project, (modeling_idefics.IdeficsRMSNorm,))


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
        sources = project_two(context, latents, modules, key_value, plain=(nn.LayerNorm,))
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
        if kwargs.get("output_attentions") or _weights_are_recorded():
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


def _kernel_suffices(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the kernels of cross_attention compute what a layer is asked for."""
    drops = module.training and module.dropout > 0
    return not (drops or kwargs.get("output_attentions") or _weights_are_recorded())


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
    given = {**dict(zip(_IDEFICS_ARGUMENTS, args, strict=False)), **kwargs}
    return args, {**kwargs, IMAGE_MASK: given.get("image_attention_mask")}


def _hand_on_tile_mask(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before MllamaModel expands its mask: takes it away, if no layer needs it expanded."""
    given = {**dict(zip(_MLLAMA_ARGUMENTS, args, strict=False)), **kwargs}
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
    if tokens is None:  # the model says so itself
        return None
    pixels, states = given.get("pixel_values"), given.get("cross_attention_states")
    tiles = len(tokens) * mask.shape[2:].numel()
    if pixels is not None and pixels.shape[:3].numel() != tiles:  # likewise
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


def _tell_of_weights(encoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before Pix2Struct's encoder runs, which collects weights that it does not ask its layers for.

    On eager they return them always.
    """
    given = {**dict(zip(_PIX2STRUCT_ARGUMENTS, args, strict=False)), **kwargs}
    for layer in encoder.layer:
        if MARK in vars(layer.attention):
            setattr(layer.attention, WEIGHTS_WANTED, bool(given.get("output_attentions")))


def _hook_model(
    hooks: dict[str, Callable[..., Any]], module: nn.Module
) -> Callable[[nn.Module], None]:
    """Adds hooks to submodules, by path."""
    for path, hook in hooks.items():
        module.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True)
    return partial(_unhook_model, hooks)


def _unhook_model(hooks: dict[str, Callable[..., Any]], module: nn.Module) -> None:
    for path, hook in hooks.items():
        hooked = module.get_submodule(path)
        for key in [key for key, value in hooked._forward_pre_hooks.items() if value is hook]:
            del hooked._forward_pre_hooks[key]
            hooked._forward_pre_hooks_with_kwargs.pop(key, None)


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


def _forward(cls: type[nn.Module]) -> Callable[..., Any]:
    """The forward method as it stands in the model's file, under any decorators."""
    return inspect.unwrap(cls.forward)


def _eager_function(cls: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    theirs = next(base for base in cls.__mro__ if not base.__module__.startswith("vlmfast."))
    forward = _forward(theirs)
    return forward.__globals__[_eager_name(forward)]


def _eager_name(forward: Callable[..., Any]) -> str:
    """The eager function that a layer names, as eager_attention_forward; "" if it names none."""
    names = (name for name in forward.__code__.co_names if name.endswith("eager_attention_forward"))
    return next(names, "")


def _uses_interface(module: nn.Module) -> bool:
    return hasattr(getattr(module, "config", None), "_attn_implementation") and (
        "ALL_ATTENTION_FUNCTIONS" in code_names(type(module).forward)
    )


_EAGER_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask"),
    *("query_states", "key_states", "value_states"),
    *("scaling", "dropout", "is_causal", "position_bias", "kwargs"),
}


def _refusal(module: nn.Module) -> str | None:
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {implementation!r}; only sdpa and eager are replaced"
    cls = type(module)
    forward = _forward(cls)
    if not _eager_name(forward):
        return "no eager_attention_forward to return attention weights"
    functions = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    theirs = functions.get_interface(implementation, None)
    if theirs is not (sdpa_attention_forward if implementation == "sdpa" else None):
        return f"{implementation!r} is registered as a function that is not transformers' own"
    why = _notices_name(cls, implementation)  # type: ignore[arg-type]  # classes are hashable
    if why is None and implementation == "eager":
        why = _unlike_softmax(_eager_function(cls))
    if why is None and not _library_supports_sdpa(cls):
        why = "its models do not support sdpa: they may read the weights of any layer"
    return why


def _weights_used_by(parent: nn.Module, module: Any) -> str | None:
    """Why a layer must go on returning its weights, which sdpa never does and eager always."""
    name = type(parent).__name__
    if name in _RETURNS_WEIGHTS and module.config._attn_implementation == "eager":
        return f"{name} around it returns its weights, whether they are asked for or not"
    return None


# Modules of transformers that hand out the weights of their attention layer unasked.
_RETURNS_WEIGHTS = ("Kosmos2ImageToTextProjection", "Kosmos2_5ImageToTextProjection")


def _library_supports_sdpa(cls: type[nn.Module]) -> bool:
    """Whether the models of the file that a layer comes from can run on sdpa."""
    home = sys.modules[_forward(cls).__module__]
    return any(
        isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == home.__name__
        and value._supports_sdpa
        for value in vars(home).values()
    )


# Functions that ask a config no more than whether its implementation is flash attention.
_ASKS_FOR_FLASH = ("is_flash_attention_requested", "get_max_seqlen")


@cache
def _notices_name(cls: type[nn.Module], implementation: str) -> str | None:
    """Why a layer would compute something else if its config named our function, or None.

    It may look its attention function up by that name, and must. Whatever else its code does with
    the name has to come out the same for ours, and its config must stay with it.
    """
    looks_up = False
    for method in _methods(cls):
        for name in code_names(method):
            helper = method.__globals__.get(name)
            if name not in _ASKS_FOR_FLASH and "_attn_implementation" in _names_of(helper):
                return f"{name}, which it calls, asks for the name of the implementation"
        if "config" not in code_names(method):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            return f"the source of its {method.__name__} is not at hand"
        holder = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and node.attr == "config"):
                continue
            around = holder[node]
            if isinstance(around, ast.Attribute) and around.attr != "_attn_implementation":
                continue
            if isinstance(around, ast.Attribute):
                use = holder[around]
                if _is_lookup(use):
                    looks_up = True
                elif not _same_answer(use, implementation):
                    return f"its code asks for the implementation: {ast.unparse(use)}"
            elif not _asks_for_flash(around) and not _reads_one_setting(around):
                return f"its code hands its config on: {ast.unparse(around)}"
    return None if looks_up else "it looks its attention function up in a way of its own"


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    """The functions of a layer that run after it is built, torch's own left out."""
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        method = inspect.unwrap(method) if inspect.isfunction(method) else None
        if method and name != "__init__" and not method.__module__.startswith("torch."):
            yield method


def _names_of(value: Any) -> frozenset[str]:
    return code_names(value) if inspect.isfunction(value) else frozenset()


def _is_lookup(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
        and len(node.args) == 2
    )


def _same_answer(node: ast.AST, implementation: str) -> bool:
    """Whether a comparison with the name of the implementation comes out the same for ours."""
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1):
        return False
    try:
        value = ast.literal_eval(node.comparators[0])
    except ValueError:
        return False
    match node.ops[0]:
        case ast.Eq() | ast.NotEq():
            return (implementation == value) is (value == NAME)
        case ast.In() | ast.NotIn():
            return (implementation in value) is (NAME in value)
    return False


def _asks_for_flash(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _ASKS_FOR_FLASH


def _reads_one_setting(node: ast.AST) -> bool:
    """getattr or hasattr of anything but the name of the implementation."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        and "_attn_implementation" not in str(node.args[1].value)
    )


@cache
def _unlike_softmax(eager: Callable[..., Any]) -> str | None:
    """Why an eager function is not softmax attention that adds whatever mask it gets, or None.

    It is run on small tensors, under a module that knows no more than any attention layer does.
    """
    parameters = inspect.signature(eager).parameters
    special = sorted(set(parameters) - _EAGER_ARGUMENTS)
    if special:
        return f"its eager attention takes {', '.join(special)}"
    module = SimpleNamespace(training=False, num_key_value_groups=1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    # Logits of about 30 and a scale that is not the usual one: a cap, a clamp or a sink shows.
    query, key, value = 10 * normal(1, 2, 3, 8), normal(1, 2, 4, 8), normal(1, 2, 4, 8)
    masks = (None, normal(1, 1, 3, 4), normal(1, 1, 3, 4) > 0)
    biases = (None, normal(1, 2, 3, 4)) if "position_bias" in parameters else (None,)
    for mask, bias in itertools.product(masks, biases):
        arguments = {} if bias is None else {"position_bias": bias}
        try:
            out, weights = eager(module, query, key, value, mask, scaling=0.9, **arguments)
        except Exception as error:
            return f"its eager attention needs more than any: {error}"
        added = sum(term for term in (mask, bias) if term is not None)
        expected = torch.softmax(0.9 * query @ key.mT + added, -1)
        # Most take their softmax in float32, whatever they are given.
        same = partial(torch.allclose, rtol=1e-5, atol=1e-5)
        if not (same(weights, expected) and same(out, (expected @ value).transpose(1, 2))):
            return "its eager attention is not softmax(query @ key.T * scale + mask) @ value"
    return None


def _replace(module: nn.Module) -> Callable[[nn.Module], None]:
    original: Any = module.config
    config = copy.copy(original)
    # The public setter would also reach the sub-configs, which the copy shares with the original.
    config._attn_implementation_internal = NAME
    module.config = config
    return _RestoreConfig(original)


class SwinLayer(modeling_swin.SwinLayer):
    """A layer of transformers' Swin on vlmfast's kernels.

    The attention weights are computed, and returned, only if `output_attentions` asks for them;
    then the original does all of the work, with the model's eager function.
    """

    backend: str | None = None

    # transformers says that a layer returns a tensor. It returns two.
    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        always_partition: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        attention: Any = self.attention
        _check_implementation(_model_config(attention))
        if kwargs.get("output_attentions") or _weights_are_recorded():
            with _eager(attention):
                return super().forward(  # type: ignore[return-value]
                    hidden_states, input_dimensions, always_partition=always_partition, **kwargs
                )
        position_bias = attention.relative_position_bias
        window = position_bias.window_size[0]
        if not always_partition and min(input_dimensions) < window:
            raise ValueError(
                f"input_dimensions: expected a map of at least one window of {window} x {window} "
                f"tokens, got {' x '.join(map(str, input_dimensions))}"
            )
        if not always_partition:
            self.set_shift_and_window_size(input_dimensions)
        attended = _attend_windows(
            self,
            self.layernorm_before(hidden_states).unflatten(1, tuple(input_dimensions)),
            (attention.q_proj, attention.k_proj, attention.v_proj),
            attention.num_attention_heads,
            bias_from_table(
                position_bias.relative_position_bias_table, position_bias.relative_position_index
            ),
            scale=attention.scaling,
            dropout_p=attention.attention_dropout if attention.training else 0.0,
        )
        attended = self.dropout(attention.o_proj(attended.flatten(1, 2)))
        hidden_states = hidden_states + self.drop_path(attended)
        out = self.dropout(self.mlp(self.layernorm_after(hidden_states)))
        return out + hidden_states, None


class _LayerV2(nn.Module):
    """What replaces a layer of Swin V2, over the class of the original."""

    backend: str | None = None

    def forward(
        self,
        hidden_states: Tensor,
        input_dimensions: tuple[int, int],
        output_attentions: bool | None = False,
    ) -> tuple[Tensor, ...]:
        layer: Any = self
        if output_attentions:
            return super().forward(hidden_states, input_dimensions, output_attentions)
        attention = layer.attention.self
        table = continuous_bias_table(
            attention.continuous_position_bias_mlp, attention.relative_coords_table
        )
        attended = _attend_windows(
            layer,
            hidden_states.unflatten(1, tuple(input_dimensions)),
            (attention.query, attention.key, attention.value),
            attention.num_attention_heads,
            bias_from_table(table, attention.relative_position_index),
            logit_scale=clamped_logit_scale(attention.logit_scale),
            # The original adds its mask of -100 twice.
            mask_value=-200.0,
            dropout_p=attention.dropout.p if attention.dropout.training else 0.0,
        )
        attended = layer.attention.output(attended.flatten(1, 2), hidden_states)
        hidden_states = hidden_states + layer.drop_path(layer.layernorm_before(attended))
        out = layer.output(layer.intermediate(hidden_states))
        return (hidden_states + layer.drop_path(layer.layernorm_after(out)),)


class Swinv2Layer(_LayerV2, modeling_swinv2.Swinv2Layer):  # type: ignore[misc]
    """A layer of transformers' Swin V2 on vlmfast's kernels.

    With `output_attentions`, the original does all of the work.
    """


class Swin2SRLayer(_LayerV2, modeling_swin2sr.Swin2SRLayer):  # type: ignore[misc]
    """A layer of transformers' Swin2SR, which is one of Swin V2, on vlmfast's kernels.

    With `output_attentions`, the original does all of the work.
    """


def _attend_windows(
    layer: Any,
    x: Tensor,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    num_heads: int,
    bias: Tensor,
    **arguments: Any,
) -> Tensor:
    """From the map (B, H, W, C) to the input of the output projection, (B, H, W, C)."""
    query, key, value = (projection(x) for projection in projections)
    return VF.shifted_window_attention(
        (query, key, value),
        num_heads,
        (int(layer.window_size),) * 2,
        (int(layer.shift_size),) * 2,
        bias,
        pad_value=_padding(projections, x),
        backend=layer.backend,
        **arguments,
    )


def _padding(projections: tuple[nn.Module, ...], x: Tensor) -> Tensor | None:
    """Query, key and value of padded tokens, one after the other: (3C,)."""
    values = [padding_value(projection, x) for projection in projections]
    known = next((value for value in values if value is not None), None)
    if known is None:
        return None
    return torch.cat([torch.zeros_like(known) if value is None else value for value in values])


@contextmanager
def _eager(attention: nn.Module) -> Iterator[None]:
    """Lets an attention layer return its weights, whatever its config says."""
    if MARK in attention.__dict__:  # it goes through attention_forward, which sees to it
        yield
        return
    config: Any = attention.config
    eager = copy.copy(config)
    eager._attn_implementation_internal = "eager"
    attention.config = eager
    try:
        yield
    finally:
        attention.config = config


def _refuse_swin(module: nn.Module) -> str | None:
    implementation = _model_config(module.get_submodule("attention"))._attn_implementation
    if implementation not in ("sdpa", "eager", NAME):
        return f"attn_implementation is {implementation!r}; only sdpa and eager are replaced"
    return None


def _arguments(cls: type[nn.Module]) -> tuple[str, ...]:
    """The names of what a layer or model takes, self left out."""
    return tuple(inspect.signature(_forward(cls)).parameters)[1:]


_IDEFICS_ARGUMENTS = _arguments(modeling_idefics.IdeficsModel)
_MLLAMA_ARGUMENTS = _arguments(modeling_mllama.MllamaModel)
_PIX2STRUCT_ARGUMENTS = _arguments(modeling_pix2struct.Pix2StructVisionEncoder)
_BLIP_TEXT_FITS = _arguments(modeling_blip_text.BlipTextSelfAttention) == _arguments(
    BlipTextSelfAttention
)
_OTHER_VERSION = "its arguments are not those that it has in transformers 5.23"


def _swap_layer(
    original: type[nn.Module],
    replacement: type[nn.Module],
    covers: dict[str, type[nn.Module]],
    refusal: Callable[[nn.Module], str | None] = lambda module: None,
) -> Rule:
    """swap_class for a layer whose forward differs between versions of transformers."""
    same_call = _arguments(original) == _arguments(replacement)

    def refuse(module: nn.Module) -> str | None:
        return refusal(module) if same_call else _OTHER_VERSION

    return swap_class(WINDOW_FAMILY, original, replacement, refusal=refuse, covers=covers)


def _swap_interface_layer(
    original: type[nn.Module],
    replacement: type[nn.Module],
    concerns: Callable[[Any], bool] = lambda module: True,
) -> Rule:
    """A rule for a layer that goes through the interface, and whose class is swapped as well."""
    same_call = _arguments(original) == _arguments(replacement)

    def replace(module: nn.Module) -> Callable[[nn.Module], None]:
        restore: Any = _replace(module)
        restore.cls = original
        module.__class__ = replacement
        return restore

    return Rule(
        family=CROSS_FAMILY,
        what=class_name(replacement),
        recognises=lambda module: type(module) is original and concerns(module),
        refusal=lambda module: _refusal(module) if same_call else _OTHER_VERSION,
        replace=replace,
    )


def _pass_on_masks(original: type[nn.Module], hooks: dict[str, Callable[..., Any]]) -> Rule:
    """A rule for a model that gives its layers masks, so that they get them in another form."""

    def refusal(module: nn.Module) -> str | None:
        if type(module) is not original:
            return "a subclass may compute something else"
        if not all(
            "kwargs" in _arguments(type(module.get_submodule(path)))
            for path in hooks  # else a model passes on no more than it knows
        ):
            return _OTHER_VERSION
        return None

    return Rule(
        family=CROSS_FAMILY,
        what="hands its layers one bit for each image",
        recognises=lambda module: isinstance(module, original),
        refusal=refusal,
        replace=partial(_hook_model, hooks),
    )


class _LogitsUnread:
    """An output whose logits are computed when they are read, by whatever path.

    Whatever is not known to leave the logits alone computes them first; from then on the object is
    one of the library's own class, as if they had been there from the start. Until then the keys
    stand in place, with no values behind them.
    """

    __slots__ = ()
    original: ClassVar[type]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # Generic code builds outputs like a given one, type(output)(...), of what it has read.
        return cls.original(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return type(self).original
        if name not in _LEAVES_LOGITS_ALONE:
            _compute_logits(self)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _LEAVES_LOGITS_ALONE:
            _compute_logits(self)
        super().__setattr__(name, value)

    def __getitem__(self, key: Any) -> Any:
        if key == 0:  # as in a tuple
            key = "loss"
        return getattr(self, key) if key in _VALUES else _compute_logits(self)[key]

    def get(self, key: Any, default: Any = None) -> Any:
        return getattr(self, key) if key in _VALUES else _compute_logits(self).get(key, default)


_VALUES = ("loss", "text_embeds", "image_embeds", "text_model_output", "vision_model_output")
_LEAVES_LOGITS_ALONE = frozenset((*_VALUES, "keys", "get", "__dataclass_fields__"))


def _after_computing(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        return getattr(_compute_logits(self), name)(*args)

    return method


# Python looks these up on the class, past __getattribute__.
for _name in (
    *("__setitem__", "__delattr__", "__eq__", "__ne__", "__or__", "__ror__", "__ior__"),
    *("__repr__", "__reduce__", "__reduce_ex__"),
):
    setattr(_LogitsUnread, _name, _after_computing(_name))


class _CLIPOutput(_LogitsUnread, CLIPOutput):
    original = CLIPOutput


class _SiglipOutput(_LogitsUnread, SiglipOutput):
    original = SiglipOutput


def _output_with_unread_logits(
    cls: type[_LogitsUnread], logits_per_text: Callable[[], Tensor], loss: Tensor, **values: Any
) -> Any:
    """An output of `cls.original` whose logits `logits_per_text` computes when they are read.

    It does so as it would have now: with this grad mode, under this autocast.
    """
    output = cls.original(
        loss=loss,
        logits_per_image=logits_per_text,
        logits_per_text=logits_per_text,
        **values,
    )
    vars(output)[_COMPUTE] = _in_present_modes(logits_per_text, output.text_embeds.device.type)
    output.__class__ = cls
    return output


_COMPUTE = "_compute_logits_per_text"


def _compute_logits(output: Any) -> Any:
    attributes = object.__getattribute__(output, "__dict__")
    if _COMPUTE in attributes:
        logits_per_text = attributes[_COMPUTE]()
        object.__setattr__(output, "__class__", type(output).original)
        del attributes[_COMPUTE]
        output["logits_per_image"] = logits_per_text.t()
        output["logits_per_text"] = logits_per_text
    return output


def _in_present_modes(function: Callable[[], Tensor], device_type: str) -> Callable[[], Tensor]:
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)

    def run() -> Tensor:
        with (
            torch.inference_mode(inference),
            torch.set_grad_enabled(grad),
            torch.autocast(device_type, dtype=dtype, enabled=autocast),
        ):
            return function()

    return run


class _LossWithoutLogits:
    """The forward of a two-tower model: the library's own, unless a loss is asked for."""

    backend: str | None = None
    _forward_with_loss: Callable[..., Any]

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        return_loss: bool | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> Any:
        images = {
            "pixel_values": pixel_values,
            "interpolate_pos_encoding": interpolate_pos_encoding,
        }
        texts = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
        }
        if return_loss and not (torch.compiler.is_compiling() or torch.jit.is_tracing()):
            return self._forward_with_loss(images, texts, **kwargs)
        library: Any = super()
        return library.forward(**images, **texts, return_loss=return_loss, **kwargs)


class CLIPModel(_LossWithoutLogits, OriginalCLIPModel):
    """`transformers.CLIPModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    @can_return_tuple
    def _forward_with_loss(
        self, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any
    ) -> Any:
        vision = self.get_image_features(**images, **kwargs)
        text = self.get_text_features(**texts, **kwargs)
        image_embeds = vision.pooler_output / _get_vector_norm(vision.pooler_output)
        text_embeds = text.pooler_output / _get_vector_norm(text.pooler_output)
        near_images = image_embeds.to(text_embeds.device)
        scale = self.logit_scale.exp().to(text_embeds.device)
        return _output_with_unread_logits(
            _CLIPOutput,
            lambda: torch.matmul(text_embeds, near_images.t()) * scale,
            loss=VF.clip_loss(near_images, text_embeds, scale, backend=self.backend),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


class SiglipModel(_LossWithoutLogits, OriginalSiglipModel):
    """`transformers.SiglipModel` whose `return_loss=True` holds no matrix of logits.

    The loss is float32 for models in half precision.
    """

    @can_return_tuple
    def _forward_with_loss(
        self, images: dict[str, Any], texts: dict[str, Any], **kwargs: Any
    ) -> Any:
        vision = self.vision_model(**images, **kwargs)
        text = self.text_model(**texts, **kwargs)
        image_embeds = vision.pooler_output / vision.pooler_output.norm(dim=-1, keepdim=True)
        text_embeds = text.pooler_output / text.pooler_output.norm(dim=-1, keepdim=True)
        near_images = image_embeds.to(text_embeds.device)
        scale = self.logit_scale.exp().to(text_embeds.device)
        # A copy: the optimiser may change the parameter before the logits are read.
        bias = self.logit_bias.to(text_embeds.device, copy=True)
        return _output_with_unread_logits(
            _SiglipOutput,
            lambda: torch.matmul(text_embeds, near_images.t()) * scale + bias,
            loss=VF.siglip_loss(near_images, text_embeds, scale, bias, backend=self.backend),
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            text_model_output=text,
            vision_model_output=vision,
        )


_LIBRARY_FORWARD = {
    OriginalCLIPModel: {
        *("get_image_features", "get_text_features", "pooler_output", "_get_vector_norm"),
        *("matmul", "logit_scale", "exp", "image_text_contrastive_loss", "CLIPOutput"),
    },
    OriginalSiglipModel: {
        *("vision_model", "text_model", "pooler_output", "norm", "matmul"),
        *("logit_scale", "exp", "logit_bias", "logsigmoid", "SiglipOutput"),
    },
}


def _loss_refusal(model: nn.Module) -> str | None:
    cls = type(model)
    if _LIBRARY_FORWARD[cls] <= code_names(cls.forward):
        return None
    return "this version of transformers computes its forward in another way"


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, sdpa_mask)

_SELF_ATTENTION_V2 = (
    modeling_swinv2.Swinv2SelfAttention,
    modeling_swin2sr.Swin2SRSelfAttention,
)

RULES = (
    _swap_layer(
        modeling_swin.SwinLayer,
        SwinLayer,
        covers={
            "attention": modeling_swin.SwinAttention,
            "attention.relative_position_bias": modeling_swin.SwinRelativePositionBias,
        },
        refusal=_refuse_swin,
    ),
    _swap_layer(
        modeling_swinv2.Swinv2Layer,
        Swinv2Layer,
        covers={
            "attention": modeling_swinv2.Swinv2Attention,
            "attention.self": modeling_swinv2.Swinv2SelfAttention,
            "attention.self.dropout": nn.Dropout,
        },
    ),
    _swap_layer(
        modeling_swin2sr.Swin2SRLayer,
        Swin2SRLayer,
        covers={
            "attention": modeling_swin2sr.Swin2SRAttention,
            "attention.self": modeling_swin2sr.Swin2SRSelfAttention,
            "attention.self.dropout": nn.Dropout,
        },
    ),
    leave_alone(
        WINDOW_FAMILY,
        lambda module: isinstance(module, _SELF_ATTENTION_V2),
        "replaced together with the layer around it, or not at all",
    ),
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
        CROSS_FAMILY,
        idefics_perceiver.IdeficsPerceiverAttention,
        IdeficsPerceiverAttention,
    ),
    swap_class(
        FAMILY,
        modeling_blip_text.BlipTextSelfAttention,
        BlipTextSelfAttention,
        refusal=lambda module: None if _BLIP_TEXT_FITS else _OTHER_VERSION,
        covers={"dropout": nn.Dropout},
    ),
    swap_class(LOSS_FAMILY, OriginalCLIPModel, CLIPModel, refusal=_loss_refusal),
    swap_class(LOSS_FAMILY, OriginalSiglipModel, SiglipModel, refusal=_loss_refusal),
    Rule(
        family=FAMILY,
        what="tells its layers when it is to return their weights",
        recognises=lambda module: type(module) is modeling_pix2struct.Pix2StructVisionEncoder,
        refusal=lambda module: None,
        replace=partial(_hook_model, {"": _tell_of_weights}),
    ),
    Rule(
        family=FAMILY,
        what=f"attention function {NAME!r}",
        recognises=_uses_interface,
        refusal=_refusal,
        replace=_replace,
        refusal_within=_weights_used_by,
    ),
    leave_alone(
        FAMILY,
        partial(computes_attention, library="transformers"),
        "does not go through AttentionInterface",
    ),
)
