"""Masked per-image cross-attention: a text token sees its image, or those before it."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlmfast import checks, dispatch
from vlmfast.checks import check_choice, check_flag, reject, reject_type
from vlmfast.reference.cross_attention import DENSE, UNIFORM, ZERO

MOST_IMAGES = checks.MOST_INT32 - 1  # Phi counts one more: no image

# As kernels count them: batch, heads, tokens or images and latents, and head dim.
_QUERY_LIMITS = checks.Limits(
    ("batch entries", "heads", "tokens", "features of a head"),
    (checks.MOST_INT32, checks.MOST_INT32, 1 << 24, 1 << 16),
)
_VALUE_LIMITS = checks.Limits(
    ("batch entries", "heads", "images", "latents", "features of a head"),
    (checks.MOST_INT32, checks.MOST_INT32, 1 << 24, 1 << 24, 1 << 16),
)

_EMPTY_ROWS = {"zero": ZERO, "uniform": UNIFORM, "dense": DENSE}
_OVERFLOW = {"zero": ZERO, "uniform": UNIFORM, "error": ZERO}


class CrossAttentionPlan(NamedTuple):
    """Which token attends to which image, as kernels want it: made by `cross_attention_plan`.

    A tuple of tensors on one device, and so a pytree: it passes through torch.compile. What they
    hold is written at `vlmfast.reference.cross_attention`.
    """

    image_index: Tensor
    visible: Tensor | None
    order: Tensor
    segments: Tensor
    image_lengths: Tensor | None

    @property
    def num_images(self) -> int:
        """I, the number of images for which the plan was made."""
        return self.segments.shape[1]


_MEMBERS = {field: f"plan_or_image_index.{field}" for field in CrossAttentionPlan._fields}
_KINDS = (  # dtype and dimensions of each
    ("image_index", torch.int32, 2),
    ("visible", torch.bool, 3),
    ("order", torch.int32, 2),
    ("segments", torch.int32, 3),
    ("image_lengths", torch.int32, 2),
)
_OPTIONAL = ("visible", "image_lengths")


def image_index(media_locations: Tensor, mode: str = "last") -> Tensor:
    """Phi: for each token the number of the image that it attends to.

    `last`: the last image before the token or at it, Phi(t) = media_locations[:t + 1].sum().
    `next`: a media token attends to its own image, any other token to the next one, and past the
    last image to none (OpenFlamingo's attend_previous=False).

    Args:
        media_locations: (B, T) bool, True where the token stands for an image.
        mode: "last" or "next".

    Returns:
        (B, T) int32; 0 = no image, 1 = the first. With media at tokens 4 and 8 of 11, `last` gives
        0 0 0 0 1 1 1 1 2 2 2 and `next` 1 1 1 1 1 2 2 2 2 0 0.

    Raises:
        TypeError: media_locations is no bool tensor.
        ValueError: it is not of two dimensions, or mode is unknown.

    Source: Alayrac et al., "Flamingo" (2022), section 2.1.3; OpenFlamingo.
    """
    checks.check_strided("media_locations", media_locations)
    if media_locations.dtype != torch.bool:
        reject_type("media_locations", "dtype torch.bool", media_locations.dtype)
    if media_locations.dim() != 2:
        reject("media_locations", "shape (B, T)", tuple(media_locations.shape))
    check_choice("mode", mode, ("last", "next"))
    index = media_locations.cumsum(-1, dtype=torch.int32)
    if mode == "last":
        return index
    following = torch.where(media_locations, index, index + 1)
    images = media_locations.sum(-1, keepdim=True, dtype=torch.int32)
    return following.masked_fill(following > images, 0)


def cross_attention_plan(
    image_index: Tensor,
    num_images: int,
    mode: str = "last",
    empty_rows: str = "zero",
    overflow: str = "zero",
    image_lengths: Tensor | None = None,
) -> CrossAttentionPlan:
    """What `image_cross_attention` needs to know of Phi: built once, for every layer of a model.

    It is computed on the device of image_index, without waiting for it. flamingo-pytorch's layers
    are mode="last", overflow="uniform", and without only_attend_immediate_media
    mode="all_previous", empty_rows="uniform".

    Args:
        image_index: Phi, (B, T) of an integer dtype: 0 = no image yet, 1 = the first image. Any
            order of numbers is legal. Or (B, T, I) bool: a token sees every image whose bit is set.
        num_images: I, the number of images.
        mode: of a Phi: "last", a token sees image Phi; "all_previous", images 1 to Phi.
        empty_rows: what a token that sees no image gets: "zero"; "uniform", the mean of all values;
            "dense", attention to every latent of every image (as Mllama has it). The last two
            ignore image_lengths.
        overflow: what a token with Phi > I gets in mode "last": "zero"; "uniform", the mean of all
            values; "error", which makes it a ValueError. In mode "all_previous" such a token sees
            all images, or is an error.
        image_lengths: (B, I) of an integer dtype: the latents of each image that exist; the others
            are hidden. 0 hides the image; more than L counts as L.

    Returns:
        A plan for (B, T) tokens and I images.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: a shape or device does not fit; mode, empty_rows or overflow is unknown; a
            number is negative, or Phi > I where overflow is "error"; tokens may see several
            images, and T * I exceeds 2**30. Values are checked for CPU tensors, elsewhere with
            VLMFAST_CHECKS=1, never while torch.compile traces: there a negative number counts as
            0, and an overflow that is an error as "zero".
    """
    _check_index(image_index)
    several = image_index.dtype == torch.bool
    if torch.jit.is_tracing() and isinstance(num_images, Tensor):  # what sizes are there
        num_images = int(num_images)
    num_images = checks.check_integer("num_images", num_images, most=MOST_IMAGES)
    check_choice("mode", mode, ("last", "all_previous"))
    check_choice("empty_rows", empty_rows, _EMPTY_ROWS)
    check_choice("overflow", overflow, _OVERFLOW)
    if several and image_index.shape[2] != num_images:
        reject("image_index", f"(B, T, {num_images}), num_images", tuple(image_index.shape))
    if several and mode != "last":
        reject("mode", "'last' where image_index is bool and says itself what is seen", repr(mode))
    if image_lengths is not None:
        image_lengths = _check_lengths(image_lengths, image_index, num_images)
    if several or mode == "all_previous" or empty_rows == "dense":
        _check_pairs(image_index.shape[1], num_images)
    if not several and checks.may_read_values(image_index):
        _check_values("image_index", image_index, num_images, overflow)
    return _make_plan(image_index, num_images, mode, empty_rows, overflow, image_lengths)


def _make_plan(
    image_index: Tensor,
    num_images: int,
    mode: str = "last",
    empty_rows: str = "zero",
    overflow: str = "zero",
    image_lengths: Tensor | None = None,
) -> CrossAttentionPlan:
    """`cross_attention_plan` of arguments that are checked."""
    if image_index.dtype == torch.bool:
        image_index = image_index.contiguous()
        empty = ~image_index.any(-1)
        kind = torch.where(empty, _EMPTY_ROWS[empty_rows], 1).int()
        return _plan_of_several(kind, image_index, image_lengths)
    phi = _saturated_int32(image_index)
    empty = phi <= 0
    if mode == "all_previous":
        numbers = torch.arange(1, num_images + 1, device=phi.device)
        kind = torch.where(empty, _EMPTY_ROWS[empty_rows], 1).int()
        return _plan_of_several(kind, phi[..., None] >= numbers, image_lengths)
    kind = torch.where(phi > num_images, _OVERFLOW[overflow], phi)
    kind = torch.where(empty, _EMPTY_ROWS[empty_rows], kind).int()
    if empty_rows == "dense":
        numbers = torch.arange(1, num_images + 1, device=phi.device)
        return _plan_of_several(kind, kind[..., None] == numbers, image_lengths)
    return _plan_of_one(kind, num_images, image_lengths)


def _plan_of_one(kind: Tensor, images: int, image_lengths: Tensor | None) -> CrossAttentionPlan:
    """For tokens that see one image at most: sorted by image, they are I runs of one list."""
    by_image, order = kind.sort(dim=-1, stable=True)
    numbers = torch.arange(1, images + 2, dtype=torch.int32, device=kind.device)
    numbers = numbers.repeat(kind.shape[0], 1)
    starts = torch.searchsorted(by_image, numbers, out_int32=True)
    segments = torch.stack((starts[:, :-1], starts[:, 1:], starts[:, 1:]), dim=-1)
    return CrossAttentionPlan(kind, None, order.int(), segments, image_lengths)


def _plan_of_several(
    kind: Tensor, visible: Tensor, image_lengths: Tensor | None
) -> CrossAttentionPlan:
    """For tokens that may see several images: a list of tokens for each image."""
    batch, tokens = kind.shape
    dense = (kind == DENSE)[..., None]
    visible = visible | dense
    # Tokens that image_lengths does not bind come after those that it does.
    place = torch.where(visible, 0 if image_lengths is None else dense.to(torch.uint8), 2)
    place = place.transpose(1, 2).to(torch.uint8)
    order = place.argsort(dim=-1, stable=True).int().flatten(1)
    begin = torch.arange(visible.shape[2], dtype=torch.int32, device=kind.device) * tokens
    middle = begin + (place == 0).sum(-1, dtype=torch.int32)
    end = begin + (place <= 1).sum(-1, dtype=torch.int32)
    segments = torch.stack((begin.expand(batch, -1), middle, end), dim=-1)
    return CrossAttentionPlan(kind, visible.contiguous(), order, segments, image_lengths)


def image_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan_or_image_index: CrossAttentionPlan | Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of each text token to the latents of its image, or of its images.

        out_t = sum_j softmax_j(scale * query_t . key_j) value_j   over latents j of t's images

    The work is that of the pairs attended to, however many images there are, and no tensor of the
    size of T x I * L exists.

    Args:
        query: (B, Hq, T, D), float32, bfloat16 or float16; any strides.
        key: (B, Hkv, I, L, D), L latents of each of I images; Hkv divides Hq, and query head h
            reads head h // (Hq // Hkv).
        value: (B, Hkv, I, L, Dv).
        plan_or_image_index: what `cross_attention_plan` returned for (B, T) tokens and I images; or
            its argument image_index, with which a plan of its defaults is made for this one call.
        scale: factor of the logits; 1 / sqrt(D) for None.
        return_lse: also return the logsumexp of each row's logits; it is differentiable.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        out (B, Hq, T, Dv) in query's dtype; with return_lse also (B, Hq, T) float32. A row that
        sees nothing has out 0, logsumexp -inf and gradients 0; a uniform one has logsumexp
        log(I * L), of logits that are all 0.

    What an image holds, NaN included, does not reach a token that does not attend to it, neither
    its output nor its gradient.

    Raises:
        TypeError: an argument is of a wrong type; query, key and value differ in dtype or are not
            floating.
        ValueError: shapes or devices do not fit, the plan was made for other tokens or another
            number of images, or backend is unknown.
        RuntimeError: numbers in a plan made by hand are wrong, under torch.vmap or in a subclass
            of Tensor; elsewhere that is a ValueError.
        NotImplementedError: the forced backend cannot run the call.

    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022),
    section 2.1.3.
    """
    query, key, value = _cast_and_check(query, key, value)
    scale = checks.softmax_scale(scale, query.shape[-1], query.dtype)
    check_flag("return_lse", return_lse)
    plan = _check_plan(plan_or_image_index, query, key.shape[2])
    try:
        out, logsumexp = dispatch.run(
            "cross_attention",
            (query, key, value, *plan, scale),
            backend,
            (query, key, value),
            out_like_query=True,
            # Key has no other sizes.
            limits=(("query", query, _QUERY_LIMITS), ("value", value, _VALUE_LIMITS)),
        )
        return (out, logsumexp) if return_lse else out
    except NotImplementedError:
        raise
    except RuntimeError as error:
        failure = error
    _check_numbers(plan, query.shape[2])
    raise failure


def _cast_and_check(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = checks.cast_alike(("query", "key", "value"), (query, key, value))
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    if len(shape) != 4:
        reject("query", "shape (B, Hq, T, D)", tuple(shape))
    for name, images in (("key", key_shape), ("value", value_shape)):
        if len(images) != 5:
            reject(name, "shape (B, Hkv, I, L, D)", tuple(images))
    checks.check_head_dims(shape, key_shape, value_shape)
    if key_shape[0] != shape[0]:
        reject("key", f"the batch of query, {shape[0]}", tuple(key_shape))
    if value_shape[:4] != key_shape[:4]:
        expected = f"batch, heads, images and latents of key, {tuple(key_shape[:4])}"
        reject("value", expected, tuple(value_shape))
    checks.check_group("key", shape[1], key_shape[1])
    return query, key, value


def _check_plan(plan: Any, query: Tensor, images: int) -> CrossAttentionPlan:
    """The plan, made from Phi if that is what was given; it fits the tokens and the images."""
    name = "plan_or_image_index"
    batch, _, length, _ = query.shape
    tokens = (batch, length)
    if not isinstance(plan, CrossAttentionPlan):
        _check_index(plan, name)
        if plan.shape[:2] != tokens:
            reject(name, f"batch and tokens of query, {tokens}", tuple(plan.shape))
        if plan.dim() == 3 and plan.shape[2] != images:
            reject(name, f"a bit for each of key's {images} images", tuple(plan.shape))
        checks.check_device(name, plan, "query", query)
        if plan.dtype != torch.bool and checks.may_read_values(plan):
            _check_values(name, plan, images, "zero")
        return _make_plan(plan, images)
    shapes = _check_members(plan, query)
    if shapes[0] != tokens:
        reject(name, f"a plan for {tokens} tokens, as query has", tuple(plan.image_index.shape))
    if plan.num_images != images:
        reject(name, f"a plan for {images} images, as key has", plan.num_images)
    expected = (
        tokens,
        (batch, length, images),
        (batch, length * (1 if plan.visible is None else images)),
        (batch, images, 3),
        (batch, images),
    )
    for (field, _, _), shape, wanted in zip(_KINDS, shapes, expected, strict=True):
        if shape is not None and shape != wanted:
            reject(_MEMBERS[field], f"shape {wanted}", tuple(shape))
    return plan


def _check_members(plan: CrossAttentionPlan, query: Tensor) -> list[torch.Size | None]:
    """The shapes of what a plan holds; it is of the kinds that `cross_attention_plan` makes."""
    shapes: list[torch.Size | None] = []
    members: tuple[Any, ...] = plan  # made by hand, it may hold anything
    for (field, dtype, dims), tensor in zip(_KINDS, members, strict=True):
        if tensor is None and field in _OPTIONAL:
            shapes.append(None)
            continue
        member = _MEMBERS[field]
        checks.check_strided(member, tensor)
        shape = tensor.shape
        if tensor.dtype != dtype:
            reject_type(member, f"dtype {dtype}", tensor.dtype)
        if len(shape) != dims:
            reject(member, f"{dims} dimensions", tuple(shape))
        if not tensor.is_contiguous():
            reject(member, "a contiguous tensor", f"strides {tensor.stride()}")
        checks.check_device(member, tensor, "query", query)
        shapes.append(shape)
    return shapes


def _check_numbers(plan: CrossAttentionPlan, tokens: int) -> None:
    """Raises ValueError where a number in a plan made by hand is none that kernels can index by.

    Operators look themselves, so this only finds out, after a failure, whether that was it.
    """
    members = {field: tensor for field, tensor in plan._asdict().items() if tensor is not None}
    for field, tensor in members.items():
        checks.check_memory(_MEMBERS[field], tensor)
    if not all(map(checks.may_read_values, members.values())):
        return
    most = plan.num_images if plan.visible is None else checks.MOST_INT32
    for kind in plan.image_index.unique().tolist():
        if not DENSE <= kind <= most:
            reject(_MEMBERS["image_index"], f"numbers from {DENSE} to {most}", kind)
    for order, segments in zip(plan.order, plan.segments.tolist(), strict=True):
        for begin, middle, end in segments:
            if not 0 <= begin <= middle <= end <= len(order):
                expected = f"increasing positions of at most {len(order)}"
                reject(_MEMBERS["segments"], expected, (begin, middle, end))
            if plan.visible is None and middle != end:
                expected = "one list for each image where visible is None"
                reject(_MEMBERS["segments"], expected, (begin, middle, end))
            for part in (order[begin:middle], order[middle:end]):
                in_range = len(part) == 0 or (part[0] >= 0 and part[-1] < tokens)
                if not in_range or (part[1:] <= part[:-1]).any():
                    expected = f"an image's tokens to increase from 0 to {tokens - 1}"
                    reject(_MEMBERS["order"], expected, part.tolist())


def _check_index(index: Any, name: str = "image_index") -> None:
    checks.check_strided(name, index)
    if index.dtype not in (*checks.INTEGER, torch.bool):
        reject_type(name, "an integer dtype, or bool with (B, T, I)", index.dtype)
    if index.dim() == 2 and index.dtype == torch.bool:
        reject_type(name, "an integer dtype with (B, T): see image_index()", index.dtype)
    if index.dim() == 3 and index.dtype != torch.bool:
        reject_type(name, "dtype torch.bool with (B, T, I)", index.dtype)
    if index.dim() not in (2, 3):
        reject(name, "shape (B, T), or (B, T, I) of bool", tuple(index.shape))


def _check_lengths(lengths: Any, index: Tensor, images: int) -> Tensor:
    checks.check_strided("image_lengths", lengths, "a tensor or None")
    if lengths.dtype not in checks.INTEGER:
        reject_type("image_lengths", "an integer dtype", lengths.dtype)
    if lengths.shape != (index.shape[0], images):
        reject("image_lengths", f"shape {(index.shape[0], images)}", tuple(lengths.shape))
    checks.check_device("image_lengths", lengths, "image_index", index)
    saturated = _saturated_int32(lengths)
    if checks.may_read_values(lengths) and bool((saturated < 0).any()):
        reject("image_lengths", "lengths of at least 0", int(lengths.long().min()))
    return saturated


def _saturated_int32(numbers: Tensor) -> Tensor:
    """A contiguous copy in int32, in which numbers that do not fit are the nearest that do."""
    limits = torch.iinfo(torch.int32)
    wide = numbers.long()
    if numbers.dtype == torch.uint64:  # whose upper half int64 takes for negative numbers
        wide = wide.masked_fill(wide < 0, limits.max)
    return wide.clamp(limits.min, limits.max).int().contiguous()


def _check_values(name: str, index: Tensor, images: int, overflow: str) -> None:
    if index.numel() == 0:
        return
    least, most = (int(x) for x in torch.aminmax(_saturated_int32(index)))
    if least < 0:
        reject(name, "numbers of at least 0", least)
    if overflow == "error" and most > images:
        reject(name, f"at most num_images, {images}", most)


def _check_pairs(tokens: int, images: int) -> None:
    """Positions in `order`, and what kernels add to them, are int32."""
    most = 2**30
    if not torch.compiler.is_compiling() and tokens * images > most:
        reject("num_images", f"at most {most} pairs with {tokens} tokens", images)
