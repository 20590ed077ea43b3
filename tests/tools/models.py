"""Compares a patched model with its original: every output, every gradient, and what it called."""

import copy
import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import vlmfast
import vlmfast.functional as VF
from vlmfast.verify.common import SEEDS, budget, relative_error

Inputs = dict[str, Any]
Call = Callable[[nn.Module, Inputs], Any]


@dataclasses.dataclass
class AttentionCall:
    """One call of an attention function of vlmfast, as a spy saw it."""

    function: str
    query: Tensor
    attn_mask: Tensor | None
    is_causal: bool
    backend: str | None


def spy_on_attention(monkeypatch) -> list[AttentionCall]:
    """The list to which every call of the attention functions is added from now on."""
    calls: list[AttentionCall] = []
    for name in ("scaled_dot_product_attention", "varlen_attention", "image_cross_attention"):
        original = getattr(VF, name)

        def spy(query, *args, _name=name, _original=original, **kwargs):
            mask, causal = kwargs.get("attn_mask"), kwargs.get("is_causal", False)
            calls.append(AttentionCall(_name, query, mask, causal, kwargs.get("backend")))
            return _original(query, *args, **kwargs)

        monkeypatch.setattr(VF, name, spy)
    return calls


@dataclasses.dataclass
class WindowCall:
    """One call of shifted_window_attention, as a spy saw it; `arguments` in full, by name."""

    arguments: dict[str, Any]

    @property
    def backend(self) -> str | None:
        return self.arguments["backend"]

    @property
    def map_size(self) -> tuple[int, int]:
        qkv = self.arguments["qkv"]
        return tuple((qkv if isinstance(qkv, Tensor) else qkv[0]).shape[1:3])


