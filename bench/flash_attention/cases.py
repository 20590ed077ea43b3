"""Attention layers of real models."""

from dataclasses import dataclass

from bench.family import INFERENCE_DTYPES, Sweep


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


CASES = (
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

SELECTION = ("vit-b16", "vit-l14-336", "siglip-so400m", "clip-text", "resampler")

SWEEP = Sweep(
    "tokens",
    tuple(
        (length, AttentionCase(f"tokens-{length}", "a sweep", 1, 2, length, length, 64))
        for length in (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
    ),
)
