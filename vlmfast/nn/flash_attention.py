"""Attention layers built on the flash_attention family."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.checks import (
    FLOATING,
    check_device,
    check_flag,
    check_floating_tensor,
    check_strided,
    floating_dtype,
    reject,
    reject_type,
)
from vlmfast.parts.common import check_fits_weight
from vlmfast.parts.flash_attention import is_causal_mask

__all__ = ["MultiheadAttention"]


class MultiheadAttention(nn.MultiheadAttention):
    r"""`torch.nn.MultiheadAttention` on vlmfast's attention kernels.

    .. math::
        \text{out} = \text{concat}_h\left(\text{softmax}(Q_h K_h^T / \sqrt{D} + M) V_h\right) W_O,
        \quad Q_h = X_q W^Q_h, \; K_h = X_k W^K_h, \; V_h = X_v W^V_h

    Constructor, state-dict keys, arguments and results are those of `torch.nn.MultiheadAttention`
    (Vaswani et al., "Attention Is All You Need", 2017); checkpoints load in both directions.

    The kernels serve `need_weights=False`. With `need_weights=True`, which is torch's default, the
    attention probabilities themselves are asked for, and the parent class computes everything.

    Attributes:
        backend: the backend of the attention kernels (see `vlmfast.use_backend`); None, the
            default, chooses by the inputs.

    Shapes (N batch, L queries, S keys, E = embed_dim; unbatched inputs leave N out):
        query (L, N, E), key (S, N, kdim), value (S, N, vdim), N first if `batch_first`;
        key_padding_mask (N, S); attn_mask (L, S) or (N * num_heads, L, S); out as query.
        A boolean mask hides where it is True, a floating one is added to the logits.
        `is_causal` is a hint that `attn_mask` is the causal mask: without key_padding_mask it is
        then not read, and may be of any shape.
        Nested query, key and value run packed, without padding.

    Raises:
        TypeError: an argument is no tensor; query, key or value is not floating or, outside
            autocast, not of the dtype of the weights; a mask is neither boolean nor floating.
        ValueError: a shape or device does not fit, or `is_causal` without `attn_mask`.
    """

    backend: str | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights:
            return super().forward(
                query,
                key,
                value,
                key_padding_mask=key_padding_mask,
                need_weights=True,
                attn_mask=attn_mask,
                average_attn_weights=average_attn_weights,
                is_causal=is_causal,
            )
        if any(isinstance(x, Tensor) and x.is_nested for x in (query, key, value)):
            return self._attend_nested(query, key, value, key_padding_mask, attn_mask), None

        self._check_inputs(query, key, value, key_padding_mask, attn_mask, is_causal)
        if query.dim() == 3:
            out = self._attend(query, key, value, key_padding_mask, attn_mask, is_causal)
            return out, None

        batch_dim = 0 if self.batch_first else 1
        self_attention = query is key and key is value
        query = query.unsqueeze(batch_dim)
        key = query if self_attention else key.unsqueeze(batch_dim)
        value = query if self_attention else value.unsqueeze(batch_dim)
        if key_padding_mask is not None:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        out = self._attend(query, key, value, key_padding_mask, attn_mask, is_causal)
        return out.squeeze(batch_dim), None

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        query, key, value = self._project(query, key, value)
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))

        # An appended key stands beyond attn_mask and is seen by all, but not under the flag.
        appended = self.bias_k is not None or self.add_zero_attn
        if key_padding_mask is not None:
            is_causal = False
        elif is_causal or (not appended and is_causal_mask(attn_mask)):
            attn_mask, is_causal = None, True
        for name, given in (("attn_mask", attn_mask), ("key_padding_mask", key_padding_mask)):
            if given is not None:
                check_device(name, given, "query", query)
        mask = _keep_or_bias(attn_mask, key_padding_mask, batch=query.shape[0])

        if self.bias_k is not None and self.bias_v is not None:
            key = torch.cat([key, self.bias_k.expand(key.shape[0], -1, -1)], dim=1)
            value = torch.cat([value, self.bias_v.expand(value.shape[0], -1, -1)], dim=1)
            mask = _show_one_more_key(mask)
        if self.add_zero_attn:
            key, value = F.pad(key, (0, 0, 0, 1)), F.pad(value, (0, 0, 0, 1))
            mask = _show_one_more_key(mask)

        # (N, tokens, E) -> (N, heads, tokens, head_dim), as views
        query, key, value = (
            x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for x in (query, key, value)
        )
        out = VF.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=is_causal,
            backend=self.backend,
        )
        out = out.transpose(1, 2).flatten(2)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return F.linear(out, self.out_proj.weight, self.out_proj.bias)

    def _attend_nested(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """Self-attention over sequences of unlike lengths, packed into one (total, E) tensor."""
        if not (query is key and key is value and self.batch_first and self._qkv_same_embed_dim):
            raise ValueError(
                "query, key and value: nested tensors need self-attention (one and the same tensor "
                "three times), batch_first=True and kdim = vdim = embed_dim"
            )
        if key_padding_mask is not None or attn_mask is not None:
            raise ValueError("key_padding_mask, attn_mask: expected None with nested tensors")
        if self.bias_k is not None or self.add_zero_attn or (self.training and self.dropout > 0):
            raise ValueError(
                "nested tensors support neither add_bias_kv, add_zero_attn nor dropout"
            )
        nested: Any = query
        sequences = nested.unbind()
        if not sequences:
            return query
        for sequence in sequences:
            check_floating_tensor("query", sequence)
            if sequence.dim() != 2 or sequence.shape[1] != self.embed_dim:
                expected = f"sequences of shape (tokens, {self.embed_dim})"
                reject("query", expected, f"one of {tuple(sequence.shape)}")
        lengths = [sequence.shape[0] for sequence in sequences]
        starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=query.device)

        weight = self.in_proj_weight
        check_fits_weight("query", query, weight)
        tokens = F.linear(torch.cat(sequences), weight, self.in_proj_bias)
        packed = tokens.unflatten(-1, (3, self.num_heads, self.head_dim))
        query, key, value = packed.unbind(1)
        longest = max(lengths)
        out = VF.varlen_attention(
            query, key, value, starts, starts, longest, longest, backend=self.backend
        )
        out = F.linear(out.flatten(1), self.out_proj.weight, self.out_proj.bias)  # type: ignore[union-attr]
        if nested.layout == torch.jagged and nested.lengths() is None:
            # On the very same offsets: jagged tensors add up only if they share them.
            return torch.nested.nested_tensor_from_jagged(out, nested.offsets())
        return torch.nested.as_nested_tensor(list(out.split(lengths)), layout=nested.layout)

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The input projections, in one product where query, key and value are one tensor."""
        if self._qkv_same_embed_dim and query is key and key is value:
            weight: Tensor = self.in_proj_weight
            check_fits_weight("query", query, weight)
            projected = F.linear(query, weight, self.in_proj_bias)
            query, key, value = projected.chunk(3, dim=-1)
            return query, key, value

        weights: tuple[Tensor, ...] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        for name, x, weight in zip(_INPUTS, (query, key, value), weights, strict=True):
            check_fits_weight(name, x, weight)
        inputs = zip((query, key, value), weights, biases, strict=True)
        query, key, value = (F.linear(x, weight, bias) for x, weight, bias in inputs)
        return query, key, value

    def _check_inputs(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> None:
        for name, x in zip(_INPUTS, (query, key, value), strict=True):
            check_floating_tensor(name, x)
        if query.dim() not in (2, 3):
            reject("query", "2 or 3 dimensions", f"shape {tuple(query.shape)}")
        for name, x, width in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            if x.dim() != query.dim() or x.shape[-1] != width:
                expected = f"{query.dim()} dimensions, the last of size {width}"
                reject(name, expected, f"shape {tuple(x.shape)}")
        if key.shape[:-1] != value.shape[:-1]:
            expected = f"key's leading sizes {tuple(key.shape[:-1])}"
            reject("value", expected, f"shape {tuple(value.shape)}")
        batched = query.dim() == 3
        batch_dim, token_dim = (0, 1) if self.batch_first else (1, 0)
        batch = query.shape[batch_dim] if batched else 1
        if batched and key.shape[batch_dim] != batch:
            reject("key", f"batch size {batch}", f"shape {tuple(key.shape)}")
        queries = query.shape[token_dim] if batched else query.shape[0]
        keys = key.shape[token_dim] if batched else key.shape[0]

        if check_flag("is_causal", is_causal) and attn_mask is None:
            reject("attn_mask", "the causal mask beside is_causal=True", None)
        padding_shape = (batch, keys) if batched else (keys,)
        _check_mask("key_padding_mask", key_padding_mask, padding_shape)
        if is_causal and key_padding_mask is None:  # the mask itself is not used
            _check_mask("attn_mask", attn_mask)
            return
        _check_mask(
            "attn_mask", attn_mask, (queries, keys), (batch * self.num_heads, queries, keys)
        )


_INPUTS = ("query", "key", "value")


def _check_mask(argument: str, mask: Tensor | None, *shapes: tuple[int, ...]) -> None:
    """Whether it is a mask, and of one of these shapes, if any are given."""
    if mask is None:
        return
    check_strided(argument, mask, "a tensor or None")
    if mask.dtype != torch.bool and mask.dtype not in FLOATING:
        reject_type(argument, f"a bool or {floating_dtype(mask)}", mask.dtype)
    if shapes and tuple(mask.shape) not in shapes:
        reject(argument, "shape " + " or ".join(map(str, shapes)), tuple(mask.shape))


def _keep_or_bias(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int
) -> Tensor | None:
    """One mask for the kernels: boolean with True = keep if both are boolean, else added.

    Gets (L, S) or (N * heads, L, S), and (N, S); returns a shape that broadcasts to
    (N, heads, L, S).
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, -1))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None, :]
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        hidden = masks[0] if len(masks) == 1 else masks[0] | masks[1]
        return ~hidden
    biases = [_as_bias(mask) for mask in masks]
    return biases[0] if len(biases) == 1 else biases[0] + biases[1]


def _as_bias(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.get_default_dtype()).masked_fill(mask, float("-inf"))


def _show_one_more_key(mask: Tensor | None) -> Tensor | None:
    """Lets every query see a key appended at the end."""
    if mask is None:
        return None
    return F.pad(mask, (0, 1), value=mask.dtype == torch.bool)
