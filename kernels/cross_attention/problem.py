"""What the kernels of one call of cross-attention have in common."""

from dataclasses import dataclass
from typing import Any

import torch

from vlmfast.kernels import launch
from vlmfast.kernels.common import Strided
from vlmfast.kernels.cross_attention.configs import TABLES
from vlmfast.kernels.cross_attention.images import Plan
from vlmfast.kernels.launch import (
    ShapeClass,
    ceil_div,
    head_columns,
    head_pieces,
    input_precision,
    next_power_of_2,
    once,
    precision_of,
    stride_unit,
    strided,
)


@dataclass
class Problem(launch.Problem):
    """What the kernels of one call have in common, as the operators receive it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    plan: Plan
    scale: float

    TABLES = TABLES

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def several(self) -> bool:
        """Whether a token may see more than one image."""
        return self.plan.visible is not None

    @property
    def parts(self) -> int:
        """Lists of tokens an image has: those bound by its length, and those that are not."""
        return 2 if self.several and self.plan.image_lengths is not None else 1

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def tokens(self) -> int:
        return self.query.shape[2]

    @property
    def images(self) -> int:
        return self.key.shape[2]

    @property
    def latents(self) -> int:
        return self.key.shape[3]

    def blocks(self, block_m: int) -> int:
        """Blocks of tokens of a batch entry, or, of each image's tokens, as many as may be."""
        blocks = ceil_div(self.tokens, block_m)
        if self.several:
            return blocks
        return blocks + min(self.images, self.tokens) if self.images else 0

    def stride_unit(self, *others: torch.Tensor) -> int:
        """That of the inputs and of further tensors."""
        return min(self._stride_unit(), stride_unit(*others))

    @once
    def _stride_unit(self) -> int:
        return stride_unit(self.query, self.key, self.value)

    @once
    def inputs(self, unit: int) -> dict[str, Any]:
        """What every kernel takes that recomputes scores."""
        return {
            "query": strided(self.query, unit),
            "key": strided_images(self.key, unit),
            "value": strided_images(self.value, unit),
            "scale": self.scale,
        }

    def kernel_plan(self) -> Plan:
        """The plan as kernels take it."""
        visible = self.plan.visible
        return self.plan._replace(visible=None if visible is None else visible.view(torch.uint8))

    def sizes(self, blocks: int) -> dict[str, int]:
        return {
            "num_heads": self.heads,
            "num_blocks": blocks,
            "num_tokens": self.tokens,
            "num_images": self.images,
            "num_latents": self.latents,
            "order_size": self.plan.order.shape[1],
        }

    @once
    def constants(self, unit: int) -> dict[str, Any]:
        """Compile-time constants of every kernel that recomputes scores."""
        return {
            "GROUP": self.heads // self.key_heads,
            "D": self.query.shape[3],
            "DV": self.value.shape[4],
            "PIECES": self.pieces(self.query.shape[3]),
            "VALUE_PIECES": self.pieces(self.value.shape[4]),
            "PARTS": self.parts,
            "PRECISION": input_precision(self.query),
            "UNIT": unit,
        }

    def token_constants(self) -> dict[str, Any]:
        """Those of kernels that walk blocks of tokens."""
        return {"SEVERAL": self.several, "IMAGES": next_power_of_2(max(self.images, 1))}

    def shape_class(self, kernel: str, rows: int) -> ShapeClass:
        plain = not self.several
        return ShapeClass(kernel, precision_of(self.query), self.columns, rows, plain)

    @property
    def columns(self) -> int:
        """Columns that the wider of the two head dimensions covers on chip."""
        precision = precision_of(self.query)
        sizes = self.query.shape[3], self.value.shape[4]
        return max(head_columns(sizes[0], precision), head_columns(sizes[1], precision))

    def pieces(self, size: int) -> tuple[tuple[int, int], ...]:
        return head_pieces(size, precision_of(self.query))


def strided_images(tensor: torch.Tensor, unit: int) -> Strided:
    """A (B, H, I, L, D) tensor as kernels take it, its strides in the order of `at_image`."""
    pointer, (batch, head, image, latent, column) = strided(tensor, unit)
    return Strided(pointer, (batch, head, latent, column, image))


def images_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised (B, H, I, L, D) tensor in the dimension order of `tensor`, without gaps."""
    batch, heads, images, latents, columns = tensor.shape
    if tensor.stride(1) < tensor.stride(3):
        inside = tensor.new_empty(batch, images, latents, heads, columns)
        return inside.permute(0, 3, 1, 2, 4)
    return tensor.new_empty(tensor.shape)
