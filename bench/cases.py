"""What is measured: shapes of real models, as data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

INFERENCE_DTYPES = ("float32", "bfloat16")
DEMO_LIBRARIES = (
    "flamingo_pytorch",
    "matplotlib",
    "open_clip",
    "timm",
    "torchvision",
    "transformers",
)


class Case(Protocol):
    """What every family's case has: a name, the model it is from, and its shape in words."""

    @property
    def name(self) -> str: ...
    @property
    def source(self) -> str: ...
    @property
    def shape(self) -> str: ...
    @property
    def dtypes(self) -> Sequence[str]: ...


class Sweep(NamedTuple):
    """Cases that differ in one size, to see how time and memory grow with it."""

    size: str
    cases: tuple[tuple[int, Case], ...]


@dataclass(frozen=True)
class AttentionCase:
    """One attention layer as a model runs it.

    Query, key and value of a self-attention layer are slices of one packed (B, L, 3, H, D)
    projection; a cross-attention layer (query_length != key_length) has a (B, L, H, D) query, and
    key and value are slices of a packed (B, S, 2, H, D) projection.
    """

    name: str
    source: str
    batch: int
    heads: int
    query_length: int
    key_length: int
    head_dim: int
    is_causal: bool = False
    dtypes: tuple[str, ...] = INFERENCE_DTYPES

    @property
    def shape(self) -> str:
        """The shape in words, e.g. "B8 H12 L197 S197 d64 causal"."""
        words = [
            f"B{self.batch}",
            f"H{self.heads}",
            f"L{self.query_length}",
            f"S{self.key_length}",
            f"d{self.head_dim}",
        ]
        return " ".join([*words, "causal"] if self.is_causal else words)


@dataclass(frozen=True)
class ImageAttentionCase:
    """Text of a Flamingo-like model that attends to its images, which stand at equal distances.

    Query is a (B, T, H, D) projection; key and value are slices of a packed (B, I, L, 2, H, D) one.
    """

    name: str
    source: str
    batch: int
    heads: int
    tokens: int
    images: int
    latents: int
    head_dim: int
    dtypes: tuple[str, ...] = INFERENCE_DTYPES

    @property
    def shape(self) -> str:
        """The shape in words, e.g. "B4 H8 T512 I33 L64 d64"."""
        return (
            f"B{self.batch} H{self.heads} T{self.tokens} I{self.images} L{self.latents} "
            f"d{self.head_dim}"
        )


FLASH_ATTENTION = (
    AttentionCase("vit-b16", "ViT-B/16, 224 px", 8, 12, 197, 197, 64),
    AttentionCase("vit-l14-336", "CLIP ViT-L/14, 336 px", 1, 16, 577, 577, 64),
    AttentionCase("siglip-so400m", "SigLIP so400m/14, 384 px", 1, 16, 729, 729, 72),
    AttentionCase("vit-h14", "OpenCLIP ViT-H/14, 224 px", 1, 16, 257, 257, 80),
    AttentionCase("vit-g14", "OpenCLIP ViT-g/14, 224 px", 1, 16, 257, 257, 88),
    AttentionCase("vit-bigg14", "OpenCLIP ViT-bigG/14, 224 px", 1, 16, 257, 257, 104),
    AttentionCase("clip-text", "CLIP ViT-B text tower", 32, 8, 77, 77, 64, is_causal=True),
    AttentionCase("long-4096", "a 1024 px image in 16 px patches", 1, 8, 4096, 4096, 64),
    AttentionCase("resampler", "Flamingo's Perceiver resampler", 1, 8, 64, 2112, 64),
)

CROSS_ATTENTION = tuple(
    ImageAttentionCase(f"t{tokens}-i{images}", "Flamingo", 4, 8, tokens, images, 64, 64)
    for tokens in (512, 2048)
    for images in (1, 4, 8, 33)
)


