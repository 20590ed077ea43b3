"""Launches of cross_attention: real models' shapes, every feature, every configuration row."""

import torch
from torch import Tensor

from tools.compile_cases.common import CompileCase
from vlmfast.kernels.cross_attention.backward import backward
from vlmfast.kernels.cross_attention.forward import forward
from vlmfast.kernels.launch import ARCHITECTURES


def _case(
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
    archs: tuple[int, ...] = ARCHITECTURES,
) -> CompileCase:
    """A forward and backward call; with `several`, a token sees more than one image."""

    def empty(*size: int, kind: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(size, dtype=kind, device="meta")

    def launch() -> None:
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
        out, lse = forward(query, key, value, *plan, dim**-0.5)
        saved = (query, key, value, out, lse, *plan, dim**-0.5)
        backward(out, lse, *saved, True, True)

    precision = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return CompileCase(name, launch, precision, archs)


_WIDE = (90, 100)  # wgmma and tcgen05, which have rows of their own
_EXTREMES = (86, 90)  # the least shared memory, and no spills allowed

CASES = [
    _case("Flamingo, 33 images of 64 x 64", 2048, 33, 64, 64),
    _case("one image of 64 x 64", 512, 1, 64, 64, dtype=torch.float16, archs=_EXTREMES),
    _case("decoding", 1, 33, 64, 64, archs=_EXTREMES),
    _case("64 x 80", 512, 6, 64, 80),
    _case("64 x 96", 512, 6, 64, 96, archs=_WIDE),
    _case("64 x 128, grouped", 512, 6, 64, 128, heads=(32, 8)),
    _case("64 x 256", 512, 6, 64, 256),
    _case("Mllama, 1601 x 128", 512, 4, 1601, 128, heads=(32, 8), several=True),
    _case("1601 x 80", 512, 4, 1601, 80),
    _case("all previous, 64 x 64", 512, 6, 64, 64, several=True),
    _case("several with lengths, 64 x 64", 512, 6, 64, 64, several=True, lengths=True),
    _case("lengths, 257 x 64", 512, 6, 257, 64, lengths=True, archs=_EXTREMES),
    *(
        _case(f"{name}, 64 x {dim}", 512, 6, 64, dim, dtype=torch.float32, tf32=name == "tf32")
        for name in ("float32", "tf32")
        for dim in (64, 128, 256)
    ),
]
