"""OpenFlamingo's layers: their names, parameters and formulas, written anew in plain PyTorch.

The package itself needs versions of torch and transformers that are long gone.
"""

import torch
from torch import Tensor, nn

__all__ = [
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "PerceiverAttention",
    "PerceiverResampler",
]


def feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(..., tokens, heads * d) to (..., heads, tokens, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def make_projections(
    layer: nn.Module, dim: int, dim_visual: int, dim_head: int, heads: int
) -> None:
    layer.scale = dim_head**-0.5
    layer.heads = heads
    layer.to_q = nn.Linear(dim, dim_head * heads, bias=False)
    layer.to_kv = nn.Linear(dim_visual, dim_head * heads * 2, bias=False)
    layer.to_out = nn.Linear(dim_head * heads, dim, bias=False)


def shifted_softmax(logits: Tensor) -> Tensor:
    return (logits - logits.amax(-1, keepdim=True).detach()).softmax(-1)


class PerceiverAttention(nn.Module):
    def __init__(self, *, dim, dim_head=64, heads=8):
        super().__init__()
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        make_projections(self, dim, dim, dim_head, heads)

    def forward(self, x, latents):
        latents = self.norm_latents(latents)
        both = torch.cat((self.norm_media(x), latents), dim=-2)
        query = split_heads(self.to_q(latents), self.heads) * self.scale
        key, value = (split_heads(part, self.heads) for part in self.to_kv(both).chunk(2, dim=-1))
        logits = query @ key.transpose(-1, -2)
        attention = (logits - logits.amax(-1, keepdim=True).detach()).softmax(-1)
        return self.to_out((attention @ value).transpose(-2, -3).flatten(-2))


class PerceiverResampler(nn.Module):
    def __init__(
        self,
        *,
        dim,
        depth=6,
        dim_head=64,
        heads=8,
        num_latents=64,
        max_num_media=None,
        max_num_frames=None,
        ff_mult=4,
    ):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.frame_embs = self.media_time_embs = None
        if max_num_frames is not None:
            self.frame_embs = nn.Parameter(torch.randn(max_num_frames, dim))
        if max_num_media is not None:
            self.media_time_embs = nn.Parameter(torch.randn(max_num_media, 1, dim))
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads),
                    feed_forward(dim, ff_mult),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x):
        batch, images, frames = x.shape[:3]
        if self.frame_embs is not None:
            x = x + self.frame_embs[:frames, None]
        x = x.flatten(2, 3)
        if self.media_time_embs is not None:
            x = x + self.media_time_embs[:images]
        latents = self.latents.repeat(batch, images, 1, 1)
        for attention, ff in self.layers:
            latents = attention(x, latents) + latents
            latents = ff(latents) + latents
        return self.norm(latents)


def attend(layer: nn.Module, x: Tensor, media: Tensor, text_time: Tensor | None) -> Tensor:
    """MaskedCrossAttention, given how many images come before each token."""
    images, latents = media.shape[1:3]
    query = split_heads(layer.to_q(layer.norm(x)), layer.heads) * layer.scale
    key, value = (
        split_heads(part, layer.heads) for part in layer.to_kv(media.flatten(1, 2)).chunk(2, dim=-1)
    )
    logits = query @ key.transpose(-1, -2)
    if text_time is not None:
        media_time = torch.arange(images, device=x.device).repeat_interleave(latents) + 1
        compare = torch.eq if layer.only_attend_immediate_media else torch.ge
        seen = compare(text_time[:, None, :, None], media_time)
        logits = logits.masked_fill(~seen, -torch.finfo(logits.dtype).max)
    attention = shifted_softmax(logits)
    if text_time is not None and layer.only_attend_immediate_media:
        attention = attention.masked_fill((text_time == 0)[:, None, :, None], 0.0)
    return layer.to_out((attention @ value).transpose(1, 2).flatten(2))


class MaskedCrossAttention(nn.Module):
    def __init__(self, *, dim, dim_visual, dim_head=64, heads=8, only_attend_immediate_media=True):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        make_projections(self, dim, dim_visual, dim_head, heads)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        text_time = None
        if media_locations is not None and use_cached_media:
            text_time = media_locations.count_nonzero(dim=1)[:, None].expand(-1, x.shape[1])
        elif media_locations is not None:
            text_time = media_locations.cumsum(dim=-1)
        return attend(self, x, media, text_time)


class GatedCrossAttentionBlock(nn.Module):
    def __init__(
        self,
        *,
        dim,
        dim_visual,
        dim_head=64,
        heads=8,
        ff_mult=4,
        only_attend_immediate_media=True,
    ):
        super().__init__()
        self.attn = MaskedCrossAttention(
            dim=dim,
            dim_visual=dim_visual,
            dim_head=dim_head,
            heads=heads,
            only_attend_immediate_media=only_attend_immediate_media,
        )
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.ff = feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x, media, media_locations=None, use_cached_media=False):
        out = self.attn(
            x, media, media_locations=media_locations, use_cached_media=use_cached_media
        )
        x = out * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x
