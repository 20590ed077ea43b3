"""Flamingo's layers: gated cross-attention to the last image, and the Perceiver resampler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import vlmfast.functional as VF
from vlmfast.checks import (
    check_device,
    check_flag,
    check_floating_tensor,
    check_integer,
    check_number,
    check_strided,
    may_read_values,
    reject,
    reject_type,
)
from vlmfast.functional.cross_attention import CrossAttentionPlan
from vlmfast.parts.common import check_fits_weight, is_linear, kept_result, positive_int
from vlmfast.parts.cross_attention import (
    KeyValue,
    attend_to_two,
    forget_media,
    kept_plan,
    project_two,
)

__all__ = [
    "GatedCrossAttentionBlock",
    "MaskedCrossAttention",
    "PerceiverAttention",
    "PerceiverResampler",
]

# What the original adds up.
_LOCATIONS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class MaskedCrossAttention(nn.Module):
    r"""Cross-attention of text to images, in which a token sees only the last image before it.

    .. math::
        \text{out}_t = W_O \, \text{softmax}(Q_t K_{\Phi(t)}^T / \sqrt{D}) V_{\Phi(t)},
        \quad Q = W_Q \, \text{norm}(x), \; (K_i, V_i) = W_{KV} \, \text{media}_i

    with :math:`\Phi` of `vlmfast.functional.image_index`. Constructor, state-dict keys and numbers
    are those of flamingo-pytorch 0.1.2, and with `dim_visual` and `use_cached_media` those of
    OpenFlamingo; checkpoints load in both directions.

    On a CPU the projected media are kept, where no gradient is wanted and `to_kv` is a plain linear
    layer, and projected again when the values of the media or of the weights are others. So a step
    of decoding attends to one image and projects nothing.

    Args:
        dim: width of the text.
        dim_visual: width of the media; `dim` for None.
        dim_head: width of a head.
        heads: number of heads.
        only_attend_immediate_media: a token sees the last image before it, or nothing where there
            is none. Otherwise it sees all images before it, and the mean of all where there is
            none, as both libraries have it.

    Attributes:
        backend: the backend of the attention kernels (see `vlmfast.use_backend`); None, the
            default, chooses by the inputs.

    Shapes:
        x (B, T, dim), media (B, I, L, dim_visual), media_locations (B, T), out (B, T, dim).

    Raises:
        TypeError: a size is no int.
        ValueError: a size is below 1.

    Source: Alayrac et al., "Flamingo: a Visual Language Model for Few-Shot Learning" (2022).
    """

    backend: str | None = None

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        only_attend_immediate_media: bool = True,
    ):
        super().__init__()
        dim, dim_head, heads = _check_sizes(dim, dim_head, heads)
        inner_dim = dim_head * heads
        dim_visual = positive_int("dim_visual", dim if dim_visual is None else dim_visual)
        self.scale = dim_head**-0.5
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim_visual, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)
        self.only_attend_immediate_media = check_flag(
            "only_attend_immediate_media", only_attend_immediate_media
        )

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        attend_previous: bool = True,
    ) -> Tensor:
        """Attends from `x` to `media`.

        Args:
            x: the text.
            media: the images, of L latents each.
            media_locations: bool, True where a token stands for an image. With None every token
                sees every image.
            use_cached_media: treat all of x as coming after the last image of `media_locations`,
                which then may be of any length: that of the prompt, in decoding.
            attend_previous: False lets a token that is no image see the next image in place of
                the last (OpenFlamingo's option in training).

        Raises:
            TypeError: an argument is no tensor or of a wrong dtype.
            ValueError: a shape or device does not fit, or `attend_previous=False` comes with
                `use_cached_media`: after the last image no image is next.
        """
        self._check_inputs(x, media, media_locations, use_cached_media, attend_previous)
        query = self.to_q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self._key_value(media)
        if media_locations is None:
            key, value = key.flatten(2, 3), value.flatten(2, 3)
            out = VF.scaled_dot_product_attention(
                query, key, value, scale=self.scale, backend=self.backend
            )
        else:
            plan = self._plan(
                media_locations, x.shape[1], media.shape[1], use_cached_media, attend_previous
            )
            out = VF.image_cross_attention(  # type: ignore[assignment]
                query, key, value, plan, scale=self.scale, backend=self.backend
            )
        return self.to_out(out.transpose(1, 2).flatten(2))

    def forget_media(self) -> None:
        """Drops the kept projections of the media, and with them their memory."""
        forget_media(self)

    def _key_value(self, media: Tensor) -> KeyValue:
        """Key and value (B, heads, I, L, dim_head): views of one projection, kept if possible."""

        def project() -> KeyValue:
            # As one sequence, (B, I * L, dim_visual), which is how the originals call it
            key_value = self.to_kv(media.flatten(1, 2)).unflatten(-1, (2, self.heads, -1))
            key_value = key_value.unflatten(1, media.shape[1:3])
            key, value = key_value.permute(3, 0, 4, 1, 2, 5).unbind(0)
            return key, value

        return kept_result(self, (self.to_kv,), media, project)

    def _plan(
        self,
        media_locations: Tensor,
        tokens: int,
        images: int,
        use_cached_media: bool,
        attend_previous: bool,
    ) -> CrossAttentionPlan:
        immediate = self.only_attend_immediate_media

        def make() -> CrossAttentionPlan:
            if use_cached_media:
                last = media_locations.count_nonzero(dim=1)
                index = last[:, None].expand(-1, tokens)
            elif media_locations.dtype == torch.bool:
                index = VF.image_index(media_locations, "last" if attend_previous else "next")
            else:
                index = media_locations.cumsum(-1)
                if may_read_values(index) and bool((index < 0).any()):
                    reject("media_locations", "a sum of at least 0", int(index.min()))
            if immediate:
                return VF.cross_attention_plan(index, images, overflow="uniform")
            return VF.cross_attention_plan(index, images, mode="all_previous", empty_rows="uniform")

        return kept_plan(
            media_locations, (tokens, images, immediate, use_cached_media, attend_previous), make
        )

    def _check_inputs(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None,
        use_cached_media: bool,
        attend_previous: bool,
    ) -> None:
        check_floating_tensor("x", x)
        if x.dim() != 3:
            reject("x", "shape (B, T, dim)", tuple(x.shape))
        _check_width("x", x, self.to_q)
        check_floating_tensor("media", media)
        if media.dim() != 4 or media.shape[0] != x.shape[0]:
            reject("media", f"shape ({x.shape[0]}, I, L, dim_visual)", tuple(media.shape))
        _check_width("media", media, self.to_kv)
        check_device("media", media, "x", x)
        check_flag("use_cached_media", use_cached_media)
        check_flag("attend_previous", attend_previous)
        if not attend_previous and use_cached_media:
            reject("attend_previous", "True with use_cached_media", attend_previous)
        if media_locations is None:
            return
        check_strided("media_locations", media_locations, "a tensor or None")
        if media_locations.dtype not in _LOCATIONS:
            reject_type("media_locations", "dtype torch.bool", media_locations.dtype)
        if not attend_previous and media_locations.dtype != torch.bool:
            reject_type(
                "media_locations",
                "dtype torch.bool with attend_previous=False",
                media_locations.dtype,
            )
        tokens = media_locations.shape[-1] if use_cached_media else x.shape[1]
        if media_locations.shape != (x.shape[0], tokens):
            got = f"{tuple(media_locations.shape)}, x being {tuple(x.shape)}"
            reject(
                "media_locations",
                f"shape ({x.shape[0]}, {'any' if use_cached_media else tokens})",
                got,
            )
        check_device("media_locations", media_locations, "x", x)


class GatedCrossAttentionBlock(nn.Module):
    r"""Flamingo's gated layer, to be put between the layers of a language model.

    .. math::
        y = x + \tanh(\alpha) \, \text{attn}(x, \text{media}),
        \quad \text{out} = y + \tanh(\beta) \, \text{ff}(y)

    Both gates are 0 at the start, so that a fresh block is exactly the identity; their gradients
    are not 0. Constructor, state-dict keys and numbers are those of flamingo-pytorch 0.1.2 and,
    with `dim_visual`, of OpenFlamingo. Arguments are those of `MaskedCrossAttention`; `ff_mult` is
    the width of the feed-forward layer over `dim`.
    """

    def __init__(
        self,
        *,
        dim: int,
        dim_visual: int | None = None,
        dim_head: int = 64,
        heads: int = 8,
        ff_mult: float = 4,
        only_attend_immediate_media: bool = True,
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
        self.ff = _feed_forward(positive_int("dim", dim), ff_mult)
        self.ff_gate = nn.Parameter(torch.tensor([0.0]))

    def forward(
        self,
        x: Tensor,
        media: Tensor,
        media_locations: Tensor | None = None,
        use_cached_media: bool = False,
        attend_previous: bool = True,
    ) -> Tensor:
        """Attends from `x` to `media` and adds; arguments as of `MaskedCrossAttention.forward`."""
        # What is at its default is not said: `attn` may be a layer that `vlmfast.patch` has left.
        options = {}
        if check_flag("use_cached_media", use_cached_media):
            options["use_cached_media"] = True
        if not check_flag("attend_previous", attend_previous):
            options["attend_previous"] = False
        out = self.attn(x, media, media_locations=media_locations, **options)
        x = _add_gated(x, out, self.attn_gate.tanh())
        return _add_gated(x, self.ff(x), self.ff_gate.tanh())


class PerceiverAttention(nn.Module):
    r"""The resampler's attention: latents attend to features and to the latents themselves.

    .. math::
        \text{out} = W_O \, \text{softmax}(Q K^T / \sqrt{D}) V, \quad Q = W_Q \, l,
        \; (K, V) = W_{KV} \, [f; l], \; f = \text{norm}(x), \; l = \text{norm}(\text{latents})

    Features and latents are read where they are: [f; l] is never put together. Constructor,
    state-dict keys and numbers are those of flamingo-pytorch 0.1.2 and OpenFlamingo.

    Attributes:
        backend: as of `MaskedCrossAttention`.

    Shapes:
        x (B, I, N, dim), latents (B, I, L, dim), out (B, I, L, dim).

    Raises:
        TypeError: a size is no int.
        ValueError: a size is below 1.

    Source: Jaegle et al., "Perceiver" (2021); Alayrac et al., "Flamingo" (2022).
    """

    backend: str | None = None

    def __init__(self, *, dim: int, dim_head: int = 64, heads: int = 8):
        super().__init__()
        dim, dim_head, heads = _check_sizes(dim, dim_head, heads)
        inner_dim = dim_head * heads
        self.scale = dim_head**-0.5
        self.heads = heads
        self.norm_media = nn.LayerNorm(dim)
        self.norm_latents = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, inner_dim, bias=False)
        self.to_kv = nn.Linear(dim, inner_dim * 2, bias=False)
        self.to_out = nn.Linear(inner_dim, dim, bias=False)

    def forward(self, x: Tensor, latents: Tensor) -> Tensor:
        """Attends from `latents` to `x` and to `latents`.

        Raises:
            TypeError: an argument is no floating tensor, or not of the dtype of the weights.
            ValueError: a shape or device does not fit.
        """
        for name, tensor in (("x", x), ("latents", latents)):
            check_floating_tensor(name, tensor)
            if tensor.dim() != 4:
                reject(name, "shape (B, I, tokens, dim)", tuple(tensor.shape))
            _check_width(name, tensor, self.to_q)
        if latents.shape[:2] != x.shape[:2]:
            reject("latents", f"batch and images of x, {tuple(x.shape[:2])}", tuple(latents.shape))
        check_device("latents", latents, "x", x)

        features, latents = self.norm_media(x), self.norm_latents(latents)
        query = self.to_q(latents).flatten(0, 1).unflatten(-1, (self.heads, -1))
        sources = project_two(features, latents, (self.to_kv,), self._key_value)
        out = attend_to_two(query, *sources, scale=self.scale, backend=self.backend)
        return self.to_out(out.flatten(-2).unflatten(0, x.shape[:2]))

    def _key_value(self, tokens: Tensor) -> KeyValue:
        """Key and value (B * I, tokens, heads, dim_head), views of one projection."""
        projected = self.to_kv(tokens).flatten(0, 1).unflatten(-1, (2, self.heads, -1))
        key, value = projected.unbind(-3)
        return key, value


class PerceiverResampler(nn.Module):
    """Maps the visual features of each image, however many, to a fixed number of latents.

    Constructor, state-dict keys and numbers are those of flamingo-pytorch 0.1.2. With
    `max_num_media`, `max_num_frames` or `num_media_embeds=None` they are those of OpenFlamingo:
    `frame_embs` and `media_time_embs`, each only if its number is given, take the place of
    `media_pos_emb`.

    Args:
        dim: width of features and latents.
        depth: number of layers.
        dim_head: width of a head.
        heads: number of heads.
        num_latents: L, the latents that each image becomes.
        num_media_embeds: number of positions of flamingo-pytorch's `media_pos_emb`.
        ff_mult: width of the feed-forward layers over `dim`.
        max_num_media: number of OpenFlamingo's embeddings of an image's place in the sequence.
        max_num_frames: number of OpenFlamingo's embeddings of a frame's place in a video.

    Shapes:
        x (B, N, dim), one image; (B, I, N, dim); or (B, I, F, N, dim), I videos of F frames.
        The result is (B, I, L, dim), with I = 1 in the first case.

    Raises:
        TypeError: a size is no int.
        ValueError: a size is below 1.

    Source: Alayrac et al., "Flamingo" (2022), section 2.1.1 and appendix A.1.1; OpenFlamingo.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 6,
        dim_head: int = 64,
        heads: int = 8,
        num_latents: int = 64,
        num_media_embeds: int | None = 4,
        ff_mult: float = 4,
        max_num_media: int | None = None,
        max_num_frames: int | None = None,
    ):
        super().__init__()
        num_latents = positive_int("num_latents", num_latents)
        dim, dim_head, heads = _check_sizes(dim, dim_head, heads)
        depth = check_integer("depth", depth, least=1, most=1 << 16)

        def number(argument: str, count: int | None) -> int | None:
            return None if count is None else positive_int(argument, count)

        def embeddings(count: int | None, *shape: int) -> nn.Parameter | None:
            return None if count is None else nn.Parameter(torch.randn(count, *shape))

        num_media_embeds = number("num_media_embeds", num_media_embeds)
        max_num_media = number("max_num_media", max_num_media)
        max_num_frames = number("max_num_frames", max_num_frames)
        if max_num_media is not None or max_num_frames is not None:
            num_media_embeds = None
        self.latents = nn.Parameter(torch.randn(num_latents, dim))
        self.media_pos_emb = embeddings(num_media_embeds, 1, dim)
        self.frame_embs = embeddings(max_num_frames, dim)
        self.media_time_embs = embeddings(max_num_media, 1, dim)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [
                    PerceiverAttention(dim=dim, dim_head=dim_head, heads=heads),
                    _feed_forward(dim, ff_mult),
                ]
            )
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """Resamples `x`.

        Raises:
            TypeError: `x` is no floating tensor, or not of the dtype of the weights.
            ValueError: its shape does not fit, or there are more images or frames than embeddings.
        """
        check_floating_tensor("x", x)
        if x.dim() not in (3, 4, 5) or x.shape[-1] != self.latents.shape[-1]:
            expected = f"3 to 5 dimensions, the last of size {self.latents.shape[-1]}"
            reject("x", expected, tuple(x.shape))
        check_device("x", x, "the weights", self.latents)
        if x.dim() == 3:
            x = x.unsqueeze(1)
        if self.frame_embs is not None:
            if x.dim() != 5:
                reject("x", "shape (B, I, frames, tokens, dim), having frame_embs", tuple(x.shape))
            x = x + _first("frames", x.shape[2], self.frame_embs)[:, None]
        if x.dim() == 5:
            x = x.flatten(2, 3)
        for embeddings in (self.media_pos_emb, self.media_time_embs):
            if embeddings is not None:
                x = x + _first("images", x.shape[1], embeddings)

        latents = self.latents.expand(*x.shape[:2], -1, -1)
        layers: Any = self.layers
        for attention, feed_forward in layers:
            latents = attention(x, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)


