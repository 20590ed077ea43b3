"""What tests of several columns do to calls of shifted-window attention."""

from collections.abc import Callable

import torch

from vlmfast.verify.common import Case, Inputs, Tensors


def with_lengths(case: Case, query: int, key: int, backend: str) -> Callable[[Inputs], Tensors]:
    """A case's kernel, on queries and keys that are longer by these powers of two."""

    def longer(packed: torch.Tensor) -> torch.Tensor:
        parts = packed.chunk(3, -1)
        return torch.cat([parts[0] * 2.0**query, parts[1] * 2.0**key, parts[2]], -1)

    def kernel(inputs: Inputs) -> Tensors:
        scaled = {name: longer(inputs[name]) for name in ("query", "pad_value") if name in inputs}
        return case.kernel({**inputs, **scaled}, backend)

    return kernel
