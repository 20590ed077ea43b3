"""Runs one problem on every instruction set and judges what comes out."""

import _thread
import ctypes
import math
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

from tools.fuzz import problems
from tools.guard_pages import guarded
from vlmfast.verify.common import (
    SEEDS,
    Case,
    Inputs,
    Problem,
    Tensors,
    backward,
    budget,
    cpu_isa,
    forward,
    in_float64,
    pose,
    run,
)

# Torch's error is its worst over eight seeds. Of a tensor of few elements it may be several times
# larger for a ninth, and among so many problems some meet theirs: before one is reported torch is
# given more seeds. What is really too inexact stays so.
_MORE_SEEDS = (len(SEEDS), 8 * len(SEEDS), 64 * len(SEEDS))

# So many budgets no chance explains.
_BEYOND_CHANCE = 100


_HIDING = {"attn_mask", "causal", "is_causal"}


class _Budgets:
    """What each tensor of a problem may err by.

    The budget of `vlmfast.verify.common` takes torch's worst error over eight seeds, so it is never
    below what torch's error on the first one allows: a tensor that keeps the latter keeps it, and
    for most of them no other seed is needed.
    """

    def __init__(self, case: Case, dtype: torch.dtype, seed: int, problem: Problem) -> None:
        self.case, self.dtype, self.seed = case, dtype, seed
        self.errors = [problem.torch_errors]

    def exceeded(self, name: str, error: float, dtype: torch.dtype) -> float | None:
        """The budget, where an error is above it."""
        for seeds in (1, *_MORE_SEEDS):
            for seed in range(len(self.errors), seeds):
                more = pose(self.case, self.dtype, "cpu", self.seed + seed)
                self.errors.append(more.torch_errors)
            limit = budget([errors[name] for errors in self.errors], dtype)
            if error <= limit:
                return None
            if error > _BEYOND_CHANCE * limit and seeds >= len(SEEDS):
                break
        return limit


class Trial:
    """A problem, which follows from family, dtype and seed, with all that is drawn beside it."""

    def __init__(self, family: str, dtype: torch.dtype, seed: int) -> None:
        self.name = f"{family} {dtype} {seed}"
        self.rng = Random(self.name)
        self.case = problems.draw(family, self.rng)
        self.problem_dtype, self.seed = dtype, seed
        self.problem = pose(self.case, dtype, "cpu", seed)
        self.budgets = _Budgets(self.case, dtype, seed, self.problem)
        self.threads = self.rng.choice((1, 1, 1, 2, 3))
        self.inputs, self.touched = self.problem.inputs, {}
        self.description = f"{self.case.name}, {self.threads} threads"
        if self.rng.random() < 0.15:
            self._poison()

    def _poison(self) -> None:
        """Makes some of an input NaN or infinite, and finds where that may show in each result.

        It may show where the reference shows it; everything else must come out as without.
        """
        case, inputs, rng = self.case, self.problem.inputs, self.rng
        names = [name for name in case.differentiable if inputs[name].numel() > 1]
        names = [name for name in names if name != "attn_mask"]  # it says itself what is hidden
        if "plan" in inputs:  # what an image holds stays with its tokens, but not the other way
            names = [name for name in names if name != "query"]
        if not names or "dropout_seed" in inputs:  # a weight that is dropped may hide it, or not
            return
        name, poison = rng.choice(names), rng.choice((math.nan, math.nan, math.inf, -math.inf))
        x, nan = (inputs[name].contiguous().clone() for _ in range(2))
        at = [rng.randrange(n) if rng.random() < 0.8 else slice(None) for n in x.shape]
        # NaN shows where infinity times zero may, and infinity where a maximum chooses by it.
        x[tuple(at)], nan[tuple(at)] = poison, math.nan
        where = ", ".join(str(i) if isinstance(i, int) else ":" for i in at)
        self.description += f", {poison} at {name}[{where}]"
        self.inputs = {**inputs, name: x}
        spoilt = {**inputs, name: nan}
        self.touched = self._differences(spoilt, case.differentiable)
        for key, shows in self._differences(self.inputs, case.differentiable).items():
            self.touched[key] |= shows
        if inputs.keys() & _HIDING:
            # Softmax attention keeps what it hides out of the output alone.
            seen = {key: x for key, x in spoilt.items() if key not in _HIDING}
            others = tuple(name for name in case.differentiable if name != "attn_mask")
            self.touched |= {
                key: x
                for key, x in self._differences(seen, others).items()
                if key.startswith("grad_")
            }
            if "grad_attn_mask" in self.touched:
                self.touched["grad_attn_mask"].fill_(True)

    def _differences(self, inputs: Inputs, differentiable: tuple[str, ...]) -> dict[str, Tensor]:
        """Where each result by the reference is not what it is without NaN."""
        clean = {name: self.problem.inputs[name] for name in inputs}
        results = [
            run(self.case.reference, in_float64(x), differentiable, self.problem.grad_outputs)
            for x in (inputs, clean)
        ]
        return {name: results[0][name] != results[1][name] for name in results[0]}

    def judge(self, isa: str) -> Iterator[str]:
        """Runs the kernels of an instruction set; yields what is wrong, as "WHAT: DETAIL"."""
        try:
            with cpu_isa(isa):
                rng = Random(f"{self.name} {isa}")
                results = _solve(
                    self.case, self.inputs, self.problem.grad_outputs, rng, self.threads
                )
        except Exception as error:
            yield f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            return
        exceeding = []
        for name, touched in self.touched.items():
            x = results[name]
            results[name] = torch.where(touched, self.problem.truth[name].to(x.dtype), x)
        for name, error in self.problem.errors(results).items():
            limit = self.budgets.exceeded(name, error, results[name].dtype)
            if limit is not None:
                exceeding.append((name, error, limit))
        again = self._errors_of_other_seeds(isa) if exceeding else []
        for name, error, limit in exceeding:
            what = f"{name} not finite" if math.isinf(error) else name
            recurs = sum(errors[name] > limit for errors in again) > len(again) // 2
            if recurs or error > _BEYOND_CHANCE * limit:
                yield f"{what}: error {error:.3g}, budget {limit:.3g}"

    def _errors_of_other_seeds(self, isa: str) -> list[dict[str, float]]:
        """The kernels' errors on other numbers of this problem.

        Of a tensor of few elements the error of one draw may be several times the usual one. What
        is above the budget by chance is below it on most others; what the kernel does too roughly
        is not.
        """
        errors = []
        for seed in range(1, len(SEEDS)):
            other = pose(self.case, self.problem_dtype, "cpu", self.seed + seed)
            with cpu_isa(isa):
                rng = Random(f"{self.name} {isa} {seed}")
                results = _solve(self.case, other.inputs, other.grad_outputs, rng, self.threads)
            errors.append(other.errors(results))
        return errors


