"""A worker whose kernels have bugs, each seed another, by which the fuzzer proves itself."""

import ctypes
from collections.abc import Callable
from typing import Any

from torch import Tensor

from tools.fuzz import worker
from vlmfast.ops import flash_attention as ops


def _end(x: Tensor) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * by for size, by in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr() + (last + 1) * x.element_size()


def _reads_beyond_an_input(key: Tensor, out: Tensor) -> Tensor:
    ctypes.c_uint16.from_address(_end(key)).value  # noqa: B018
    return out


def _writes_beyond_an_output(key: Tensor, out: Tensor) -> Tensor:
    ctypes.c_uint16.from_address(_end(out)).value = 0
    return out


def _leaves_an_element_unwritten(key: Tensor, out: Tensor) -> Tensor:
    partly = out.new_empty(out.shape)
    partly[..., :-1] = out[..., :-1]
    return partly


def _has_a_wrong_sign(key: Tensor, out: Tensor) -> Tensor:
    return -out


BUGS: list[Callable[[Tensor, Tensor], Tensor] | None] = [
    None,
    _reads_beyond_an_input,
    _writes_beyond_an_output,
    _leaves_an_element_unwritten,
    _has_a_wrong_sign,
]


def main() -> None:
    right, run = ops.FORWARD["cpu"], worker.run
    bug = None

    def wrong(query: Tensor, key: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
        out, logsumexp = right(query, key, *rest, **named)
        return (bug(key, out) if bug and out.numel() and key.numel() else out), logsumexp

    def run_with_a_bug(family: str, dtype: str, seed: int, *options: Any) -> None:
        nonlocal bug
        bug = BUGS[seed % len(BUGS)]
        run(family, dtype, seed, *options)

    ops.FORWARD["cpu"] = wrong
    worker.run = run_with_a_bug
    worker.main()


if __name__ == "__main__":
    main()
