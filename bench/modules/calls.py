"""Inputs, calls and formulas of `layers` and `models`: a module as its library makes it.

The contestants are the module, a patched copy and a compiled one.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from bench.common import make_call as call_of
from bench.common import worst_errors
from bench.contestant import is_installed
from bench.contrastive_loss import calls as contrastive_loss
from bench.contrastive_loss.cases import LossCase
from bench.measure import Call, Truth, Work
from bench.modules.build import BUILD
from bench.modules.cases import LOSS, ModuleCase
from bench.modules.peers import PrepareModule
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.verify.common import SEEDS


@dataclass(frozen=True)
class Inputs:
    """The original module, what it takes, and, but for "fwd", the gradient of what it returns."""

    module: nn.Module
    tensors: tuple[Tensor, ...]
    grad_out: Tensor | None


def make_inputs(
    case: ModuleCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """The module, in evaluation mode (nothing is dropped out), and random inputs."""
    module = copy.deepcopy(_module(case.module, tuple(case.options.items())))
    module = module.to(device, dtype)
    if mode == "fwd":
        module.requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        _, made = BUILD[case.module](case.batch, **case.options)
        tensors = tuple(_placed(x, dtype, device) for x in made)
        if case.module == LOSS:  # has no parameters
            tensors = tuple(x.requires_grad_(mode != "fwd") for x in tensors)
        if mode == "fwd":
            return Inputs(module, tensors, None)
        with torch.no_grad():
            out = module(*tensors)
        grad_out = torch.randn(out.shape) if out.dim() else torch.ones(())
        return Inputs(module, tensors, grad_out.to(device, out.dtype))


@functools.lru_cache(maxsize=1)
def _module(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A module with random weights, float32."""
    if is_installed("torchvision"):
        import_torchvision()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        make, _ = BUILD[name](1, **dict(options))
        module = make().eval()
        with torch.no_grad():
            for parameter in module.parameters():  # gates that let nothing through, and biases
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return module


def _placed(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A scalar stays float32, as a loss's scale does."""
    to = dtype if tensor.is_floating_point() and tensor.dim() else tensor.dtype
    return tensor.detach().to(device, to)


def make_call(prepare: PrepareModule, inputs: Inputs, mode: str) -> Call:
    """The call to be timed; its gradients are those of the parameters, or of what a loss takes."""
    module = prepare(inputs.module, mode)
    return _call(module, module, inputs, mode)


def _call(module: nn.Module, forward: Callable[..., Tensor], inputs: Inputs, mode: str) -> Call:
    sources = [x for x in (*module.parameters(), *inputs.tensors) if x.requires_grad]
    return call_of(lambda: forward(*inputs.tensors), sources, inputs.grad_out, mode)


def chosen_backend(case: ModuleCase, inputs: Inputs) -> str:
    """Each patched layer chooses for itself."""
    return "patched"


def _loss_case(case: ModuleCase) -> LossCase:
    return LossCase(case.name, case.source, case.batch, case.options["dim"])


def reference(case: ModuleCase, inputs: Inputs, mode: str) -> tuple[Truth, ...]:
    """What the original returns in float64.

    A gradient may be nothing but rounding (that of a key's bias is zero), so that what counts is
    its error relative to the gradients of its layer. A loss alone sums what may cancel.
    """
    if case.module == LOSS:
        return contrastive_loss.reference(
            _loss_case(case), contrastive_loss.Inputs(*inputs.tensors), mode
        )
    exact = copy.deepcopy(inputs.module).double()
    tensors = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs.tensors
    )
    grad_out = None if inputs.grad_out is None else inputs.grad_out.double()
    doubled = Inputs(exact, tensors, grad_out)
    results = make_call(lambda module, mode: module, doubled, mode)()
    outs, gradients = results[: mode != "bwd"], results[mode != "bwd" :]
    layers = [name.rpartition(".")[0] for name, x in exact.named_parameters() if x.requires_grad]
    norms: dict[str, float] = {}
    for layer, gradient in zip(layers, gradients, strict=False):
        norms[layer] = math.hypot(norms.get(layer, 0.0), gradient.norm().item())
    terms = [norms[layer] for layer in layers] or [0.0] * len(gradients)
    return (
        *(Truth(x.detach()) for x in outs),
        *(Truth(x, term) for x, term in zip(gradients, terms, strict=True)),
    )


def yardsticks(case: ModuleCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of the original, one for each result: the worst over eight seeds.

    The first are the very inputs that are judged: what a library sums over a batch, it may round
    after each of its elements. The others are of a batch of one, where the module does not mix
    what is in a batch.
    """
    if case.module == LOSS:
        return contrastive_loss.yardsticks(_loss_case(case), dtype, mode)
    few = replace(case, batch=case.yardstick_batch)
    first, *others = SEEDS
    runs = [(case, first), *((few, seed) for seed in others)]
    samples = (make_inputs(of, dtype, mode, seed) for of, seed in runs)
    return worst_errors(
        (make_call(lambda module, mode: module, x, mode)(), reference(case, x, mode))
        for x in samples
    )


def work(case: ModuleCase, dtype: torch.dtype, mode: str) -> Work:
    """FLOPs as torch and our operators count them; parameters, inputs, output moved once a pass.

    Backward reads them again and the output's gradient, and writes the gradients. Exponentials are
    not counted. Nothing is computed: the tensors have shapes alone.
    """
    inputs = make_inputs(case, dtype, mode, device="meta")
    vlmfast.patch(inputs.module)
    # Not the module itself: the counter's hooks on modules do not bear inputs that are leaves.
    forward = inputs.module.forward
    with FlopCounterMode(display=False) as counter:
        out, *_ = _call(inputs.module, forward, inputs, "fwd" if mode == "fwd" else "fwd+bwd")()
    flops = counter.get_total_flops()
    if mode == "bwd":
        with FlopCounterMode(display=False) as counter:
            forward(*inputs.tensors)
        flops -= counter.get_total_flops()
    held = [*inputs.module.parameters(), *inputs.tensors]
    read = sum(x.nbytes for x in held) + out.nbytes
    written = sum(x.nbytes for x in held if x.requires_grad)
    least = {"fwd": read, "bwd": read + written, "fwd+bwd": 2 * read + written}[mode]
    return Work(flops, least)
