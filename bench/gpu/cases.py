"""What is measured on a GPU: the goals at batch sizes that fill one, and small cases of the same.

A goal is a layer of a real model as it trains or serves on a GPU. The small cases are for numbers,
for what a launch costs the host, and for memcheck.
"""

from typing import NamedTuple

import torch

from bench.contestant import Contestant
from bench.contrastive_loss.cases import LossCase
from bench.cross_attention.cases import ImageAttentionCase
from bench.families import FAMILIES
from bench.family import Family, TimedCase
from bench.flash_attention.cases import AttentionCase
from bench.gpu import bias
from bench.measure import Call
from bench.window_attention.cases import WindowCase

DTYPE = torch.bfloat16
MODES = ("fwd", "fwd+bwd")


class Goal(NamedTuple):
    """A case, and the row of the benchmark that it is computed by."""

    family: Family
    case: TimedCase

    @property
    def name(self) -> str:
        return self.case.name

    @property
    def ours(self) -> Contestant:
        return self.family.contestants[0]

    def our_call(self, mode: str, device: str) -> Call:
        """Our own call, on inputs of its own."""
        inputs = self.family.calls.make_inputs(self.case, DTYPE, mode, device=device)
        return self.family.calls.make_call(self.ours.prepare(self.case), inputs, mode)


def _goal(family: str, case: TimedCase) -> Goal:
    return Goal(FAMILIES[family], case)


def _flash(
    name: str, source: str, batch: int, heads: int, length: int, dim: int, is_causal: bool = False
) -> Goal:
    case = AttentionCase(name, source, batch, heads, length, length, dim, is_causal)
    return _goal("flash_attention", case)


def _biased(name: str, batch: int) -> Goal:
    return Goal(bias.FAMILY, AttentionCase(name, "ViT-B/16 with a bias", batch, 12, 197, 197, 64))


def _window(name: str, source: str, batch: int, size: int, heads: int, window: int) -> Goal:
    case = WindowCase(name, source, batch, size, heads, 32, window, window // 2)
    return _goal("window_attention", case)


def _cross(name: str, batch: int, tokens: int, images: int) -> Goal:
    case = ImageAttentionCase(name, "Flamingo", batch, 8, tokens, images, 64, 64)
    return _goal("cross_attention", case)


def _loss(name: str, pairs: int) -> Goal:
    return _goal("contrastive_loss", LossCase(name, "CLIP ViT-B", pairs, 512))


GOALS = (
    _flash("vit-b16", "ViT-B/16, 224 px", 64, 12, 197, 64),
    _window("swin-t-s1", "Swin-T, 224 px, stage 1", 64, 56, 3, 7),
    _cross("phi", 8, 2048, 33),
    _loss("clip-32768", 32768),
    _flash("vit-l14-336", "CLIP ViT-L/14, 336 px", 16, 16, 577, 64),
    _window("swin-b-384-s1", "Swin-B, 384 px, stage 1", 16, 96, 4, 12),
    _biased("vit-b16-bias", 64),
    _flash("siglip-so400m", "SigLIP so400m/14, 384 px", 16, 16, 729, 72),
    _flash("vit-h14", "OpenCLIP ViT-H/14, 224 px", 64, 16, 257, 80),
    _flash("clip-text", "CLIP ViT-B text tower", 256, 8, 77, 64, is_causal=True),
    _window("w16", "Swin with windows of 16", 16, 64, 4, 16),
    _flash("long-4096", "a 1024 px image in 16 px patches", 4, 16, 4096, 64),
)

SMALL = (
    _flash("small-vit-b16", "ViT-B/16, 224 px", 2, 12, 197, 64),
    _window("small-swin-t-s1", "Swin-T, 224 px, stage 1", 2, 28, 3, 7),
    _cross("small-phi", 2, 512, 4),
    _loss("small-clip", 512),
    _biased("small-bias", 2),
    _flash("small-clip-text", "CLIP ViT-B text tower", 4, 8, 77, 64, is_causal=True),
)

BY_NAME = {goal.name: goal for goal in (*SMALL, *GOALS)}

# The costliest kernels, each where it is: what the search of launches begins with.
COSTLIEST = (
    ("vit-l14-336", "flash_attention_fwd"),
    ("swin-t-s1", "window_attention_bwd_whole"),
    ("clip-32768", "contrastive_loss_bwd"),
    ("phi", "cross_attention_bwd_whole"),
    ("vit-l14-336", "flash_attention_bwd_key_value"),
    ("vit-l14-336", "flash_attention_bwd_query"),
    ("vit-b16", "flash_attention_bwd_whole"),
    ("swin-b-384-s1", "window_attention_fwd"),
    ("clip-32768", "contrastive_loss_fwd"),
)
