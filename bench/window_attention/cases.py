"""Shifted-window attention of Swin."""

from dataclasses import dataclass, replace

from bench.family import INFERENCE_DTYPES, Sweep


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


CASES = (
    *_stage("swin-t-s1", "Swin-T, 224 px, stage 1", 8, 56, 3, 7),
    *_stage("swin-t-s2", "Swin-T, 224 px, stage 2", 8, 28, 6, 7),
    *_stage("swin-t-s3", "Swin-T, 224 px, stage 3", 8, 14, 12, 7),
    *_stage("swin-t-s4", "Swin-T, 224 px, stage 4", 8, 7, 24, 7),
    *_stage("swin-b-384-s1", "Swin-B, 384 px, stage 1", 1, 96, 4, 12),
    *_stage("swin-b-384-s3", "Swin-B, 384 px, stage 3", 1, 24, 16, 12),
    *_stage("swinv2-t-w8-s1", "Swin V2-T, 256 px, stage 1", 8, 64, 3, 8, True),
    *_stage("swinv2-b-w16-s1", "Swin V2-B, 256 px, stage 1", 1, 64, 4, 16, True),
)

SELECTION = ("swin-t-s1-shifted", "swin-t-s4", "swin-b-384-s3", "swinv2-b-w16-s1")

SWEEP = Sweep(
    "tokens on a side",
    tuple(
        (size, WindowCase(f"map-{size}", "a sweep", 1, size, 3, 32, 7, 3))
        for size in (14, 28, 56, 112, 224, 448)
    ),
)
