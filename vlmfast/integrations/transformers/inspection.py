"""Which layers go through `AttentionInterface`, and which of them must stay.

A patched layer finds our attention function by the name that its config carries. So a layer stays
if its code asks for that name and would do something else, or if the function that it called
before, "eager", is not softmax attention.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from vlmfast.integrations.rules import code_names
from vlmfast.integrations.transformers.common import NAME

__all__ = ["eager_function", "refusal", "uses_interface", "weights_used_by"]


def eager_function(cls: type[nn.Module]) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that a layer of the library, or one of ours in its place, runs on "eager"."""
    bases: Any = cls.__mro__
    theirs = next(base for base in bases if not base.__module__.startswith("vlmfast."))
    forward = inspect.unwrap(theirs.forward)
    return forward.__globals__[_eager_name(forward)]


def _eager_name(forward: Callable[..., Any]) -> str:
    """The eager function that a layer names, as eager_attention_forward; "" if it names none."""
    names = (name for name in forward.__code__.co_names if name.endswith("eager_attention_forward"))
    return next(names, "")


def uses_interface(module: nn.Module) -> bool:
    """Whether a module looks its attention function up by the name in its config."""
    return hasattr(getattr(module, "config", None), "_attn_implementation") and (
        "ALL_ATTENTION_FUNCTIONS" in code_names(type(module).forward)
    )


# What every eager function may take.
_EAGER_ARGUMENTS = {
    *("module", "query", "key", "value", "attention_mask"),
    *("query_states", "key_states", "value_states"),
    *("scaling", "dropout", "is_causal", "position_bias", "kwargs"),
}


def refusal(module: nn.Module) -> str | None:
    """Why a layer that uses the interface must stay as it is, or None."""
    config: Any = module.config
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager"):
        return f"attn_implementation is {implementation!r}; only sdpa and eager are replaced"
    cls = type(module)
    forward = inspect.unwrap(cls.forward)
    if not _eager_name(forward):
        return "no eager_attention_forward to return attention weights"
    functions = forward.__globals__["ALL_ATTENTION_FUNCTIONS"]
    theirs = functions.get_interface(implementation, None)
    if theirs is not (sdpa_attention_forward if implementation == "sdpa" else None):
        return f"{implementation!r} is registered as a function that is not transformers' own"
    why = _notices_name(cls, implementation)  # type: ignore[arg-type]  # classes are hashable
    if why is None and implementation == "eager":
        why = _unlike_softmax(eager_function(cls))
    if why is None and not _library_supports_sdpa(cls):
        why = "its models do not support sdpa: they may read the weights of any layer"
    return why


def weights_used_by(parent: nn.Module, module: Any) -> str | None:
    """Why a layer must go on returning its weights, which sdpa never does and eager always."""
    name = type(parent).__name__
    if name in _RETURNS_WEIGHTS and module.config._attn_implementation == "eager":
        return f"{name} around it returns its weights, whether they are asked for or not"
    return None


# Modules of transformers that hand out the weights of their attention layer unasked.
_RETURNS_WEIGHTS = ("Kosmos2ImageToTextProjection", "Kosmos2_5ImageToTextProjection")


def _library_supports_sdpa(cls: type[nn.Module]) -> bool:
    """Whether the models of the file that a layer comes from can run on sdpa."""
    home = sys.modules[inspect.unwrap(cls.forward).__module__]
    return any(
        isinstance(value, type)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == home.__name__
        and value._supports_sdpa
        for value in vars(home).values()
    )


# Functions that ask a config whether its implementation is flash attention, and nothing else.
_ASKS_FOR_FLASH = ("is_flash_attention_requested", "get_max_seqlen")


