"""A valid call of everything that is public."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn


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