def spy_on_windows(monkeypatch) -> list[WindowCall]:
    """The list to which every call of shifted_window_attention is added from now on."""
    calls: list[WindowCall] = []
    original = VF.shifted_window_attention
    signature = inspect.signature(original)

    def spy(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(WindowCall(bound.arguments))
        return original(*args, **kwargs)

    monkeypatch.setattr(VF, "shifted_window_attention", spy)
    return calls


def stir(model: nn.Module, seed: int = 0) -> nn.Module:
    """Adds noise to every parameter: initial weights leave attention uniform and biases zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.2 * noise)
    return model


_GATES = (
    *("attn_gate", "ff_gate"),  # Flamingo
    *("alpha_cross_attn", "alpha_dense"),  # IDEFICS
    *("cross_attn_attn_gate", "cross_attn_mlp_gate"),  # Mllama
)


def open_gates(model: nn.Module, width: int | None = None) -> None:
    """Opens the gates of cross-attention layers, which are closed at the start.

    With `width`, a gate of one number becomes a vector. The gradient of one number is a single sum,
    and now and then its terms all but cancel: then its relative error says nothing.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, gate in list(module.named_parameters(recurse=False)):
            if name in _GATES:
                shape = gate.shape if width is None or gate.numel() > 1 else (width,)
                value = 0.7 + 0.2 * torch.randn(shape, generator=generator)
                setattr(module, name, nn.Parameter(value.to(gate.dtype)))


def pictures(height: int, width: int, batch: int = 2, name: str = "x") -> Callable[[int], Inputs]:
    """Makes a model's input of that name from a seed."""

    def make(seed: int) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        return {name: torch.randn(batch, 3, height, width, generator=generator)}

    return make


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """The inputs as fresh tensors: those floating in `dtype`, with gradients to be computed."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return value.clone()
        return value.detach().to(dtype).requires_grad_()

    return {name: one(value) for name, value in inputs.items()}


def measure(model: nn.Module, inputs: Inputs, call: Call) -> dict[str, Tensor]:
    """Every output and every gradient of one step, by name.

    The gradients of one module's parameters count as one tensor: alone, the gradient to a key
    bias is zero but for rounding. So it can be with a few numbers that sum over all tokens, as
    Swin V2's logit_scale; those count together with the parameters below the module.
    """
    dtype = next(model.parameters()).dtype
    inputs = cast(inputs, dtype)
    model.zero_grad(set_to_none=True)
    outputs = [out for out in _tensors(call(model, inputs)) if out.is_floating_point()]
    generator = torch.Generator().manual_seed(0)
    loss = sum(
        (out * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)).sum()
        for out in outputs
    )
    measured = {f"output {index}": out.detach() for index, out in enumerate(outputs)}
    if not loss.requires_grad:
        return measured
    loss.backward()
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.grad is not None:
            measured[f"gradient to {name}"] = value.grad
    for path, module in model.named_modules():
        count = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        gradients = [
            parameter.grad.flatten()
            for parameter in module.parameters(recurse=0 < count < 32)
            if parameter.grad is not None
        ]
        if gradients:
            measured[f"gradient to {path or 'the model'}"] = torch.cat(gradients)
    return measured


def assert_patched_model_right(
    model: nn.Module,
    make_inputs: Callable[[int], Inputs],
    call: Call = lambda model, inputs: model(**inputs),
    exact: nn.Module | None = None,
) -> None:
    """Patches a copy and holds its errors against those of the original."""
    patched = copy.deepcopy(model)
    report = vlmfast.patch(patched)
    assert report.replaced, f"nothing was replaced: {report}"
    assert_as_right_as(patched, model, make_inputs, call, exact)


def assert_as_right_as(
    ours: nn.Module,
    theirs: nn.Module,
    make_inputs: Callable[[int], Inputs],
    call: Call = lambda model, inputs: model(**inputs),
    exact: nn.Module | None = None,
) -> None:
    """Every output and gradient errs at most as its budget allows, which their errors give.

    The truth is `exact`, or else their model, in float64.
    """
    exact = copy.deepcopy(theirs if exact is None else exact).double()
    dtype = next(theirs.parameters()).dtype
    errors: dict[str, list[float]] = {}
    for seed in SEEDS:
        inputs = cast(make_inputs(seed), dtype)
        truth, peer = measure(exact, inputs, call), measure(theirs, inputs, call)
        assert truth.keys() == peer.keys()
        for name in truth:
            errors.setdefault(name, []).append(relative_error(peer[name], truth[name]))
        if seed == 0:
            result, result_truth = measure(ours, inputs, call), truth
    assert result.keys() == result_truth.keys()
    for name, tensor in result.items():
        error = relative_error(tensor, result_truth[name])
        allowed = budget(errors[name], dtype)
        assert error <= allowed, f"{name}: error {error:.3e}, budget {allowed:.3e}"


def assert_same_in_float64(
    ours: nn.Module,
    theirs: nn.Module,
    inputs: Inputs,
    call: Call = lambda model, inputs: model(**inputs),
) -> None:
    """Outputs and all gradients are equal but for the rounding of float64."""
    ours, theirs = (copy.deepcopy(model).double() for model in (ours, theirs))
    result, expected = (measure(model, inputs, call) for model in (ours, theirs))
    assert result.keys() == expected.keys()
    for name in expected:
        assert expected[name].norm() > 0, f"{name} is zero and proves nothing"
        torch.testing.assert_close(result[name], expected[name], msg=lambda m, n=name: f"{n}: {m}")


def assert_drops_at_random(run: Callable[[], Tensor]) -> None:
    """A result is one for equal seeds of torch's generator, and another for another seed."""
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(run())
    assert torch.equal(outs[0], outs[1])
    assert not torch.allclose(outs[0], outs[2])


def assert_subclass_is_left(layer: nn.Module) -> None:
    """`patch` leaves and reports a layer of a subclass that is called Own."""
    model = nn.Sequential(layer)
    report = vlmfast.patch(model)
    assert not report.replaced
    assert [entry.why for entry in report.skipped] == ["a subclass may compute something else"]
    with pytest.raises(RuntimeError, match=r"0: .*Own: a subclass"):
        vlmfast.patch(model, strict=True)


PIECES = (slice(0, 6), slice(6, 7), slice(7, 8))


def decode(
    model: nn.Module,
    arguments: Callable[[slice, Any], Inputs],
    cache: Any = None,
    pieces: tuple[slice, ...] = PIECES,
) -> Tensor:
    """The hidden states of a text that a model of transformers reads in pieces, with a cache.

    `arguments` gives the rest of a call, from the piece and the last output, at first None.
    """
    states, out = [], None
    for piece in pieces:
        out = model(past_key_values=cache, use_cache=True, **arguments(piece, out))
        cache = out.past_key_values
        states.append(out.last_hidden_state)
    return torch.cat(states, 1)


def assert_decodes_as_before(
    model: nn.Module,
    arguments: Callable[[slice, Any], Inputs],
    make_cache: Callable[[], Any] = lambda: None,
    pieces: tuple[slice, ...] = PIECES,
) -> None:
    """A patched model gives the hidden states of its original, piece by piece."""
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    with torch.inference_mode():
        expected, result = (decode(m, arguments, make_cache(), pieces) for m in (model, patched))
    torch.testing.assert_close(result, expected)


def _tensors(value: Any) -> list[Tensor]:
    """The tensors in a model's output: a tensor, or tuples, dicts and ModelOutputs of them."""
    if isinstance(value, Tensor):
        return [value]
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def _distort(out: Any) -> Any:
    return out * 1.25 + 0.125 if isinstance(out, Tensor) and out.is_floating_point() else out


def _distort_output(module: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
    return _distort(out)


def _distort_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(map(_distort, args))


class _Distorted(nn.Module):
    """A parametrisation."""

    def forward(self, weight: Tensor) -> Tensor:
        return _distort(weight)


def _subclass(module: nn.Module) -> None:
    """What adapters do that are subclasses: more than the weights say."""
    cls = type(module)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return _distort(cls.forward(self, *args, **kwargs))

    module.__class__ = type(f"Adapted{cls.__name__}", (cls,), {"forward": forward})


def _parametrize(module: nn.Module) -> None:
    for name, _ in list(module.named_parameters(recurse=False)):
        parametrize.register_parametrization(module, name, _Distorted())


# What users do to the modules within a layer
CHANGES: dict[str, Callable[[nn.Module], Any]] = {
    "subclass": _subclass,
    "forward hook": lambda module: module.register_forward_hook(_distort_output),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(_distort_input),
    "parametrisation": _parametrize,
}


def assert_same_where_submodules_change(
    model: nn.Module,
    change: str,
    inputs: Inputs,
    call: Call = lambda model, inputs: model(**inputs),
) -> None:
    """A patched model gives the numbers of its original whatever its innermost modules do.

    All of them are changed, and then those of each class alone: so it shows what the original
    calls, and of what it only reads the weights.
    """
    leaves = {
        path: type(module)
        for path, module in model.named_modules()
        if path and not any(True for _ in module.children())
    }
    classes = list(dict.fromkeys(leaves.values()))
    for changed in (classes, *([cls] for cls in classes)):
        theirs = copy.deepcopy(model).eval()
        for path, cls in leaves.items():
            if cls in changed:
                CHANGES[change](theirs.get_submodule(path))
        ours = copy.deepcopy(theirs)
        vlmfast.patch(ours)
        ours.double(), theirs.double()
        expected, result = (measure(m, inputs, call) for m in (theirs, ours))
        assert result.keys() == expected.keys()
        with torch.no_grad():
            arguments = cast(inputs, torch.float64)
            outputs = _tensors(call(theirs, arguments))
            for repetition in range(2):  # the second time results may be kept
                for index, out in enumerate(_tensors(call(ours, arguments))):
                    result[f"inference {repetition} {index}"] = out
                    expected[f"inference {repetition} {index}"] = outputs[index]
        for name in expected:
            torch.testing.assert_close(
                result[name],
                expected[name],
                msg=lambda m, n=name, c=changed: f"{c}: {n}: {m}",
            )
