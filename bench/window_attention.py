"""Inputs, calls and formulas of the `window_attention` family.

A call begins at the output of the qkv projection and ends at the input of the output projection.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench.cases import WindowCase
from bench.measure import Work
from bench.peers import WindowAttention, window_sequence
from vlmfast.reference.window_attention import window_attention
from vlmfast.verify.common import SEEDS, relative_error


@dataclass(frozen=True)
class Inputs:
    """qkv (B, H, W, 3C), bias (heads, M, M), logit_scale (heads,), and the output's gradient."""

    qkv: Tensor
    bias: Tensor
    logit_scale: Tensor | None
    grad_out: Tensor

    def sources(self) -> tuple[Tensor, ...]:
        """What gets a gradient."""
        given = (self.qkv, self.bias, self.logit_scale)
        return tuple(x for x in given if x is not None)


def make_inputs(
    case: WindowCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Inputs as a model's projection leaves them, all in one dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    size, tokens = (case.batch, case.size, case.size), case.window**2
    qkv, bias = normal(*size, 3 * case.channels), normal(case.heads, tokens, tokens)
    logit_scale = normal(case.heads).abs() + 10.0 if case.is_cosine else None
    inputs = Inputs(qkv, bias, logit_scale, normal(*size, case.channels))
    for tensor in inputs.sources():
        tensor.requires_grad_(mode != "fwd")
    return inputs


def make_call(
    attention: WindowAttention, inputs: Inputs, mode: str
) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed, without arguments.

    It returns (out,) for "fwd", the gradients of qkv, bias and, where there is one, logit_scale for
    "bwd" (of a forward pass done here, once), and all of these for "fwd+bwd".
    """
    sources = inputs.sources()

    def forward() -> tuple[Tensor, ...]:
        return (attention(inputs.qkv, inputs.bias, inputs.logit_scale),)

    def both() -> tuple[Tensor, ...]:
        (out,) = forward()
        return (out, *torch.autograd.grad(out, sources, inputs.grad_out))

    if mode == "fwd":
        return forward
    if mode == "fwd+bwd":
        return both

    (out,) = forward()

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, sources, inputs.grad_out, retain_graph=True)

    return backward


def chosen_backend(case: WindowCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    window = (case.window, case.window)
    function = VF.shifted_window_attention
    return vlmfast.explain(function, inputs.qkv, case.heads, window).backend


def reference(case: WindowCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        geometry = (case.heads, case.window, case.window, case.shift, case.shift)
        scale = case.head_dim**-0.5
        tensors = (qkv, None, None, bias, logit_scale, None)
        return window_attention(*tensors, *geometry, scale=scale)[0]

    def exact(tensor: Tensor) -> Tensor:
        return tensor.detach().double().requires_grad_(tensor.requires_grad)

    logit_scale = None if inputs.logit_scale is None else exact(inputs.logit_scale)
    doubled = Inputs(exact(inputs.qkv), exact(inputs.bias), logit_scale, exact(inputs.grad_out))
    return tuple(result.detach() for result in make_call(attention, doubled, mode)())


def yardsticks(case: WindowCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of torchvision's steps, one for each result: the worst over eight seeds."""
    steps = window_sequence(case)
    errors = []
    for seed in SEEDS:
        inputs = make_inputs(case, dtype, mode, seed)
        results = make_call(steps, inputs, mode)()
        truths = reference(case, inputs, mode)
        errors.append([relative_error(*pair) for pair in zip(results, truths, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


def work(case: WindowCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without.

    With P = windows * heads * M^2 pairs of tokens, forward is two products, 4 P D; backward is five
    (the logits again, dP, dV, dQ, dK), 10 P D; each takes P exponentials. With E elements in the
    output, forward reads 3 E and the bias and writes E; backward reads 3 E, the bias and the
    output's gradient, and writes 3 E and the bias's gradient: it needs neither the output nor any
    statistics.
    """
    tokens = case.window**2
    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[mode]
    pairs = case.windows * case.heads * tokens**2
    passes = {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[mode]
    element = case.batch * case.size**2 * case.channels
    bias = case.heads * tokens**2
    forward, backward = 4 * element + bias, 7 * element + 2 * bias
    least = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
    return Work(products * 2 * pairs * case.head_dim, least * dtype.itemsize, passes * pairs)
