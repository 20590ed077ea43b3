"""Inputs, calls and formulas of `layers` and `models`: a module as its library makes it.

The contestants are the module itself and the same patched; each takes the same tensors.
"""

import copy
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import vlmfast
from bench import common, contrastive_loss
from bench.cases import LossCase, ModuleCase
from bench.measure import Truth, Work
from bench.peers import PrepareModule, is_installed
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.verify.common import SEEDS

# How to make the module, and what it takes.
Built = tuple[Callable[[], nn.Module], Sequence[Tensor]]
LOSS = "open_clip ClipLoss"


@dataclass(frozen=True)
class Inputs:
    """The original module, what it takes, and, but for "fwd", the gradient of what it returns."""

    module: nn.Module
    tensors: tuple[Tensor, ...]
    grad_out: Tensor | None


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
        starts = torch.zeros(text.shape[:2], dtype=torch.bool, device=text.device)
        starts[:, [image * text.shape[1] // self.images for image in range(self.images)]] = True
        return self.attention(text, latents, media_locations=starts)


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


def _loss_case(case: ModuleCase) -> LossCase:
    return LossCase(case.name, case.source, case.batch, case.options["dim"])


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
_BUILD: dict[str, Callable[..., Built]] = {
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


def make_inputs(
    case: ModuleCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """The module, in evaluation mode (nothing is dropped out), and random inputs."""
    module = copy.deepcopy(_module(case.module, tuple(case.options.items())))
    module = module.to(device, dtype)
    if mode == "fwd":
        module.requires_grad_(False)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        _, made = _BUILD[case.module](case.batch, **case.options)
        tensors = tuple(_placed(x, dtype, device) for x in made)
        if case.module == LOSS:  # has no parameters
            tensors = tuple(x.requires_grad_(mode != "fwd") for x in tensors)
        if mode == "fwd":
            return Inputs(module, tensors, None)
        with torch.no_grad():
            out = module(*tensors)
        grad_out = torch.randn(out.shape) if out.dim() else torch.ones(())
        return Inputs(module, tensors, grad_out.to(device, out.dtype))


@functools.lru_cache(maxsize=1)
def _module(name: str, options: tuple[tuple[str, Any], ...]) -> nn.Module:
    """A module with random weights, float32."""
    if is_installed("torchvision"):
        import_torchvision()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        make, _ = _BUILD[name](1, **dict(options))
        module = make().eval()
        with torch.no_grad():
            for parameter in module.parameters():  # gates that let nothing through, and biases
                if not parameter.any():
                    nn.init.normal_(parameter, std=0.1)
        return module


def _placed(tensor: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """A scalar stays float32, as a loss's scale does."""
    to = dtype if tensor.is_floating_point() and tensor.dim() else tensor.dtype
    return tensor.detach().to(device, to)


def make_call(prepare: PrepareModule, inputs: Inputs, mode: str) -> common.Call:
    """The call to be timed; its gradients are those of the parameters, or of what a loss takes."""
    module = prepare(inputs.module, mode)
    return _call(module, module, inputs, mode)


def _call(
    module: nn.Module, forward: Callable[..., Tensor], inputs: Inputs, mode: str
) -> common.Call:
    sources = [x for x in (*module.parameters(), *inputs.tensors) if x.requires_grad]
    return common.make_call(lambda: forward(*inputs.tensors), sources, inputs.grad_out, mode)


def chosen_backend(case: ModuleCase, inputs: Inputs) -> str:
    """Each patched layer chooses for itself."""
    return "patched"


def reference(case: ModuleCase, inputs: Inputs, mode: str) -> tuple[Truth, ...]:
    """What the original returns in float64.

    A gradient may be nothing but rounding (that of a key's bias is zero), so that what counts is
    its error relative to the gradients of its layer. A loss alone sums what may cancel.
    """
    if case.module == LOSS:
        return contrastive_loss.reference(
            _loss_case(case), contrastive_loss.Inputs(*inputs.tensors), mode
        )
    exact = copy.deepcopy(inputs.module).double()
    tensors = tuple(
        x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
        for x in inputs.tensors
    )
    grad_out = None if inputs.grad_out is None else inputs.grad_out.double()
    doubled = Inputs(exact, tensors, grad_out)
    results = make_call(lambda module, mode: module, doubled, mode)()
    outs, gradients = results[: mode != "bwd"], results[mode != "bwd" :]
    layers = [name.rpartition(".")[0] for name, x in exact.named_parameters() if x.requires_grad]
    norms: dict[str, float] = {}
    for layer, gradient in zip(layers, gradients, strict=False):
        norms[layer] = math.hypot(norms.get(layer, 0.0), gradient.norm().item())
    terms = [norms[layer] for layer in layers] or [0.0] * len(gradients)
    return (
        *(Truth(x.detach()) for x in outs),
        *(Truth(x, term) for x, term in zip(gradients, terms, strict=True)),
    )


def yardsticks(case: ModuleCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of the original, one for each result: the worst over eight seeds.

    The first are the very inputs that are judged: what a library sums over a batch, it may round
    after each of its elements. The others are of a batch of one, where the module does not mix
    what is in a batch.
    """
    if case.module == LOSS:
        return contrastive_loss.yardsticks(_loss_case(case), dtype, mode)
    few = replace(case, batch=case.yardstick_batch)
    first, *others = SEEDS
    runs = [(case, first), *((few, seed) for seed in others)]
    samples = (make_inputs(of, dtype, mode, seed) for of, seed in runs)
    return common.worst_errors(
        (make_call(lambda module, mode: module, x, mode)(), reference(case, x, mode))
        for x in samples
    )


def work(case: ModuleCase, dtype: torch.dtype, mode: str) -> Work:
    """FLOPs as torch and our operators count them; parameters, inputs, output moved once a pass.

    Backward reads them again and the output's gradient, and writes the gradients. Exponentials are
    not counted. Nothing is computed: the tensors have shapes alone.
    """
    inputs = make_inputs(case, dtype, mode, device="meta")
    vlmfast.patch(inputs.module)
    # Not the module itself: the counter's hooks on modules do not bear inputs that are leaves.
    forward = inputs.module.forward
    with FlopCounterMode(display=False) as counter:
        out, *_ = _call(inputs.module, forward, inputs, "fwd" if mode == "fwd" else "fwd+bwd")()
    flops = counter.get_total_flops()
    if mode == "bwd":
        with FlopCounterMode(display=False) as counter:
            forward(*inputs.tensors)
        flops -= counter.get_total_flops()
    held = [*inputs.module.parameters(), *inputs.tensors]
    read = sum(x.nbytes for x in held) + out.nbytes
    written = sum(x.nbytes for x in held if x.requires_grad)
    least = {"fwd": read, "bwd": read + written, "fwd+bwd": 2 * read + written}[mode]
    return Work(flops, least)
