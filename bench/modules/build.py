"""How the layers and models are made, each as its library makes it, and what they take."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bench.contrastive_loss import calls as contrastive_loss
from bench.contrastive_loss.cases import LossCase
from bench.cross_attention.peers import media_locations
from bench.modules.cases import LOSS

# How to make the module, and what it takes.
Built = tuple[Callable[[], nn.Module], Sequence[Tensor]]


class _SelfAttention(nn.Module):
    """torch.nn.MultiheadAttention as a transformer calls it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _MaskedCrossAttention(nn.Module):
    def __init__(self, dim: int, heads: int, images: int):
        super().__init__()
        from flamingo_pytorch.flamingo_pytorch import MaskedCrossAttention

        self.attention = MaskedCrossAttention(dim=dim, heads=heads)
        self.images = images

    def forward(self, text: Tensor, latents: Tensor) -> Tensor:
        media = media_locations(*text.shape[:2], self.images, text.device)
        return self.attention(text, latents, media_locations=media)


class _ClipEmbeddings(nn.Module):
    """transformers' CLIP: the embeddings of images and texts, one above the other."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import CLIPConfig, CLIPModel

        self.model = CLIPModel(CLIPConfig())
        self.model.logit_scale.requires_grad_(False)  # of a loss

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        out = self.model(input_ids=tokens, pixel_values=pixels)
        return torch.cat([out.image_embeds, out.text_embeds])


class _Flamingo(nn.Module):
    """What Flamingo adds to a language model, as the demo builds it."""

    def __init__(self, dim: int, heads: int, latents: int, depth: int):
        super().__init__()
        from vlmfast.demo import Flamingo

        self.model = Flamingo(dim, heads, latents, depth)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return self.model(images, tokens, media_locations=tokens == 0)["text"]


class _ClipStep(nn.Module):
    """open_clip's model and its loss: what one step of training computes."""

    def __init__(self, name: str):
        super().__init__()
        import open_clip
        from open_clip.loss import ClipLoss

        self.model = open_clip.create_model(name)
        self.loss = ClipLoss()

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        image, text, scale = self.model(pixels, tokens)
        return self.loss(image, text, scale)


def _words(*shape: int) -> Tensor:
    """Random words, then the end token, which CLIP looks for: the last of its vocabulary."""
    tokens = torch.randint(1, 49000, shape)
    tokens[:, -1] = 49407
    return tokens


def _multihead(batch: int, dim: int, heads: int, tokens: int) -> Built:
    return partial(_SelfAttention, dim, heads), [torch.randn(batch, tokens, dim)]


def _timm_attention(batch: int, dim: int, heads: int, tokens: int) -> Built:
    from timm.layers import Attention

    return partial(Attention, dim, heads, qkv_bias=True), [torch.randn(batch, tokens, dim)]


def _torchvision_windows(
    name: str, batch: int, dim: int, heads: int, size: int, window: int, shift: int
) -> Built:
    from torchvision.models import swin_transformer

    layer = getattr(swin_transformer, name)
    module = partial(layer, dim, [window, window], [shift, shift], heads)
    return module, [torch.randn(batch, size, size, dim)]


def _timm_swin_block(batch: int, dim: int, heads: int, size: int, window: int, shift: int) -> Built:
    from timm.models.swin_transformer import SwinTransformerBlock

    map_size = (size, size)
    options = {"window_size": window, "shift_size": shift}
    module = partial(SwinTransformerBlock, dim, map_size, heads, **options)
    return module, [torch.randn(batch, *map_size, dim)]


def _cross_attention(
    batch: int, dim: int, heads: int, tokens: int, images: int, latents: int
) -> Built:
    tensors = [torch.randn(batch, tokens, dim), torch.randn(batch, images, latents, dim)]
    return partial(_MaskedCrossAttention, dim, heads, images), tensors


def _clip_loss(batch: int, dim: int) -> Built:
    from open_clip.loss import ClipLoss

    seed = int(torch.randint(2**31, ()))
    case = LossCase(LOSS, "", batch, dim)
    return ClipLoss, contrastive_loss.make_inputs(case, torch.float32, "fwd", seed).sources


def _timm_model(batch: int, model: str, size: int) -> Built:
    import timm

    return partial(timm.create_model, model), [torch.randn(batch, 3, size, size)]


def _torchvision_model(batch: int, model: str, size: int) -> Built:
    from torchvision.models import get_model

    return partial(get_model, model), [torch.randn(batch, 3, size, size)]


def _clip(batch: int, size: int, tokens: int) -> Built:
    return _ClipEmbeddings, [torch.randn(batch, 3, size, size), _words(batch, tokens)]


def _clip_step(batch: int, model: str, size: int, tokens: int) -> Built:
    return partial(_ClipStep, model), [torch.randn(batch, 3, size, size), _words(batch, tokens)]


def _flamingo(
    batch: int, dim: int, heads: int, latents: int, depth: int, images: int, tokens: int
) -> Built:
    text = torch.randint(1, 49000, (batch, tokens))
    text[:, :: -(-tokens // images)] = 0  # an image begins
    return partial(_Flamingo, dim, heads, latents, depth), [
        torch.randn(batch, images, 3, 224, 224),
        text,
    ]


# By `ModuleCase.module`: batch and options to the module and what it takes.
BUILD: dict[str, Callable[..., Built]] = {
    "torch.nn.MultiheadAttention": _multihead,
    "timm.layers.Attention": _timm_attention,
    "torchvision ShiftedWindowAttention": partial(_torchvision_windows, "ShiftedWindowAttention"),
    "torchvision ShiftedWindowAttentionV2": partial(
        _torchvision_windows, "ShiftedWindowAttentionV2"
    ),
    "timm SwinTransformerBlock": _timm_swin_block,
    "flamingo_pytorch MaskedCrossAttention": _cross_attention,
    LOSS: _clip_loss,
    "timm model": _timm_model,
    "torchvision model": _torchvision_model,
    "transformers CLIPModel": _clip,
    "open_clip model with ClipLoss": _clip_step,
    "Flamingo": _flamingo,
}
