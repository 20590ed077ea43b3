"""Hostile inputs: what no public function may take, misread or die of.

Every public function, module constructor and module call has a valid call below. From its signature
each argument in turn is replaced by every value of two tables: what no argument of its kind ever
is (a string, a list, a number beyond any dtype, ...), and what resembles the right value (the same
tensor in another dtype, layout, size, memory or class). Each try must end in

    a refusal       ValueError, TypeError or NotImplementedError whose message names the argument;
                    where two arguments of right types do not fit each other, it may name the other
    a right result  the value is of the argument's annotated type, and the result is what the same
                    call gives on the reference backend for the same numbers in plain dense tensors,
                    gradients included where one is asked for; without data, its shape and dtype; of
                    a constructor, a module of finite parameters
    torch's answer  the very error or result of the torch layer that a module stands in for; or, for
                    a size that no memory holds, its allocator's error

Anything else is a finding: another exception, one that does not say which argument is wrong, a
wrong type that is taken, wrong numbers, a crash, a hang. The tries run in child processes, which
crash in the parent's stead.

    PYTHONPATH=. python tests/hostile.py [--only NAME]
"""

from __future__ import annotations

import argparse
import collections.abc
import copy
import dataclasses
import fractions
import inspect
import json
import os
import queue
import re
import resource
import subprocess
import sys
import threading
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn

SECONDS_PER_TRY = 60
MOST_MEMORY = 2 << 30  # that a child may take for its tries: what asks for more fails at once
TOO_LARGE = re.compile("you tried to allocate|cannot allocate|size calculation overflowed")
REFUSALS = (ValueError, TypeError, NotImplementedError)


@dataclasses.dataclass(frozen=True)
class Call:
    """A valid call.

    Attributes:
        name: what a report calls it.
        make: makes its arguments anew, by name: `function(**arguments)`.
        function: what is called.
        on_reference: the same on the reference backend; None: the result need only be whole.
        like_torch: torch's own, which answers for what is left to it.
        signature: whose parameters and annotations the arguments are.
        hides: keys are hidden from queries, which in the reference take part with weight 0.
    """

    name: str
    make: Callable[[], dict[str, Any]]
    function: Callable[..., Any]
    on_reference: Callable[..., Any] | None = None
    like_torch: Callable[..., Any] | None = None
    signature: Callable[..., Any] | None = None
    hides: bool = False


# --- Valid calls ---


def numbers(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + 31 * sum(shape))
    return torch.randn(shape, generator=generator)


def attention() -> dict[str, Any]:
    return {
        "query": numbers(2, 4, 5, 8),
        "key": numbers(2, 4, 6, 8),
        "value": numbers(2, 4, 6, 8, seed=1),
        "attn_mask": None,
        "dropout_p": 0.0,
        "is_causal": False,
        "scale": None,
        "enable_gqa": False,
        "backend": None,
    }


def masked_attention() -> dict[str, Any]:
    shared = {"key": numbers(2, 2, 6, 8), "value": numbers(2, 2, 6, 8, seed=1), "enable_gqa": True}
    return (
        attention() | shared | {"attn_mask": numbers(2, 4, 5, 6), "scale": 0.5, "is_causal": True}
    )


def packed_attention() -> dict[str, Any]:
    return {
        "query": numbers(7, 4, 8),
        "key": numbers(9, 2, 8),
        "value": numbers(9, 2, 8, seed=1),
        "cu_seqlens_q": torch.tensor([0, 3, 7], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, 5, 9], dtype=torch.int32),
        "max_seqlen_q": 4,
        "max_seqlen_k": 5,
        "is_causal": False,
        "scale": 0.5,
        "return_lse": True,
        "backend": None,
    }


def xformers_attention() -> dict[str, Any]:
    return {
        "query": numbers(2, 5, 4, 8),
        "key": numbers(2, 6, 4, 8),
        "value": numbers(2, 6, 4, 8, seed=1),
        "attn_bias": numbers(2, 4, 5, 6),
        "p": 0.0,
        "scale": 0.5,
        "backend": None,
    }


def windows() -> dict[str, Any]:
    return {
        "qkv": numbers(2, 6, 4, 48),
        "num_heads": 2,
        "window_size": (3, 2),
        "shift_size": (1, 1),
        "relative_position_bias": numbers(2, 6, 6),
        "logit_scale": None,
        "scale": None,
        "mask_value": -100.0,
        "pad_value": None,
        "wrap": "padded",
        "dropout_p": 0.0,
        "backend": None,
    }


def cosine_windows() -> dict[str, Any]:
    parts = tuple(numbers(2, 5, 4, 32, seed=seed) for seed in range(3))
    more = {"logit_scale": torch.tensor([4.0, 2.0]), "pad_value": torch.ones(96), "scale": 0.5}
    return windows() | {"qkv": parts, "relative_position_bias": numbers(2, 6, 6)} | more


def phi() -> Tensor:
    return torch.tensor([[0, 1, 1, 2, 2, 3, 3], [0, 0, 1, 1, 1, 1, 2]])


