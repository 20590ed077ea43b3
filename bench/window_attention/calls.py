"""Inputs, calls and formulas of the `window_attention` family.

A call begins at the output of the qkv projection and ends at the input of the output projection.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench import common
from bench.measure import Truth, Work
from bench.window_attention.cases import WindowCase
from bench.window_attention.peers import WindowAttention, torchvision_steps
from vlmfast.reference.window_attention import window_attention
from vlmfast.verify.common import SEEDS
from vlmfast.verify.window_attention import summed_terms


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
    numbers = common.normal_numbers(seed, device)

    def normal(*shape: int) -> Tensor:
        return numbers(*shape).to(dtype)

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
    """The call to be timed; its gradients are those of qkv, bias and any logit_scale."""
    return common.make_call(
        lambda: attention(inputs.qkv, inputs.bias, inputs.logit_scale),
        inputs.sources(),
        inputs.grad_out,
        mode,
    )


def chosen_backend(case: WindowCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    window = (case.window, case.window)
    function = VF.shifted_window_attention
    return vlmfast.explain(function, inputs.qkv, case.heads, window).backend


def reference(case: WindowCase, inputs: Inputs, mode: str) -> tuple[Truth, ...]:
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
    results = [result.detach() for result in make_call(attention, doubled, mode)()]
    if mode == "fwd":
        return tuple(map(Truth, results))
    out, gradients = results[: mode == "fwd+bwd"], results[mode == "fwd+bwd" :]
    with torch.no_grad():
        terms = _summed_terms(case, doubled)
    names = ("grad_query", "grad_bias", "grad_logit_scale")  # that of query holds qkv's
    return (
        *map(Truth, out),
        *(Truth(x, terms[name]) for x, name in zip(gradients, names, strict=False)),
    )


def _summed_terms(case: WindowCase, inputs: Inputs) -> dict[str, float]:
    """The gradients of bias and logit_scale sum over every window, and cancel."""
    arguments = {
        "query": inputs.qkv,
        "bias": inputs.bias,
        "logit_scale": inputs.logit_scale,
        "num_heads": case.heads,
        "window_height": case.window,
        "window_width": case.window,
        "shift_height": case.shift,
        "shift_width": case.shift,
        "scale": case.head_dim**-0.5,
    }
    return summed_terms(arguments, {"out": inputs.grad_out})


def yardsticks(case: WindowCase, dtype: torch.dtype, mode: str, device: str = "cpu") -> list[float]:
    """The errors of torchvision's steps, one for each result: the worst over eight seeds.

    One image for each seed: images differ no more than seeds do.
    """
    one = replace(case, batch=1)
    steps = torchvision_steps(one)
    images = (make_inputs(one, dtype, mode, seed, device) for seed in SEEDS)
    return common.worst_errors(
        (make_call(steps, inputs, mode)(), reference(one, inputs, mode)) for inputs in images
    )


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
