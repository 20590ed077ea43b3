"""Random problems of each family, made of the pages of `vlmfast.verify`.

Every function takes a random.Random, from which alone the problem follows, and returns a Case
whose name tells what was drawn.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from torch import Tensor

from vlmfast.verify import contrastive_loss, cross_attention, flash_attention, window_attention
from vlmfast.verify.common import Case, Inputs

# Sizes lie around those of tiles and vectors.
_BANDS = (
    *((1, 1), (2, 9), (2, 9), (15, 17), (23, 25), (31, 33), (47, 49), (63, 65), (95, 98)),
    *((127, 137), (191, 193), (255, 265)),
)
# Multiplications of one product of query and key; forward and backward, in float64, by torch and
# by the kernels, are some thirty of them.
_MOST_WORK = (13, 20)  # powers of two


def _size(rng: Random, most: int = 265, least: int = 1) -> int:
    bands = [(low, high) for low, high in _BANDS if low <= most and high >= least]
    low, high = rng.choice(bands)
    return rng.randint(max(low, least), min(high, most))


def _count(rng: Random) -> int:
    """Of batches, heads, images."""
    return rng.choice((1, 1, 1, 2, 2, 3, 5))


def _maybe(rng: Random, chance: float) -> bool:
    return rng.random() < chance


def _head_dim(rng: Random) -> int:
    if _maybe(rng, 0.6):
        return 8 * rng.choice((1, 2, 4, 5, 8, 8, 9, 10, 12, 13, 16, 20, 32))
    return _size(rng, 257)


def _within(
    rng: Random, work: Callable[..., int], draw: Callable[[], tuple[Any, ...]]
) -> tuple[Any, ...]:
    """Draws sizes until they are small enough: mostly small, so that there are many."""
    most = 2 ** rng.uniform(*_MOST_WORK)
    while True:
        sizes = draw()
        if work(*sizes) <= most:
            return sizes


def _scale(rng: Random) -> dict[str, float]:
    """A factor of the logits, or none: the default."""
    if _maybe(rng, 0.6):
        return {}
    return {"scale": rng.choice((-0.2, 0.05, -1.0, 1.0, 3.0))}


# --- families -----------------------------------------------------------------------------------


def flash(rng: Random) -> Case:
    """A dense or a packed call of softmax attention."""
    return _packed(rng) if _maybe(rng, 0.3) else _dense(rng)


def _dense(rng: Random) -> Case:
    def draw() -> tuple[int, ...]:
        group, dim = rng.choice((1, 1, 1, 2, 3, 8)), _head_dim(rng)
        value_dim = dim if _maybe(rng, 0.6) else _head_dim(rng)
        rows = _size(rng)
        columns = rows if _maybe(rng, 0.3) else _size(rng)
        return _count(rng), _count(rng), group, rows, columns, dim, value_dim

    batch, key_heads, group, rows, columns, dim, value_dim = _within(
        rng, lambda b, h, g, m, n, d, e: b * h * g * m * n * (d + e), draw
    )
    heads = key_heads * group
    if _maybe(rng, 0.03):
        batch, rows, columns = rng.choice(
            ((0, rows, columns), (batch, 0, columns), (batch, rows, 0))
        )
    options: dict[str, Any] = {"causal": rng.choice((0, 0, 0, 1, 1, 2)), **_scale(rng)}
    if _maybe(rng, 0.15):
        options["dropout_p"] = rng.choice((0.0, 0.1, 0.5, 0.9))
    if _maybe(rng, 0.5) and batch * rows * columns:
        full = (batch, heads, rows, columns)
        shape = tuple(size if _maybe(rng, 0.6) else 1 for size in full)
        options["mask"], kind = _mask(rng, shape)
        options["bias_dtype"] = rng.choice((None, torch.float32, torch.bfloat16, torch.float16))
        name = f", {kind} mask {shape}, {options['bias_dtype']}"
    else:
        name = ""
    shown = {key: x for key, x in options.items() if key not in ("mask", "bias_dtype")}
    name = f"query {(batch, heads, rows, dim)}, keys {key_heads} x {columns} to {value_dim}{name}"
    return flash_attention.dense_case(
        f"{name}, {shown}",
        (batch, heads, rows, dim),
        (batch, key_heads, columns),
        value_dim,
        **options,
    )


def _mask(rng: Random, shape: tuple[int, ...]) -> tuple[Callable[[torch.Generator], Tensor], str]:
    """What makes a mask, and what to call it."""
    kind = rng.choice(("bool", "sparse bool", "bias", "bias", "large bias", "bias with holes"))

    def make(generator: torch.Generator) -> Tensor:
        normal = torch.randn(shape, generator=generator)
        if kind == "bool":
            return normal > -0.5
        if kind == "sparse bool":
            return normal > 1.5
        if kind == "large bias":
            return 30.0 * normal
        return normal.masked_fill(normal > 0.5, -torch.inf) if kind == "bias with holes" else normal

    return make, kind


def _packed(rng: Random) -> Case:
    def draw() -> tuple[Any, ...]:
        lengths = []
        for _ in range(rng.randint(1, 5)):
            queries = 0 if _maybe(rng, 0.1) else _size(rng, 137)
            keys = queries if _maybe(rng, 0.4) else 0 if _maybe(rng, 0.1) else _size(rng, 137)
            lengths.append((queries, keys))
        dim = _head_dim(rng)
        value_dim = dim if _maybe(rng, 0.7) else _head_dim(rng)
        return lengths, _count(rng), rng.choice((1, 1, 2, 4)), dim, value_dim

    def work(lengths: Any, heads: int, group: int, dim: int, value_dim: int) -> int:
        # the reference holds all queries against all keys
        queries, keys = (sum(x) for x in zip(*lengths, strict=True))
        return queries * keys * heads * group * (dim + value_dim)

    lengths, key_heads, group, dim, value_dim = _within(rng, work, draw)
    options: dict[str, Any] = {"is_causal": _maybe(rng, 0.5), "value_dim": value_dim, **_scale(rng)}
    if _maybe(rng, 0.2):
        options["spare"] = (rng.randint(0, 9), rng.randint(0, 9))
    heads = (key_heads * group, key_heads)
    name = f"packed {lengths}, heads {heads}, dim {dim}, {options}"
    return flash_attention.packed_case(name, lengths, heads, dim, **options)


def window(rng: Random) -> Case:
    """A call of shifted-window attention."""

    def draw() -> tuple[int, ...]:
        sides = [rng.choice((1, 2, 3, 4, 5, 6, 7, 7, 8, 8, 10, 12, 13, 16)) for _ in range(2)]
        if _maybe(rng, 0.5):
            sides[1] = sides[0]
        maps = [
            rng.randint(1, side) if _maybe(rng, 0.2) else rng.randint(1, 3 * side) for side in sides
        ]
        if _maybe(rng, 0.3):  # whole windows
            maps = [side * rng.randint(1, 3) for side in sides]
        return _count(rng), *maps, *sides, _count(rng), _head_dim(rng)

    def work(b: int, h: int, w: int, m: int, n: int, heads: int, dim: int) -> int:
        return b * math.ceil(h / m) * math.ceil(w / n) * heads * (m * n) ** 2 * 2 * dim

    batch, height, width, *sides, heads, dim = _within(rng, work, draw)
    cosine = _maybe(rng, 0.4) and dim > 2  # of one channel each cosine is 1 or -1
    if _maybe(rng, 0.02):
        batch = 0
    shift = tuple(rng.randrange(side) for side in sides) if _maybe(rng, 0.6) else (0, 0)
    options: dict[str, Any] = {
        "cosine": cosine,
        "bias_std": rng.choice((None, 0.1, 1.0, 20.0)),
        "bias_dtype": rng.choice((None, torch.float32)),
        "pad_value": _maybe(rng, 0.5),
        "packed": _maybe(rng, 0.6),
        "wrap_padded": _maybe(rng, 0.5),
        "mask_value": rng.choice((-100.0, -100.0, 0.0, -5.0, -1e9, 2.0)),
        **_scale(rng),
    }
    if _maybe(rng, 0.15):
        options["dropout_p"] = rng.choice((0.0, 0.1, 0.5, 0.9))
    size = (batch, height, width)
    name = f"map {size}, {heads} heads of {dim}, windows {sides}, shift {shift}, {options}"
    return window_attention.window_case(name, size, heads, dim, tuple(sides), shift, **options)


def cross(rng: Random) -> Case:
    """A call of per-image cross-attention."""

    def draw() -> tuple[int, ...]:
        dim = _head_dim(rng)
        value_dim = dim if _maybe(rng, 0.7) else _head_dim(rng)
        group, tokens, latents = rng.choice((1, 1, 2, 4)), _size(rng), _size(rng)
        return _count(rng), _count(rng), group, tokens, rng.randint(1, 7), latents, dim, value_dim

    batch, key_heads, group, tokens, images, latents, dim, value_dim = _within(
        rng, lambda b, h, g, t, i, n, d, e: b * h * g * t * i * n * (d + e), draw
    )
    if _maybe(rng, 0.04):
        batch, tokens, images, latents = rng.choice(
            (
                (0, tokens, images, latents),
                (batch, 0, images, latents),
                (batch, tokens, 0, latents),
                (batch, tokens, images, 0),
            )
        )
    options: dict[str, Any] = {
        "empty_rows": rng.choice(("zero", "uniform", "dense")),
        **_scale(rng),
    }
    kind = rng.choice(("ordered", "shuffled", "bits", "far"))
    if kind == "shuffled":
        options["phi"] = cross_attention.shuffled(batch, tokens, images + 1)
    elif kind == "far":  # most tokens are past the last image
        options["phi"] = cross_attention.shuffled(batch, tokens, 3 * images + 2)
    elif kind == "bits":
        options["phi"] = cross_attention.random_bits(batch, tokens, images)
    if kind != "bits":
        options["mode"] = rng.choice(("last", "all_previous"))
        options["overflow"] = rng.choice(("zero", "uniform"))
    if _maybe(rng, 0.4):
        options["lengths"] = tuple(
            rng.choice((0, latents, rng.randint(0, latents))) for _ in range(images)
        )
    shape, key_shape = (batch, key_heads * group, tokens, dim), (key_heads, images, latents)
    shown = {key: x for key, x in options.items() if key != "phi"}
    name = f"query {shape}, keys {key_shape} to {value_dim}, {kind}, {shown}"
    return cross_attention.image_case(name, shape, key_shape, value_dim, **options)


def loss(rng: Random) -> Case:
    """A call of one of the contrastive losses."""
    n, dim = _within(rng, lambda n, d: n * n * d, lambda: (_size(rng), _size(rng, least=3)))
    kind = rng.choice(("clip", "siglip", "ntxent", "itc", "blip2"))
    cosines = rng.choice(((0.0, 0.0), (0.3, 0.9), (0.95, 1.0), (-1.0, -1.0), None))
    if kind == "ntxent" and cosines == (-1.0, -1.0):
        cosines = None  # torch's error is 0: half precision rounds to the very cosine
    pairs = contrastive_loss.random_pairs(n, dim)
    if cosines is not None:
        pairs = contrastive_loss.aligned_pairs(n, dim, *cosines)
    name = f"{kind} {(n, dim)}, cosines {cosines}"
    scale = rng.choice((0.1, 1.0, 10.0, 1 / 0.07, 100.0))
    if kind == "clip":
        return contrastive_loss.clip_case(f"{name}, scale {scale}", pairs, scale)
    if kind == "siglip":
        bias = rng.choice((-10.0, 0.0, 3.0))
        return contrastive_loss.siglip_case(f"{name}, {scale}, {bias}", pairs, scale, bias)
    if kind == "ntxent":
        temperature = rng.choice((0.01, 0.1, 0.5, 2.0))
        return contrastive_loss.ntxent_case(
            f"{name}, temperature {temperature}", pairs, temperature
        )
    numbers = {"label_smoothing": rng.choice((0.0, 0.1, 1.0))}
    if kind == "itc":
        queue = rng.choice((0, _size(rng, 137)))
        numbers["alpha"] = rng.choice((0.0, 0.4, 1.0))
        makes = contrastive_loss.momentum_pairs(n, queue, dim)
        return contrastive_loss.itc_case(f"{name}, queue {queue}, {numbers}", makes, **numbers)
    queries = rng.choice((1, 2, 5, 32))
    makes = contrastive_loss.query_pairs(max(1, n // queries), queries, dim)
    return contrastive_loss.blip2_case(f"{name}, {queries} queries, {numbers}", makes, **numbers)


FAMILIES: dict[str, Callable[[Random], Case]] = {
    "flash_attention": flash,
    "window_attention": window,
    "cross_attention": cross,
    "contrastive_loss": loss,
}


# --- what any problem may have besides ------------------------------------------------------------


def draw(family: str, rng: Random) -> Case:
    """A problem of a family."""
    case = FAMILIES[family](rng)
    if family != "contrastive_loss":  # whose features are of unit length, and differ
        if _maybe(rng, 0.15):
            case = _with_extremes(case, rng)
        if _maybe(rng, 0.15):
            case = _with_constants(case, rng)
    if _maybe(rng, 0.25):
        some = tuple(name for name in case.differentiable if _maybe(rng, 0.5))
        some = some or (rng.choice(case.differentiable),)
        case = replace(case, name=f"{case.name}, gradients {some}", differentiable=some)
    return case


def _changed(case: Case, name: str, change: Callable[[str, Tensor], Tensor]) -> Case:
    """The case with its differentiable inputs changed."""

    def make(*args: Any) -> Inputs:
        inputs = case.make(*args)
        return {
            key: change(key, x) if key in case.differentiable else x for key, x in inputs.items()
        }

    return replace(case, name=f"{case.name}, {name}", make=make)


def _with_extremes(case: Case, rng: Random) -> Case:
    """Inputs of other magnitudes than models have.

    Float32 queries and keys are not made small: where all logits are 0, all rows have one
    logsumexp, and what its rounding does to the recomputed weights does not average out. Nor is a
    scale of cosines made large: rows of zeros are multiplied by it and twice by 1e12, in float32.
    Values times queries or keys, which gradients sum, stay representable, and so do values over the
    square of the least norm of cosines, 1e-12.
    """
    powers = (-140, -60, -30, -12, -4, 3, 6, 10, 14, 30, 60, 90)
    exponents = {x: rng.choice(powers) for x in case.differentiable if _maybe(rng, 0.4)}
    if "value" in exponents:
        most = 40 - max(0, exponents.get("query", 0), exponents.get("key", 0))
        exponents["value"] = min(exponents["value"], most)

    def change(key: str, x: Tensor) -> Tensor:
        exponent = exponents.get(key, 0)
        if x.dtype == torch.float32 and key in ("query", "key"):
            exponent = max(0, exponent)
        if key == "logit_scale":
            exponent = min(exponent, 30)
        return (x.double() * 2.0**exponent).to(x.dtype)

    return _changed(case, f"times powers of two {exponents}", change)


def _with_constants(case: Case, rng: Random) -> Case:
    """Inputs that are expanded, with stride 0, along some of their dimensions.

    In float32 along the first two alone: of equal tokens the gradients vanish, and what is left is
    rounding that does not average out.
    """
    chances = {key: [rng.random() for _ in range(6)] for key in case.differentiable}

    def change(key: str, x: Tensor) -> Tensor:
        once = x
        dims = min(x.dim(), 2 if x.dtype == torch.float32 else 6)
        for dim, chance in enumerate(chances[key][:dims]):
            if chance < 0.3:
                once = once[(slice(None),) * dim + (slice(0, 1),)]
        return once.expand(x.shape)

    shown = {key: [i for i, x in enumerate(xs) if x < 0.3] for key, xs in chances.items()}
    return _changed(case, f"expanded along {shown}", change)
