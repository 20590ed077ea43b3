"""Launches of flash_attention: real models' shapes, every feature, every configuration row."""

import torch
from torch import Tensor

from tools.compile_cases.common import CompileCase
from vlmfast.kernels.flash_attention.backward import backward
from vlmfast.kernels.flash_attention.forward import forward
from vlmfast.kernels.launch import ARCHITECTURES


def _case(
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
    gradients: bool = True,
    tf32: bool = False,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> CompileCase:
    """A forward and, perhaps, a backward call with all gradients."""

    def tokens(length: int, count: int) -> Tensor:
        """(B, H, L, D) as a projection leaves it, heads inside tokens."""
        size = (1 if packed else batch, length, count, dim)
        return torch.empty(size, dtype=dtype, device="meta").transpose(1, 2)

    def integers(count: int, kind: torch.dtype) -> Tensor:
        return torch.empty(count, dtype=kind, device="meta")

    def launch() -> None:
        query, key, value = (
            tokens(queries, heads[0]),
            tokens(keys, heads[1]),
            tokens(keys, heads[1]),
        )
        attn_mask = None if mask is None else torch.empty(mask[1], dtype=mask[0], device="meta")
        segments = integers(5, torch.int32) if packed else None
        longest = (256, 256) if packed else (0, 0)
        seed = integers(1, torch.int64) if dropout_p else None
        rest = (segments, segments, *longest, causal, dim**-0.5, dropout_p, seed)
        out, lse = forward(query, key, value, attn_mask, *rest)
        if gradients:
            wanted = (True, True, attn_mask is not None and attn_mask.is_floating_point())
            backward(out, lse, query, key, value, attn_mask, out, lse, *rest, *wanted)

    precision = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return CompileCase(name, launch, precision, archs)


_BFLOAT16 = torch.bfloat16
_FLOAT32 = torch.float32
_TF32 = {"dtype": _FLOAT32, "tf32": True}
_WIDE = (90, 100)  # wgmma and tcgen05, which have rows of their own
_NO_SPILLS = (90,)


def _bias(length: int, dtype: torch.dtype) -> tuple[torch.dtype, tuple[int, ...]]:
    """A bias of heads, shared by the batch."""
    return dtype, (1, 12, length, length)


CASES = [
    # Every row of the table, on every architecture.
    _case("ViT-B/32, 50 x 64", 50, 50, 64),
    _case("ViT-B/16, 197 x 64", 197, 197, 64),
    _case("CLIP text, 77 x 64, causal", 77, 77, 64, causal=1, dtype=torch.float16),
    _case("ViT-bigG/14, 257 x 104", 257, 257, 104, heads=(16, 16)),
    _case("50 x 80", 50, 50, 80, archs=_WIDE),
    _case("50 x 128", 50, 50, 128),
    _case("577 x 128", 577, 577, 128),
    _case("577 x 256", 577, 577, 256, archs=_WIDE),
    _case("decoder, 2048 x 80, causal, grouped", 2048, 2048, 80, heads=(32, 8), causal=2),
    _case(
        "decoder, 2048 x 128, causal, grouped",
        2048,
        2048,
        128,
        heads=(32, 8),
        causal=2,
        archs=_WIDE,
    ),
    _case("bias, 197 x 64", 197, 197, 64, mask=_bias(197, _FLOAT32)),
    _case("bias, 577 x 256", 577, 577, 256, mask=_bias(577, _BFLOAT16)),
    _case("float32, 577 x 64", 577, 577, 64, dtype=_FLOAT32, gradients=False),
    _case("float32, 577 x 128", 577, 577, 128, dtype=_FLOAT32),
    _case("float32, bias, 197 x 64", 197, 197, 64, mask=_bias(197, _FLOAT32), dtype=_FLOAT32),
    _case("float32, bias, 197 x 256", 197, 197, 256, mask=_bias(197, _FLOAT32), dtype=_FLOAT32),
    _case("tf32, 577 x 128", 577, 577, 128, **_TF32),
    _case("tf32, bias, 197 x 64", 197, 197, 64, mask=_bias(197, _FLOAT32), **_TF32),
    _case("tf32, bias, 197 x 256", 197, 197, 256, mask=_bias(197, _FLOAT32), **_TF32),
    # What takes registers, where spills are forbidden: other head dimensions, and each feature.
    _case("SigLIP-so400m, 729 x 72", 729, 729, 72, heads=(16, 16), archs=_WIDE),
    _case("ViT-H/14, 257 x 80", 257, 257, 80, heads=(16, 16), archs=_NO_SPILLS),
    _case("ViT-g/14, 257 x 88", 257, 257, 88, heads=(16, 16), archs=_NO_SPILLS),
    _case("text of bigG, 77 x 80, causal", 77, 77, 80, causal=1, archs=_NO_SPILLS),
    _case("ViT-L/14, 257 x 64", 257, 257, 64, heads=(16, 16), archs=_NO_SPILLS),
    _case("resampler, 64 queries of 2112 x 64", 64, 2112, 64, archs=_NO_SPILLS),
    _case("resampler, 64 queries of 2112 x 96", 64, 2112, 96, archs=_NO_SPILLS),
    _case("resampler, 64 queries of 2112 x 128", 64, 2112, 128, archs=_NO_SPILLS),
    _case("padding, 50 x 64", 50, 50, 64, mask=(torch.bool, (8, 1, 1, 50)), archs=_NO_SPILLS),
    _case(
        "padding, 1024 x 128", 1024, 1024, 128, mask=(torch.bool, (8, 1, 1, 1024)), archs=_NO_SPILLS
    ),
    _case(
        "bool mask, 197 x 64", 197, 197, 64, mask=(torch.bool, (8, 1, 197, 197)), archs=_NO_SPILLS
    ),
    _case("bool mask, 77 x 64", 77, 77, 64, mask=(torch.bool, (8, 1, 77, 77)), archs=_NO_SPILLS),
    _case("bias, 77 x 80", 77, 77, 80, mask=_bias(77, _BFLOAT16), archs=_NO_SPILLS),
    _case("bias, 1024 x 128", 1024, 1024, 128, mask=_bias(1024, _BFLOAT16), archs=_NO_SPILLS),
    _case("dropout, 50 x 64", 50, 50, 64, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 77 x 64", 77, 77, 64, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 197 x 64", 197, 197, 64, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 257 x 80", 257, 257, 80, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 257 x 104", 257, 257, 104, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 1024 x 128", 1024, 1024, 128, dropout_p=0.1, archs=_NO_SPILLS),
    _case("dropout, 577 x 256", 577, 577, 256, dropout_p=0.1, archs=_NO_SPILLS),
    _case(
        "bias, causal and dropout, 577 x 104",
        577,
        577,
        104,
        mask=_bias(577, _FLOAT32),
        causal=1,
        dropout_p=0.1,
        archs=_NO_SPILLS,
    ),
    _case("2048 x 256, causal", 2048, 2048, 256, causal=1, archs=_NO_SPILLS),
    _case("packed, causal, 64", 4096, 4096, 64, packed=True, causal=2, archs=_NO_SPILLS),
    _case("packed, 80", 4096, 4096, 80, packed=True, archs=_NO_SPILLS),
    _case("packed, causal, 128", 4096, 4096, 128, packed=True, causal=2, archs=_NO_SPILLS),
    _case("float32, 257 x 80", 257, 257, 80, dtype=_FLOAT32, archs=_NO_SPILLS),
    _case("float32, causal, 577 x 64", 577, 577, 64, causal=1, dtype=_FLOAT32, archs=_NO_SPILLS),
    _case(
        "float32, dropout, 577 x 128",
        577,
        577,
        128,
        dropout_p=0.1,
        dtype=_FLOAT32,
        archs=_NO_SPILLS,
    ),
    _case("tf32, 257 x 80", 257, 257, 80, **_TF32, archs=_NO_SPILLS),
    _case("tf32, dropout, 577 x 64", 577, 577, 64, dropout_p=0.1, **_TF32, archs=_NO_SPILLS),
]