def _add_gated(residual: Tensor, out: Tensor, gate: Tensor) -> Tensor:
    """residual + gate * out, in one pass where all are of one dtype."""
    if residual.dtype == out.dtype == gate.dtype:
        return torch.addcmul(residual, out, gate)
    return residual + out * gate


def _check_sizes(dim: int, dim_head: int, heads: int) -> tuple[int, int, int]:
    named = ("dim", dim), ("dim_head", dim_head), ("heads", heads)
    dim, dim_head, heads = (positive_int(*pair) for pair in named)
    return dim, dim_head, heads


def _check_width(argument: str, tensor: Tensor, projection: nn.Module) -> None:
    """Whether a projection can take `tensor`; one that is no plain linear layer says so itself."""
    if not is_linear(projection):
        return
    if tensor.shape[-1] != projection.in_features:
        reject(argument, f"a last dimension of size {projection.in_features}", tuple(tensor.shape))
    check_fits_weight(argument, tensor, projection.weight)


def _feed_forward(dim: int, mult: float) -> nn.Sequential:
    inner_dim = positive_int("ff_mult", int(dim * check_number("ff_mult", mult)))
    return nn.Sequential(
        nn.LayerNorm(dim),
        nn.Linear(dim, inner_dim, bias=False),
        nn.GELU(),
        nn.Linear(inner_dim, dim, bias=False),
    )


def _first(what: str, count: int, embeddings: Tensor) -> Tensor:
    """The first embeddings, one for each image or frame; a single one serves them all."""
    if count > len(embeddings) and len(embeddings) != 1:
        reject("x", f"at most {len(embeddings)} {what}, as there are embeddings", count)
    return embeddings[:count]
