"""What the kernels of one call of window attention have in common."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlmfast.kernels import launch
from vlmfast.kernels.launch import (
    Launch,
    ShapeClass,
    ceil_div,
    covered_columns,
    dropout,
    head_pieces,
    input_precision,
    multiprocessors,
    once,
    precision_of,
    split_into_pieces,
    stride_unit,
    strided,
)
from vlmfast.kernels.window_attention.configs import TABLES
from vlmfast.kernels.window_attention.tokens import NO_PADDING, WRAP_PADDED, WRAP_UNPADDED, Geometry

LARGEST_MASK = 6e37  # see LARGEST_BIAS

WHOLE_KERNEL = "window_attention_bwd_whole"

# Registers of a thread up to which kernels keep the bias in them; that of keys and values holds
# more besides.
MOST_BIAS_REGISTERS = 128
MOST_BIAS_REGISTERS_FOR_KEYS = 64

# Warps that a multiprocessor is given, as programs; more than are resident, so that it has others
# to go on with when some programs end early.
WARPS_PER_MULTIPROCESSOR = 32


@functools.cache
def token_pieces(tokens: int, largest: int) -> tuple[tuple[int, int], ...]:
    """Cut tokens into pieces of power-of-two widths: whole ones of the largest, then at most two.

    >>> token_pieces(144, 128), token_pieces(49, 64)
    (((0, 128), (128, 16)), ((0, 64),))
    """
    whole = tuple((start, largest) for start in range(0, tokens - largest + 1, largest))
    rest = tokens - largest * len(whole)
    last = split_into_pieces(rest, largest, most=2) if rest else ()
    return whole + tuple((largest * len(whole) + start, width) for start, width in last)


@dataclass
class Problem(launch.Problem):
    """What the kernels of one call have in common, as the operators receive it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None
    logit_scale: torch.Tensor | None
    pad_value: torch.Tensor | None
    num_heads: int
    window: tuple[int, int]
    shift: tuple[int, int]
    wrap_padded: bool
    scale: float
    mask_value: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    TABLES = TABLES

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def tokens(self) -> int:
        return self.window[0] * self.window[1]

    @functools.cached_property
    def dim(self) -> int:
        return self.query.shape[3] // self.num_heads

    @functools.cached_property
    def grid(self) -> tuple[int, int]:
        """Windows along the height and the width of the map."""
        height, width = self.query.shape[1:3]
        return ceil_div(height, self.window[0]), ceil_div(width, self.window[1])

    @functools.cached_property
    def num_windows(self) -> int:
        return self.query.shape[0] * self.grid[0] * self.grid[1]

    @functools.cached_property
    def padding(self) -> int:
        sizes = zip(self.query.shape[1:3], self.window, strict=True)
        if all(size % window == 0 for size, window in sizes):
            return NO_PADDING.value
        return (WRAP_PADDED if self.wrap_padded else WRAP_UNPADDED).value

    @functools.cached_property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """The tiles that a head's channels are split into."""
        return head_pieces(self.dim, precision_of(self.query), largest=128)

    def stride_unit(self, *others: torch.Tensor | None) -> int:
        """That of the inputs and of further maps."""
        return min(self._stride_unit(), stride_unit(*others))

    @once
    def _stride_unit(self) -> int:
        return stride_unit(self.query, self.key, self.value)

    def arguments(self, unit: int, groups: int, splits: int) -> dict[str, Any]:
        """What every kernel takes, of whose programs `groups` share a head and its windows."""
        added = {"bias": self.bias, "logit_scale": self.logit_scale, "pad_value": self.pad_value}
        return {
            "query": strided(self.query, unit),
            "key": strided(self.key, unit),
            "value": strided(self.value, unit),
            **{name: None if x is None else x.contiguous() for name, x in added.items()},
            "geometry": Geometry(
                tuple(self.query.shape[1:3]), self.grid, self.shift, self.num_windows
            ),
            "dropout": dropout(self.dropout_p, self.dropout_seed),
            "num_heads": self.num_heads,
            "num_groups": groups,
            "num_splits": splits,
            "scale": self.scale,
            "mask_value": max(-LARGEST_MASK, min(self.mask_value, LARGEST_MASK)),
            **self.constants(unit),
        }

    @once
    def constants(self, unit: int) -> dict[str, Any]:
        return {
            "D": self.dim,
            "PIECES": self.pieces,
            "WINDOW": self.window,
            "SHIFTED": any(self.shift),
            "PADDING": self.padding,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": input_precision(self.query),
            "UNIT": unit,
        }

    def checks(self, rows: int, keys: int) -> dict[str, bool]:
        """Whether tiles may hold tokens beyond the window or off the map.

        That is for programs that take so many queries and keys of a window.
        """
        padded = self.padding != NO_PADDING.value
        return {
            "CHECK_ROWS": padded or self.tokens % rows != 0,
            "CHECK_KEYS": padded or self.tokens % keys != 0,
        }

    def tile_constants(
        self, launch: Launch, rows: int, keys: int, most_registers: int
    ) -> dict[str, bool]:
        """`checks`, and whether a program has the registers to keep its part of the bias."""
        keep_bias = rows * keys <= most_registers * 32 * launch.num_warps
        return {**self.checks(rows, keys), "KEEP_BIAS": keep_bias}

    def splits(self, launch: Launch, groups: int) -> int:
        """Programs that share the windows of a head."""
        warps = multiprocessors(self.device) * WARPS_PER_MULTIPROCESSOR
        programs = warps // launch.num_warps
        return max(1, min(self.num_windows, ceil_div(programs, self.num_heads * groups)))

    def shape_class(self, kernel: str, rows: int) -> ShapeClass:
        padded = self.padding != NO_PADDING.value
        plain = self.logit_scale is None and self.dropout_p == 0.0 and not padded
        columns = covered_columns(self.pieces)
        return ShapeClass(kernel, precision_of(self.query), columns, rows, plain)


def make_problem(
    query: torch.Tensor, key: torch.Tensor | None, value: torch.Tensor | None, *rest
) -> Problem:
    """From an operator's arguments; three tensors packed into one become views of it."""
    if key is None or value is None:
        query, key, value = query.chunk(3, dim=3)
    *tensors, heads, height, width, shift_height, shift_width = rest[:8]
    window, shift = (height, width), (shift_height, shift_width)
    return Problem(query, key, value, *tensors, heads, window, shift, *rest[8:])


class Gradients(NamedTuple):
    """Where gradients go; None where one is not asked for. The map's have any strides."""

    query: torch.Tensor | None
    key: torch.Tensor | None
    value: torch.Tensor | None
    bias: torch.Tensor | None
    logit_scale: torch.Tensor | None
    pad_value: torch.Tensor | None


class RowStatistics(NamedTuple):
    """What the gradient of keys is computed from, float32 (windows, heads, M).

    P = exp2(scores - shift) * scale and dS = P * (dP - delta).
    """

    shift: torch.Tensor
    scale: torch.Tensor
    delta: torch.Tensor