def image_plan() -> dict[str, Any]:
    return {
        "image_index": phi(),
        "num_images": 3,
        "mode": "last",
        "empty_rows": "zero",
        "overflow": "uniform",
        "image_lengths": torch.tensor([[4, 2, 4], [3, 0, 4]]),
    }


def several_images_plan() -> dict[str, Any]:
    visible = phi()[..., None] >= torch.tensor([1, 2, 3])
    return image_plan() | {"image_index": visible, "empty_rows": "dense"}


def image_attention() -> dict[str, Any]:
    return {
        "query": numbers(2, 4, 7, 8),
        "key": numbers(2, 2, 3, 4, 8),
        "value": numbers(2, 2, 3, 4, 8, seed=1),
        "plan_or_image_index": VF.cross_attention_plan(**image_plan()),
        "scale": None,
        "return_lse": True,
        "backend": None,
    }


def several_images_attention() -> dict[str, Any]:
    plan = VF.cross_attention_plan(**several_images_plan())
    return image_attention() | {"plan_or_image_index": plan, "scale": 0.5}


def indexed_attention() -> dict[str, Any]:
    return image_attention() | {"plan_or_image_index": phi(), "return_lse": False}


def towers() -> dict[str, Any]:
    return {
        "image_features": numbers(5, 8),
        "text_features": numbers(5, 8, seed=1),
        "logit_scale": torch.tensor(2.0),
        "logit_bias": torch.tensor(-1.0),
        "group": None,
        "backend": None,
    }


def clip() -> dict[str, Any]:
    return towers() | {"local_loss": True, "gather_with_grad": True}


def clip_of_numbers() -> dict[str, Any]:
    return clip() | {"logit_scale": 2.0, "logit_bias": -1.0}


def views() -> dict[str, Any]:
    two = {"z1": numbers(5, 16), "z2": numbers(5, 16, seed=1)}
    return two | {"temperature": 0.5, "group": None, "backend": None}


def itc() -> dict[str, Any]:
    return {
        "image_features": numbers(5, 8),
        "text_features": numbers(5, 8, seed=1),
        "logit_scale": torch.tensor([2.0]),
        "image_momentum": numbers(5, 8, seed=2),
        "text_momentum": numbers(5, 8, seed=3),
        "image_queue": numbers(3, 8, seed=2),
        "text_queue": numbers(3, 8, seed=3),
        "alpha": 0.5,
        "label_smoothing": 0.25,
        "group": None,
        "backend": None,
    }


def itc_of_queries() -> dict[str, Any]:
    none = dict.fromkeys(("image_momentum", "text_momentum", "image_queue", "text_queue"))
    return itc() | none | {"image_features": numbers(5, 2, 8), "alpha": 0.0}


def locations() -> Tensor:
    return torch.tensor([[False, True, False, True, False], [True, False, False, False, True]])


def media_call() -> dict[str, Any]:
    return {
        "x": numbers(2, 5, 16),
        "media": numbers(2, 2, 3, 12),
        "media_locations": locations(),
        "use_cached_media": False,
        "attend_previous": True,
    }


def head_call() -> dict[str, Any]:
    return {
        "query": numbers(2, 5, 16),
        "key": numbers(2, 6, 16),
        "value": numbers(2, 6, 16, seed=1),
        "key_padding_mask": torch.zeros(2, 6, dtype=torch.bool),
        "need_weights": False,
        "attn_mask": numbers(5, 6),
        "average_attn_weights": True,
        "is_causal": False,
    }


def heads() -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "num_heads": 2,
        "dropout": 0.0,
        "bias": True,
        "add_bias_kv": False,
        "add_zero_attn": False,
        "kdim": None,
        "vdim": None,
        "batch_first": True,
        "device": None,
        "dtype": None,
    }


def swin() -> dict[str, Any]:
    return {
        "dim": 16,
        "window_size": [3, 2],
        "shift_size": [1, 1],
        "num_heads": 2,
        "qkv_bias": True,
        "proj_bias": True,
        "attention_dropout": 0.0,
        "dropout": 0.0,
    }


def gated() -> dict[str, Any]:
    sizes = {"dim": 16, "dim_visual": 12, "dim_head": 8, "heads": 2}
    return sizes | {"only_attend_immediate_media": True}


def resampler() -> dict[str, Any]:
    return {
        "dim": 12,
        "depth": 1,
        "dim_head": 8,
        "heads": 2,
        "num_latents": 3,
        "num_media_embeds": 4,
        "ff_mult": 2,
        "max_num_media": None,
        "max_num_frames": None,
    }


def video_resampler() -> dict[str, Any]:
    return resampler() | {"num_media_embeds": None, "max_num_media": 4, "max_num_frames": 2}


def losses_of_ranks() -> dict[str, Any]:
    return {"cache_labels": False, "rank": 0, "world_size": 1}


def clip_of_ranks() -> dict[str, Any]:
    flags = {"local_loss": False, "gather_with_grad": False, "use_horovod": False}
    return losses_of_ranks() | flags


def tower_call() -> dict[str, Any]:
    call = towers() | {"output_dict": True}
    del call["group"], call["backend"]
    return call


