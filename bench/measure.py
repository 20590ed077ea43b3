"""Check first, then race: errors against float64, interleaved times, fractions of the ceilings."""

import ctypes
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vlmfast.verify.common import budget, relative_error

Call = Callable[[], tuple[Tensor, ...]]
Clock = Callable[[Call, int], float]  # (call, repeats) -> seconds a call

# A sample shorter than this is made of several calls, so that reading the clock costs nothing.
SHORTEST_SAMPLE = 1e-3
FEWEST_ROUNDS = 5
MOST_SETS = 256  # of inputs
MOST_LAUNCHED = 10  # calls in a row: of a hundred kernels each, they still fit in a GPU's queue


def settle_allocator() -> bool:
    """Puts glibc's malloc in the state that a long-running process reaches by itself.

    Blocks of up to 32 MiB are then reused and larger ones mapped afresh, as by default, but what
    one contestant frees is not given back to the system, for which the next would pay with page
    faults of its own. Returns whether the C library could be told.
    """
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    return bool(mallopt(mmap_threshold, 32 << 20)) and bool(mallopt(trim_threshold, 2**31 - 1))


@dataclass(frozen=True)
class Work:
    """What one call cannot do without.

    Attributes:
        flops: floating-point operations of its matrix products.
        least_bytes: read from or written to memory, each tensor once.
        exps: exponentials.
    """

    flops: int
    least_bytes: int
    exps: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds a call, over the samples of one race."""

    median: float
    p20: float
    p80: float
    samples: int


@dataclass(frozen=True)
class Verdict:
    """The error of one call's results against the truth, and the most that it may be."""

    error: float
    budget: float

    @property
    def passed(self) -> bool:
        # Where torch itself overflows the budget is no bound, but NaN is still no result.
        return math.isfinite(self.error) and self.error <= self.budget


class Truth(NamedTuple):
    """A result in float64, and the norm of the terms that it sums where these may cancel."""

    value: Tensor
    terms: float = 0.0


def judge(
    results: Sequence[Tensor], truths: Sequence[Truth], yardsticks: Sequence[float]
) -> Verdict:
    """Judges a call by the result that is nearest to its budget, or furthest beyond it.

    A yardstick is the error of the eager formula in the same dtype, from which comes the budget
    that `vlmfast.verify` allows.
    """
    verdicts = []
    for result, truth, yardstick in zip(results, truths, yardsticks, strict=True):
        error = relative_error(result, *truth)
        verdicts.append(Verdict(error, budget([yardstick], result.dtype)))
    failed = [verdict for verdict in verdicts if not verdict.passed]
    return max(failed or verdicts, key=lambda verdict: verdict.error / verdict.budget)


def race(
    calls: Mapping[str, Call], seconds: float, clock: Clock | None = None
) -> dict[str, Timing]:
    """Times every call in turn, A B C A B C ..., for about `seconds` in all.

    Whatever slows the machine down for a while then slows all of them down. Every other round runs
    backwards, so that nobody always runs after the same rival.

    Args:
        calls: by name.
        seconds: for all of them together.
        clock: `wall_seconds`, which None stands for, `cuda_seconds` or `launch_seconds`.
    """
    seconds_of = wall_seconds if clock is None else clock
    repeats = {}
    round_seconds = 0.0
    for name, call in calls.items():
        call()
        once = seconds_of(call, 1)
        repeats[name] = max(1, math.ceil(SHORTEST_SAMPLE / once))
        round_seconds += once * repeats[name]
    rounds = max(FEWEST_ROUNDS, round(seconds / round_seconds))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        order = list(calls) if turn % 2 == 0 else list(reversed(calls))
        for name in order:
            samples[name].append(seconds_of(calls[name], repeats[name]))
    return {name: _timing(values) for name, values in samples.items()}


def clock_rate(device: str = "cpu") -> float | None:
    """MHz of the fastest core, or of the GPU, as the system tells it just now; None if it does not.

    A virtual machine may tell one rate for ever.
    """
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"]
        try:
            told = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            return float(told.splitlines()[torch.cuda.current_device()])
        except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
            return None
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    rates = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    return max(rates, default=None)


def launch_seconds(call: Call, repeats: int) -> float:
    """Seconds of the CPU that it takes to launch a call on a GPU.

    With an empty queue to begin with: a launch waits where a thousand others wait before it.
    """
    torch.cuda.synchronize()
    return wall_seconds(call, min(repeats, MOST_LAUNCHED))


def wall_seconds(call: Call, repeats: int) -> float:
    """Seconds a call on the CPU."""
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_seconds(call: Call, repeats: int) -> float:
    """Seconds of the GPU a call, between two events."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


class Rotation:
    """One call on several sets of inputs, one after the other."""

    def __init__(self, calls: Sequence[Call]):
        self.calls = calls
        self._next = 0

    def __call__(self) -> tuple[Tensor, ...]:
        call = self.calls[self._next]
        self._next = (self._next + 1) % len(self.calls)
        return call()


def input_sets(work: Work, device: str) -> int:
    """How many sets of inputs a race takes turns with.

    A small input would else stay in the cache from call to call: as many as are twice the
    last-level cache.
    """
    cache = _cpu_cache() if device == "cpu" else torch.cuda.get_device_properties(0).L2_cache_size
    return max(1, min(MOST_SETS, math.ceil(2 * cache / work.least_bytes)))


def _cpu_cache() -> int:
    """Bytes of the largest cache, as Linux tells them; 0 where it does not."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 2**10, "M": 2**20}
    told = [size.read_text().strip() for size in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in told), default=0)


