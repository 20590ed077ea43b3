"""The layers of transformers' Swin and Swin V2.

They roll, pad and cut the map, and hand windows to their attention. All of this is one kernel
here, so that the layer is what is replaced. Its attention stays where it is, and holds the
parameters, but is called only for attention weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.swin import modeling_swin
from transformers.models.swin2sr import modeling_swin2sr
from transformers.models.swinv2 import modeling_swinv2

import vlmfast.functional as VF
from vlmfast.integrations.rules import MARK, leave_alone
from vlmfast.integrations.transformers.common import (
    NAME,
    check_implementation,
    model_config,
    swap_layer,
    weights_are_recorded,
)
from vlmfast.parts.window_attention import (
    bias_from_table,
    clamped_logit_scale,
    continuous_bias_table,
    padding_value,
)

__all__ = ["RULES", "Swin2SRLayer", "SwinLayer", "Swinv2Layer"]

FAMILY = "window_attention"


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
        check_implementation(model_config(attention))
        if kwargs.get("output_attentions") or weights_are_recorded():
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
    implementation = model_config(module.get_submodule("attention"))._attn_implementation
    if implementation not in ("sdpa", "eager", NAME):
        return f"attn_implementation is {implementation!r}; only sdpa and eager are replaced"
    return None


_SELF_ATTENTION_V2 = (
    modeling_swinv2.Swinv2SelfAttention,
    modeling_swin2sr.Swin2SRSelfAttention,
)

RULES = (
    swap_layer(
        FAMILY,
        modeling_swin.SwinLayer,
        SwinLayer,
        covers={
            "attention": modeling_swin.SwinAttention,
            "attention.relative_position_bias": modeling_swin.SwinRelativePositionBias,
        },
        refusal=_refuse_swin,
    ),
    swap_layer(
        FAMILY,
        modeling_swinv2.Swinv2Layer,
        Swinv2Layer,
        covers={
            "attention": modeling_swinv2.Swinv2Attention,
            "attention.self": modeling_swinv2.Swinv2SelfAttention,
            "attention.self.dropout": nn.Dropout,
        },
    ),
    swap_layer(
        FAMILY,
        modeling_swin2sr.Swin2SRLayer,
        Swin2SRLayer,
        covers={
            "attention": modeling_swin2sr.Swin2SRAttention,
            "attention.self": modeling_swin2sr.Swin2SRSelfAttention,
            "attention.self.dropout": nn.Dropout,
        },
    ),
    leave_alone(
        FAMILY,
        lambda module: isinstance(module, _SELF_ATTENTION_V2),
        "replaced together with the layer around it, or not at all",
    ),
)
