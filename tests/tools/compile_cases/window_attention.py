"""Launches of window_attention: Swin's shapes, every feature, every configuration row."""

import torch
from torch import Tensor

from tools.compile_cases.common import CompileCase
from vlmfast.kernels.launch import ARCHITECTURES
from vlmfast.kernels.window_attention.backward import backward
from vlmfast.kernels.window_attention.forward import forward


def _case(
    name: str,
    window: int,
    heads: int,
    dim: int = 32,
    dtype: torch.dtype = torch.bfloat16,
    shifted: bool = True,
    padded: bool = False,
    cosine: bool = False,
    dropout_p: float = 0.0,
    tf32: bool = False,
    archs: tuple[int, ...] = ARCHITECTURES,
) -> CompileCase:
    """A forward and a backward call with all gradients, on packed query, key and value."""

    def launch() -> None:
        def tensor(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=kind, device="meta")

        size, shift = 8 * window - (3 if padded else 0), window // 2 if shifted else 0
        qkv = tensor(8, size, size, 3 * heads * dim, kind=dtype)
        bias = tensor(heads, window**2, window**2)
        logit_scale = tensor(heads) if cosine else None
        pad_value = tensor(3 * heads * dim) if padded else None
        seed = tensor(1, kind=torch.int64) if dropout_p else None
        tensors = (qkv, None, None, bias, logit_scale, pad_value)
        numbers = (heads, window, window, shift, shift, True, dim**-0.5, -100.0, dropout_p, seed)
        out, logsumexp = forward(*tensors, *numbers)
        backward(out, *tensors, out, logsumexp, *numbers, *(True,) * 4)

    precision = "half" if dtype != torch.float32 else "tf32" if tf32 else "ieee"
    return CompileCase(name, launch, precision, archs)


_FLOAT32 = torch.float32

CASES = [
    # Every row of the table, on every architecture.
    _case("Swin-T, w7", 7, 3),
    _case("Swin-B at 384, w12", 12, 4),
    _case("Swin V2, w16", 16, 3, cosine=True),
    _case("w7, head dim 128", 7, 3, dim=128),
    _case("float32, w7", 7, 3, dtype=_FLOAT32),
    _case("tf32, w7", 7, 3, dtype=_FLOAT32, tf32=True),
    # Features and other shapes, where spills are forbidden.
    _case("w7 without shift", 7, 3, shifted=False, archs=(90,)),
    _case("w7, padded", 7, 3, padded=True, archs=(90,)),
    _case("Swin V2, w8", 8, 3, cosine=True, padded=True),
    _case("w7, dropout", 7, 3, dropout_p=0.1, archs=(90,)),
    _case("w8, float16, head dim 64", 8, 3, dim=64, dtype=torch.float16, archs=(90, 100)),
    _case("Swin V2 at 384, w24", 24, 4, cosine=True, archs=(90,)),
    _case("w12, padded", 12, 4, padded=True, archs=(90, 100)),
    _case("w16", 16, 3, archs=(90, 100)),
    _case("float32, w12", 12, 4, dtype=_FLOAT32, archs=(90,)),
    _case("tf32, w16, cosine", 16, 3, dtype=_FLOAT32, cosine=True, tf32=True, archs=(90,)),
]