def captured(call: Call) -> Call:
    """The call as a CUDA graph: its kernels without the time to launch each of them."""
    if isinstance(call, Rotation):
        return Rotation([captured(part) for part in call.calls])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled or allocated once must not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay


def _timing(samples: Sequence[float]) -> Timing:
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Timing(statistics.median(samples), fifths[0], fifths[3], len(samples))


@dataclass(frozen=True)
class Ceilings:
    """The rates this machine reaches with its threads as they are set.

    Attributes:
        flops: floating-point operations a second, by dtype, in large matrix products.
        flops_source: which routine reached them, by dtype.
        bandwidth: bytes a second, read and written, when copying an array far larger than caches.
        exps: exponentials a second, of float32 numbers in the caches.
    """

    flops: Mapping[str, float]
    flops_source: Mapping[str, str]
    bandwidth: float
    exps: float

    def limits(self, work: Work, dtype: str) -> dict[str, float]:
        """Seconds that each ceiling alone would leave a call."""
        return {
            "matrix": work.flops / self.flops[dtype],
            "memory": work.least_bytes / self.bandwidth,
            "exp": work.exps / self.exps,
        }

    def least_seconds(self, work: Work, dtype: str) -> float:
        """The time of a call at whichever ceiling it meets first."""
        return max(self.limits(work, dtype).values())

    def binding(self, work: Work, dtype: str) -> str:
        """The name of that ceiling."""
        limits = self.limits(work, dtype)
        return max(limits, key=lambda name: limits[name])


def measure_ceilings(
    dtypes: Sequence[str], size: int = 2048, seconds: float = 2.0, device: str = "cpu"
) -> Ceilings:
    """Measures the ceilings: products of two (size, size) matrices, a copy of 256 MiB, and exp.

    Any type may be computed in float32, so no ceiling is below that of float32.
    """
    # The fastest fifth: a ceiling is what the machine can do, not what it does on average.
    rates: dict[str, tuple[float, str]] = {}
    clock = cuda_seconds if device == "cuda" else wall_seconds
    is_fast = _has_fast_products if device == "cpu" else lambda dtype: True
    for dtype in {"float32", *filter(is_fast, dtypes)}:
        products = _matrix_products(size, dtype, device)
        for routine, timing in race(products, seconds, clock).items():
            rate = (2 * size**3 / timing.p20, f"{dtype}, {routine}")
            rates[dtype] = max(rate, rates.get(dtype, rate))
    best = {dtype: max(rates["float32"], rates.get(dtype, (0.0, ""))) for dtype in dtypes}

    block = torch.rand(2**26, device=device)
    target = torch.zeros_like(block)
    copy = race({"copy": lambda: (target.copy_(block),)}, seconds, clock)["copy"]
    numbers = -torch.rand(2**18 if device == "cpu" else 2**22, device=device)
    powers = torch.empty_like(numbers)
    exp = race({"exp": lambda: (torch.exp(numbers, out=powers),)}, seconds, clock)["exp"]
    return Ceilings(
        flops={dtype: rate for dtype, (rate, _) in best.items()},
        flops_source={dtype: source for dtype, (_, source) in best.items()},
        bandwidth=2 * block.nbytes / copy.p20,
        exps=numbers.numel() / exp.p20,
    )


def unhurried_rate(dtype: str, size: int = 256) -> float:
    """Floating-point operations a second that torch.matmul does on a CPU, fast or not.

    Far below the ceiling where torch has no fast routine: bfloat16 without AVX-512 takes one
    scalar at a time.
    """
    left, right = torch.randn(2, size, size).to(getattr(torch, dtype)).unbind()
    seconds = min(wall_seconds(lambda: (left @ right,), 1) for _ in range(3))
    return 2 * size**3 / seconds


def _has_fast_products(dtype: str) -> bool:
    """Whether torch multiplies matrices of this type by other means than one scalar at a time."""
    if not torch.backends.mkldnn.is_available():
        return dtype == "float32"
    if dtype == "bfloat16":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == "float16":
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True


def _matrix_products(size: int, dtype: str, device: str) -> dict[str, Call]:
    left, right = torch.randn(2, size, size, device=device).to(getattr(torch, dtype)).unbind()
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return {"torch.matmul": lambda: (left @ right,)}
    # torch.matmul is not the fastest everywhere: on AMD its library keeps to AVX2.
    packed = torch.ops.mkldnn._reorder_linear_weight(right.t().contiguous(), size)
    return {
        "torch.matmul": lambda: (left @ right,),
        "oneDNN with packed weight": lambda: (
            torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""),
        ),
    }
