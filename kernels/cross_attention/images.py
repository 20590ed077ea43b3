"""Which tokens see which latents: what all kernels read of a plan, on the device."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmfast.kernels.common import Strided, at_head

# Values of image_index that are no number of an image.
UNIFORM_ROW = tl.constexpr(-1)
DENSE_ROW = tl.constexpr(-2)

# Parameters that change from call to call: kernels are not compiled anew for them.
VARYING = ["num_heads", "num_blocks", "num_tokens", "num_images", "num_values", "order_size"]


class Plan(NamedTuple):
    """Which token sees which image: see `vlmfast.reference.cross_attention`."""

    image_index: torch.Tensor
    visible: torch.Tensor | None
    order: torch.Tensor
    segments: torch.Tensor
    image_lengths: torch.Tensor | None


@triton.jit
def at_image(tensor, batch, head, image, UNIT: tl.constexpr):
    """A (B, H, I, L, D) tensor from latent 0 of an image on: its strides are (batch, head, latent,
    column, image)."""
    tensor = at_head(tensor, batch, head, 0, UNIT)
    pointer = tensor.pointer + tl.cast(image, tl.int64) * tensor.strides[4] * UNIT
    return Strided(pointer, tensor.strides)


@triton.jit
def visible_latents(image_lengths, batch, image, num_images, num_latents):
    """How many latents of an image exist."""
    length = num_latents
    if image_lengths is not None:
        length = tl.load(image_lengths + tl.cast(batch, tl.int64) * num_images + image)
        length = tl.minimum(tl.maximum(length, 0), num_latents)
    return length


@triton.jit
def list_bounds(segments, batch, image, part, num_images, order_size):
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
    segments, batch, block, num_images, order_size, IMAGES: tl.constexpr, BLOCK_M: tl.constexpr
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


class Tokens(NamedTuple):
    """A block of tokens: their rows, and what image_index says of them, both (M,).

    They see no image but those from first_image to end_image.
    """

    rows: tl.tensor
    kinds: tl.tensor
    first_image: tl.tensor
    end_image: tl.tensor


@triton.jit
def locate_tokens(
    plan,
    batch,
    block,
    num_tokens,
    num_images,
    order_size,
    SEVERAL: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The tokens of a block; first_image is num_images where there is no such block."""
    if SEVERAL:
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        image_index = plan.image_index + tl.cast(batch, tl.int64) * num_tokens
        kinds = tl.load(image_index + rows, mask=rows < num_tokens, other=0)
        tokens = Tokens(rows, kinds, 0, num_images)
    else:
        image, begin, end = find_block(
            plan.segments, batch, block, num_images, order_size, IMAGES, BLOCK_M
        )
        order = plan.order + tl.cast(batch, tl.int64) * order_size
        rows = listed_tokens(order, begin + tl.arange(0, BLOCK_M), end, num_tokens)
        tokens = Tokens(rows, rows, image, image + 1)
    return tokens


@triton.jit
def seen_latents(
    tokens,
    plan,
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
    """
    length = num_latents
    if part == 0:
        length = visible_latents(plan.image_lengths, batch, image, num_images, num_latents)
    sees = tokens.rows < num_tokens
    if SEVERAL:
        visible = plan.visible + tl.cast(batch, tl.int64) * num_tokens * num_images
        pointers = visible + tokens.rows.to(tl.int64) * num_images + image
        sees = tl.load(pointers, mask=sees, other=0) != 0
        if PARTS == 2:
            sees = sees & ((tokens.kinds == DENSE_ROW) == (part == 1))
        length = tl.where(tl.max(sees.to(tl.int32), 0) == 0, 0, length)
    return sees, length