def patched() -> dict[str, Any]:
    return {
        "model": nn.Sequential(nn.MultiheadAttention(16, 2, batch_first=True)),
        "families": ["flash_attention"],
        "backend": None,
        "strict": False,
        "filter": None,
        "inference": False,
    }


# The Perceiver's layers pack the images of a batch.
HIDING = (
    *(masked_attention, packed_attention, xformers_attention, vnn.MultiheadAttention),
    *(vnn.PerceiverAttention, vnn.PerceiverResampler),
)


def function_calls() -> Iterator[Call]:
    for function, makes in (
        (VF.scaled_dot_product_attention, (attention, masked_attention)),
        (VF.varlen_attention, (packed_attention,)),
        (VF.memory_efficient_attention, (xformers_attention,)),
        (VF.shifted_window_attention, (windows, cosine_windows)),
        (VF.image_cross_attention, (image_attention, several_images_attention, indexed_attention)),
        (VF.clip_loss, (clip, clip_of_numbers)),
        (VF.siglip_loss, (towers,)),
        (VF.ntxent_loss, (views,)),
        (VF.itc_loss, (itc, itc_of_queries)),
    ):
        for make in makes:
            name = f"{function.__name__} ({make.__name__})"
            yield Call(name, make, function, function, hides=make in HIDING)
    for function, makes in (
        (VF.image_index, (lambda: {"media_locations": locations(), "mode": "next"},)),
        (VF.cross_attention_plan, (image_plan, several_images_plan)),
    ):
        for make in makes:
            yield Call(f"{function.__name__} ({make.__name__})", make, function, function)


def whole(module: nn.Module) -> nn.Module:
    """A layer as it is when it is trained: no parameter is 0."""
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = numbers(*parameter.shape, seed=seed) / 4
    return module.eval()


MODULES: dict[type[nn.Module], list[tuple[Callable[[], dict[str, Any]], Callable[[], dict]]]] = {
    vnn.MultiheadAttention: [(heads, head_call)],
    vnn.ShiftedWindowAttention: [(swin, lambda: {"x": numbers(2, 5, 4, 16)})],
    vnn.ShiftedWindowAttentionV2: [(swin, lambda: {"x": numbers(2, 5, 4, 16)})],
    vnn.MaskedCrossAttention: [(gated, media_call)],
    vnn.GatedCrossAttentionBlock: [(lambda: gated() | {"ff_mult": 2}, media_call)],
    vnn.PerceiverAttention: [
        (
            lambda: {"dim": 12, "dim_head": 8, "heads": 2},
            lambda: {"x": numbers(2, 2, 5, 12), "latents": numbers(2, 2, 3, 12)},
        )
    ],
    vnn.PerceiverResampler: [
        (resampler, lambda: {"x": numbers(2, 3, 5, 12)}),
        (video_resampler, lambda: {"x": numbers(2, 3, 2, 5, 12)}),
    ],
    vnn.ClipLoss: [(clip_of_ranks, tower_call)],
    vnn.SigLipLoss: [(lambda: losses_of_ranks() | {"dist_impl": None}, tower_call)],
    vnn.NTXentLoss: [
        (
            lambda: {"temperature": 0.5, "memory_bank_size": 0, "gather_distributed": False},
            lambda: {"out0": numbers(5, 16), "out1": numbers(5, 16, seed=1)},
        )
    ],
}


def module_calls() -> Iterator[Call]:
    for cls, makes in MODULES.items():
        for make, make_call in makes:
            parent = nn.MultiheadAttention if cls is vnn.MultiheadAttention else None
            yield Call(f"{cls.__name__}()", make, cls, None, parent, cls.__init__)
            module = whole(cls(**make()))
            reference = copy.deepcopy(module)
            reference.backend = "reference"
            for layer in reference.modules():
                if hasattr(type(layer), "backend"):
                    layer.backend = "reference"
            theirs = None
            if parent is not None:
                theirs = parent(**make()).eval()
                theirs.load_state_dict(module.state_dict())
            name = f"{cls.__name__}.forward"
            yield Call(name, make_call, module, reference, theirs, cls.forward, cls in HIDING)


def package_calls() -> Iterator[Call]:
    def unpatch(model: Any) -> None:
        vlmfast.patch(model) if isinstance(model, nn.Module) else None
        vlmfast.unpatch(model)

    yield Call("patch", patched, vlmfast.patch, None)
    yield Call("unpatch", lambda: {"model": patched()["model"]}, vlmfast.unpatch, None)
    yield Call(
        "use_backend",
        lambda: {"backend": "reference"},
        vlmfast.use_backend,
        None,
        None,
        vlmfast.use_backend.__init__,
    )
    yield Call(
        "explain",
        lambda: {"fn": lambda: VF.scaled_dot_product_attention(*[numbers(1, 1, 2, 8)] * 3)},
        vlmfast.explain,
        None,
    )