# --- running kernels under guard -----------------------------------------------------------------


def _solve(case: Case, inputs: Inputs, grad_outputs: Tensors, rng: Random, threads: int) -> Tensors:
    """Outputs and gradients by the kernels, all memory guarded."""
    inputs = {name: _place(x, rng) for name, x in inputs.items()}
    switch = _switch()

    def solve() -> Tensors:
        switch.value = 1
        outputs, leaves = forward(lambda x: case.kernel(x, "cpu"), inputs, case.differentiable)
        switch.value = 0
        arriving = {
            name: _place(grad_outputs[name].to(x.dtype), rng) for name, x in outputs.items()
        }
        switch.value = 1
        return backward(outputs, leaves, arriving)

    torch.set_num_threads(threads)
    try:
        return _in_new_thread(solve)
    finally:
        switch.value = 0
        torch.set_num_threads(1)


def _in_new_thread(function: Callable[[], Tensors]) -> Tensors:
    """Calls a function in a thread of its own.

    Kernels keep their scratch as long as the thread lives, and what an earlier case left behind
    would be too large to end at a guard page where this one's ends.
    """
    results: list[Any] = []
    done = _thread.allocate_lock()

    def work() -> None:
        try:
            results.append(function())
        except Exception as error:
            results.append(error)
        done.release()

    done.acquire()
    _thread.start_new_thread(work, ())
    done.acquire()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def _switch() -> ctypes.c_int:
    return ctypes.c_int.in_dll(ctypes.CDLL(None), "guarded_malloc_on")


def _place(x: Any, rng: Random) -> Any:
    """A tensor, or each of a tuple, at a guard page; floating and bool ones in random strides."""
    if isinstance(x, tuple):
        return type(x)(*(_place(part, rng) for part in x))
    if not isinstance(x, Tensor):
        return x
    integers = not x.is_floating_point() and x.dtype != torch.bool
    strides = None if integers else _strides(x, rng)
    return guarded(x.detach(), rng.random() < 0.7, strides)


def _strides(x: Tensor, rng: Random) -> list[int]:
    """Strides of no two elements in one place, except where x has stride 0 itself."""
    order = list(range(x.dim()))
    kind = rng.choice(("dense", "dense", "permuted", "gaps", "swapped", "swapped with gaps"))
    if kind == "permuted":
        rng.shuffle(order)
    elif kind.startswith("swapped") and x.dim() > 2:  # heads inside tokens, as projections have it
        i = rng.randrange(x.dim() - 2)
        order[i], order[i + 1] = order[i + 1], order[i]
    strides, step = [0] * x.dim(), 1
    if kind.endswith("gaps") and rng.random() < 0.2:
        step = rng.choice((2, 3))
    for dim in reversed(order):
        if x.stride(dim) == 0 and x.shape[dim] > 1:
            continue
        strides[dim] = step
        step *= max(1, x.shape[dim])
        if kind.endswith("gaps") and rng.random() < 0.6:
            step += rng.choice((1, 3, 5, 8, 16))
    return strides
