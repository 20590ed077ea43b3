"""Registration that every family shares, and the loading of the C++ extension."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

NAMESPACE = "vlmfast"

# Inductor must hand an operator the very strides that its fake saw, because output strides follow
# input strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _load_extension() -> str | None:
    """Loads the library vlmfast._C, which registers the C++ kernels; returns why not, or None."""
    try:
        found = importlib.util.find_spec("vlmfast._C")
    except ImportError:  # an import hook may hide it
        found = None
    if found is None or found.origin is None:
        return "the C++ extension vlmfast._C is not built"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return f"the C++ extension vlmfast._C does not load: {error}"
    return None


EXTENSION_ERROR = _load_extension()


def define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Defines the operator `vlmfast::name` with its fake implementation; returns its overload.

    Args:
        name: `<family>_<backend>` or `<family>_backward_<backend>`.
        schema: arguments and results, as torch.library.define takes them.
        fake: makes empty results of the right shape, dtype and strides.
    """
    _library.define(name + schema, tags=_TAGS)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name).default
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _vmap_by_loop(operator), lib=_library)
    return operator


def _vmap_by_loop(operator: Any) -> Callable[..., Any]:
    """torch.vmap for an operator that returns a tuple of tensors: a call for each element."""

    def rule(info: Any, in_dims: Sequence[int | None], *args: Any) -> Any:
        if info.batch_size == 0:
            raise NotImplementedError(f"{operator}: vmap over a dimension of size 0")
        calls = [
            operator(
                *(
                    arg if dim is None else arg.select(dim, index)
                    for arg, dim in zip(args, in_dims, strict=True)
                )
            )
            for index in range(info.batch_size)
        ]
        results = tuple(torch.stack(slices) for slices in zip(*calls, strict=True))
        return results, (0,) * len(results)

    return rule


def register_kernel(name: str, dispatch_keys: Sequence[str], kernel: Callable[..., Any]) -> None:
    """Registers a Python function as the kernel of `vlmfast::name`."""
    for dispatch_key in dispatch_keys:
        _library.impl(name, kernel, dispatch_key)


def has_kernel(name: str, dispatch_key: str) -> bool:
    """Whether `vlmfast::name` has a kernel under the dispatch key."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", dispatch_key)


def below_autograd(operator: Any, *args: Any) -> Any:
    """Calls an operator from within its own autograd kernel or autograd.Function."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def call(operator: Any, *args: Any) -> Any:
    """Calls an operator, past its autograd kernel where that would only pass the call on.

    A kernel in Python costs its way through the dispatcher, some 4 us, also when nothing requires
    a gradient.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or forward_ad._current_level >= 0
        or (torch.is_grad_enabled() and torch._C._any_requires_grad(*args))
    ):
        return operator(*args)
    return below_autograd(operator, *args)


def register_autograd(name: str, operator: Any, function: type[torch.autograd.Function]) -> None:
    """Makes an autograd.Function the autograd kernel of `vlmfast::name`.

    `function.forward(ctx, *args)` calls `below_autograd(operator, *args)`; where no gradient is
    asked for it is not entered, so that nothing is saved.
    """
    # Function.apply refuses to run inside torch.func transforms, because it cannot know that it is
    # within the dispatcher. Here it is: the transform has been peeled off already, as it is for
    # autograd kernels in C++. So the plain apply of the base class is right.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def autograd_kernel(*args: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_forward_mode(name, args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return below_autograd(operator, *args)
        if torch._C._are_functorch_transforms_active():
            with enable_single_level_autograd_function():
                return apply(*args)
        return apply(*args)

    _library.impl(name, autograd_kernel, "Autograd")


def _refuse_forward_mode(name: str, args: Sequence[Any]) -> None:
    for arg in args:
        if isinstance(arg, Tensor) and forward_ad.unpack_dual(arg).tangent is not None:
            raise NotImplementedError(
                f"{NAMESPACE}::{name} has no forward-mode derivative (torch.func.jvp, jacfwd); "
                'use reverse mode (torch.func.vjp, jacrev, grad), or backend="reference"'
            )


def forbid_double_backward(name: str, operator: Any) -> None:
    """Lets gradients of the backward operator `vlmfast::name` fail with a clear error.

    The error comes when a second derivative is really taken, not when the first is computed with
    create_graph=True.
    """

    class FirstDerivativeOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            return below_autograd(operator, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{NAMESPACE}::{name} cannot be differentiated: double backward is not "
                'implemented; use backend="reference" where second derivatives are needed'
            )

    register_autograd(name, operator, FirstDerivativeOnly)


def register_flops(operator: Any, formula: Callable[..., int]) -> None:
    """Registers a formula for torch.utils.flop_counter; it receives the operator's arguments."""
    register_flop_formula(operator._overloadpacket, get_raw=True)(formula)


def heads_inside_tokens(tensor: Tensor) -> bool:
    """Whether a (B, H, L, D) tensor lies in memory as (B, L, H, D)."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    return guard_or_false(tensor.stride(1) < tensor.stride(2))


def dense_like(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty, dense (B, H, L, D) tensor in the dimension order of `tensor`.

    Memory order is (B, L, H, D) where the heads of `tensor` lie inside its tokens, as a packed
    projection leaves them, otherwise (B, H, L, D). Gaps and expanded strides are never inherited.
    """
    batch, heads, length, dim = shape
    if heads_inside_tokens(tensor):
        return tensor.new_empty((batch, length, heads, dim)).transpose(1, 2)
    return tensor.new_empty((batch, heads, length, dim))