def planted(how: str = "well") -> Tensor:
    """Fails in every way that must be found."""
    if how == "":
        os.abort()
    if not isinstance(how, (str, int)):
        raise TypeError("how: expected a string")
    if how == 0:
        raise RuntimeError("how: expected a string")
    if how == 1:
        raise ValueError("no idea which argument is wrong")
    return torch.ones(2) if how == "well" else torch.tensor([1.0, float("nan")])


def planted_calls() -> Iterator[Call]:
    yield Call("planted", lambda: {"how": "well"}, planted, lambda how: torch.ones(2))


def calls(plant: bool = False) -> list[Call]:
    return (
        list(planted_calls()) if plant else [*function_calls(), *module_calls(), *package_calls()]
    )


# --- Hostile values ---

Variant = tuple[str, Callable[[], Any]]


ALIENS: tuple[tuple[str, Any], ...] = (
    ("None", None),
    ("a string", "abc"),
    ("an empty string", ""),
    ("bytes", b"padded"),
    ("an empty list", []),
    ("a list of floats", [1.0, 2.0]),
    ("a tuple of ints", (1, 1)),
    ("a triple of ints", (2, 2, 2)),
    ("a nested list", [[True, False]]),
    ("a dict", {}),
    ("a set", {1}),
    ("an object", object()),
    ("a class", int),
    ("a function", len),
    ("a module", torch),
    ("a dtype", torch.float32),
    ("a device", torch.device("cpu")),
    ("True", True),
    ("False", False),
    ("nan", float("nan")),
    ("inf", float("inf")),
    ("-inf", float("-inf")),
    ("1e39", 1e39),
    ("-1e39", -1e39),
    ("1e300", 1e300),
    ("1e-60", 1e-60),
    ("-0.0", -0.0),
    ("0.5", 0.5),
    ("1.0", 1.0),
    ("1.5", 1.5),
    ("-0.5", -0.5),
    ("10**400", 10**400),
    ("-10**400", -(10**400)),
    ("-1", -1),
    ("0", 0),
    ("1", 1),
    ("2**31 - 1", 2**31 - 1),
    ("2**31", 2**31),
    ("2**32 + 1", 2**32 + 1),
    ("2**63 - 1", 2**63 - 1),
    ("2**63", 2**63),
    ("2**64 + 1", 2**64 + 1),
    ("-2**63 - 1", -(2**63) - 1),
    ("a complex number", 1j),
    ("a fraction", fractions.Fraction(1, 2)),
    ("numpy.float32", np.float32(0.5)),
    ("numpy.float64", np.float64(0.5)),
    ("numpy.float64 nan", np.float64("nan")),
    ("numpy.int64", np.int64(1)),
    ("numpy.int64 -1", np.int64(-1)),
    ("numpy.uint64 2**63", np.uint64(2**63)),
    ("numpy.bool_", np.bool_(True)),
    ("numpy.str_", np.str_("abc")),
    ("a numpy array", np.ones((5, 8), np.float32)),
    ("a numpy 0-d array", np.array(1)),
    ("a 0-d tensor", torch.tensor(0.5)),
    ("a 0-d int tensor", torch.tensor(1)),
    ("a bool tensor", torch.tensor([True, False])),
    ("a float tensor", torch.ones(3)),
    ("a complex 0-d tensor", torch.tensor(1j)),
    ("a sparse tensor", torch.eye(3).to_sparse()),
    ("a nested tensor", torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(3, 8)])),
    ("an empty tensor", torch.empty(0)),
    ("a meta scalar", torch.tensor(0.5, device="meta")),
)

