"""What the kernels of one call of the contrastive losses have in common."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vlmfast.kernels import launch
from vlmfast.kernels.contrastive_loss.configs import TABLES
from vlmfast.kernels.launch import (
    Launch,
    ShapeClass,
    ceil_div,
    check_lengths,
    input_precision,
    precision_of,
    strided,
)

# Programs that a launch is cut into, where there are tiles enough: nearly 8 for each of the 132
# multiprocessors of an H100 or H200, which hold 1 or 2 at a time, so that the last round, part of
# which idles, is one of four or more. By this arithmetic alone: no card has measured it.
PROGRAMS = 1024


class Grid(NamedTuple):
    """How the tiles of a launch are shared out: a program takes one tile of rows by one strip."""

    row_tiles: int
    strips: int
    tiles_per_program: int  # column tiles of a strip

    @property
    def programs(self) -> int:
        return self.row_tiles * self.strips


@dataclass
class Problem(launch.Problem):
    """Features and factors, as `vlmfast.reference.contrastive_loss` describes them."""

    rows: torch.Tensor
    columns: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None
    first_column: int
    sigmoid: bool

    TABLES = TABLES

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def shape_class(self, kernel: str, rows: int) -> ShapeClass:
        """With several queries a row more is kept in registers."""
        one_query = self.rows.shape[1] == 1
        return ShapeClass(kernel, precision_of(self.rows), self.rows.shape[2], rows, one_query)

    def grid(self, launch: Launch) -> Grid:
        row_tiles = ceil_div(self.rows.shape[0], launch.block_m)
        column_tiles = ceil_div(self.columns.shape[0], launch.block_n)
        per_program = max(1, row_tiles * column_tiles // PROGRAMS)
        return Grid(row_tiles, ceil_div(column_tiles, per_program), per_program)

    def arguments(self, launch: Launch) -> dict[str, Any]:
        """What both kernels take."""
        grid = self.grid(launch)
        return {
            "rows": strided(self.rows),
            "columns": strided(self.columns),
            "scale": self.scale,
            "bias": self.bias,
            "num_rows": self.rows.shape[0],
            "num_columns": self.columns.shape[0],
            # Beyond these bounds no row has a pair.
            "first_column": max(-(1 << 29), min(1 << 29, self.first_column)),
            "row_tiles": grid.row_tiles,
            "tiles_per_program": grid.tiles_per_program,
            "DIM": self.rows.shape[2],
            "QUERIES": self.rows.shape[1],
            "SIGMOID": self.sigmoid,
            "BLOCK_M": launch.block_m,
            "BLOCK_N": launch.block_n,
            "BLOCK_K": block_k(self.rows),
            "PRECISION": input_precision(self.rows),
        }


def make_problem(
    rows: torch.Tensor,
    columns: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    first_column: int,
    sigmoid: bool,
) -> Problem:
    """From an operator's arguments."""
    check_lengths(rows=rows.shape[0], columns=columns.shape[0])
    features = in_whole_blocks(rows), in_whole_blocks(columns)
    return Problem(*features, scale, bias, first_column, sigmoid)


def block_k(tensor: torch.Tensor) -> int:
    return 64 if tensor.dtype != torch.float32 else 32


def in_whole_blocks(features: torch.Tensor) -> torch.Tensor:
    """The features side by side, with zeros up to a multiple of the block: a copy where need be.

    Masks and odd strides in the innermost loop would cost far more.
    """
    missing = -features.shape[-1] % block_k(features)
    if missing:
        return torch.nn.functional.pad(features, (0, missing))
    return features if features.stride(-1) == 1 else features.contiguous()
