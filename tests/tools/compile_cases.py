"""The launches that the compile gate compiles: real models' shapes, and every feature once.

A case is a name and a function that calls a family's launchers on meta tensors.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vlmfast.kernels import configs, cross_attention, flash_attention


class CompileCase(NamedTuple):
    """A call of launchers, and the architectures that it is compiled for."""

    launch: Callable[[], None]
    archs: tuple[int, ...]


CASES: dict[str, CompileCase] = {}


def flash_attention_case(
    name: str,
    queries: int,
    keys: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 8,
    heads: tuple[int, int] = (12, 12),
    mask: tuple[torch.dtype, tuple[int, ...]] | None = None,
    causal: int = 0,
    dropout_p: float = 0.0,
    packed: bool = False,
    whole: bool = True,
    backward: bool = True,
    tf32: bool = False,
    archs: tuple[int, ...] = configs.ARCHITECTURES,
) -> None:
    """Adds a forward and backward call; `whole=False` keeps the whole-head kernel out of it."""
    launch = partial(
        _call_flash_attention,
        (1 if packed else batch, queries, keys, dim),
        heads,
        dtype,
        mask,
        causal,
        dropout_p,
        packed,
        whole,
        backward,
        tf32,
    )
    CASES[name] = CompileCase(launch, archs)


def _call_flash_attention(
    shape, heads, dtype, mask, causal, dropout_p, packed, whole, backward, tf32
) -> None:
    batch, queries, keys, dim = shape

    def tokens(length: int, count: int) -> Tensor:
        """(B, H, L, D) as a projection leaves it, heads inside tokens."""
        return torch.empty(batch, length, count, dim, dtype=dtype, device="meta").transpose(1, 2)

    def integers(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    query, key, value = tokens(queries, heads[0]), tokens(keys, heads[1]), tokens(keys, heads[1])
    attn_mask = None if mask is None else torch.empty(mask[1], dtype=mask[0], device="meta")
    segments = integers(5, torch.int32) if packed else None
    longest = (256, 256) if packed else (0, 0)
    seed = integers(1, torch.int64) if dropout_p else None
    rest = (segments, segments, *longest, causal, dim**-0.5, dropout_p, seed)
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    override = {} if whole else {"flash_attention_bwd_whole": None}
    try:
        with configs.override(**override):
            out, lse = flash_attention.forward(query, key, value, attn_mask, *rest)
            if backward:
                wanted = (True, True, attn_mask is not None and attn_mask.is_floating_point())
                flash_attention.backward(
                    out, lse, query, key, value, attn_mask, out, lse, *rest, *wanted
                )
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


_case = flash_attention_case
_WIDE = (90, 100)  # wgmma and tcgen05, which have rows of their own
_EXTREMES = (86, 90)  # the least shared memory, and no spills allowed
_BIAS_64 = (torch.float32, (1, 12, 197, 197))

_case("ViT-B/16, 197 x 64", 197, 197, 64)
_case("ViT-L/14 at 336, 577 x 64", 577, 577, 64, heads=(16, 16))
_case("ViT-L/14, 257 x 64", 257, 257, 64, heads=(16, 16), archs=_EXTREMES)
_case("ViT-B/32, 50 x 64", 50, 50, 64, dtype=torch.float16)
_case("ViT-B/32 with padding, 50 x 64", 50, 50, 64, mask=(torch.bool, (8, 1, 1, 50)))
_case("CLIP text, 77 x 64, causal", 77, 77, 64, causal=1, dtype=torch.float16)
_case("SigLIP-so400m, 729 x 72", 729, 729, 72, heads=(16, 16))
_case("ViT-H/14, 257 x 80", 257, 257, 80, heads=(16, 16), archs=_EXTREMES)
_case("ViT-g/14, 257 x 88", 257, 257, 88, heads=(16, 16), archs=_EXTREMES)
_case("ViT-bigG/14, 257 x 104", 257, 257, 104, heads=(16, 16))
_case("text of bigG, 77 x 80", 77, 77, 80, archs=_WIDE)
_case("50 x 128", 50, 50, 128)
_case("577 x 128", 577, 577, 128)
_case("577 x 256", 577, 577, 256, archs=_WIDE)
_case("resampler, 64 queries of 2112 x 64", 64, 2112, 64, heads=(8, 8), backward=False)
_case("resampler, 64 queries of 2112 x 96", 64, 2112, 96, heads=(8, 8), backward=False)
_case("resampler, 64 queries of 2112 x 128", 64, 2112, 128, heads=(8, 8), backward=False)
_case(
    "resampler with padding, 64 queries of 2112 x 64",
    64,
    2112,
    64,
    mask=(torch.bool, (8, 1, 1, 2112)),
    archs=_EXTREMES,
)
_case("decoder, 2048 x 80, causal, grouped", 2048, 2048, 80, heads=(32, 8), causal=2)
_case("decoder, 2048 x 128, causal, grouped", 2048, 2048, 128, heads=(32, 8), causal=2)
_case("2048 x 256, causal", 2048, 2048, 256, causal=1)
_case("packed, causal, 64", 4096, 4096, 64, packed=True, causal=2)
_case("packed, 80", 4096, 4096, 80, packed=True, archs=_EXTREMES)
_case("bias of heads, 197 x 64", 197, 197, 64, mask=_BIAS_64)
_case("bias of heads, 77 x 64", 77, 77, 64, mask=(torch.float32, (1, 12, 77, 77)), archs=_EXTREMES)
_case(
    "bias of heads, 1024 x 128",
    1024,
    1024,
    128,
    mask=(torch.bfloat16, (1, 12, 1024, 1024)),
    archs=_EXTREMES,
)
_case("bias of heads, 577 x 256", 577, 577, 256, mask=(torch.bfloat16, (1, 12, 577, 577)))
_case("bool mask over keys, 197 x 64", 197, 197, 64, mask=(torch.bool, (8, 1, 1, 197)), archs=(90,))
_case("dropout, 77 x 64", 77, 77, 64, dropout_p=0.1, archs=_EXTREMES)
_case("dropout, 197 x 64", 197, 197, 64, dropout_p=0.1, archs=_EXTREMES)
_case("dropout, 257 x 104", 257, 257, 104, dropout_p=0.1, archs=(90,))
_case("dropout, 1024 x 128", 1024, 1024, 128, dropout_p=0.1, archs=(90,))
for _name, _tf32 in (("float32", False), ("tf32", True)):
    _float = {"dtype": torch.float32, "tf32": _tf32}
    _case(f"{_name}, 577 x 64", 577, 577, 64, **_float, archs=_EXTREMES)
    _case(f"{_name}, bias of heads, 197 x 64", 197, 197, 64, mask=_BIAS_64, **_float)
    _case(f"{_name}, 257 x 80", 257, 257, 80, **_float, archs=_EXTREMES)
    _case(f"{_name}, 577 x 128", 577, 577, 128, **_float)
    _case(
        f"{_name}, bias of heads, 197 x 256",
        197,
        197,
        256,
        mask=(torch.float32, (1, 12, 197, 197)),
        **_float,
    )
_case("float32, causal, 577 x 64", 577, 577, 64, causal=1, dtype=torch.float32, archs=_EXTREMES)


def cross_attention_case(
    name: str,
    tokens: int,
    images: int,
    latents: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    batch: int = 4,
    heads: tuple[int, int] = (8, 8),
    several: bool = False,
    lengths: bool = False,
    tf32: bool = False,
    archs: tuple[int, ...] = configs.ARCHITECTURES,
) -> None:
    """Adds a forward and backward call."""
    shape = (batch, tokens, images, latents, dim)
    launch = partial(_call_cross_attention, shape, heads, dtype, several, lengths, tf32)
    CASES[f"Phi: {name}"] = CompileCase(launch, archs)


def _call_cross_attention(shape, heads, dtype, several, lengths, tf32) -> None:
    batch, tokens, images, latents, dim = shape

    def empty(*size: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    query = empty(batch, tokens, heads[0], dim, kind=dtype).transpose(1, 2)
    packed = empty(batch, images, latents, 2, heads[1], dim, kind=dtype)
    key, value = packed.permute(3, 0, 4, 1, 2, 5).unbind(0)
    plan = (
        empty(batch, tokens),
        empty(batch, tokens, images, kind=torch.bool) if several else None,
        empty(batch, tokens * images if several else tokens),
        empty(batch, images, 3),
        empty(batch, images) if lengths else None,
    )
    precision = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        out, lse = cross_attention.forward(query, key, value, *plan, dim**-0.5)
        saved = (query, key, value, out, lse, *plan, dim**-0.5)
        cross_attention.backward(out, lse, *saved, True, True)
    finally:
        torch.backends.cuda.matmul.fp32_precision = precision


_image_case = cross_attention_case
_image_case("Flamingo, 33 images of 64 x 64", 2048, 33, 64, 64)
_image_case("one image of 64 x 64", 512, 1, 64, 64, dtype=torch.float16, archs=_EXTREMES)
_image_case("decoding", 1, 33, 64, 64, archs=_EXTREMES)
_image_case("64 x 80", 512, 6, 64, 80)
_image_case("64 x 96", 512, 6, 64, 96, archs=_WIDE)
_image_case("64 x 128, grouped", 512, 6, 64, 128, heads=(32, 8))
_image_case("64 x 256", 512, 6, 64, 256)
_image_case("Mllama, 1601 x 128", 512, 4, 1601, 128, heads=(32, 8), several=True)
_image_case("1601 x 80", 512, 4, 1601, 80)
_image_case("all previous, 64 x 64", 512, 6, 64, 64, several=True)
_image_case("several with lengths, 64 x 64", 512, 6, 64, 64, several=True, lengths=True)
_image_case("lengths, 257 x 64", 512, 6, 257, 64, lengths=True, archs=_EXTREMES)
for _name, _tf32 in (("float32", False), ("tf32", True)):
    for _dim in (64, 128, 256):
        _image_case(f"{_name}, 64 x {_dim}", 512, 6, 64, _dim, dtype=torch.float32, tf32=_tf32)