DTYPES = (
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.complex64,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


class Subclass(Tensor):
    pass


class FunctionSubclass(Tensor):
    """One that torch's functions are handed to, as libraries that carry units or metadata make."""

    @classmethod
    def __torch_function__(cls, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, kinds, args, kwargs or {})


def grown(x: Tensor, dim: int) -> Tensor:
    return torch.cat((x, x.narrow(dim, 0, 1)), dim)


def expanded(x: Tensor, dim: int, size: int) -> Tensor:
    return x.narrow(dim, 0, 1).expand(*x.shape[:dim], size, *x.shape[dim + 1 :])


def with_element(x: Tensor, number: float) -> Tensor:
    x = x.clone()
    x.view(-1)[x.numel() // 2] = number
    return x


def overlapping(x: Tensor) -> Tensor:
    """Rows that lie one number apart."""
    strides = tuple(1 for _ in x.shape)
    return x.flatten().as_strided(x.shape, strides)


def sliced(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, -1)[..., ::2]


def transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1)


def without_memory(x: Tensor) -> Tensor:
    if x.numel() == 1:
        raise ValueError("torch's own product of such a one and a number is of a wrong dtype")
    return torch._efficientzerotensor(x.shape, dtype=x.dtype)


def frozen(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def in_bits(x: Tensor) -> Tensor:
    return x.to(torch.uint8).view(torch.bits8)


def quantized(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 0.5, 1, torch.quint8)


def quantized_int32(x: Tensor) -> Tensor:
    return torch.quantize_per_tensor(x.float(), 1.0, 0, torch.qint32)


def faked(x: Tensor) -> Tensor:
    # Mixed with true tensors, as constants in a traced program are.
    return FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)


TENSOR_VARIANTS: tuple[tuple[str, Callable[[Tensor], Any]], ...] = (
    *((str(dtype), lambda x, dtype=dtype: x.to(dtype)) for dtype in DTYPES),
    ("quint8", quantized),
    ("qint32", quantized_int32),
    ("bits8", in_bits),
    ("on meta", lambda x: x.to("meta")),
    ("sparse COO", lambda x: x.to_sparse()),
    ("sparse CSR", lambda x: x.to_sparse_csr()),
    ("mkldnn", lambda x: x.to_mkldnn()),
    ("nested, strided", lambda x: torch.nested.nested_tensor(list(x))),
    ("nested, jagged", lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged)),
    ("one dimension more", lambda x: x[None]),
    ("one dimension less", lambda x: x[0]),
    ("0-d", lambda x: x.flatten()[0]),
    ("1-d", lambda x: x.flatten()),
    ("seven dimensions", lambda x: x[(None,) * (7 - x.dim())]),
    ("transposed in memory", transposed),
    ("every other number", sliced),
    ("overlapping", overlapping),
    ("negated view", lambda x: torch._neg_view(-x)),
    ("zero tensor", without_memory),
    ("inference tensor", frozen),
    ("Parameter", lambda x: nn.Parameter(x)),
    ("requires_grad", lambda x: x.requires_grad_()),
    ("subclass", lambda x: x.as_subclass(Subclass)),
    ("subclass with __torch_function__", lambda x: x.as_subclass(FunctionSubclass)),
    ("subclass with __torch_dispatch__", lambda x: TwoTensor(x, x.clone())),
    ("FakeTensor", faked),
    ("as a numpy array", lambda x: x.numpy()),
    ("as a list", lambda x: x.tolist()),
    *(
        (f"with {number}", lambda x, number=number: with_element(x, number))
        for number in (float("nan"), float("inf"), float("-inf"), 1e15, 1e-40, -1, 2**31 - 1, 2**40)
    ),
    ("uint64 of 2**63", lambda x: with_element(x.to(torch.int64), -(2**63)).view(torch.uint64)),
    ("negative infinity throughout", lambda x: torch.full_like(x, float("-inf"))),
    ("int32 of huge numbers", lambda x: torch.full_like(x, 2**31 - 1, dtype=torch.int32)),
    ("int32 of negative numbers", lambda x: torch.full_like(x, -7, dtype=torch.int32)),
)
SIZE_VARIANTS: tuple[tuple[str, Callable[[Tensor, int], Tensor]], ...] = (
    ("of size 0", lambda x, dim: x.narrow(dim, 0, 0)),
    ("one larger", grown),
    ("of size 1", lambda x, dim: x.narrow(dim, 0, 1)),
    ("of size 2**31", lambda x, dim: expanded(x, dim, 2**31)),
    ("of size 2**40", lambda x, dim: expanded(x, dim, 2**40)),
)
TRANSFORMS = ("vmap", "func.grad", "vmap of func.grad")


class Impossible(Exception):
    """A variant that torch itself cannot make of this tensor."""


def variants(make: Callable[[], Any]) -> Iterator[Variant]:
    """What resembles a valid value, and is made anew at each call."""
    base = make()

    def of_tensor(change: Callable[..., Any], *more: Any) -> Callable[[], Any]:
        def variant() -> Any:
            try:
                return change(make(), *more)
            except (RuntimeError, TypeError, ValueError, IndexError, OverflowError) as error:
                raise Impossible from error

        return variant

    if isinstance(base, Tensor):
        for label, change in TENSOR_VARIANTS:
            yield label, of_tensor(change)
        for dim in range(base.dim()):
            for label, change in SIZE_VARIANTS:
                yield f"dimension {dim} {label}", of_tensor(change, dim)
    elif isinstance(base, (tuple, list)):
        is_named = hasattr(base, "_replace")

        def rebuilt(parts: list[Any]) -> Any:
            return type(base)(*parts) if is_named else type(base)(parts)

        for index, part in enumerate(base):
            place = base._fields[index] if is_named else index
            inner = variants(lambda index=index: make()[index])
            aliens = ((label, lambda alien=alien: alien) for label, alien in ALIENS)
            for label, make_part in (*aliens, *inner):
                if type(part) is str:
                    continue

                def variant(index: int = index, make_part: Any = make_part) -> Any:
                    parts = list(make())
                    parts[index] = make_part()
                    return rebuilt(parts)

                yield f"[{place}] {label}", variant
        if not is_named:
            yield "shorter", lambda: type(base)(list(make())[:-1])
            yield "longer", lambda: type(base)([*make(), make()[0]])


# --- A try and its outcome ---


@dataclasses.dataclass(frozen=True)
class Try:
    call: Call
    argument: str  # or "" where all tensors are changed together
    label: str
    run: Callable[[], str]  # the outcome

    @property
    def name(self) -> str:
        return f"{self.call.name}: {self.argument or 'all tensors'} = {self.label}"