@cache
def _notices_name(cls: type[nn.Module], implementation: str) -> str | None:
    """Why a layer would compute something else if its config named our function, or None.

    It must look its attention function up by that name. Whatever else its code does with the name
    has to come out for ours as for the one it has, and its config must stay with it.
    """
    looks_up = False
    for method in _methods(cls):
        for name in code_names(method):
            helper = method.__globals__.get(name)
            if name not in _ASKS_FOR_FLASH and "_attn_implementation" in _names_of(helper):
                return f"{name}, which it calls, asks for the name of the implementation"
        if "config" not in code_names(method):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            return f"the source of its {method.__name__} is not at hand"
        holder = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Attribute) and node.attr == "config"):
                continue
            around = holder[node]
            if isinstance(around, ast.Attribute) and around.attr != "_attn_implementation":
                continue
            if isinstance(around, ast.Attribute):
                use = holder[around]
                if _is_lookup(use):
                    looks_up = True
                elif not _same_answer(use, implementation):
                    return f"its code asks for the implementation: {ast.unparse(use)}"
            elif not _asks_for_flash(around) and not _reads_one_setting(around):
                return f"its code hands its config on: {ast.unparse(around)}"
    return None if looks_up else "it looks its attention function up in a way of its own"


def _methods(cls: type[nn.Module]) -> Iterator[Any]:
    """The functions of a layer that run after it is built, torch's own left out."""
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if isinstance(method, (staticmethod, classmethod)):
            method = method.__func__
        method = inspect.unwrap(method) if inspect.isfunction(method) else None
        if method and name != "__init__" and not method.__module__.startswith("torch."):
            yield method


def _names_of(value: Any) -> frozenset[str]:
    return code_names(value) if inspect.isfunction(value) else frozenset()


def _is_lookup(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "ALL_ATTENTION_FUNCTIONS.get_interface"
        and len(node.args) == 2
    )


def _same_answer(node: ast.AST, implementation: str) -> bool:
    """Whether a comparison with the name of the implementation comes out for ours as for it."""
    if not (isinstance(node, ast.Compare) and len(node.ops) == 1):
        return False
    try:
        value = ast.literal_eval(node.comparators[0])
    except ValueError:
        return False
    match node.ops[0]:
        case ast.Eq() | ast.NotEq():
            return (implementation == value) is (value == NAME)
        case ast.In() | ast.NotIn():
            return (implementation in value) is (NAME in value)
    return False


def _asks_for_flash(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _ASKS_FOR_FLASH


def _reads_one_setting(node: ast.AST) -> bool:
    """getattr or hasattr of anything but the name of the implementation."""
    return (
        isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        and "_attn_implementation" not in str(node.args[1].value)
    )


@cache
def _unlike_softmax(eager: Callable[..., Any]) -> str | None:
    """Why an eager function is not softmax attention that adds whatever mask it gets, or None.

    It is run on small tensors, under a module that knows what every attention layer knows.
    """
    parameters = inspect.signature(eager).parameters
    special = sorted(set(parameters) - _EAGER_ARGUMENTS)
    if special:
        return f"its eager attention takes {', '.join(special)}"
    module = SimpleNamespace(training=False, num_key_value_groups=1)
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    # Logits of about 30 and a scale that is not the usual one: a cap, a clamp or a sink shows.
    query, key, value = 10 * normal(1, 2, 3, 8), normal(1, 2, 4, 8), normal(1, 2, 4, 8)
    masks = (None, normal(1, 1, 3, 4), normal(1, 1, 3, 4) > 0)
    biases = (None, normal(1, 2, 3, 4)) if "position_bias" in parameters else (None,)
    for mask, bias in itertools.product(masks, biases):
        arguments = {} if bias is None else {"position_bias": bias}
        try:
            out, weights = eager(module, query, key, value, mask, scaling=0.9, **arguments)
        except Exception as error:
            return f"its eager attention needs more than any: {error}"
        added = sum(term for term in (mask, bias) if term is not None)
        expected = torch.softmax(0.9 * query @ key.mT + added, -1)
        # Most take their softmax in float32, whatever they are given.
        same = partial(torch.allclose, rtol=1e-5, atol=1e-5)
        if not (same(weights, expected) and same(out, (expected @ value).transpose(1, 2))):
            return "its eager attention is not softmax(query @ key.T * scale + mask) @ value"
    return None
