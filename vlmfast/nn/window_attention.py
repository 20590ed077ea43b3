"""Attention layers built on the window_attention family."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.checks import (
    MOST_INT32,
    check_dropout,
    check_flag,
    check_floating_tensor,
    check_integer,
    reject,
    reject_type,
)
from vlmfast.parts.common import check_fits_weight, is_linear, positive_int
from vlmfast.parts.window_attention import (
    bias_from_table,
    clamped_logit_scale,
    continuous_bias_table,
    relative_position_index,
)

__all__ = [
    "ShiftedWindowAttention",
    "ShiftedWindowAttentionV2",
]

CPB_WIDTH = 512


class ShiftedWindowAttention(nn.Module):
    r"""torchvision's `ShiftedWindowAttention` (Swin) on vlmfast's attention kernels.

    .. math::
        \text{out} = \text{concat}_h\left(\text{softmax}(Q_h K_h^T / \sqrt{D} + B_h + M) V_h\right)
        W_O, \quad (Q, K, V) = X W_{QKV}

    within each window; :math:`B_h` comes from `relative_position_bias_table` by the offset of two
    tokens, :math:`M` is -100 between tokens that only the cyclic shift brought into one window.
    Sizes that the window does not divide are padded below and at the right; the padded tokens are
    keys like any other. An axis that one window covers is not shifted.

    Constructor, state-dict keys and numbers are those of
    `torchvision.models.swin_transformer.ShiftedWindowAttention`; torchvision need not be there.

    Args:
        dim: channels C of the map.
        window_size, shift_size: two ints each, of height and width; 0 <= shift < window.
        num_heads: divides dim.
        qkv_bias, proj_bias: whether the projections have a bias.
        attention_dropout: of the attention weights, in training.
        dropout: of the output, in training.

    Attributes:
        backend: the backend of the attention kernels (see `vlmfast.use_backend`); None, the
            default, chooses by the inputs.

    Shapes: x (B, H, W, C), out as x.

    Raises:
        TypeError: an argument is of the wrong type; x is not floating or, outside autocast, not of
            the dtype of the weights.
        ValueError: a size, a shift, a number of heads or a probability that cannot be; x is not
            (B, H, W, C) or on another device.

    Source: Liu et al., "Swin Transformer" (2021).
    """

    backend: str | None = None
    relative_position_index: Tensor

    def __init__(
        self,
        dim: int,
        window_size: Sequence[int],
        shift_size: Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        dim, num_heads = positive_int("dim", dim), positive_int("num_heads", num_heads)
        if dim % num_heads:
            reject("num_heads", f"a number that divides dim, {dim}", num_heads)
        self.window_size = _two_ints("window_size", window_size)
        self.shift_size = _two_ints("shift_size", shift_size)
        if min(self.window_size) < 1:
            reject("window_size", "at least 1 token in each direction", self.window_size)
        if math.prod(self.window_size) > MOST_INT32:
            reject("window_size", f"at most {MOST_INT32} tokens", self.window_size)
        if any(not 0 <= s < w for s, w in zip(self.shift_size, self.window_size, strict=True)):
            expected = f"at least 0 and below window_size, {self.window_size}"
            reject("shift_size", expected, self.shift_size)
        self.num_heads = num_heads
        self.attention_dropout = check_dropout("attention_dropout", attention_dropout)
        self.dropout = check_dropout("dropout", dropout)

        self.qkv = nn.Linear(dim, 3 * dim, bias=check_flag("qkv_bias", qkv_bias))
        self.proj = nn.Linear(dim, dim, bias=check_flag("proj_bias", proj_bias))
        self._define_logits()
        self.register_buffer("relative_position_index", relative_position_index(self.window_size))

    def _define_logits(self) -> None:
        offsets = math.prod(2 * size - 1 for size in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def get_relative_position_bias(self) -> Tensor:
        """The bias of all pairs of tokens of a window, (1, num_heads, M, M)."""
        table, index = self.relative_position_bias_table, self.relative_position_index
        return bias_from_table(table, index)[None]

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.qkv.weight, self.qkv.bias
        self._check_input(x, weight)
        return self._attend(_linear(x, self.qkv, weight, bias), bias, logit_scale=None)

    def _check_input(self, x: Tensor, weight: Tensor) -> None:
        check_floating_tensor("x", x)
        dim = weight.shape[1]
        if x.dim() != 4 or x.shape[3] != dim:
            reject("x", f"shape (batch, height, width, {dim})", tuple(x.shape))
        check_fits_weight("x", x, weight)

    def _attend(self, qkv: Tensor, qkv_bias: Tensor | None, logit_scale: Tensor | None) -> Tensor:
        height, width = qkv.shape[1:3]
        window_height, window_width = self.window_size
        shift_down, shift_right = self.shift_size
        out = VF.shifted_window_attention(
            qkv,
            self.num_heads,
            (window_height, window_width),
            (
                shift_down if height > window_height else 0,
                shift_right if width > window_width else 0,
            ),
            self.get_relative_position_bias()[0],
            logit_scale=logit_scale,
            pad_value=qkv_bias,
            dropout_p=self.attention_dropout if self.training else 0.0,
            backend=self.backend,
        )
        out = _linear(out, self.proj, self.proj.weight, self.proj.bias)
        return F.dropout(out, p=self.dropout, training=self.training)


class ShiftedWindowAttentionV2(ShiftedWindowAttention):
    r"""torchvision's `ShiftedWindowAttentionV2` (Swin V2) on vlmfast's attention kernels.

    As `ShiftedWindowAttention`, but with logits

    .. math::
        \tau_h \cos(Q_h, K_h) + B_h + M, \quad \tau_h = \exp(\min(s_h, \log 100))

    with `logit_scale` :math:`s_h`, and with a bias :math:`B_h = 16\,\sigma(\text{MLP}(\Delta))`
    computed by the network `cpb_mlp` from the logarithmic offset of two tokens. The key has no
    bias: that third of `qkv.bias` is taken as zero and gets a zero gradient.

    The network runs once for each offset, (2w - 1)^2 of them, not for each pair of tokens; and,
    on a CPU where nothing of it needs a gradient, only when a weight of it has changed since.

    Constructor, state-dict keys and numbers are those of
    `torchvision.models.swin_transformer.ShiftedWindowAttentionV2`; only that here a window that is
    one token wide gives numbers, there NaN. Arguments, shapes and errors: see
    `ShiftedWindowAttention`.

    Source: Liu et al., "Swin Transformer V2" (2022).
    """

    relative_coords_table: Tensor

    def _define_logits(self) -> None:
        height, width = (
            torch.arange(1 - size, size, dtype=torch.float32) / max(size - 1, 1)
            for size in self.window_size
        )
        offsets = 8 * torch.stack(torch.meshgrid(height, width, indexing="ij"), dim=-1)
        # log2(1 + |offset|), with the sign of the offset, over log2(8)
        table = torch.sign(offsets) * torch.log2(torch.abs(offsets) + 1.0) / 3.0
        self.register_buffer("relative_coords_table", table[None])
        self.logit_scale = nn.Parameter(torch.log(10 * torch.ones((self.num_heads, 1, 1))))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, CPB_WIDTH),
            nn.ReLU(inplace=True),
            nn.Linear(CPB_WIDTH, self.num_heads, bias=False),
        )
        if self.qkv.bias is not None:
            with torch.no_grad():
                self.qkv.bias.chunk(3)[1].zero_()

    def get_relative_position_bias(self) -> Tensor:
        """The bias of all pairs of tokens of a window, (1, num_heads, M, M)."""
        table = continuous_bias_table(self.cpb_mlp, self.relative_coords_table)
        return bias_from_table(table, self.relative_position_index)[None]

    def forward(self, x: Tensor) -> Tensor:
        weight = self.qkv.weight
        bias: Tensor | None = self.qkv.bias
        self._check_input(x, weight)
        if bias is not None:
            query_bias, key_bias, value_bias = bias.chunk(3)
            bias = torch.cat([query_bias, torch.zeros_like(key_bias), value_bias])
        qkv = F.linear(x, weight, bias)
        return self._attend(qkv, bias, clamped_logit_scale(self.logit_scale))


def _linear(x: Tensor, projection: nn.Module, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b with the weight and the bias of `projection`, as torchvision computes it.

    It calls no projection: a subclass of Linear may compute something else there, and hooks do not
    run. Only a layer of `patch` that keeps its weight packed computes the product itself, faster.
    """
    if is_linear(projection):
        return type(projection).forward(projection, x)
    return F.linear(x, weight, bias)


def _two_ints(argument: str, pair: Any) -> list[int]:
    if not isinstance(pair, (tuple, list)):
        reject_type(argument, "a list of two ints", type(pair).__name__)
    if len(pair) != 2:
        reject(argument, "two ints", pair)
    return [check_integer(argument, number, least=-MOST_INT32) for number in pair]
