"""The error budget of `vlmfast.verify` as an assertion."""

from collections.abc import Callable

import torch

from vlmfast.verify.common import Case, Inputs, Tensors, measure


def assert_keeps_budget(
    case: Case,
    dtype: torch.dtype,
    backend: str = "cpu",
    kernel: Callable[[Inputs], Tensors] | None = None,
    first_seed: int = 0,
    device: str = "cpu",
) -> None:
    """Every output and gradient of a case errs at most as its budget allows."""
    results = measure(case, backend, dtype, device, first_seed, kernel)
    over = [
        f"{m.tensor}: error {m.error:.3e}, torch's {m.torch_error:.3e}, budget {m.budget:.3e}"
        for m in results
        if not m.passed
    ]
    assert not over, f"{case.name}, {dtype}\n" + "\n".join(over)