def tries(plant: bool = False) -> list[Try]:
    found = []
    for call in calls(plant):
        base = call.make()
        check_valid(call)
        for argument in arguments_of(call):
            here = [(label, lambda alien=alien: alien) for label, alien in ALIENS]
            here += variants(lambda call=call, argument=argument: call.make()[argument])
            for label, make in here:
                run = replaced(call, argument, make, grad=label != "inference tensor")
                found.append(Try(call, argument, label, run))
            if call.on_reference and isinstance(base[argument], Tensor):
                for transform in TRANSFORMS:
                    run = transformed(call, argument, transform)
                    found.append(Try(call, argument, f"under {transform}", run))
        if call.on_reference and any(isinstance(x, Tensor) for x in base.values()):
            for label, change in TENSOR_VARIANTS:
                found.append(Try(call, "", label, changed_together(call, change)))
    return found


def arguments_of(call: Call) -> list[str]:
    """The arguments of a call, which must be all that its signature has."""
    parameters = inspect.signature(call.signature or call.function).parameters.values()
    named = {
        p.name
        for p in parameters
        if p.name != "self" and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }
    assert named == set(call.make()), f"{call.name}: its call lacks {named ^ set(call.make())}"
    return [name for name in call.make()]


def check_valid(call: Call) -> None:
    outcome = judge(call, call.make(), tuple(call.make()))
    assert outcome in ("right", "as torch"), f"{call.name}: its valid call {outcome}"


def replaced(
    call: Call, argument: str, make: Callable[[], Any], grad: bool = True
) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        try:
            arguments[argument] = make()
        except Impossible:
            return "impossible"
        if argument in ("filter", "fn") and callable(arguments[argument]):
            return "impossible"  # to be told from a right one, but by what it raises itself
        with torch.set_grad_enabled(grad):
            return judge(call, arguments, (argument,))

    return run


def changed_together(call: Call, change: Callable[[Tensor], Any]) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        if change is faked:  # of one mode, as tensors of one program are
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            arguments = {
                name: mode.from_tensor(x) if isinstance(x, Tensor) else x
                for name, x in arguments.items()
            }
            return judge(call, arguments, tuple(arguments))
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                try:
                    arguments[name] = change(value)
                except (RuntimeError, TypeError, ValueError, IndexError):
                    return "impossible"
        with torch.set_grad_enabled(change is not frozen):
            return judge(call, arguments, tuple(arguments))

    return run


def judge(call: Call, arguments: dict[str, Any], suspects: tuple[str, ...]) -> str:
    """How a call ends: "right", "refused", "as torch" or what is wrong with it."""
    ours = attempt(call.function, arguments)
    if isinstance(ours, Exception):
        fitting = all(fits(annotations(call).get(name, Any), arguments[name]) for name in suspects)
        if is_refusal(ours, suspects) or (
            fitting and type(ours) is ValueError and is_refusal(ours, tuple(arguments))
        ):
            return "refused"
        if TOO_LARGE.search(str(ours)):
            return "as torch"
        if call.like_torch is not None:
            theirs = attempt(call.like_torch, arguments)
            if type(theirs) is type(ours) and str(theirs) == str(ours):
                return "as torch"
        return f"raised {type(ours).__name__}: {shortened(ours)}"
    if call.like_torch is not None and agree(ours, attempt(call.like_torch, arguments)) == "":
        return "as torch"
    for name in suspects:
        if not fits(annotations(call).get(name, Any), arguments[name]):  # torch's are bare
            return f"took {type(arguments[name]).__name__} for {name}"
    if call.on_reference is None:
        return "right" if is_whole(ours) else "returned what is not whole"
    plain = {name: made_plain(value) for name, value in arguments.items()}
    if "backend" in plain:
        plain["backend"] = "reference"
    wanted = attempt(call.on_reference, plain)
    if isinstance(wanted, Exception):
        return f"returned, where plain tensors raise {type(wanted).__name__}: {shortened(wanted)}"
    if len(suspects) == 1 and isinstance(arguments[suspects[0]], VF.CrossAttentionPlan):
        # Made by hand, its members may contradict each other, and backends read different ones.
        difference = agree(ours, wanted, in_value=False)
        return f"wrong: {difference}" if difference else "right"
    difference = agree(ours, wanted, hides=call.hides) or agree(
        gradients(ours, arguments), gradients(wanted, plain), hides=call.hides
    )
    return f"wrong: {difference}" if difference else "right"


