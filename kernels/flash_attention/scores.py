"""Which scores there are, and what hides them: what forward and backward share on the device."""

from typing import NamedTuple

import triton
import triton.language as tl

from vlmfast.kernels.common import inner_products, segment_bounds

# Kinds of attention mask, as the kernels' MASK parameter.
NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)

CAUSAL_BOTTOM_RIGHT = tl.constexpr(2)

# Parameters that change from call to call: kernels are not compiled anew for them.
VARYING = [
    "dropout",
    "num_heads",
    "num_blocks",
    "num_queries",
    "num_splits",
    "num_steps",
    "head_steps",
    "row_steps",
]


class Segment(NamedTuple):
    """Where a batch entry or packed segment lies.

    Query i sees the keys j <= i + causal_offset where attention is causal.
    """

    batch: int
    first_query: int
    num_queries: int
    first_key: int
    num_keys: int
    causal_offset: int


@triton.jit
def locate(
    batch,
    num_queries,
    num_keys,
    CAUSAL: tl.constexpr,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
):
    """The batch entry or, where there are cumulative lengths, the packed segment of that number."""
    first_query = 0
    first_key = 0
    if cu_seqlens_q is not None:
        first_query, num_queries = segment_bounds(cu_seqlens_q, batch, num_queries)
        first_key, num_keys = segment_bounds(cu_seqlens_k, batch, num_keys)
        batch = 0
    causal_offset = 0
    if CAUSAL == CAUSAL_BOTTOM_RIGHT:
        causal_offset = num_keys - num_queries
    return Segment(batch, first_query, num_queries, first_key, num_keys, causal_offset)


@triton.jit
def visible_columns(
    segment,
    first_row,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Keys that a block of queries sees: (end of them all, end of the blocks seen by every row)."""
    end = segment.num_keys
    checked_from = segment.num_keys // BLOCK_N * BLOCK_N
    if CAUSAL:
        seen_by_first_row = tl.maximum(first_row + segment.causal_offset + 1, 0)
        seen_by_last_row = tl.maximum(first_row + segment.causal_offset + BLOCK_M, 0)
        end = tl.minimum(end, seen_by_last_row)
        checked_from = tl.minimum(checked_from, seen_by_first_row // BLOCK_N * BLOCK_N)
    return end, checked_from


@triton.jit
def masked_scores(
    tiles,
    other_tiles,
    rows,
    columns,
    segment,
    attn_mask,
    scale,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    CHECK_COLUMNS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The products of two split tiles under every mask: unscaled, and -inf where hidden.

    `rows` and `columns` are indices of queries and keys, shaped to broadcast to the tile: (M, 1)
    and (1, N), or (1, M) and (N, 1) where the tile is transposed. A float mask is added to the
    scaled scores, so the result is scaled with one and unscaled without.

    The mask is loaded before the products: between them and their use it would make each product
    of a loop wait for the one before it.
    """
    if MASK != NO_MASK:
        pointers = attn_mask.pointer + columns.to(tl.int64) * attn_mask.strides[3]
        inside = columns < segment.num_keys
        if MASK_HAS_ROWS:
            pointers += rows.to(tl.int64) * attn_mask.strides[2]
            inside = inside & (rows < segment.num_queries)
        mask = tl.load(pointers, mask=inside, other=0)
    scores = inner_products(tiles, other_tiles, PRECISION)
    if MASK == FLOAT_MASK:
        scores = scores * scale + mask.to(tl.float32)
    elif MASK == BOOL_MASK:
        scores = tl.where(mask != 0, scores, float("-inf"))
    if CAUSAL:
        scores = tl.where(columns <= rows + segment.causal_offset, scores, float("-inf"))
    if CHECK_COLUMNS:
        scores = tl.where(columns < segment.num_keys, scores, float("-inf"))
    return scores
