"""What a call costs the host before a GPU has anything to do: python -m bench.host [FAMILY ...].

The launchers of every family, `forward` and `backward` of `kernels/<family>/`, are called again and
again on one small shape, with operators, checks and autograd left out. Where there is a GPU the
launches are real. Elsewhere tensors lie on the CPU, kernels are compiled for sm_90, and a driver
that is none takes the launches and does nothing: what the CUDA driver itself takes, and what Triton
does in C for it, is then not in the numbers, nor is the switch to another device.

The table says microseconds a call, how many of them are Triton's (`JITFunction.run` and below: the
rest is ours and torch's), and launches a call. Triton's are told by calls that leave it out.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from bench.measure import wall_seconds

ARCHITECTURE = 90

Pair = tuple[Callable[[], Any], Callable[[], Any]]  # a forward and a backward call


class Cost(NamedTuple):
    """Of one call: microseconds, how many of them are Triton's, and launches."""

    microseconds: float
    triton: float
    launches: int


class NoDriver:
    """What Triton asks of a driver, answered for a GPU that is not there; counts launches."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", ARCHITECTURE, 32)
        self.utils = self
        self.launches: list[tuple[str, int]] = []  # the kernel, and how many arguments it has

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return -1  # compiled kernels are kept by device, and stay when this driver is gone

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        from vlmfast.kernels.launch import SHARED_MEMORY

        return {"max_shared_mem": SHARED_MEMORY[ARCHITECTURE]}

    def load_binary(self, name: str, *rest: object) -> tuple[object, object, int, int, int]:
        return name, name, 0, 0, 1024  # module, function, registers, spills, threads at most

    def launcher_cls(self, source: object, metadata: object) -> Callable[..., None]:
        from triton.runtime.driver import driver

        # A compiled kernel keeps its launcher, and is launched by later drivers, too.
        return lambda *arguments: driver.active.launch(*arguments)

    def launch(self, x: int, y: int, z: int, stream: int, function: str, *rest: Any) -> None:
        self.launches.append((function, len(rest) - 4))  # two kinds of metadata, two hooks


@contextlib.contextmanager
def launches_go_nowhere() -> Iterator[list[tuple[str, int]]]:
    """Within the block kernels are compiled for sm_90, and their launches only noted."""
    from triton.runtime.driver import driver

    none = NoDriver()
    # reset_active() would look for a real driver, and there may be none.
    with mock.patch.object(driver, "_active", none):
        yield none.launches


@contextlib.contextmanager
def counted_launches() -> Iterator[list[str]]:
    """The kernels launched within the block, in order, whatever the driver."""
    from triton.runtime.jit import JITFunction

    launched: list[str] = []
    run = JITFunction.run

    def count(self: Any, *args: Any, **kwargs: Any) -> Any:
        launched.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    with mock.patch.object(JITFunction, "run", count):
        yield launched


def without_triton() -> Any:
    """Within the block kernels are not even looked for."""
    from triton.runtime.jit import JITFunction

    return mock.patch.object(JITFunction, "run", lambda self, *args, **kwargs: None)


def flash_attention(device: str) -> Pair:
    """Two heads of a vision transformer, in the layout of a projection."""
    from vlmfast.kernels.flash_attention.backward import backward
    from vlmfast.kernels.flash_attention.forward import forward

    query, key, value = (_half(1, 300, 2, 64, device=device).transpose(1, 2) for _ in range(3))
    numbers = (None, None, 0, 0, 0, 0.125, 0.0, None)
    out, logsumexp = torch.empty_like(query), _floats(1, 2, 300, device=device)
    inputs = (query, key, value, None)
    return (
        lambda: forward(*inputs, *numbers),
        lambda: backward(out, None, *inputs, out, logsumexp, *numbers, True, True, False),
    )


def cross_attention(device: str) -> Pair:
    """Two images of Flamingo."""
    from vlmfast.kernels.cross_attention.backward import backward
    from vlmfast.kernels.cross_attention.forward import forward

    def integers(*size: int) -> Tensor:
        return torch.zeros(size, dtype=torch.int32, device=device)

    tokens, images, latents, heads, dim = 64, 2, 64, 2, 64
    query = _half(1, tokens, heads, dim, device=device).transpose(1, 2)
    packed = _half(1, images, latents, 2, heads, dim, device=device)
    key, value = packed.permute(3, 0, 4, 1, 2, 5).unbind(0)
    plan = (integers(1, tokens), None, integers(1, tokens), integers(1, images, 3), None, dim**-0.5)
    out, logsumexp = torch.empty_like(query), _floats(1, heads, tokens, device=device)
    return (
        lambda: forward(query, key, value, *plan),
        lambda: backward(out, None, query, key, value, out, logsumexp, *plan, True, True),
    )


def window_attention(device: str) -> Pair:
    """Shifted windows of Swin, packed query, key and value, a bias."""
    from vlmfast.kernels.window_attention.backward import backward
    from vlmfast.kernels.window_attention.forward import forward

    window, heads, dim = 7, 3, 32
    qkv = _half(1, 14, 14, 3 * heads * dim, device=device)
    bias = _floats(heads, window**2, window**2, device=device)
    numbers = (heads, window, window, 3, 3, True, dim**-0.5, -100.0, 0.0, None)
    tensors = (qkv, None, None, bias, None, None)
    out, logsumexp = forward(*tensors, *numbers)
    return (
        lambda: forward(*tensors, *numbers),
        lambda: backward(out, *tensors, out, logsumexp, *numbers, *(True,) * 4),
    )


def contrastive_loss(device: str) -> Pair:
    """CLIP's loss, whose products beside the kernels are torch's."""
    from vlmfast.kernels.contrastive_loss.backward import backward
    from vlmfast.kernels.contrastive_loss.forward import forward

    n, dim = 32, 64
    rows, columns = _half(n, 1, dim, device=device), _half(n, dim, device=device)
    block = (rows, columns, _floats(1, device=device)[0], None)
    vector = _floats(n, device=device)
    gradients = (vector, None, vector, vector)
    return (
        lambda: forward(*block, 0, False, True),
        lambda: backward(*gradients, *block, vector, vector, 0, False, *(True,) * 4, False),
    )


def _half(*size: int, device: str) -> Tensor:
    return torch.zeros(size, dtype=torch.bfloat16, device=device)


def _floats(*size: int, device: str) -> Tensor:
    return torch.zeros(size, device=device)


FAMILIES: dict[str, Callable[[str], Pair]] = {
    make.__name__: make
    for make in (flash_attention, cross_attention, window_attention, contrastive_loss)
}


def cost(call: Callable[[], Any], repeats: int, samples: int = 9) -> Cost:
    """Medians over rounds that take turns with calls that leave Triton out."""
    call()  # compiles
    with counted_launches() as launched:
        call()
    whole, ours = [], []
    for _ in range(samples):
        whole.append(_microseconds(call, repeats))
        with without_triton():
            ours.append(_microseconds(call, repeats))
    total = statistics.median(whole)
    return Cost(total, total - statistics.median(ours), len(launched))


def _microseconds(call: Callable[[], Any], repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()  # a launch waits where a thousand others wait before it
    return 1e6 * wall_seconds(call, repeats)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; returns 0."""
    parser = argparse.ArgumentParser("python -m bench.host", description=__doc__.splitlines()[0])
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"of {', '.join(FAMILIES)}; default: all"
    )
    parser.add_argument(
        "--repeats", type=int, default=200, help="calls in a row (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.families) - set(FAMILIES):
        parser.error(f"argument FAMILY: unknown: {', '.join(sorted(unknown))}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("unset TRITON_INTERPRET: interpreted kernels are not launched")
    on_card = torch.cuda.is_available()
    print(f"{'':16} {'':8} {'us':>7} {'Triton':>7} {'ours':>7} launches")
    with contextlib.nullcontext() if on_card else launches_go_nowhere():
        for family in options.families or FAMILIES:
            for name, call in zip(
                ("forward", "backward"), FAMILIES[family]("cuda" if on_card else "cpu"), strict=True
            ):
                found = cost(call, options.repeats)
                print(
                    f"{family:16} {name:8} {found.microseconds:7.1f} {found.triton:7.1f} "
                    f"{found.microseconds - found.triton:7.1f} {found.launches}"
                )
    return 0


if __name__ == "__main__":
    gc.freeze()  # what importing torch leaves behind need not be looked through again and again
    sys.exit(main())