def transformed(call: Call, argument: str, transform: str) -> Callable[[], str]:
    def run() -> str:
        arguments = call.make()
        x = arguments.pop(argument)
        others = arguments | {name: "reference" for name in arguments if name == "backend"}

        def value(function: Callable[..., Any], more: dict[str, Any]) -> Callable[[Tensor], Any]:
            return lambda t: first_floating(function(**more, **{argument: t}))

        def total(function: Any, more: dict[str, Any]) -> Callable[[Tensor], Any]:
            return lambda t: value(function, more)(t).sum()

        if transform != "vmap" and not x.is_floating_point():
            return "impossible"
        if transform == "func.grad":
            ours = attempt(lambda: torch.func.grad(total(call.function, arguments))(x), {})
            wanted = torch.func.grad(total(call.on_reference, others))(x)
        else:
            pair = torch.stack((x, x.flip(0) if x.is_floating_point() else x))
            ours_of, wanted_of = (
                (value(call.function, arguments), value(call.on_reference, others))
                if transform == "vmap"
                else (
                    torch.func.grad(total(call.function, arguments)),
                    torch.func.grad(total(call.on_reference, others)),
                )
            )
            ours = attempt(lambda: torch.vmap(ours_of)(pair), {})
            wanted = torch.stack([wanted_of(t) for t in pair])
        if isinstance(ours, Exception):
            if is_refusal(ours, (argument,)):
                return "refused"
            return f"raised {type(ours).__name__}: {shortened(ours)}"
        difference = agree(ours, wanted)
        return f"wrong: {difference}" if difference else "right"

    return run


