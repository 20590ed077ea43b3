"""The error budget that every kernel keeps, and how a case of a family is measured against it.

The truth is a family's reference in float64. A kernel may err twice as much as torch does in the
same dtype, plus one rounding of its output:

    error(kernel) <= 2 * max over eight seeds of error(torch) + unit roundoff of the output

An error is the L2 norm of the difference over the norm of the truth, or over the norm of the terms
that the truth sums, if that is larger: where terms cancel, the digits of their sum are lost.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
Tensors = dict[str, Tensor]

SEEDS = range(8)


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding to a dtype."""
    return torch.finfo(dtype).eps / 2


def relative_error(actual: Tensor, truth: Tensor, terms: float = 0.0) -> float:
    """L2 norm of the difference, relative to the truth or to the terms that it sums.

    Infinity where the shapes differ, where `actual` is NaN, or where it misses an infinite element.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    finite = truth.isfinite()
    if actual.shape != truth.shape or not torch.equal(actual[~finite], truth[~finite]):
        return float("inf")
    difference = (actual - truth)[finite].norm().item()
    if difference == 0.0:
        return 0.0
    norm = max(truth[finite].norm().item(), terms)
    error = difference / norm if norm else float("inf")
    return float("inf") if math.isnan(error) else error


def budget(torch_errors: Sequence[float], dtype: torch.dtype) -> float:
    """The error that a kernel may have; `torch_errors` holds torch's, one for each seed."""
    return 2.0 * max(torch_errors) + unit_roundoff(dtype)


@dataclass(frozen=True)
class Case:
    """One problem of a family, to be computed in any dtype by any backend.

    Attributes:
        name: what a table calls it.
        make: (generator, dtype, device) to the inputs, tensors and others, by name.
        differentiable: names of the inputs whose gradients are compared.
        kernel: (inputs, backend) to named outputs, by a kernel.
        torch: inputs to the same outputs by torch alone, in the inputs' dtype.
        reference: inputs to the same outputs by the reference.
        terms: (inputs, gradients of the outputs), in float64, to the norm of the terms that each
            output and each "grad_<input>" sums.
    """

    name: str
    make: Callable[[torch.Generator, torch.dtype, str], Inputs]
    differentiable: tuple[str, ...]
    kernel: Callable[[Inputs, str], Tensors]
    torch: Callable[[Inputs], Tensors]
    reference: Callable[[Inputs], Tensors]
    terms: Callable[[Inputs, Tensors], dict[str, float]]


@dataclass(frozen=True)
class Measurement:
    """Errors of one tensor: the kernel's, torch's worst over the seeds, and what is allowed."""

    tensor: str
    error: float
    torch_error: float
    budget: float

    @property
    def passed(self) -> bool:
        return self.error <= self.budget


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers in float64."""
    return {
        name: x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }


def run(
    compute: Callable[[Inputs], Tensors],
    inputs: Inputs,
    differentiable: Sequence[str],
    grad_outputs: Tensors,
) -> Tensors:
    """The outputs named in `grad_outputs`, and the gradients of inputs as "grad_<input>"."""
    leaves = {name: inputs[name].detach().clone().requires_grad_() for name in differentiable}
    outputs = compute({**inputs, **leaves})
    names = list(grad_outputs)
    gradients = torch.autograd.grad(
        [outputs[name] for name in names],
        list(leaves.values()),
        [grad_outputs[name].to(outputs[name].dtype) for name in names],
    )
    results = {name: outputs[name].detach() for name in names}
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return results


def measure(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    first_seed: int = 0,
    kernel: Callable[[Inputs], Tensors] | None = None,
) -> list[Measurement]:
    """Errors of every output and gradient of a case.

    Args:
        case: the problem.
        backend: which kernel computes it.
        dtype: of the inputs.
        device: of the inputs.
        first_seed: the first of the eight seeds; the kernel runs on this one.
        kernel: computes the outputs in place of `case.kernel`.
    """
    errors: dict[str, float] = {}
    ours: Tensors = {}
    torch_errors: dict[str, list[float]] = {}
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(first_seed + seed)
        inputs = case.make(generator, dtype, device)
        exact = in_float64(inputs)
        with torch.no_grad():
            shapes = {name: x.shape for name, x in case.reference(exact).items()}
        grad_outputs = {
            name: torch.randn(shape, generator=generator).to(dtype).to(device)
            for name, shape in shapes.items()
        }
        truth = run(case.reference, exact, case.differentiable, grad_outputs)
        terms = case.terms(exact, in_float64(grad_outputs))
        by_torch = run(case.torch, inputs, case.differentiable, grad_outputs)
        for name, x in by_torch.items():
            error = relative_error(x, truth[name], terms[name])
            torch_errors.setdefault(name, []).append(error)
        if seed == SEEDS[0]:
            compute = kernel or (lambda inputs: case.kernel(inputs, backend))
            ours = run(compute, inputs, case.differentiable, grad_outputs)
            errors = {name: relative_error(x, truth[name], terms[name]) for name, x in ours.items()}
    return [
        Measurement(
            name, error, max(torch_errors[name]), budget(torch_errors[name], ours[name].dtype)
        )
        for name, error in errors.items()
    ]


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """Forces an instruction set of the CPU kernels for a block."""
    outer = os.environ.get("VLMFAST_CPU_ISA")
    os.environ["VLMFAST_CPU_ISA"] = name
    try:
        yield
    finally:
        if outer is None:
            del os.environ["VLMFAST_CPU_ISA"]
        else:
            os.environ["VLMFAST_CPU_ISA"] = outer
