"""Registration that every family shares, and the loading of the C++ extension."""

import importlib
import importlib.util
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from vlmfast.ops.flops import register_flops

NAMESPACE = "vlmfast"

BACKENDS = ("cpu", "triton")  # whose kernels are operators

_apply: dict[Any, Callable[..., Any]] = {}  # what an operator's autograd kernel calls

# Inductor must hand an operator the very strides that its fake saw, because output strides follow
# input strides.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _load_extension() -> tuple[str | None, str | None]:
    """Loads the library vlmfast._C, which registers the C++ kernels.

    The environment variable VLMFAST_EXTENSION names another build of it. Returns the file, and why
    it is not loaded, or None.

    Raises:
        ValueError: VLMFAST_EXTENSION names nothing that loads.
    """
    wanted = os.environ.get("VLMFAST_EXTENSION")
    if wanted:
        try:
            torch.ops.load_library(wanted)
        except OSError as error:
            raise ValueError(
                f"VLMFAST_EXTENSION: expected the file of a C++ extension, got {wanted!r}: {error}"
            ) from None
        return wanted, None
    try:
        found = importlib.util.find_spec("vlmfast._C")
    except ImportError:  # an import hook may hide it
        found = None
    if found is None or found.origin is None:
        return None, "the C++ extension vlmfast._C is not built"
    try:
        torch.ops.load_library(found.origin)
    except OSError as error:
        return found.origin, f"the C++ extension vlmfast._C does not load: {error}"
    return found.origin, None


EXTENSION_FILE, EXTENSION_ERROR = _load_extension()


def register_family(
    family: str,
    schemas: tuple[str, str],
    fakes: tuple[Callable[..., Any], Callable[..., Any]],
    autograd_function: Callable[[Any, Any], type[torch.autograd.Function]],
    flops: tuple[Callable[..., int], Callable[..., int]],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Defines the operators of a family; returns their overloads by backend.

    For each backend these are `vlmfast::<family>_<backend>` and
    `vlmfast::<family>_backward_<backend>`, of which `schemas`, `fakes` and `flops` are pairs. The
    Triton kernels are registered, too: `forward` and `backward` of the files of these
    names in vlmfast/kernels/<family>/.

    Args:
        autograd_function: makes the one of a backend, from its two operators.
    """
    forward: dict[str, Any] = {}
    backward: dict[str, Any] = {}
    for backend in BACKENDS:
        name, backward_name = f"{family}_{backend}", f"{family}_backward_{backend}"
        forward[backend] = define(name, schemas[0], fakes[0])
        backward[backend] = define(backward_name, schemas[1], fakes[1])
        function = autograd_function(forward[backend], backward[backend])
        register_autograd(name, forward[backend], function)
        forbid_double_backward(backward_name, backward[backend])
        register_flops(forward[backend], flops[0])
        register_flops(backward[backend], flops[1])
    # The interpreter runs Triton kernels on CPU tensors, so they are registered there too.
    keys = ("CPU", "CUDA")
    register_kernel(f"{family}_triton", keys, _triton_kernel(family, "forward"))
    register_kernel(f"{family}_backward_triton", keys, _triton_kernel(family, "backward"))
    return forward, backward


def _triton_kernel(family: str, function: str) -> Callable[..., Any]:
    def kernel(*args: Any) -> Any:
        module = importlib.import_module(f"vlmfast.kernels.{family}.{function}")  # imports Triton
        return getattr(module, function)(*args)

    return kernel


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


def below_autograd(operator: Any, *args: Any) -> Any:
    """Calls an operator without its autograd kernel, as that kernel itself does."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator._op(*args)  # not operator(...): a frame of Python less


def call_in_forward(operator: Any, *args: Any) -> Any:
    """Calls an operator from the forward of its own autograd.Function.

    That disables gradients, which transforms around this one, as in nested torch.func.grad, need.
    """
    if not torch._C._are_functorch_transforms_active():
        return below_autograd(operator, *args)
    with torch.enable_grad():
        return below_autograd(operator, *args)


def is_eager() -> bool:
    """Whether nobody watches or transforms what is called: no tracer, no mode, no torch.func."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def call(operator: Any, *args: Any) -> Any:
    """Calls an operator as its autograd kernel would, where nobody watches.

    An autograd kernel in Python costs the dispatcher's way to it, some 4 us, and several times as
    much where other code has taken the cache meanwhile.
    """
    if not is_eager():
        return operator(*args)
    if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
        return below_autograd(operator, *args)
    if torch.is_inference_mode_enabled():  # and gradients all the same
        return operator(*args)
    return _apply[operator](*args)


def register_autograd(name: str, operator: Any, function: type[torch.autograd.Function]) -> None:
    """Makes an autograd.Function the autograd kernel of `vlmfast::name`.

    `function.forward(ctx, *args)` calls `call_in_forward(operator, *args)`; where no gradient is
    asked for it is not entered, so that nothing is saved.
    """
    # Function.apply refuses to run inside torch.func transforms, because it cannot know that it is
    # within the dispatcher. Here it is: the transform has been peeled off already, as it is for
    # autograd kernels in C++. So the plain apply of the base class is right.
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    _apply[operator] = apply

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
            return call_in_forward(operator, *args)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise RuntimeError(
                f"{NAMESPACE}::{name} cannot be differentiated: double backward is not "
                'implemented; use backend="reference" where second derivatives are needed'
            )

    register_autograd(name, operator, FirstDerivativeOnly)


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
