"""What the backward takes from the queries' rows of scores before it comes to the tiles."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    at_head,
    dropout_keep,
    inner_products,
    load_rows,
    online_softmax_step,
    program_indices,
)
from vlmfast.kernels.flash_attention.gradients import Statistics, row_delta
from vlmfast.kernels.flash_attention.problem import Problem
from vlmfast.kernels.flash_attention.scores import (
    FLOAT_MASK,
    VARYING,
    locate,
    masked_scores,
    visible_columns,
)
from vlmfast.kernels.launch import Launch, Saved, ceil_div, start, stride_unit, strided


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_statistics_kernel(
    query,
    key,
    value,
    attn_mask,
    grad_out,
    grad_logsumexp,
    statistics,
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
    MASK_HAS_ROWS: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROPOUT: tl.constexpr,
    DELTA: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Maximum of each query's scores and log2 of the sum that is left, where a float mask is added.

    A float mask can make the log-sum-exp so large that its rounding to float32 shows in the
    weights, or swallows the sum altogether (a row hidden by the lowest finite number). So the
    backward takes the two apart. A row that sees no key gets maximum +inf, which makes its weights
    0.

    With DELTA also delta = sum_j P[i, j] dP[i, j] - grad_logsumexp[i]. As out . grad_out it lacks
    what rounding took from out: rows of dS would not sum to 0, and the mask's gradient shows it.
    """
    block, head, batch = program_indices(num_blocks, num_heads)
    segment = locate(batch, num_queries, num_keys, CAUSAL)
    stream = batch * num_heads + head
    query = at_head(query, batch, head, row=0, UNIT=UNIT)
    key = at_head(key, batch, head // GROUP, row=0, UNIT=UNIT)
    attn_mask = at_head(attn_mask, batch, head, row=0, UNIT=1)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    query_tiles = load_rows(query, rows, num_queries, D, PIECES, UNIT)
    if DELTA:
        value = at_head(value, batch, head // GROUP, row=0, UNIT=UNIT)
        grad_out = at_head(grad_out, batch, head, row=0, UNIT=UNIT)
        grad_out_tiles = load_rows(grad_out, rows, num_queries, DV, VALUE_PIECES, UNIT)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    products = tl.zeros([BLOCK_M], tl.float32)
    end, _checked_from = visible_columns(segment, first_row, CAUSAL, BLOCK_M, BLOCK_N)
    for first_column in range(0, end, BLOCK_N):
        columns = first_column + tl.arange(0, BLOCK_N)
        key_tiles = load_rows(key, columns, num_keys, D, PIECES, UNIT)
        scores = masked_scores(
            query_tiles,
            key_tiles,
            rows[:, None],
            columns[None, :],
            segment=segment,
            attn_mask=attn_mask,
            scale=scale,
            MASK=FLOAT_MASK,
            MASK_HAS_ROWS=MASK_HAS_ROWS,
            CAUSAL=CAUSAL,
            CHECK_COLUMNS=True,
            PRECISION=PRECISION,
        )
        weights, decay, row_max, row_sum = online_softmax_step(scores, row_max, row_sum, LOG2E)
        if DELTA:
            value_tiles = load_rows(value, columns, num_keys, DV, VALUE_PIECES, UNIT)
            grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
            if DROPOUT:
                keep = dropout_keep(
                    dropout, stream, rows, first_column, COLUMNS=BLOCK_N, ALIGNED=True
                )
                grad_weights = tl.where(keep, grad_weights * dropout.scale, 0.0)
            products = products * decay + tl.sum(weights * grad_weights, 1)
    hidden = row_max == float("-inf")
    offsets = tl.cast(stream, tl.int64) * num_queries + rows
    inside = rows < num_queries
    if DELTA:
        delta = products / row_sum
        if grad_logsumexp is not None:
            delta -= tl.load(grad_logsumexp + offsets, mask=inside, other=0.0)
        tl.store(statistics.delta + offsets, tl.where(hidden, 0.0, delta), mask=inside)
    tl.store(statistics.row_max + offsets, tl.where(hidden, float("inf"), row_max), mask=inside)
    log_sum = tl.math.log2(tl.where(hidden, 1.0, row_sum))
    tl.store(statistics.log_sum + offsets, log_sum, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def flash_attention_bwd_delta_kernel(
    out,
    grad_out,
    logsumexp,
    grad_logsumexp,
    delta,
    num_heads,
    num_blocks,
    num_queries,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """delta[b, h, i] = out[b, h, i] . grad_out[b, h, i] - grad_logsumexp[b, h, i]."""
    block, head, batch = program_indices(num_blocks, num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    offset = tl.cast(batch * num_heads + head, tl.int64) * num_queries
    if grad_logsumexp is not None:
        grad_logsumexp += offset
    out = at_head(out, batch, head, row=0, UNIT=UNIT)
    grad_out = at_head(grad_out, batch, head, row=0, UNIT=UNIT)
    grad_out_tiles = load_rows(grad_out, rows, num_queries, DV, VALUE_PIECES, UNIT)
    out_tiles = load_rows(out, rows, num_queries, DV, VALUE_PIECES, UNIT)
    row_deltas = row_delta(
        grad_out_tiles, out_tiles, logsumexp + offset, grad_logsumexp, rows, num_queries
    )
    tl.store(delta + offset + rows, row_deltas, mask=rows < num_queries)


def row_statistics(problem: Problem, saved: Saved, exact_delta: bool) -> Statistics:
    """Args:
    exact_delta: where there is a float mask, take delta from the weights instead of from out.
    """
    if problem.mask_kind != FLOAT_MASK.value:
        return Statistics(saved.logsumexp, None, None, row_deltas(problem, saved))
    statistics = Statistics(
        saved.logsumexp,
        row_max=torch.empty_like(saved.logsumexp),
        log_sum=torch.empty_like(saved.logsumexp),
        delta=torch.empty_like(saved.logsumexp) if exact_delta else row_deltas(problem, saved),
    )
    unit = problem.stride_unit(saved.grad_out)

    def run(launch: Launch) -> None:
        blocks = ceil_div(problem.longest_query, launch.block_m)
        start(
            flash_attention_bwd_statistics_kernel,
            problem.batch_entries * problem.heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.constants(unit),
            grad_out=strided(saved.grad_out, unit),
            grad_logsumexp=saved.grad_logsumexp,
            statistics=statistics,
            num_blocks=blocks,
            MASK_HAS_ROWS=problem.mask_has_rows,
            DELTA=exact_delta,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )

    problem.launch("flash_attention_bwd_statistics", problem.longest_query, run)
    return statistics


def row_deltas(problem: Problem, saved: Saved) -> torch.Tensor:
    """out . grad_out - grad_logsumexp of each query, float32 (B, Hq, L)."""
    delta = torch.empty_like(saved.logsumexp)
    batch, heads, num_queries, value_size = saved.out.shape
    unit = stride_unit(saved.out, saved.grad_out)

    def run(launch: Launch) -> None:
        blocks = ceil_div(num_queries, launch.block_m)
        start(
            flash_attention_bwd_delta_kernel,
            batch * heads * blocks,
            launch,
            out=strided(saved.out, unit),
            grad_out=strided(saved.grad_out, unit),
            logsumexp=saved.logsumexp,
            grad_logsumexp=saved.grad_logsumexp,
            delta=delta,
            num_heads=heads,
            num_blocks=blocks,
            num_queries=num_queries,
            DV=value_size,
            VALUE_PIECES=problem.pieces(value_size),
            UNIT=unit,
            BLOCK_M=launch.block_m,
        )

    problem.launch("flash_attention_bwd_delta", num_queries, run)
    return delta
