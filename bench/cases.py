"""What is measured: shapes of real models, as data."""

from dataclasses import dataclass, replace

INFERENCE_DTYPES = ("float32", "bfloat16")


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

CASES: dict[str, tuple[AttentionCase, ...] | tuple[WindowCase, ...]] = {
    "flash_attention": FLASH_ATTENTION,
    "window_attention": WINDOW_ATTENTION,
}