def attempt(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """The result, or the exception in its place."""
    torch.manual_seed(0)  # of dropout
    try:
        return function(**arguments)
    except Exception as error:
        return error


def is_refusal(error: Exception, suspects: tuple[str, ...]) -> bool:
    return isinstance(error, REFUSALS) and any(
        re.search(rf"\b{name}\b", str(error)) for name in suspects
    )


def shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def annotations(call: Call) -> dict[str, Any]:
    return typing.get_type_hints(call.signature or call.function)


def fits(annotation: Any, value: Any) -> bool:
    """Whether a value is of the type that a signature asks for."""
    if isinstance(value, np.generic):
        value = value.item()  # numpy's scalars are numbers
    if annotation is Any:
        return True
    if annotation is None or annotation is type(None):
        return value is None
    origin, of = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(fits(one, value) for one in of)
    if annotation is bool:
        return isinstance(value, bool)
    if annotation is int:
        return hasattr(value, "__index__") and not isinstance(value, bool)
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if origin is tuple:
        # A list stands for a tuple, as it does in torch.
        return (
            isinstance(value, (tuple, list)) and len(value) == len(of) and all(map(fits, of, value))
        )
    if origin in (collections.abc.Sequence, collections.abc.Iterable):
        try:
            return isinstance(value, origin) and all(fits(of[0], x) for x in value)
        except (TypeError, RuntimeError):  # a tensor that cannot be iterated over
            return False
    if origin is collections.abc.Callable:
        return callable(value)
    return isinstance(value, annotation)


def made_plain(value: Any) -> Any:
    """The same numbers, in plain dense tensors and in Python's numbers."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        parts = [made_plain(x) for x in value]
        return type(value)(*parts) if hasattr(value, "_replace") else type(value)(parts)
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, TwoTensor):
        value = value.a
    if value.is_meta or isinstance(value, FakeTensor):
        return value
    grad = value.requires_grad
    if type(value) is not Tensor:
        value = value.detach().as_subclass(Tensor)
    value = value.detach().resolve_neg()
    if value.layout is torch.strided and not value.is_nested:
        plain = torch.empty(value.shape, dtype=value.dtype)
        value = plain.copy_(value)
    return value.requires_grad_(grad)


def leaves(result: Any) -> list[Any]:
    if isinstance(result, dict):
        result = tuple(result.values())
    return list(result) if isinstance(result, (tuple, list)) else [result]


def first_floating(result: Any) -> Tensor:
    return next(x for x in leaves(result) if isinstance(x, Tensor))


def agree(ours: Any, wanted: Any, in_value: bool = True, hides: bool = False) -> str:
    """What is different; empty where nothing is."""
    if isinstance(wanted, Exception):
        return "an error was wanted"
    ours, wanted = leaves(ours), leaves(wanted)
    if len(ours) != len(wanted):
        return f"{len(ours)} results, wanted {len(wanted)}"
    for mine, theirs in zip(ours, wanted, strict=True):
        if not isinstance(theirs, Tensor):
            if mine is not theirs and mine != theirs:
                return f"{mine!r}, wanted {theirs!r}"
            continue
        if not isinstance(mine, Tensor):
            return f"{mine!r}, wanted a tensor"
        if isinstance(mine, TwoTensor):
            mine = mine.a
        if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
            return f"{mine.dtype} {tuple(mine.shape)}, wanted {theirs.dtype} {tuple(theirs.shape)}"
        if mine.is_meta or isinstance(mine, FakeTensor) or not in_value:
            continue
        difference = unlike(mine, theirs, hides)
        if difference:
            return difference
    return ""


def unlike(mine: Tensor, theirs: Tensor, hides: bool) -> str:
    """How numbers differ. What is not finite need only be so in both."""
    mine, theirs = (x.detach().as_subclass(Tensor) for x in (mine, theirs))
    if not mine.is_floating_point():
        return "" if torch.equal(mine, theirs) else "other integers"
    finite = theirs.isfinite()
    if hides:  # a NaN that is hidden may reach the reference's results
        finite |= theirs.isnan()
        mine = torch.where(theirs.isnan(), 0.0, mine)
        theirs = theirs.nan_to_num(0.0, float("inf"), float("-inf"))
    if not mine[finite].isfinite().all():
        return f"{int((~mine[finite].isfinite()).sum())} numbers that are not finite"
    if mine[~finite].isfinite().any():
        return "finite numbers, wanted inf or NaN"
    mine, theirs = mine[finite], theirs[finite]
    # assert_close is for numbers of the size of 1.
    size = theirs.abs().max().clamp(min=1.0) if theirs.numel() else 1.0
    try:
        torch.testing.assert_close(mine / size, theirs / size)
    except AssertionError as error:
        return shortened(error)
    return ""


def gradients(result: Any, arguments: dict[str, Any]) -> list[Tensor]:
    """Those of the leaves among the arguments, to the sum of all results."""
    total = [x.sum() for x in leaves(result) if isinstance(x, Tensor) and x.requires_grad]
    flat = [y for x in arguments.values() for y in (x if type(x) is tuple else (x,))]
    wanted = [x for x in flat if isinstance(x, Tensor) and x.requires_grad and x.is_leaf]
    if not total or not wanted or any(x.is_meta or isinstance(x, FakeTensor) for x in wanted):
        return []
    found = torch.autograd.grad(sum(total), wanted, allow_unused=True)
    pairs = zip(found, wanted, strict=True)
    return [torch.zeros_like(x) if gradient is None else gradient for gradient, x in pairs]


def is_whole(result: Any) -> bool:
    if isinstance(result, nn.Module):
        return all(p.is_meta or bool(p.isfinite().all()) for p in result.parameters())
    return True


# --- Children, and the count ---


def run_as_child(start: int, step: int, only: str) -> None:
    taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST_MEMORY,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)  # so that tasks are divided
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints is no answer
    todo = [t for t in tries(plant=only == "planted") if only in t.name]
    for index in range(start, len(todo), step):
        out.write(json.dumps({"begins": index, "name": todo[index].name}) + "\n")
        try:
            outcome = todo[index].run()
        except Exception as error:  # a fault of this page, not to be mistaken for an answer
            outcome = f"could not be judged: {type(error).__name__}: {shortened(error)}"
        out.write(json.dumps({"ends": index, "outcome": outcome}) + "\n")


class Child:
    """A process that runs every `step`-th try; after a crash another goes on behind it."""

    def __init__(self, first: int, step: int, only: str):
        self.step, self.only = step, only
        self.outcomes: dict[int, tuple[str, str]] = {}
        self._start(first)

    def _start(self, at: int) -> None:
        command = [sys.executable, __file__, "--child", str(at), str(self.step)]
        self._process = subprocess.Popen(
            [*command, "--only", self.only],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parent.parent)},
            text=True,
        )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(self._process, self._lines), daemon=True).start()
        self._begun: tuple[int, str] | None = None

    @staticmethod
    def _read(process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
        for line in process.stdout:
            lines.put(line)
        lines.put("")

    def collect(self) -> dict[int, tuple[str, str]]:
        """The names and outcomes of all its tries, once they are there."""
        while True:
            try:
                line = self._lines.get(timeout=SECONDS_PER_TRY)
            except queue.Empty:
                self._process.kill()
                why = f"hung for {SECONDS_PER_TRY} s"
            else:
                if line:
                    self._note(json.loads(line))
                    continue
                why = f"ended with {self._process.wait()}"
            if self._begun is None:
                assert why == "ended with 0", f"a child {why} between two tries"
                return self.outcomes
            index, name = self._begun
            self.outcomes[index] = name, why
            self._start(index + self.step)

    def _note(self, said: dict[str, Any]) -> None:
        if "begins" in said:
            self._begun = said["begins"], said["name"]
        else:
            self.outcomes[said["ends"]] = self._begun[1], said["outcome"]
            self._begun = None


def run(only: str = "", every: int = 1, children: int = 2) -> list[tuple[str, str]]:
    """The name and outcome of every try, or of every second, third, ..., in their order."""
    processes = [Child(every * i, every * children, only) for i in range(children)]
    outcomes = {index: both for process in processes for index, both in process.collect().items()}
    return [outcomes[index] for index in sorted(outcomes)]


GOOD = ("refused", "right", "as torch", "impossible")


def summary(outcomes: list[tuple[str, str]]) -> tuple[Counter[str], list[str]]:
    """How many tries ended how, and the findings."""
    counts = Counter(outcome if outcome in GOOD else "findings" for _, outcome in outcomes)
    counts["tried"] = len(outcomes) - counts["impossible"]
    findings = [f"{name}: {outcome}" for name, outcome in outcomes if outcome not in GOOD]
    return counts, findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="tries that have this in their name")
    parser.add_argument("--every", type=int, default=1, help="of these, every so many-th")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        run_as_child(*arguments.child, arguments.only)
        return
    counts, findings = summary(run(arguments.only, arguments.every))
    print("\n".join(findings))
    print(", ".join(f"{what}: {counts[what]}" for what in ("tried", *GOOD[:3], "findings")))
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
