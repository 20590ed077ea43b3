"""Softmax attention.

    out[i] = sum_j P[i, j] value[j],  P[i] = softmax_j(scale * query[i] . key[j] + mask[i, j])

by tiles, with the softmax taken online in base 2 (Dao et al., FlashAttention-2), so that no L x S
matrix is ever held. Shapes: query (B, Hq, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv).
"""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LN2,
    LOG2E,
    add_products,
    at_head,
    dropout_keep,
    load_rows,
    online_softmax_step,
    program_indices,
    scale_tiles,
    store_rows,
    zero_tiles,
)
from vlmfast.kernels.flash_attention.problem import Problem
from vlmfast.kernels.flash_attention.scores import (
    FLOAT_MASK,
    NO_MASK,
    VARYING,
    locate,
    masked_scores,
    visible_columns,
)
from vlmfast.kernels.launch import (
    Launch,
    ceil_div,
    check_lengths,
    dense_like,
    start,
    strided,
    with_positive_scale,
)


@triton.jit
def attend(
    query_tiles,
    acc,
    row_max,
    row_sum,
    rows,
    first_column,
    end,
    segment,
    stream,
    key,
    value,
    attn_mask,
    dropout,
    scale,
    factor,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    STEP: tl.constexpr,
):
    """The share of the keys from first_column to end in the online softmax of a block of queries.

    A loop that may run zero times would let each product wait for the one before it.
    """
    if end > first_column:
        tl.assume(end > first_column)
        for column in range(first_column, end, STEP):
            columns = column + tl.arange(0, STEP)
            key_tiles = load_rows(key, columns, segment.num_keys, D, PIECES, UNIT, CHECK)
            scores = masked_scores(
                query_tiles,
                key_tiles,
                rows[:, None],
                columns[None, :],
                segment=segment,
                attn_mask=attn_mask,
                scale=scale,
                MASK=MASK,
                MASK_HAS_ROWS=MASK_HAS_ROWS,
                CAUSAL=CAUSAL,
                CHECK_COLUMNS=CHECK,
                PRECISION=PRECISION,
            )
            weights, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, factor)
            if DROPOUT:
                keep = dropout_keep(
                    dropout,
                    stream,
                    segment.first_query + rows,
                    segment.first_key + column,
                    COLUMNS=STEP,
                    ALIGNED=not VARLEN,
                )
                weights = tl.where(keep, weights, 0.0)
            value_tiles = load_rows(value, columns, segment.num_keys, DV, VALUE_PIECES, UNIT, CHECK)
            acc = add_products(scale_tiles(acc, decay[:, None]), weights, value_tiles, PRECISION)
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=VARYING)
def flash_attention_fwd_kernel(
    query,
    key,
    value,
    attn_mask,
    out,
    logsumexp,
    cu_seqlens_q,
    cu_seqlens_k,
    dropout,
    num_heads,
    num_blocks,
    num_queries,
    num_keys,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    MASK: tl.constexpr,
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    VARLEN: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    REST: tl.constexpr,
):
    """One block of BLOCK_M queries of one head: its output (BLOCK_M, DV) and log-sum-exp.

    Programs run over blocks first, then heads, so that those sharing keys run side by side.
    """
    block, head, entry = program_indices(num_blocks, num_heads)
    if CAUSAL:
        block = num_blocks - 1 - block  # the blocks that see most keys start first
    segment = locate(entry, num_queries, num_keys, CAUSAL, cu_seqlens_q, cu_seqlens_k)
    first_row = block * BLOCK_M
    if first_row >= segment.num_queries:
        return
    stream = segment.batch * num_heads + head

    query = at_head(query, segment.batch, head, segment.first_query, UNIT)
    key = at_head(key, segment.batch, head // GROUP, segment.first_key, UNIT)
    value = at_head(value, segment.batch, head // GROUP, segment.first_key, UNIT)
    out = at_head(out, segment.batch, head, segment.first_query, UNIT)
    logsumexp += tl.cast(stream, tl.int64) * num_queries + segment.first_query
    if MASK != NO_MASK:
        attn_mask = at_head(attn_mask, segment.batch, head, row=0, UNIT=1)

    factor = LOG2E if MASK == FLOAT_MASK else scale * LOG2E
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, rows, segment.num_queries, D, PIECES, UNIT)
    acc = zero_tiles(BLOCK_M, VALUE_PIECES)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)

    end, checked_from = visible_columns(segment, first_row, CAUSAL, BLOCK_M, BLOCK_N)
    for phase in tl.static_range(2):  # 0: whole blocks, nothing to check; 1: the rest
        acc, row_max, row_sum = attend(
            query_tiles,
            acc,
            row_max,
            row_sum,
            rows,
            first_column=checked_from if phase == 1 else 0,
            end=end if phase == 1 else checked_from,
            segment=segment,
            stream=stream,
            key=key,
            value=value,
            attn_mask=attn_mask,
            dropout=dropout,
            scale=scale,
            factor=factor,
            D=D,
            DV=DV,
            PIECES=PIECES,
            VALUE_PIECES=VALUE_PIECES,
            MASK=MASK,
            MASK_HAS_ROWS=MASK_HAS_ROWS,
            CAUSAL=CAUSAL and phase == 1,
            VARLEN=VARLEN,
            DROPOUT=DROPOUT,
            CHECK=phase == 1,
            PRECISION=PRECISION,
            UNIT=UNIT,
            STEP=BLOCK_N if phase == 0 or CAUSAL else (REST or BLOCK_N),
        )

    visible_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # a fully masked row gives 0, not 0 / 0
    acc = scale_tiles(acc, ((dropout.scale if DROPOUT else 1.0) / visible_sum)[:, None])
    store_rows(out, rows, segment.num_queries, acc, DV, VALUE_PIECES, UNIT)
    natural_max = row_max if MASK == FLOAT_MASK else row_max * scale
    tl.store(
        logsumexp + rows,
        natural_max + tl.math.log2(visible_sum) * LN2,
        mask=rows < segment.num_queries,
    )


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor | None,
    cu_seqlens_k: torch.Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: int,
    scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Hq, L, Dv) in the queries' dtype and float32 natural log-sum-exp (B, Hq, L).

    Args:
        query, key, value: (B, Hq, L, D), (B, Hkv, S, D), (B, Hkv, S, Dv), of any strides; query
            head h reads key head h // (Hq // Hkv).
        attn_mask: four dimensions, each 1 or that of (B, Hq, L, S); bool (True = keep) or
            floating, added to the scaled scores.
        cu_seqlens_q, cu_seqlens_k: int32 (segments + 1,) on the device, for packed batches: then
            B is 1, L and S are totals, and the longest segments bound the grid.
        causal: 0 none; 1 key j visible to query i iff j <= i; 2 iff j <= i + S - L.
        dropout_seed: int64 (1,) on the device, where dropout_p > 0.

    Rows that see no key, and rows of a packed batch in no segment, give 0 and -inf.
    """
    problem, _ = with_positive_scale(
        Problem(
            query,
            key,
            value,
            attn_mask,
            cu_seqlens_q,
            cu_seqlens_k,
            max_seqlen_q,
            max_seqlen_k,
            causal,
            scale,
            dropout_p,
            dropout_seed,
        )
    )
    batch, heads, num_queries, _ = query.shape
    check_lengths(query=num_queries, key=key.shape[2])
    out = dense_like(query, (batch, heads, num_queries, value.shape[3]))
    logsumexp = query.new_empty((batch, heads, num_queries), dtype=torch.float32)
    if problem.packed:  # no program may come by rows outside every segment
        out.zero_()
        logsumexp.fill_(float("-inf"))
    unit = problem.stride_unit(out)

    def run(launch: Launch) -> None:
        blocks = ceil_div(problem.longest_query, launch.block_m)
        start(
            flash_attention_fwd_kernel,
            problem.batch_entries * heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.variant(),
            **problem.constants(unit),
            out=strided(out, unit),
            logsumexp=logsumexp,
            num_blocks=blocks,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            REST=problem.rest,
        )

    problem.launch("flash_attention_fwd", problem.longest_query, run)
    return out, logsumexp
