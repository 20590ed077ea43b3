"""The layers in which OpenFlamingo's first version differs: they take attend_previous."""

import torch
from torch import nn

from tools.open_flamingo import attend, feed_forward, make_projections

__all__ = ["GatedCrossAttentionBlock", "MaskedCrossAttention"]


class MaskedCrossAttention(nn.Module):
    def __init__(self, *, dim, dim_visual, dim_head=64, heads=8, only_attend_immediate_media=True):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        make_projections(self, dim, dim_visual, dim_head, heads)
        self.only_attend_immediate_media = only_attend_immediate_media

    def forward(self, x, media, media_locations=None, attend_previous=True):
        text_time = None
        if media_locations is not None:
            text_time = media_locations.cumsum(dim=-1)
            if not attend_previous:
                text_time[~media_locations] += 1
                text_time[text_time > media_locations.count_nonzero(dim=1)[:, None]] = 0
        return attend(self, x, media, text_time)


class GatedCrossAttentionBlock(nn.Module):
    def __init__(self, *, dim, dim_visual, ff_mult=4, **attention):
        super().__init__()
        self.attn = MaskedCrossAttention(dim=dim, dim_visual=dim_visual, **attention)
        self.attn_gate = nn.Parameter(torch.tensor([0.0]))
        self.ff = feed_forward(dim, ff_mult)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(self, x, media, media_locations=None, attend_previous=True):
        out = self.attn(x, media, media_locations=media_locations, attend_previous=attend_previous)
        x = out * self.attn_gate.tanh() + x
        return self.ff(x) * self.ff_gate.tanh() + x
