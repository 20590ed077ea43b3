"""Launches of the contrastive losses: CLIP's and BLIP-2's sizes, every configuration row."""

import torch

from tools.compile_cases.common import CompileCase
from vlmfast.kernels.contrastive_loss.backward import backward
from vlmfast.kernels.contrastive_loss.forward import forward
from vlmfast.kernels.launch import ARCHITECTURES


def _case(
    name: str,
    n: int,
    m: int,
    dim: int,
    dtype: torch.dtype = torch.bfloat16,
    queries: int = 1,
    sigmoid: bool = False,
    tf32: bool = False,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> CompileCase:
    """A forward and a backward call with all gradients."""

    def launch() -> None:
        def vector(size: int) -> torch.Tensor:
            return torch.empty(size, device="meta")

        rows = torch.empty((n, queries, dim), dtype=dtype, device="meta")
        columns = torch.empty((m, dim), dtype=dtype, device="meta")
        scale = torch.empty((), device="meta")
        block = (rows, columns, scale, scale if sigmoid else None)
        forward(*block, 0, sigmoid, not sigmoid)
        of_columns = None if sigmoid else vector(m)
        maxima = vector(n), vector(0 if sigmoid else m)
        backward(
            vector(n), None, vector(n), of_columns, *block, *maxima, 0, sigmoid, *(True,) * 4, False
        )

    precision = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return CompileCase(name, launch, precision, archs)


CASES = [
    _case("CLIP, 1024 of 32768 x 512", 1024, 32768, 512),
    _case("CLIP, 1024 of 32768 x 640", 1024, 32768, 640, archs=(90,)),
    _case("SigLIP, 1024 of 32768 x 1152", 1024, 32768, 1152, sigmoid=True),
    _case("float16, 1000 x 500", 1000, 1000, 500, dtype=torch.float16, archs=(90,)),
    _case("BLIP-2, 128 x 32 queries x 256", 128, 128, 256, queries=32),
    _case("float32, 1024 x 512", 1024, 1024, 512, dtype=torch.float32),
    _case("float32, 128 x 32 queries x 256", 128, 128, 256, dtype=torch.float32, queries=32),
    _case("float32, SigLIP, 1024 x 768", 1024, 1024, 768, dtype=torch.float32, sigmoid=True),
    _case("tf32, 1024 x 512", 1024, 1024, 512, dtype=torch.float32, tf32=True),
    _case("tf32, SigLIP, 1024 x 768", 1024, 1024, 768, torch.float32, sigmoid=True, tf32=True),
    _case("tf32, 128 x 32 queries", 128, 128, 256, dtype=torch.float32, queries=32, tf32=True),
]
