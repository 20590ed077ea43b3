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
    if actual.shape != truth.shape:
        return float("inf")
    finite = truth.isfinite()
    if not finite.all():
        if not torch.equal(actual[~finite], truth[~finite]):
            return float("inf")
        actual, truth = actual[finite], truth[finite]
    difference = (actual - truth).norm().item()
    if difference == 0.0:
        return 0.0
    norm = max(truth.norm().item(), terms)
    error = difference / norm if norm else float("inf")
    return float("inf") if math.isnan(error) else error


def softmax_terms(
    weights: Tensor, value: Tensor, grad_out: Tensor, grad_logsumexp: Tensor | None = None
) -> Tensor:
    """What the roundings of the backward of softmax attention add up to for each weight.

    The gradient of a logit is its weight times the gradient of the weight, less the mean of these:

        P_ij * (sum_d dO_id V_jd - sum_d dO_id O_id)

    Where one key has all the weight the difference is 0. Torch finds exactly that, because it
    subtracts the mean of the very numbers that it has; who computes the mean from the output, and
    so needs no second pass over the keys, finds the rounding of two dot products. Independent
    roundings add up as squares do, once for each level of a tree of sums over d.
    """
    out = weights @ value
    squares = grad_out.square() @ value.square().transpose(-2, -1)
    squares = squares + (grad_out * out).square().sum(-1, keepdim=True)
    levels = 1 + math.log2(max(1, value.shape[-1]))
    terms = (levels * squares).sqrt()
    return terms if grad_logsumexp is None else terms + grad_logsumexp.abs()[..., None]


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


def forward(
    compute: Callable[[Inputs], Tensors], inputs: Inputs, differentiable: Sequence[str]
) -> tuple[Tensors, Tensors]:
    """The outputs, and the inputs that they are to be differentiated by."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in differentiable}
    return compute({**inputs, **leaves}), leaves


def backward(outputs: Tensors, leaves: Tensors, grad_outputs: Tensors) -> Tensors:
    """The outputs, and the gradients of `leaves` as "grad_<input>"."""
    names = [name for name in outputs if outputs[name].requires_grad]
    gradients = torch.autograd.grad(
        [outputs[name] for name in names],
        list(leaves.values()),
        [grad_outputs[name].to(outputs[name].dtype) for name in names],
    )
    results = {name: x.detach() for name, x in outputs.items()}
    results.update({f"grad_{name}": g for name, g in zip(leaves, gradients, strict=True)})
    return results


def run(
    compute: Callable[[Inputs], Tensors],
    inputs: Inputs,
    differentiable: Sequence[str],
    grad_outputs: Tensors,
) -> Tensors:
    """Outputs, and gradients of inputs as "grad_<input>"."""
    return backward(*forward(compute, inputs, differentiable), grad_outputs)


@dataclass(frozen=True)
class Problem:
    """What a case makes of one seed, and what must come out.

    Attributes:
        inputs: of the case.
        grad_outputs: gradients of the outputs, in the dtype of the inputs.
        truth: outputs and gradients by the reference in float64.
        terms: norms of the terms that each of them sums.
        torch_errors: torch's error of each.
    """

    inputs: Inputs
    grad_outputs: Tensors
    truth: Tensors
    terms: dict[str, float]
    torch_errors: dict[str, float]

    def errors(self, results: Tensors) -> dict[str, float]:
        """The error of each output and gradient."""
        return {
            name: relative_error(x, self.truth[name], self.terms[name])
            for name, x in results.items()
        }


def pose(case: Case, dtype: torch.dtype, device: str, seed: int) -> Problem:
    """Makes the problem of a seed, and has the reference and torch solve it."""
    generator = torch.Generator().manual_seed(seed)
    inputs = case.make(generator, dtype, device)
    exact = in_float64(inputs)
    outputs, leaves = forward(case.reference, exact, case.differentiable)
    grad_outputs = {
        name: torch.randn(x.shape, generator=generator).to(dtype).to(device)
        for name, x in outputs.items()
    }
    truth = backward(outputs, leaves, grad_outputs)
    terms = case.terms(exact, in_float64(grad_outputs))
    problem = Problem(inputs, grad_outputs, truth, terms, {})
    by_torch = run(case.torch, inputs, case.differentiable, grad_outputs)
    problem.torch_errors.update(problem.errors(by_torch))
    return problem


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
    problem = pose(case, dtype, device, first_seed)
    compute = kernel or (lambda inputs: case.kernel(inputs, backend))
    ours = run(compute, problem.inputs, case.differentiable, problem.grad_outputs)
    torch_errors = [problem.torch_errors]
    torch_errors += [pose(case, dtype, device, first_seed + i).torch_errors for i in SEEDS[1:]]
    measurements = []
    for name, error in problem.errors(ours).items():
        by_seed = [errors[name] for errors in torch_errors]
        limit = budget(by_seed, ours[name].dtype)
        measurements.append(Measurement(name, error, max(by_seed), limit))
    return measurements


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