@dataclass(frozen=True)
class WindowCase:
    """One shifted-window attention layer as a model runs it, on square maps and windows."""

    name: str
    source: str
    batch: int
    size: int
    heads: int
    head_dim: int
    window: int
    shift: int = 0
    is_cosine: bool = False
    dtypes: tuple[str, ...] = INFERENCE_DTYPES

    @property
    def channels(self) -> int:
        """Of the map that the layer returns."""
        return self.heads * self.head_dim

    @property
    def windows(self) -> int:
        """How many cover the maps of a batch."""
        return self.batch * (-(-self.size // self.window)) ** 2

    @property
    def shape(self) -> str:
        """The shape in words, e.g. "B8 56x56 H3 d32 w7 shifted"."""
        words = [
            f"B{self.batch}",
            f"{self.size}x{self.size}",
            f"H{self.heads}",
            f"d{self.head_dim}",
            f"w{self.window}",
            *(["shifted"] if self.shift else []),
            *(["cosine"] if self.is_cosine else []),
        ]
        return " ".join(words)


def _stage(
    name: str, source: str, batch: int, size: int, heads: int, window: int, is_cosine: bool = False
) -> tuple[WindowCase, ...]:
    """The two layers of a pair of blocks; where one window covers the map, neither shifts."""
    plain = WindowCase(name, source, batch, size, heads, 32, window, 0, is_cosine)
    if size <= window:
        return (plain,)
    shifted = replace(plain, name=f"{name}-shifted", shift=window // 2)
    return plain, shifted


WINDOW_ATTENTION = (
    *_stage("swin-t-s1", "Swin-T, 224 px, stage 1", 8, 56, 3, 7),
    *_stage("swin-t-s2", "Swin-T, 224 px, stage 2", 8, 28, 6, 7),
    *_stage("swin-t-s3", "Swin-T, 224 px, stage 3", 8, 14, 12, 7),
    *_stage("swin-t-s4", "Swin-T, 224 px, stage 4", 8, 7, 24, 7),
    *_stage("swin-b-384-s1", "Swin-B, 384 px, stage 1", 1, 96, 4, 12),
    *_stage("swin-b-384-s3", "Swin-B, 384 px, stage 3", 1, 24, 16, 12),
    *_stage("swinv2-t-w8-s1", "Swin V2-T, 256 px, stage 1", 8, 64, 3, 8, True),
    *_stage("swinv2-b-w16-s1", "Swin V2-B, 256 px, stage 1", 1, 64, 4, 16, True),
)


@dataclass(frozen=True)
class LossCase:
    """A contrastive loss of a batch: `pairs` images and texts of `dim` features."""

    name: str
    source: str
    pairs: int
    dim: int
    loss: str = "clip"  # or "siglip"
    dtypes: tuple[str, ...] = INFERENCE_DTYPES

    @property
    def shape(self) -> str:
        """The shape in words, e.g. "N4096 d512"."""
        return f"N{self.pairs} d{self.dim}"


CONTRASTIVE_LOSS = (
    LossCase("clip-1024", "CLIP ViT-B", 1024, 512),
    LossCase("clip-4096", "CLIP ViT-B", 4096, 512),
    LossCase("clip-8192", "CLIP ViT-B", 8192, 512),
    LossCase("clip-l-4096", "CLIP ViT-L", 4096, 768),
    LossCase("siglip-so400m-2048", "SigLIP so400m", 2048, 1152, "siglip"),
)


@dataclass(frozen=True)
class ModuleCase:
    """One layer, or a whole model, as its library makes it, against the same after patching.

    Attributes:
        family: of the kernels that patching brings in.
        module: which of `bench/modules.py`.
        batch: of its inputs.
        options: of its constructor, and sizes of its inputs.
        yardstick_batch: of the smaller runs that tell how far the original is off.
    """

    name: str
    source: str
    family: str
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
        "flash_attention",
        "torch.nn.MultiheadAttention",
        8,
        {"dim": 768, "heads": 12, "tokens": 197},
    ),
    ModuleCase(
        "siglip-so400m-layer",
        "SigLIP so400m/14, 384 px",
        "flash_attention",
        "timm.layers.Attention",
        1,
        {"dim": 1152, "heads": 16, "tokens": 729},
    ),
    ModuleCase(
        "swin-t-s1-layer",
        "Swin-T, 224 px, stage 1",
        "window_attention",
        "torchvision ShiftedWindowAttention",
        8,
        {"dim": 96, "heads": 3, "size": 56, "window": 7, "shift": 3},
    ),
    ModuleCase(
        "swin-b-384-s3-block",
        "Swin-B, 384 px, stage 3",
        "window_attention",
        "timm SwinTransformerBlock",
        1,
        {"dim": 512, "heads": 16, "size": 24, "window": 12, "shift": 6},
    ),
    ModuleCase(
        "swinv2-t-s1-layer",
        "Swin V2-T, 256 px, stage 1",
        "window_attention",
        "torchvision ShiftedWindowAttentionV2",
        8,
        {"dim": 96, "heads": 3, "size": 64, "window": 8, "shift": 4},
    ),
    ModuleCase(
        "flamingo-layer",
        "Flamingo",
        "cross_attention",
        "flamingo_pytorch MaskedCrossAttention",
        4,
        {"dim": 1024, "heads": 8, "tokens": 512, "images": 4, "latents": 64},
    ),
    ModuleCase(
        "clip-loss-layer",
        "CLIP ViT-B",
        "contrastive_loss",
        "open_clip ClipLoss",
        1024,
        {"dim": 512},
        yardstick_batch=1024,
    ),
)

MODELS = (
    ModuleCase(
        "vit-b16-model",
        "ViT-B/16, 224 px",
        "flash_attention",
        "timm model",
        4,
        {"model": "vit_base_patch16_224", "size": 224},
    ),
    ModuleCase(
        "clip-vit-b32-model",
        "CLIP ViT-B/32, 224 px",
        "flash_attention",
        "transformers CLIPModel",
        4,
        {"size": 224, "tokens": 77},
    ),
    ModuleCase(
        "swin-t-model",
        "Swin-T, 224 px",
        "window_attention",
        "torchvision model",
        4,
        {"model": "swin_t", "size": 224},
    ),
    ModuleCase(
        "swinv2-t-model",
        "Swin V2-T, 256 px",
        "window_attention",
        "timm model",
        4,
        {"model": "swinv2_tiny_window8_256", "size": 256},
    ),
    ModuleCase(
        "flamingo-model",
        "Flamingo: resampler and six gated blocks",
        "cross_attention",
        "Flamingo",
        1,
        {"dim": 1024, "heads": 8, "latents": 64, "depth": 6, "images": 6, "tokens": 256},
    ),
    ModuleCase(
        "clip-vit-b32-step",
        "CLIP ViT-B/32, 224 px, and its loss",
        "contrastive_loss",
        "open_clip model with ClipLoss",
        4,
        {"model": "ViT-B-32", "size": 224, "tokens": 77},
        yardstick_batch=4,
    ),
)

# Every family by name, and layers and models of all of them: their cases, ...
CASES: dict[str, Sequence[Case]] = {
    "flash_attention": FLASH_ATTENTION,
    "window_attention": WINDOW_ATTENTION,
    "cross_attention": CROSS_ATTENTION,
    "contrastive_loss": CONTRASTIVE_LOSS,
    "layers": LAYERS,
    "models": MODELS,
}

# ... those that `make bench` has time for, ...
SELECTION = {
    "flash_attention": ("vit-b16", "vit-l14-336", "siglip-so400m", "clip-text", "resampler"),
    "window_attention": ("swin-t-s1-shifted", "swin-t-s4", "swin-b-384-s3", "swinv2-b-w16-s1"),
    "cross_attention": ("t512-i4", "t2048-i1", "t2048-i8", "t2048-i33"),
    "contrastive_loss": ("clip-1024", "clip-4096"),
    "layers": ("vit-b16-layer", "swin-t-s1-layer", "flamingo-layer", "clip-loss-layer"),
    "models": ("swin-t-model",),
}

# ... and what its cost is drawn against.
SWEEPS = {
    "flash_attention": Sweep(
        "tokens",
        tuple(
            (length, AttentionCase(f"tokens-{length}", "a sweep", 1, 2, length, length, 64))
            for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
        ),
    ),
    "window_attention": Sweep(
        "tokens on a side",
        tuple(
            (size, WindowCase(f"map-{size}", "a sweep", 1, size, 3, 32, 7, 3))
            for size in (14, 28, 56, 112, 224, 448)
        ),
    ),
    "cross_attention": Sweep(
        "images",
        tuple(
            (images, ImageAttentionCase(f"images-{images}", "a sweep", 1, 8, 1024, images, 64, 64))
            for images in (1, 2, 4, 8, 16, 32, 64)
        ),
    ),
    "contrastive_loss": Sweep(
        "pairs",
        tuple(
            (pairs, LossCase(f"pairs-{pairs}", "a sweep", pairs, 512))
            for pairs in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
        ),
    ),
}
