"""Per-image cross-attention.

    out[t] = sum_j P[t, j] value[j],  P[t] = softmax_j(scale * query[t] . key[j])

over the latents j of the image, or images, that token t sees. Shapes: query (B, Hq, T, D), key
(B, Hkv, I, L, D), value (B, Hkv, I, L, Dv). A plan lists, on the device, the tokens of each image.

Where a token sees one image at most, a program takes a block of one image's tokens, gathered by
their list, so the work is that of the pairs attended to; how many blocks an image has only the
device knows, and programs beyond the last block return. Where a token may see several, a program
takes neighbouring tokens and passes over the images that none of them sees. Tokens that do not see
what others of their block see are selected out after each product: a weight of 0 would not do,
since 0 times NaN is NaN.
"""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LN2,
    LOG2E,
    add_products,
    at_head,
    inner_products,
    load_rows,
    online_softmax_step,
    program_indices,
    scale_tiles,
    store_rows,
    zero_tiles,
)
from vlmfast.kernels.cross_attention.forward_fill import fill_rows
from vlmfast.kernels.cross_attention.images import (
    UNIFORM_ROW,
    VARYING,
    Plan,
    at_image,
    locate_tokens,
    seen_latents,
)
from vlmfast.kernels.cross_attention.problem import Problem
from vlmfast.kernels.cross_attention.tiles import select_tiles
from vlmfast.kernels.launch import Launch, dense_like, start, strided, with_positive_scale


@triton.jit
def attend(
    query_tiles,
    acc,
    row_max,
    row_sum,
    sees,
    key,
    value,
    num_latents,
    scale,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One image's share of the online softmax of a block of queries, of which `sees` see it."""
    for first in range(0, num_latents, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        key_tiles = load_rows(key, columns, num_latents, D, PIECES, UNIT)
        scores = inner_products(query_tiles, key_tiles, PRECISION)
        scores = tl.where((columns < num_latents)[None, :], scores, float("-inf"))
        if SEVERAL:
            scores = tl.where(sees[:, None], scores, float("-inf"))
        weights, decay, row_max, row_sum = online_softmax_step(
            scores, row_max, row_sum, scale * LOG2E
        )
        value_tiles = load_rows(value, columns, num_latents, DV, VALUE_PIECES, UNIT)
        after = add_products(scale_tiles(acc, decay[:, None]), weights, value_tiles, PRECISION)
        if SEVERAL:
            after = select_tiles(sees, after, acc)
        acc = after
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=VARYING)
def cross_attention_fwd_kernel(
    query,
    key,
    value,
    out,
    logsumexp,
    plan,
    num_heads,
    num_blocks,
    num_tokens,
    num_images,
    num_latents,
    order_size,
    scale,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    PIECES: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    PARTS: tl.constexpr,
    IMAGES: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of BLOCK_M tokens of one head: output (BLOCK_M, DV) and log-sum-exp.

    Programs run over blocks first, then heads, so that those sharing an image run side by side.
    """
    block, head, batch = program_indices(num_blocks, num_heads)
    tokens = locate_tokens(
        plan, batch, block, num_tokens, num_images, order_size, SEVERAL, IMAGES, BLOCK_M
    )
    if not SEVERAL and tokens.first_image >= num_images:
        return
    rows = tokens.rows

    query = at_head(query, batch, head, 0, UNIT)
    query_tiles = load_rows(query, rows, num_tokens, D, PIECES, UNIT)
    acc = zero_tiles(BLOCK_M, VALUE_PIECES)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for image in range(tokens.first_image, tokens.end_image):
        image_key = at_image(key, batch, head // GROUP, image, UNIT)
        image_value = at_image(value, batch, head // GROUP, image, UNIT)
        for part in tl.static_range(PARTS):
            sees, length = seen_latents(
                tokens,
                plan,
                batch,
                image,
                part=part,
                num_tokens=num_tokens,
                num_images=num_images,
                num_latents=num_latents,
                SEVERAL=SEVERAL,
                PARTS=PARTS,
            )
            acc, row_max, row_sum = attend(
                query_tiles,
                acc,
                row_max,
                row_sum,
                sees,
                image_key,
                image_value,
                num_latents=length,
                scale=scale,
                D=D,
                DV=DV,
                PIECES=PIECES,
                VALUE_PIECES=VALUE_PIECES,
                SEVERAL=SEVERAL,
                PRECISION=PRECISION,
                UNIT=UNIT,
                BLOCK_N=BLOCK_N,
            )

    acc = scale_tiles(acc, (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None])
    lse = row_max * scale + tl.math.log2(row_sum) * LN2
    keep = rows
    if SEVERAL:
        # Those that average all values are cross_attention_fill_kernel's.
        keep = tl.where(tokens.kinds == UNIFORM_ROW, num_tokens, rows)
    out = at_head(out, batch, head, 0, UNIT)
    store_rows(out, keep, num_tokens, acc, DV, VALUE_PIECES, UNIT)
    logsumexp += tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    tl.store(logsumexp + keep, lse, mask=keep < num_tokens)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    image_index: torch.Tensor,
    visible: torch.Tensor | None,
    order: torch.Tensor,
    segments: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, Hq, T, Dv) in the queries' dtype and float32 natural log-sum-exp (B, Hq, T).

    Args:
        query, key, value: (B, Hq, T, D), (B, Hkv, I, L, D), (B, Hkv, I, L, Dv), of any strides;
            query head h reads key head h // (Hq // Hkv).
        image_index, visible, order, segments, image_lengths: a plan, see
            `vlmfast.reference.cross_attention`.
    """
    plan = Plan(image_index, visible, order, segments, image_lengths)
    problem, _ = with_positive_scale(Problem(query, key, value, plan, scale))
    batch, heads, tokens, _ = query.shape
    out = dense_like(query, (batch, heads, tokens, value.shape[4]))
    logsumexp = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    unit = problem.stride_unit(out)

    def run(launch: Launch) -> None:
        blocks = problem.blocks(launch.block_m)
        start(
            cross_attention_fwd_kernel,
            batch * heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.sizes(blocks),
            **problem.constants(unit),
            **problem.token_constants(),
            plan=problem.kernel_plan(),
            out=strided(out, unit),
            logsumexp=logsumexp,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
        )

    problem.launch("cross_attention_fwd", problem.latents, run)
    fill_rows(problem, out, logsumexp)
    return out, logsumexp
