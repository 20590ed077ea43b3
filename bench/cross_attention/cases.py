"""Masked per-image cross-attention of Flamingo."""

from dataclasses import dataclass

from bench.family import INFERENCE_DTYPES, Sweep


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


CASES = tuple(
    ImageAttentionCase(f"t{tokens}-i{images}", "Flamingo", 4, 8, tokens, images, 64, 64)
    for tokens in (512, 2048)
    for images in (1, 4, 8, 33)
)

SELECTION = ("t512-i4", "t2048-i1", "t2048-i8", "t2048-i33")

SWEEP = Sweep(
    "images",
    tuple(
        (images, ImageAttentionCase(f"images-{images}", "a sweep", 1, 8, 1024, images, 64, 64))
        for images in (1, 2, 4, 8, 16, 32, 64)
    ),
)
