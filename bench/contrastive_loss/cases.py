"""Contrastive losses of CLIP and SigLIP."""

from dataclasses import dataclass

from bench.family import INFERENCE_DTYPES, Sweep

BIAS = -10.0  # of SigLIP's logits


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


CASES = (
    LossCase("clip-1024", "CLIP ViT-B", 1024, 512),
    LossCase("clip-4096", "CLIP ViT-B", 4096, 512),
    LossCase("clip-8192", "CLIP ViT-B", 8192, 512),
    LossCase("clip-l-4096", "CLIP ViT-L", 4096, 768),
    LossCase("siglip-so400m-2048", "SigLIP so400m", 2048, 1152, "siglip"),
)

SELECTION = ("clip-1024", "clip-4096")

SWEEP = Sweep(
    "pairs",
    tuple(
        (pairs, LossCase(f"pairs-{pairs}", "a sweep", pairs, 512))
        for pairs in (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
    ),
)
