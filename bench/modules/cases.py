"""Layers and whole models as their libraries make them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.family import INFERENCE_DTYPES

DEMO_LIBRARIES = (
    "flamingo_pytorch",
    "matplotlib",
    "open_clip",
    "timm",
    "torchvision",
    "transformers",
)
LOSS = "open_clip ClipLoss"


@dataclass(frozen=True)
class ModuleCase:
    """One layer, or a whole model, as its library makes it, to be raced against a patched copy.

    Attributes:
        module: which of `bench/modules/build.py`.
        batch: of its inputs.
        options: of its constructor, and sizes of its inputs.
        yardstick_batch: of the smaller runs that tell how far the original is off.
    """

    name: str
    source: str
    module: str
    batch: int
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    yardstick_batch: int = 1
    dtypes: tuple[str, ...] = INFERENCE_DTYPES

    @property
    def libraries(self) -> tuple[str, ...]:
        """The packages that the module is from."""
        if self.module == "Flamingo":  # as the demo builds it, which needs all of them
            return DEMO_LIBRARIES
        return (self.module.replace(".", " ").split()[0],)

    @property
    def shape(self) -> str:
        """In words, e.g. "B8 dim 768 heads 12 tokens 197"."""
        return " ".join(
            [f"B{self.batch}", *(f"{name} {value}" for name, value in self.options.items())]
        )


LAYERS = (
    ModuleCase(
        "vit-b16-layer",
        "ViT-B/16, 224 px",
        "torch.nn.MultiheadAttention",
        8,
        {"dim": 768, "heads": 12, "tokens": 197},
    ),
    ModuleCase(
        "siglip-so400m-layer",
        "SigLIP so400m/14, 384 px",
        "timm.layers.Attention",
        1,
        {"dim": 1152, "heads": 16, "tokens": 729},
    ),
    ModuleCase(
        "swin-t-s1-layer",
        "Swin-T, 224 px, stage 1",
        "torchvision ShiftedWindowAttention",
        8,
        {"dim": 96, "heads": 3, "size": 56, "window": 7, "shift": 3},
    ),
    ModuleCase(
        "swin-b-384-s3-block",
        "Swin-B, 384 px, stage 3",
        "timm SwinTransformerBlock",
        1,
        {"dim": 512, "heads": 16, "size": 24, "window": 12, "shift": 6},
    ),
    ModuleCase(
        "swinv2-t-s1-layer",
        "Swin V2-T, 256 px, stage 1",
        "torchvision ShiftedWindowAttentionV2",
        8,
        {"dim": 96, "heads": 3, "size": 64, "window": 8, "shift": 4},
    ),
    ModuleCase(
        "flamingo-layer",
        "Flamingo",
        "flamingo_pytorch MaskedCrossAttention",
        4,
        {"dim": 1024, "heads": 8, "tokens": 512, "images": 4, "latents": 64},
    ),
    ModuleCase(
        "clip-loss-layer",
        "CLIP ViT-B",
        LOSS,
        1024,
        {"dim": 512},
        yardstick_batch=1024,
    ),
)

MODELS = (
    ModuleCase(
        "vit-b16-model",
        "ViT-B/16, 224 px",
        "timm model",
        4,
        {"model": "vit_base_patch16_224", "size": 224},
    ),
    ModuleCase(
        "clip-vit-b32-model",
        "CLIP ViT-B/32, 224 px",
        "transformers CLIPModel",
        4,
        {"size": 224, "tokens": 77},
    ),
    ModuleCase(
        "swin-t-model",
        "Swin-T, 224 px",
        "torchvision model",
        4,
        {"model": "swin_t", "size": 224},
    ),
    ModuleCase(
        "swinv2-t-model",
        "Swin V2-T, 256 px",
        "timm model",
        4,
        {"model": "swinv2_tiny_window8_256", "size": 256},
    ),
    ModuleCase(
        "flamingo-model",
        "Flamingo: resampler and six gated blocks",
        "Flamingo",
        1,
        {"dim": 1024, "heads": 8, "latents": 64, "depth": 6, "images": 6, "tokens": 256},
    ),
    ModuleCase(
        "clip-vit-b32-step",
        "CLIP ViT-B/32, 224 px, and its loss",
        "open_clip model with ClipLoss",
        4,
        {"model": "ViT-B-32", "size": 224, "tokens": 77},
        yardstick_batch=4,
    ),
)

SELECTED_LAYERS = ("vit-b16-layer", "swin-t-s1-layer", "flamingo-layer", "clip-loss-layer")
SELECTED_MODELS = ("swin-t-model",)
