"""Per-image cross-attention, forward and backward.

    out[t] = sum_j P[t, j] value[j],  P[t] = softmax_j(scale * query[t] . key[j])

over the latents j of the image, or images, that token t sees. Shapes: query (B, Hq, T, D), key
(B, Hkv, I, L, D), value (B, Hkv, I, L, Dv). A plan lists, on the device, the tokens of each image.

Where a token sees one image at most, a program takes a block of one image's tokens, gathered by
their list, so the work is that of the pairs attended to; how many blocks an image has only the
device knows, and programs beyond the last block return. Where a token may see several, a program
takes neighbouring tokens and passes over the images that none of them sees. Tokens that do not see
what others of their block see are selected out after each product: a weight of 0 would not do,
since 0 times NaN is NaN.

The backward has no atomics: an image's gradients come from its own list of tokens. Where its
latents fit on chip and tokens see one image at most, the queries' gradients come from the same
pass; elsewhere from a kernel of their own.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels import configs
from vlmfast.kernels.common import (
    LN2,
    LOG2E,
    Saved,
    add_products,
    add_transposed_products,
    covered_columns,
    dense_like,
    head_pieces,
    head_pointer,
    inner_products,
    input_precision,
    kernel_strides,
    load_head_rows,
    load_rows,
    online_softmax_step,
    precision_of,
    program_indices,
    row_inner_products,
    run_kernel,
    run_with_launch,
    saved_for_backward,
    scale_tiles,
    shifted_exp2,
    store_head_rows,
    store_rows,
    stride_unit,
    transpose_tiles,
    with_positive_scale,
    with_strides,
    zero_tiles,
    zero_transposed_tiles,
)
from vlmfast.kernels.configs import Launch

# Values of image_index that are no number of an image.
UNIFORM_ROW = tl.constexpr(-1)
DENSE_ROW = tl.constexpr(-2)


@triton.jit
def image_pointer(pointer, strides, batch, head, image, UNIT: tl.constexpr):
    """Address of latent 0 of an image; `strides` are (batch, head, latent, column, image)."""
    pointer = head_pointer(pointer, strides, batch, head, 0, UNIT)
    return pointer + tl.cast(image, tl.int64) * strides[4] * UNIT


@triton.jit
def visible_latents(image_lengths, batch, num_images, image, num_latents):
    """How many latents of an image exist."""
    length = num_latents
    if image_lengths is not None:
        length = tl.load(image_lengths + tl.cast(batch, tl.int64) * num_images + image)
        length = tl.minimum(tl.maximum(length, 0), num_latents)
    return length


@triton.jit
def list_bounds(segments, batch, num_images, image, part, order_size):
    """Positions in `order` of an image's tokens: part 0 those that image_lengths binds, 1 the rest.

    They never leave the list, whatever `segments` holds.
    """
    segment = segments + (tl.cast(batch, tl.int64) * num_images + image) * 3 + part
    begin = tl.minimum(tl.maximum(tl.load(segment), 0), order_size)
    return begin, tl.minimum(tl.maximum(tl.load(segment + 1), begin), order_size)


@triton.jit
def listed_tokens(order, positions, end, num_tokens):
    """The tokens at some positions of a list; num_tokens where the list has ended."""
    tokens = tl.load(order + positions, mask=positions < end, other=num_tokens)
    return tl.where((tokens >= 0) & (tokens < num_tokens), tokens, num_tokens)


@triton.jit
def find_block(
    segments, batch, num_images, block, order_size, IMAGES: tl.constexpr, BLOCK_M: tl.constexpr
):
    """The image that block number `block` of a batch entry belongs to, and its place in the list.

    Gives (image, first position, end of the image's list); the image is num_images where there are
    fewer blocks. IMAGES is the power of two that num_images fits in.
    """
    images = tl.arange(0, IMAGES)
    inside = images < num_images
    segment = segments + tl.cast(batch, tl.int64) * num_images * 3 + images * 3
    begins = tl.load(segment, mask=inside, other=0)
    ends = tl.load(segment + 2, mask=inside, other=0)
    blocks = tl.cdiv(tl.maximum(ends - begins, 0), BLOCK_M)
    before = (tl.cumsum(blocks, 0) <= block) & inside
    image = tl.sum(before.to(tl.int32), 0)
    first_block = tl.sum(tl.where(before, blocks, 0), 0)
    chosen = images == image
    begin = tl.sum(tl.where(chosen, begins, 0), 0) + (block - first_block) * BLOCK_M
    end = tl.sum(tl.where(chosen, ends, 0), 0)
    begin = tl.minimum(tl.maximum(begin, 0), order_size)
    return image, begin, tl.minimum(end, order_size)


@triton.jit
def seen_latents(
    visible,
    image_lengths,
    kinds,
    rows,
    batch,
    image,
    part: tl.constexpr,
    num_tokens,
    num_images,
    num_latents,
    SEVERAL: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Which tokens of a block see an image, and how many of its latents; none if none of them do.

    Where there are two PARTS, part 0 is of tokens that image_lengths binds, part 1 of the others.
    `visible` is that of the batch entry.
    """
    length = num_latents
    if part == 0:
        length = visible_latents(image_lengths, batch, num_images, image, num_latents)
    sees = rows < num_tokens
    if SEVERAL:
        pointers = visible + rows.to(tl.int64) * num_images + image
        sees = tl.load(pointers, mask=sees, other=0) != 0
        if PARTS == 2:
            sees = sees & ((kinds == DENSE_ROW) == (part == 1))
        length = tl.where(tl.max(sees.to(tl.int32), 0) == 0, 0, length)
    return sees, length


@triton.jit
def select_tiles(condition, yes, no):
    """Rows of one split tile where `condition` (M,) holds, of another elsewhere."""
    selected = ()
    for i in tl.static_range(len(yes)):
        selected = selected + (tl.where(condition[:, None], yes[i], no[i]),)
    return selected


@triton.jit
def sum_of_rows(tiles):
    """Sums over the rows of a split tile, (1, width) each, in float32."""
    sums = ()
    for i in tl.static_range(len(tiles)):
        sums = sums + (tl.sum(tiles[i].to(tl.float32), 0)[None, :],)
    return sums


@triton.jit
def add_tiles(left, right):
    sums = ()
    for i in tl.static_range(len(left)):
        sums = sums + (left[i] + right[i],)
    return sums


@triton.jit
def value_count(num_images, num_latents):
    """How many values a key head has, in float32: of stride 0 there may be more than 2**31."""
    return tl.cast(num_images, tl.float32) * num_latents


@triton.jit
def mean_value(
    value,
    value_strides,
    batch,
    key_head,
    num_images,
    num_latents,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The mean of all values of a key head, a split tile (1, DV)."""
    total = zero_tiles(1, VALUE_PIECES)
    for image in range(num_images):
        latents = image_pointer(value, value_strides, batch, key_head, image, UNIT)
        for first in range(0, num_latents, BLOCK_N):
            columns = first + tl.arange(0, BLOCK_N)
            tiles = load_rows(
                latents, value_strides, columns, num_latents, DV, VALUE_PIECES, UNIT, True
            )
            total = add_tiles(total, sum_of_rows(tiles))
    return scale_tiles(total, 1.0 / tl.maximum(value_count(num_images, num_latents), 1.0))


@triton.jit
def attend(
    query_tiles,
    acc,
    row_max,
    row_sum,
    sees,
    key,
    key_strides,
    value,
    value_strides,
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
        key_tiles = load_rows(key, key_strides, columns, num_latents, D, PIECES, UNIT, True)
        scores = inner_products(query_tiles, key_tiles, PRECISION)
        scores = tl.where((columns < num_latents)[None, :], scores, float("-inf"))
        if SEVERAL:
            scores = tl.where(sees[:, None], scores, float("-inf"))
        weights, decay, row_max, row_sum = online_softmax_step(
            scores, row_max, row_sum, scale * LOG2E
        )
        value_tiles = load_rows(
            value, value_strides, columns, num_latents, DV, VALUE_PIECES, UNIT, True
        )
        after = add_products(scale_tiles(acc, decay[:, None]), weights, value_tiles, PRECISION)
        if SEVERAL:
            after = select_tiles(sees, after, acc)
        acc = after
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_tokens", "num_images", "order_size"])
def cross_attention_fwd_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    out,
    out_strides,
    logsumexp,
    image_index,
    visible,
    order,
    segments,
    image_lengths,
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
    if SEVERAL:
        first_image = 0
        end_image = num_images
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        image_index += tl.cast(batch, tl.int64) * num_tokens
        kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=0)
        visible += tl.cast(batch, tl.int64) * num_tokens * num_images
    else:
        first_image, begin, end = find_block(
            segments, batch, num_images, block, order_size, IMAGES, BLOCK_M
        )
        if first_image >= num_images:
            return
        end_image = first_image + 1
        order += tl.cast(batch, tl.int64) * order_size
        rows = listed_tokens(order, begin + tl.arange(0, BLOCK_M), end, num_tokens)
        kinds = rows

    query = head_pointer(query, query_strides, batch, head, 0, UNIT)
    query_tiles = load_rows(query, query_strides, rows, num_tokens, D, PIECES, UNIT, True)
    acc = zero_tiles(BLOCK_M, VALUE_PIECES)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for image in range(first_image, end_image):
        image_key = image_pointer(key, key_strides, batch, head // GROUP, image, UNIT)
        image_value = image_pointer(value, value_strides, batch, head // GROUP, image, UNIT)
        for part in tl.static_range(PARTS):
            sees, length = seen_latents(
                visible,
                image_lengths,
                kinds,
                rows,
                batch,
                image,
                part,
                num_tokens,
                num_images,
                num_latents,
                SEVERAL,
                PARTS,
            )
            acc, row_max, row_sum = attend(
                query_tiles,
                acc,
                row_max,
                row_sum,
                sees,
                image_key,
                key_strides,
                image_value,
                value_strides,
                length,
                scale,
                D,
                DV,
                PIECES,
                VALUE_PIECES,
                SEVERAL,
                PRECISION,
                UNIT,
                BLOCK_N,
            )

    acc = scale_tiles(acc, (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None])
    lse = row_max * scale + tl.math.log2(row_sum) * LN2
    keep = rows
    if SEVERAL:
        keep = tl.where(kinds == UNIFORM_ROW, num_tokens, rows)  # cross_attention_fill_kernel's
    out = head_pointer(out, out_strides, batch, head, 0, UNIT)
    store_rows(out, out_strides, keep, num_tokens, acc, DV, VALUE_PIECES, UNIT)
    logsumexp += tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    tl.store(logsumexp + keep, lse, mask=keep < num_tokens)


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_tokens", "num_images"])
def cross_attention_fill_kernel(
    value,
    value_strides,
    out,
    out_strides,
    logsumexp,
    image_index,
    num_heads,
    num_blocks,
    num_tokens,
    num_images,
    num_latents,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    SEVERAL: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows of one block of tokens of one head that see no image: 0, or the mean of all values."""
    block, head, batch = program_indices(num_blocks, num_heads)
    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    image_index += tl.cast(batch, tl.int64) * num_tokens
    kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=1)
    uniform = kinds == UNIFORM_ROW
    filled = uniform if SEVERAL else (uniform | (kinds == 0))
    if tl.max(filled.to(tl.int32), 0) == 0:
        return
    count = tl.where(tl.max(uniform.to(tl.int32), 0) == 0, 0, num_images)
    mean = mean_value(
        value,
        value_strides,
        batch,
        head // GROUP,
        count,
        num_latents,
        DV,
        VALUE_PIECES,
        UNIT,
        BLOCK_N,
    )
    tiles = ()
    zeros = zero_tiles(BLOCK_M, VALUE_PIECES)
    for i in tl.static_range(len(mean)):
        tiles = tiles + (tl.where(uniform[:, None], mean[i], zeros[i]),)
    keep = tl.where(filled, rows, num_tokens)
    out = head_pointer(out, out_strides, batch, head, 0, UNIT)
    store_rows(out, out_strides, keep, num_tokens, tiles, DV, VALUE_PIECES, UNIT)
    values = value_count(count, num_latents)  # 0 gives the log-sum-exp of nothing, -inf
    lse = tl.where(uniform, tl.math.log2(values) * LN2, float("-inf"))
    logsumexp += tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    tl.store(logsumexp + keep, lse, mask=keep < num_tokens)


@triton.jit
def row_statistics(grad_out_tiles, out_tiles, logsumexp, grad_logsumexp, rows, num_rows):
    """The shift and the delta of each query; rows that are none or see nothing weigh 0."""
    inside = rows < num_rows
    lse = tl.load(logsumexp + rows, mask=inside, other=float("-inf"))
    delta = row_inner_products(grad_out_tiles, out_tiles)
    if grad_logsumexp is not None:
        grad_lse = tl.load(grad_logsumexp + rows, mask=inside, other=0.0)
        delta -= tl.where(lse == float("-inf"), 0.0, grad_lse)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_tokens", "num_images", "order_size"])
def cross_attention_bwd_key_value_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    out,
    out_strides,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    grad_key,
    grad_key_strides,
    grad_value,
    grad_value_strides,
    logsumexp,
    grad_logsumexp,
    uniform_gradient,
    order,
    segments,
    image_lengths,
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
    image_key = image_pointer(key, key_strides, batch, key_head, image, UNIT)
    image_value = image_pointer(value, value_strides, batch, key_head, image, UNIT)
    order += tl.cast(batch, tl.int64) * order_size
    grad_key_tiles = zero_tiles(BLOCK_N, PIECES)
    grad_value_tiles = zero_tiles(BLOCK_N, VALUE_PIECES)

    for part in tl.static_range(PARTS):
        length = num_latents
        if part == 0:
            length = visible_latents(image_lengths, batch, num_images, image, num_latents)
        begin, end = list_bounds(segments, batch, num_images, image, part, order_size)
        end = tl.where(block * BLOCK_N < length, end, begin)
        key_tiles = load_rows(image_key, key_strides, columns, length, D, PIECES, UNIT, True)
        value_tiles = load_rows(
            image_value, value_strides, columns, length, DV, VALUE_PIECES, UNIT, True
        )
        steps = tl.cdiv(end - begin, BLOCK_M)
        for step in range(GROUP * steps):
            head = key_head * GROUP + step // steps
            positions = begin + step % steps * BLOCK_M + tl.arange(0, BLOCK_M)
            rows = listed_tokens(order, positions, end, num_tokens)
            query_tiles = load_head_rows(
                query, query_strides, batch, head, 0, rows, num_tokens, D, PIECES, UNIT
            )
            grad_out_tiles = load_head_rows(
                grad_out, grad_out_strides, batch, head, 0, rows, num_tokens, DV, VALUE_PIECES, UNIT
            )
            out_tiles = load_head_rows(
                out, out_strides, batch, head, 0, rows, num_tokens, DV, VALUE_PIECES, UNIT
            )
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
            grad_scores = (weights * (grad_weights - delta[None, :])).to(query.dtype.element_ty)
            grad_value_tiles = add_products(grad_value_tiles, weights, grad_out_tiles, PRECISION)
            grad_key_tiles = add_products(grad_key_tiles, grad_scores, query_tiles, PRECISION)
            if WITH_QUERY:
                grad_query_tiles = add_transposed_products(
                    zero_transposed_tiles(BLOCK_M, PIECES), key_tiles, grad_scores, PRECISION
                )
                store_head_rows(
                    grad_query,
                    grad_query_strides,
                    batch,
                    head,
                    0,
                    rows,
                    num_tokens,
                    transpose_tiles(scale_tiles(grad_query_tiles, scale)),
                    D,
                    PIECES,
                    UNIT,
                )

    uniform_gradient += tl.cast(batch * key_heads + key_head, tl.int64) * DV
    share = load_rows(
        uniform_gradient, (0, 0, 0, 1), tl.zeros([1], tl.int32), 1, DV, VALUE_PIECES, 1, True
    )
    store_rows(
        image_pointer(grad_key, grad_key_strides, batch, key_head, image, UNIT),
        grad_key_strides,
        columns,
        num_latents,
        scale_tiles(grad_key_tiles, scale),
        D,
        PIECES,
        UNIT,
    )
    store_rows(
        image_pointer(grad_value, grad_value_strides, batch, key_head, image, UNIT),
        grad_value_strides,
        columns,
        num_latents,
        add_tiles(grad_value_tiles, share),
        DV,
        VALUE_PIECES,
        UNIT,
    )


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_values"])
def cross_attention_bwd_uniform_kernel(
    grad_out,
    grad_out_strides,
    uniform_gradient,
    image_index,
    num_heads,
    num_tokens,
    num_values,
    GROUP: tl.constexpr,
    DV: tl.constexpr,
    VALUE_PIECES: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """What the rows that average all values add to the gradient of each value of a key head."""
    key_heads = num_heads // GROUP
    key_head = tl.program_id(0) % key_heads
    batch = tl.program_id(0) // key_heads
    image_index += tl.cast(batch, tl.int64) * num_tokens
    total = zero_tiles(1, VALUE_PIECES)
    for first in range(0, num_tokens, BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=0)
        uniform = kinds == UNIFORM_ROW
        members = tl.where(tl.max(uniform.to(tl.int32), 0) == 0, 0, GROUP)
        rows = tl.where(uniform, rows, num_tokens)
        for member in range(members):
            head_grad_out = head_pointer(
                grad_out, grad_out_strides, batch, key_head * GROUP + member, 0, UNIT
            )
            tiles = load_rows(
                head_grad_out, grad_out_strides, rows, num_tokens, DV, VALUE_PIECES, UNIT, True
            )
            total = add_tiles(total, sum_of_rows(tiles))
    store_rows(
        uniform_gradient + tl.cast(tl.program_id(0), tl.int64) * DV,
        (0, 0, 0, 1),
        tl.zeros([1], tl.int32),
        1,
        scale_tiles(total, 1.0 / tl.maximum(num_values, 1)),
        DV,
        VALUE_PIECES,
        1,
    )


@triton.jit
def add_query_gradient(
    query_tiles,
    grad_out_tiles,
    grad_query_tiles,
    shift,
    delta,
    sees,
    key,
    key_strides,
    value,
    value_strides,
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
    """One image's share of the gradient of a block of queries, of which `sees` see it."""
    for first in range(0, num_latents, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        key_tiles = load_rows(key, key_strides, columns, num_latents, D, PIECES, UNIT, True)
        value_tiles = load_rows(
            value, value_strides, columns, num_latents, DV, VALUE_PIECES, UNIT, True
        )
        scores = inner_products(query_tiles, key_tiles, PRECISION)
        weights = shifted_exp2(scores, shift[:, None], scale * LOG2E)
        weights = tl.where((columns < num_latents)[None, :], weights, 0.0)
        grad_weights = inner_products(grad_out_tiles, value_tiles, PRECISION)
        grad_scores = weights * (grad_weights - delta[:, None])
        if SEVERAL:
            grad_scores = tl.where(sees[:, None], grad_scores, 0.0)
        after = add_products(grad_query_tiles, grad_scores, key_tiles, PRECISION)
        if SEVERAL:
            after = select_tiles(sees, after, grad_query_tiles)
        grad_query_tiles = after
    return grad_query_tiles


@triton.jit(do_not_specialize=["num_heads", "num_blocks", "num_tokens", "num_images", "order_size"])
def cross_attention_bwd_query_kernel(
    query,
    query_strides,
    key,
    key_strides,
    value,
    value_strides,
    out,
    out_strides,
    grad_out,
    grad_out_strides,
    grad_query,
    grad_query_strides,
    logsumexp,
    grad_logsumexp,
    image_index,
    visible,
    order,
    segments,
    image_lengths,
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
    """Gradient of one block of BLOCK_M tokens' queries of one head; blocks as in the forward."""
    block, head, batch = program_indices(num_blocks, num_heads)
    if SEVERAL:
        first_image = 0
        end_image = num_images
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        image_index += tl.cast(batch, tl.int64) * num_tokens
        kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=0)
        visible += tl.cast(batch, tl.int64) * num_tokens * num_images
    else:
        first_image, begin, end = find_block(
            segments, batch, num_images, block, order_size, IMAGES, BLOCK_M
        )
        if first_image >= num_images:
            return
        end_image = first_image + 1
        order += tl.cast(batch, tl.int64) * order_size
        rows = listed_tokens(order, begin + tl.arange(0, BLOCK_M), end, num_tokens)
        kinds = rows

    query = head_pointer(query, query_strides, batch, head, 0, UNIT)
    out = head_pointer(out, out_strides, batch, head, 0, UNIT)
    grad_out = head_pointer(grad_out, grad_out_strides, batch, head, 0, UNIT)
    query_tiles = load_rows(query, query_strides, rows, num_tokens, D, PIECES, UNIT, True)
    grad_out_tiles = load_rows(
        grad_out, grad_out_strides, rows, num_tokens, DV, VALUE_PIECES, UNIT, True
    )
    out_tiles = load_rows(out, out_strides, rows, num_tokens, DV, VALUE_PIECES, UNIT, True)
    statistics_offset = tl.cast(batch * num_heads + head, tl.int64) * num_tokens
    if grad_logsumexp is not None:
        grad_logsumexp += statistics_offset
    shift, delta = row_statistics(
        grad_out_tiles, out_tiles, logsumexp + statistics_offset, grad_logsumexp, rows, num_tokens
    )
    grad_query_tiles = zero_tiles(BLOCK_M, PIECES)
    for image in range(first_image, end_image):
        image_key = image_pointer(key, key_strides, batch, head // GROUP, image, UNIT)
        image_value = image_pointer(value, value_strides, batch, head // GROUP, image, UNIT)
        for part in tl.static_range(PARTS):
            sees, length = seen_latents(
                visible,
                image_lengths,
                kinds,
                rows,
                batch,
                image,
                part,
                num_tokens,
                num_images,
                num_latents,
                SEVERAL,
                PARTS,
            )
            grad_query_tiles = add_query_gradient(
                query_tiles,
                grad_out_tiles,
                grad_query_tiles,
                shift,
                delta,
                sees,
                image_key,
                key_strides,
                image_value,
                value_strides,
                length,
                scale,
                D,
                DV,
                PIECES,
                VALUE_PIECES,
                SEVERAL,
                PRECISION,
                UNIT,
                BLOCK_N,
            )
    grad_query = head_pointer(grad_query, grad_query_strides, batch, head, 0, UNIT)
    grad_query_tiles = scale_tiles(grad_query_tiles, scale)
    store_rows(grad_query, grad_query_strides, rows, num_tokens, grad_query_tiles, D, PIECES, UNIT)


class Problem(NamedTuple):
    """What the kernels of one call have in common, as the operators receive it."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    image_index: torch.Tensor
    visible: torch.Tensor | None
    order: torch.Tensor
    segments: torch.Tensor
    image_lengths: torch.Tensor | None
    scale: float

    @property
    def several(self) -> bool:
        """Whether a token may see more than one image."""
        return self.visible is not None

    @property
    def parts(self) -> int:
        """Lists of tokens an image has: those bound by its length, and those that are not."""
        return 2 if self.several and self.image_lengths is not None else 1

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
        blocks = triton.cdiv(self.tokens, block_m)
        if self.several:
            return blocks
        return blocks + min(self.images, self.tokens) if self.images else 0

    def inputs(self, unit: int) -> list:
        """Leading arguments of every kernel that recomputes scores."""
        images = (
            argument for x in (self.key, self.value) for argument in (x, *strides_of(x, unit))
        )
        return [*with_strides(unit, self.query), *images]

    def lists(self) -> list:
        """The plan, as kernels take it that walk blocks of tokens."""
        visible = None if self.visible is None else self.visible.view(torch.uint8)
        return [self.image_index, visible, self.order, self.segments, self.image_lengths]

    def sizes(self, blocks: int) -> list:
        return [
            self.heads,
            blocks,
            self.tokens,
            self.images,
            self.latents,
            self.order.shape[1],
            self.scale,
        ]

    def constants(self, unit: int) -> dict:
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

    def token_constants(self) -> dict:
        """Those of kernels that walk blocks of tokens."""
        return {"SEVERAL": self.several, "IMAGES": triton.next_power_of_2(max(self.images, 1))}

    def shape_class(self, kernel: str) -> configs.ShapeClass:
        """What the table of launch configurations is asked for."""
        plain = not self.several
        return configs.ShapeClass(
            kernel, precision_of(self.query), self.columns, self.latents, plain
        )

    def find_launch(self, kernel: str) -> Launch | None:
        return configs.lookup(self.shape_class(kernel), self.query.device)

    def launch(self, kernel: str, run: Callable[[Launch], None]) -> None:
        """Call `run` with the launch configuration of a kernel."""
        run_with_launch(self.shape_class(kernel), self.query, run)

    @property
    def columns(self) -> int:
        """Columns that the wider of the two head dimensions covers on chip."""
        sizes = (self.query.shape[3], self.value.shape[4])
        return max(covered_columns(self.pieces(size)) for size in sizes)

    def pieces(self, size: int) -> tuple[tuple[int, int], ...]:
        return head_pieces(size, precision_of(self.query))


def strides_of(tensor: torch.Tensor, unit: int) -> list:
    """Strides of a (B, H, I, L, D) tensor in the order that `image_pointer` takes them."""
    batch, head, image, latent, column = kernel_strides(tensor, unit)
    return [(batch, head, latent, column, image)]


def images_like(tensor: torch.Tensor) -> torch.Tensor:
    """Uninitialised (B, H, I, L, D) tensor in the dimension order of `tensor`, without gaps."""
    batch, heads, images, latents, columns = tensor.shape
    if tensor.stride(1) < tensor.stride(3):
        inside = tensor.new_empty(batch, images, latents, heads, columns)
        return inside.permute(0, 3, 1, 2, 4)
    return tensor.new_empty(tensor.shape)


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
    plan = (image_index, visible, order, segments, image_lengths)
    problem, _ = with_positive_scale(Problem(query, key, value, *plan, scale))
    batch, heads, tokens, _ = query.shape
    out = dense_like(query, (batch, heads, tokens, value.shape[4]))
    logsumexp = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    unit = stride_unit(problem.query, key, value, out)

    def run(launch: Launch) -> None:
        blocks = problem.blocks(launch.block_m)
        run_kernel(
            cross_attention_fwd_kernel,
            batch * heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, out),
            logsumexp,
            *problem.lists(),
            *problem.sizes(blocks),
            **problem.constants(unit),
            **problem.token_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("cross_attention_fwd", run)
    fill_rows(problem, out, logsumexp)
    return out, logsumexp


def fill_rows(problem: Problem, out: torch.Tensor, logsumexp: torch.Tensor) -> None:
    """Rows that see no image: 0, or the mean of all values."""
    unit = stride_unit(problem.value, out)

    def run(launch: Launch) -> None:
        blocks = triton.cdiv(problem.tokens, launch.block_m)
        run_kernel(
            cross_attention_fill_kernel,
            problem.batch * problem.heads * blocks,
            problem.value,
            *strides_of(problem.value, unit),
            *with_strides(unit, out),
            logsumexp,
            problem.image_index,
            problem.heads,
            blocks,
            problem.tokens,
            problem.images,
            problem.latents,
            GROUP=problem.heads // problem.key_heads,
            DV=problem.value.shape[4],
            VALUE_PIECES=problem.pieces(problem.value.shape[4]),
            SEVERAL=problem.several,
            UNIT=unit,
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("cross_attention_fill", run)


def backward(
    grad_out: torch.Tensor,
    grad_logsumexp: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    image_index: torch.Tensor,
    visible: torch.Tensor | None,
    order: torch.Tensor,
    segments: torch.Tensor,
    image_lengths: torch.Tensor | None,
    scale: float,
    query_grad: bool,
    key_value_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value, each of shape (0,) where it is not asked for.

    Takes what `forward` took and gave, grad_out (B, Hq, T, Dv) of any strides and grad_logsumexp
    (B, Hq, T).
    """
    plan = (image_index, visible, order, segments, image_lengths)
    problem, query_factor = with_positive_scale(Problem(query, key, value, *plan, scale))
    saved = saved_for_backward(out, logsumexp, grad_out, grad_logsumexp)
    grad_query, grad_key, grad_value = (tensor.new_empty(0) for tensor in (query, key, value))
    if query_grad:  # no program comes by the tokens that see no image
        grad_query = dense_like(query, tuple(query.shape)).zero_()
    if key_value_grad:
        grad_key, grad_value = images_like(key), images_like(value)
    if problem.heads == 0:  # of the queries: no key head has a group of them
        return grad_query, grad_key.zero_(), grad_value.zero_()
    whole = query_grad and key_value_grad and takes_whole_images(problem)
    if key_value_grad:
        key_value_gradients(problem, saved, grad_query, grad_key, grad_value, whole)
    if query_grad and not whole:
        query_gradient(problem, saved, grad_query)
    if query_grad and query_factor != 1.0:
        grad_query *= query_factor
    return grad_query, grad_key, grad_value


def takes_whole_images(problem: Problem) -> bool:
    """Whether one program should give all gradients of an image and its tokens."""
    if problem.several:
        return False
    launch = problem.find_launch("cross_attention_bwd_whole")
    return launch is not None and problem.latents <= launch.block_n


def uniform_gradient(problem: Problem, saved: Saved) -> torch.Tensor:
    """What rows that average all values add to the gradient of each, float32 (B, Hkv, Dv)."""
    value_size = problem.value.shape[4]
    shape = (problem.batch, problem.key_heads, value_size)
    result = problem.query.new_empty(shape, dtype=torch.float32)
    unit = stride_unit(saved.grad_out)

    def run(launch: Launch) -> None:
        run_kernel(
            cross_attention_bwd_uniform_kernel,
            problem.batch * problem.key_heads,
            *with_strides(unit, saved.grad_out),
            result,
            problem.image_index,
            problem.heads,
            problem.tokens,
            problem.images * problem.latents,
            GROUP=problem.heads // problem.key_heads,
            DV=value_size,
            VALUE_PIECES=problem.pieces(value_size),
            UNIT=unit,
            BLOCK_M=launch.block_m,
            launch=launch,
        )

    problem.launch("cross_attention_bwd_uniform", run)
    return result


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
    tokens = (saved.out, saved.grad_out, gradient)
    unit = stride_unit(problem.query, problem.key, problem.value, grad_key, grad_value, *tokens)

    def run(launch: Launch) -> None:
        block_n = launch.block_n
        if whole:  # of several blocks each would write its own share of the queries' gradients
            block_n = max(block_n, triton.next_power_of_2(problem.latents))
        blocks = triton.cdiv(problem.latents, block_n)
        run_kernel(
            cross_attention_bwd_key_value_kernel,
            problem.batch * problem.images * problem.key_heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, *tokens),
            grad_key,
            *strides_of(grad_key, unit),
            grad_value,
            *strides_of(grad_value, unit),
            saved.logsumexp,
            saved.grad_logsumexp,
            share,
            problem.order,
            problem.segments,
            problem.image_lengths,
            *problem.sizes(blocks),
            **problem.constants(unit),
            WITH_QUERY=whole,
            BLOCK_M=launch.block_m,
            BLOCK_N=block_n,
            launch=launch,
        )

    kernel = "cross_attention_bwd_whole" if whole else "cross_attention_bwd_key_value"
    problem.launch(kernel, run)


def query_gradient(problem: Problem, saved: Saved, grad_query: torch.Tensor) -> None:
    tokens = (saved.out, saved.grad_out, grad_query)
    unit = stride_unit(problem.query, problem.key, problem.value, *tokens)

    def run(launch: Launch) -> None:
        blocks = problem.blocks(launch.block_m)
        run_kernel(
            cross_attention_bwd_query_kernel,
            problem.batch * problem.heads * blocks,
            *problem.inputs(unit),
            *with_strides(unit, *tokens),
            saved.logsumexp,
            saved.grad_logsumexp,
            *problem.lists(),
            *problem.sizes(blocks),
            **problem.constants(unit),
            **problem.token_constants(),
            BLOCK_M=launch.block_m,
            BLOCK_N=launch.block_n,
            launch=launch,
        )

    problem.launch("cross_attention_bwd_query", run)
