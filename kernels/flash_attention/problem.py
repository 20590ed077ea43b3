"""The arguments of attention's operators, and what its kernels take of them."""

from dataclasses import dataclass
from typing import Any

import torch

from vlmfast.kernels import launch
from vlmfast.kernels.flash_attention import configs
from vlmfast.kernels.flash_attention.scores import BOOL_MASK, FLOAT_MASK, NO_MASK
from vlmfast.kernels.launch import (
    dropout,
    head_columns,
    head_pieces,
    input_precision,
    once,
    precision_of,
    strided,
)


@dataclass
class Problem(launch.Problem):
    """The arguments of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attn_mask: torch.Tensor | None
    cu_seqlens_q: torch.Tensor | None
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: int
    scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None

    TABLES = configs.TABLES

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def packed(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def batch_entries(self) -> int:
        """Batch entries, or segments of a packed batch."""
        if self.cu_seqlens_q is not None:
            return self.cu_seqlens_q.shape[0] - 1
        return self.query.shape[0]

    @property
    def longest_query(self) -> int:
        return self.max_seqlen_q if self.packed else self.query.shape[2]

    @property
    def longest_key(self) -> int:
        return self.max_seqlen_k if self.packed else self.key.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def key_heads(self) -> int:
        return self.key.shape[1]

    @property
    def rest(self) -> int:
        """Keys at a time where those left are fewer than a block, which would be mostly nothing.

        0 stands for a block: without tensor cores nothing is gained.
        """
        return 16 if precision_of(self.query) == "half" else 0

    @property
    def mask_kind(self) -> int:
        if self.attn_mask is None:
            return NO_MASK.value
        return (BOOL_MASK if self.attn_mask.dtype == torch.bool else FLOAT_MASK).value

    @property
    def mask_has_rows(self) -> bool:
        return self.attn_mask is not None and self.attn_mask.shape[2] > 1

    def stride_unit(self, *others: torch.Tensor) -> int:
        """UNIT of the strides of the inputs and of other tensors."""
        return min(self._stride_unit(), launch.stride_unit(*others))

    @once
    def _stride_unit(self) -> int:
        return launch.stride_unit(self.query, self.key, self.value)

    @once
    def inputs(self, unit: int) -> dict[str, Any]:
        """Arguments of every kernel that computes scores."""
        mask = self.attn_mask
        if mask is not None and mask.dtype == torch.bool:
            mask = mask.view(torch.uint8)
        return {
            "query": strided(self.query, unit),
            "key": strided(self.key, unit),
            "value": strided(self.value, unit),
            "attn_mask": strided(mask),
            "dropout": dropout(self.dropout_p, self.dropout_seed),
            "num_heads": self.heads,
            "num_queries": self.query.shape[2],
            "num_keys": self.key.shape[2],
            "scale": self.scale,
        }

    @once
    def constants(self, unit: int) -> dict[str, Any]:
        """Compile-time constants of every kernel that computes scores."""
        return {
            "GROUP": self.heads // self.key_heads,
            "D": self.query.shape[3],
            "DV": self.value.shape[3],
            "PIECES": self.pieces(self.query.shape[3]),
            "VALUE_PIECES": self.pieces(self.value.shape[3]),
            "CAUSAL": self.causal,
            "DROPOUT": self.dropout_p > 0.0,
            "PRECISION": input_precision(self.query),
            "UNIT": unit,
        }

    def variant(self) -> dict[str, Any]:
        """What kernels are told that take packed batches, and masks of every kind."""
        return {
            "cu_seqlens_q": self.cu_seqlens_q,
            "cu_seqlens_k": self.cu_seqlens_k,
            "MASK": self.mask_kind,
            "MASK_HAS_ROWS": self.mask_has_rows,
            "VARLEN": self.packed,
        }

    def shape_class(self, kernel: str, rows: int) -> launch.ShapeClass:
        plain = not (self.packed or self.causal or self.dropout_p) and self.attn_mask is None
        return launch.ShapeClass(kernel, precision_of(self.query), self.columns, rows, plain)

    @property
    def columns(self) -> int:
        """Columns that the wider of the two head dimensions covers on chip."""
        precision = precision_of(self.query)
        sizes = self.query.shape[3], self.value.shape[3]
        return max(head_columns(sizes[0], precision), head_columns(sizes[1], precision))

    def pieces(self, size: int) -> tuple[tuple[int, int], ...]:
        return head_pieces(size, precision_of(self.query))
