"""Gradients of keys and values, image by image; where an image fits on chip, of queries, too."""

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import (
    LOG2E,
    Strided,
    add_products,
    add_transposed_products,
    at_head,
    inner_products,
    load_rows,
    program_indices,
    scale_tiles,
    shifted_exp2,
    store_rows,
    transpose_tiles,
    zero_tiles,
    zero_transposed_tiles,
)
from vlmfast.kernels.cross_attention.backward_uniform import uniform_gradient
from vlmfast.kernels.cross_attention.images import (
    VARYING,
    at_image,
    list_bounds,
    listed_tokens,
    visible_latents,
)
from vlmfast.kernels.cross_attention.problem import Problem, strided_images
from vlmfast.kernels.cross_attention.tiles import add_tiles, row_statistics
from vlmfast.kernels.launch import Launch, Saved, ceil_div, next_power_of_2, start, strided


@triton.jit(do_not_specialize=VARYING)
def cross_attention_bwd_key_value_kernel(
    query,
    key,
    value,
    out,
    grad_out,
    grad_query,
    grad_key,
    grad_value,
    logsumexp,
    grad_logsumexp,
    uniform_gradient,
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
    PARTS: tl.constexpr,
    WITH_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradients of one block of BLOCK_N latents of one image and key head.

    The loop runs over the query heads that share the key head and over the image's own tokens, so
    nothing is left to sum between programs. WITH_QUERY the block is the whole image, and the only
    one of its tokens, so that their gradient is complete. Tiles are transposed, latents by tokens.
    """
    key_heads = num_heads // GROUP
    block, key_head, image_of_all = program_indices(num_blocks, key_heads)
    image = image_of_all % num_images
    batch = image_of_all // num_images
    columns = block * BLOCK_N + tl.arange(0, BLOCK_N)
    image_key = at_image(key, batch, key_head, image, UNIT)
    image_value = at_image(value, batch, key_head, image, UNIT)
    order = plan.order + tl.cast(batch, tl.int64) * order_size
    grad_key_tiles = zero_tiles(BLOCK_N, PIECES)
    grad_value_tiles = zero_tiles(BLOCK_N, VALUE_PIECES)

    for part in tl.static_range(PARTS):
        length = num_latents
        if part == 0:
            length = visible_latents(plan.image_lengths, batch, image, num_images, num_latents)
        begin, end = list_bounds(plan.segments, batch, image, part, num_images, order_size)
        end = tl.where(block * BLOCK_N < length, end, begin)
        key_tiles = load_rows(image_key, columns, length, D, PIECES, UNIT)
        value_tiles = load_rows(image_value, columns, length, DV, VALUE_PIECES, UNIT)
        steps = tl.cdiv(end - begin, BLOCK_M)
        for step in range(GROUP * steps):
            head = key_head * GROUP + step // steps
            positions = begin + step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
            rows = listed_tokens(order, positions, end, num_tokens)
            head_query = at_head(query, batch, head, 0, UNIT)
            query_tiles = load_rows(head_query, rows, num_tokens, D, PIECES, UNIT)
            head_grad_out = at_head(grad_out, batch, head, 0, UNIT)
            grad_out_tiles = load_rows(head_grad_out, rows, num_tokens, DV, VALUE_PIECES, UNIT)
            head_out = at_head(out, batch, head, 0, UNIT)
            out_tiles = load_rows(head_out, rows, num_tokens, DV, VALUE_PIECES, UNIT)
            statistics_offset = tl.cast(batch * num_heads + head, tl.int64) * num_tokens
            head_grad_logsumexp = grad_logsumexp
            if grad_logsumexp is not None:
                head_grad_logsumexp = grad_logsumexp + statistics_offset
            shift, delta = row_statistics(
                grad_out_tiles,
                out_tiles,
                logsumexp + statistics_offset,
                head_grad_logsumexp,
                rows,
                num_tokens,
            )
            scores = inner_products(key_tiles, query_tiles, PRECISION)
            weights = shifted_exp2(scores, shift[None, :], scale * LOG2E)
            weights = tl.where((columns < length)[:, None], weights, 0.0)
            grad_weights = inner_products(value_tiles, grad_out_tiles, PRECISION)
            grad_scores = weights * (grad_weights - delta[None, :])
            grad_scores = grad_scores.to(query.pointer.dtype.element_ty)
            grad_value_tiles = add_products(grad_value_tiles, weights, grad_out_tiles, PRECISION)
            grad_key_tiles = add_products(grad_key_tiles, grad_scores, query_tiles, PRECISION)
            if WITH_QUERY:
                grad_query_tiles = add_transposed_products(
                    zero_transposed_tiles(BLOCK_M, PIECES), key_tiles, grad_scores, PRECISION
                )
                store_rows(
                    at_head(grad_query, batch, head, 0, UNIT),
                    rows,
                    num_tokens,
                    transpose_tiles(scale_tiles(grad_query_tiles, scale)),
                    D,
                    PIECES,
                    UNIT,
                )

    uniform_gradient += tl.cast(batch * key_heads + key_head, tl.int64) * DV
    uniform = Strided(uniform_gradient, (0, 0, 0, 1))
    share = load_rows(uniform, tl.zeros([1], tl.int32), 1, DV, VALUE_PIECES, UNIT=1)
    grad_key = at_image(grad_key, batch, key_head, image, UNIT)
    grad_key_tiles = scale_tiles(grad_key_tiles, scale)
    store_rows(grad_key, columns, num_latents, grad_key_tiles, D, PIECES, UNIT)
    grad_value = at_image(grad_value, batch, key_head, image, UNIT)
    grad_value_tiles = add_tiles(grad_value_tiles, share)
    store_rows(grad_value, columns, num_latents, grad_value_tiles, DV, VALUE_PIECES, UNIT)


def key_value_gradients(
    problem: Problem,
    saved: Saved,
    grad_query: torch.Tensor,
    grad_key: torch.Tensor,
    grad_value: torch.Tensor,
    whole: bool,
) -> None:
    """Gradients of the images, and, where `whole`, of the queries, too."""
    share = uniform_gradient(problem, saved)
    gradient = grad_query if whole else problem.query  # which is then not written to
    unit = problem.stride_unit(saved.out, saved.grad_out, gradient, grad_key, grad_value)

    def run(launch: Launch) -> None:
        block_n = launch.block_n
        if whole:  # of several blocks each would write its own share of the queries' gradients
            block_n = max(block_n, next_power_of_2(problem.latents))
        blocks = ceil_div(problem.latents, block_n)
        start(
            cross_attention_bwd_key_value_kernel,
            problem.batch * problem.images * problem.key_heads * blocks,
            launch,
            **problem.inputs(unit),
            **problem.sizes(blocks),
            **problem.constants(unit),
            plan=problem.kernel_plan(),
            out=strided(saved.out, unit),
            grad_out=strided(saved.grad_out, unit),
            grad_query=strided(gradient, unit),
            grad_key=strided_images(grad_key, unit),
            grad_value=strided_images(grad_value, unit),
            logsumexp=saved.logsumexp,
            grad_logsumexp=saved.grad_logsumexp,
            uniform_gradient=share,
            WITH_QUERY=whole,
            BLOCK_M=launch.block_m,
            BLOCK_N=block_n,
        )

    kernel = "cross_attention_bwd_whole" if whole else "cross_attention_bwd_key_value"
    problem.launch(kernel, problem.latents, run)
