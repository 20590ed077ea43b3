"""Who races, by family: our own call and what it replaces. Each says what it cannot run and why."""

import copy
import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlmfast
import vlmfast.functional as VF
from bench.cases import AttentionCase, ImageAttentionCase, LossCase, ModuleCase, WindowCase

OURS = "vlmfast"

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of image, text, scale
PrepareModule = Callable[[nn.Module, str], nn.Module]  # of the original and the mode


@dataclass(frozen=True)
class Contestant:
    """One way to compute a family's operation.

    Attributes:
        name: how tables call it.
        refusal: (case, dtype) -> why it cannot run that, or None.
        prepare: case -> the call to be timed. What a model would build once and keep, such as a
            causal mask, is built here and not timed.
        devices: where it races.
        compiles: it compiles for every shape first, which takes up to a minute, and is left out
            unless asked for.
    """

    name: str
    refusal: Callable[[Any, torch.dtype], str | None]
    prepare: Callable[[Any], Callable[..., Any]]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles: bool = False


Refusal = Callable[[Any, torch.dtype], str | None]


def _never(case: Any, dtype: torch.dtype) -> str | None:
    return None


def _half_only(case: Any, dtype: torch.dtype) -> str | None:
    return None if dtype in (torch.bfloat16, torch.float16) else f"does not take {dtype}"


def _needs(package: str, *further: Refusal) -> Refusal:
    """Refuses where a package is missing, and then where one of `further` does."""

    def refusal(case: Any, dtype: torch.dtype) -> str | None:
        if not is_installed(package):
            return "not installed"
        return next(filter(None, (why(case, dtype) for why in further)), None)

    return refusal


@functools.cache
def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def _forced(
    prepare: Callable[[Any], Callable[..., Tensor]], backend: SDPBackend
) -> Callable[[Any], Callable[..., Tensor]]:
    """The same with torch's attention bound to one of its backends."""

    def prepare_forced(case: Any) -> Callable[..., Tensor]:
        attention = prepare(case)

        def forced(*sources: Tensor | None) -> Tensor:
            with sdpa_kernel(backend):
                return attention(*sources)

        return forced

    return prepare_forced


def _compiled(prepare: Callable[[Any], Callable[..., Any]]) -> Callable[[Any], Callable[..., Any]]:
    """The same by torch.compile."""

    def prepare_compiled(case: Any) -> Callable[..., Any]:
        functorch_config.donated_buffer = False  # backward alone keeps its graph
        return torch.compile(prepare(case), fullgraph=True)

    return prepare_compiled


def _ours(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return VF.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def _sdpa(case: AttentionCase) -> Attention:
    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=case.is_causal)

    return attention


def eager_attention(case: AttentionCase) -> Attention:
    """softmax(scale q k^T + mask) v with the scores in memory, each step torch's own."""
    scale = 1 / math.sqrt(case.head_dim)

    @functools.cache
    def hidden(device: torch.device) -> Tensor:
        sizes = (case.query_length, case.key_length)
        return torch.ones(sizes, dtype=torch.bool, device=device).triu(1)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1)
        if case.is_causal:
            scores = scores.masked_fill(hidden(query.device), -math.inf)
        return scores.softmax(dim=-1) @ value

    return attention


def _eager_refusal(case: AttentionCase, dtype: torch.dtype) -> str | None:
    # Scores, probabilities and the gradients of both are alive at once in backward.
    matrices = 4 * case.batch * case.heads * case.query_length * case.key_length * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"four score matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _flex(case: AttentionCase) -> Attention:
    compiled = torch.compile(flex_attention, fullgraph=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    @functools.cache
    def mask(device: torch.device) -> BlockMask:
        sizes = (None, None, case.query_length, case.key_length)
        return create_block_mask(visible, *sizes, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not case.is_causal:
            return compiled(query, key, value)
        return compiled(query, key, value, block_mask=mask(query.device))

    return attention


def _xformers(case: AttentionCase) -> Attention:
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    bias = LowerTriangularMask() if case.is_causal else None

    def attention(*sources: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in sources)
        return memory_efficient_attention(query, key, value, bias).transpose(1, 2)

    return attention


def _bottom_right(case: AttentionCase, dtype: torch.dtype) -> str | None:
    if case.is_causal and case.query_length != case.key_length:
        return "aligns a causal mask at its other end"
    return None


def _flash_attn(case: AttentionCase) -> Attention:
    from flash_attn import flash_attn_func

    def attention(*sources: Tensor) -> Tensor:
        query, key, value = (x.transpose(1, 2) for x in sources)
        return flash_attn_func(query, key, value, causal=case.is_causal).transpose(1, 2)

    return attention


def _torch_varlen(case: AttentionCase) -> Attention:
    """Every batch element as one sequence of a packed batch."""
    from torch.nn.attention.varlen import varlen_attn

    sizes = (case.query_length, case.key_length)
    window = (-1, 0) if case.is_causal else (-1, -1)

    @functools.cache
    def starts(length: int, device: torch.device) -> Tensor:
        return length * torch.arange(case.batch + 1, dtype=torch.int32, device=device)

    def attention(*sources: Tensor) -> Tensor:
        packed = (x.transpose(1, 2).flatten(0, 1) for x in sources)
        cumulative = (starts(length, sources[0].device) for length in sizes)
        out = varlen_attn(*packed, *cumulative, *sizes, window_size=window)
        return out.unflatten(0, (case.batch, -1)).transpose(1, 2)

    return attention


FLASH_ATTENTION = Contestant(OURS, _never, _ours)
SDPA = Contestant("torch SDPA", _never, _sdpa)
EAGER = Contestant("eager", _eager_refusal, eager_attention)


def image_plan(
    case: ImageAttentionCase, batch: int | None = None, device: torch.device | str = "cpu"
) -> VF.CrossAttentionPlan:
    """Of a text with its images at equal distances, the first at its start."""
    media = torch.zeros(batch or case.batch, case.tokens, dtype=torch.bool, device=device)
    media[:, [image * case.tokens // case.images for image in range(case.images)]] = True
    return VF.cross_attention_plan(VF.image_index(media), case.images)


def _image_mask(case: ImageAttentionCase, device: torch.device) -> Tensor:
    """(1, 1, T, I * L) bool: which latents each token sees."""
    phi = image_plan(case, 1, device).image_index
    images = torch.arange(1, case.images + 1, device=device).repeat_interleave(case.latents)
    return (phi[..., None] == images)[:, None]


def _our_image_attention(case: ImageAttentionCase) -> Attention:
    plan = functools.cache(lambda device: image_plan(case, device=device))
    return lambda q, k, v: VF.image_cross_attention(q, k, v, plan(q.device))


def _sdpa_image_attention(case: ImageAttentionCase) -> Attention:
    mask = functools.cache(functools.partial(_image_mask, case))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return F.scaled_dot_product_attention(query, key, value, mask(query.device))

    return attention


def eager_image_attention(case: ImageAttentionCase) -> Attention:
    """flamingo-pytorch's formula: every score, those of other images at the lowest float."""
    scale = 1 / math.sqrt(case.head_dim)
    hidden = functools.cache(lambda device: ~_image_mask(case, device))

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = (query * scale) @ key.flatten(2, 3).transpose(-2, -1)
        scores = scores.masked_fill(hidden(query.device), -torch.finfo(scores.dtype).max)
        scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        return scores.softmax(dim=-1) @ value.flatten(2, 3)

    return attention


def _flex_image_attention(case: ImageAttentionCase) -> Attention:
    compiled = torch.compile(flex_attention, fullgraph=True)

    @functools.cache
    def mask(device: torch.device) -> BlockMask:
        phi = image_plan(case, 1, device).image_index[0]

        def visible(b: Tensor, h: Tensor, token: Tensor, latent: Tensor) -> Tensor:
            return phi[token] == 1 + latent // case.latents

        sizes = (None, None, case.tokens, case.images * case.latents)
        return create_block_mask(visible, *sizes, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.flatten(2, 3), value.flatten(2, 3)
        return compiled(query, key, value, block_mask=mask(query.device))

    return attention


CROSS_ATTENTION = Contestant(OURS, _never, _our_image_attention)
IMAGE_SDPA = Contestant("torch SDPA, bool mask", _never, _sdpa_image_attention)
IMAGE_EAGER = Contestant("flamingo-pytorch's steps", _never, eager_image_attention)

# qkv (B, H, W, 3C), bias (heads, M, M), logit_scale (heads,) or None
WindowAttention = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def _our_windows(case: WindowCase) -> WindowAttention:
    window, shift = (case.window, case.window), (case.shift, case.shift)

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        return VF.shifted_window_attention(
            qkv, case.heads, window, shift, bias, logit_scale=logit_scale
        )

    return attention


def _region_mask(case: WindowCase, device: torch.device) -> Tensor | None:
    """(windows of a map, M, M): what a shifted layer adds to its logits."""
    if not case.shift:
        return None
    padded = -(-case.size // case.window) * case.window
    regions = torch.zeros(1, padded, padded, 1, device=device)
    regions[:, -case.shift :] += 2
    regions[:, :, -case.shift :] += 1
    regions = _cut(regions, case.window).squeeze(-1)
    return torch.where(regions[:, :, None] == regions[:, None, :], 0.0, -100.0)


def _cut(tokens: Tensor, window: int) -> Tensor:
    """(B, H, W, C) to (B * windows, M, C)."""
    batch, height, width, channels = tokens.shape
    grid = tokens.view(batch, height // window, window, width // window, window, channels)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(-1, window * window, channels)


def _join(windows: Tensor, batch: int, size: int, window: int) -> Tensor:
    """(B * windows, M, C) to (B, size, size, C)."""
    grid = windows.view(batch, size // window, size // window, window, window, -1)
    return grid.permute(0, 1, 3, 2, 4, 5).reshape(batch, size, size, -1)


def window_sequence(case: WindowCase, with_sdpa: bool = False) -> WindowAttention:
    """torchvision's steps: pad, roll, cut, attend, join, roll back, crop.

    They begin at the output of the projection, as ours does, and so roll and cut its 3C channels.
    The libraries do that before they project, to C channels.
    """
    padding = -case.size % case.window
    region_mask = functools.cache(functools.partial(_region_mask, case))

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        batch = qkv.shape[0]
        mask = region_mask(qkv.device)
        mask = None if mask is None else mask.to(qkv.dtype)
        if padding:
            qkv = F.pad(qkv, (0, 0, 0, padding, 0, padding))
        if case.shift:
            qkv = qkv.roll((-case.shift, -case.shift), (1, 2))
        windows = _cut(qkv, case.window).unflatten(-1, (3, case.heads, case.head_dim))
        query, key, value = windows.permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            query = query * case.head_dim**-0.5
        else:
            query = F.normalize(query, dim=-1) * logit_scale[:, None, None]
            key = F.normalize(key, dim=-1)
        if with_sdpa:
            added = bias[None]
            if mask is not None:
                added = (added + mask[:, None]).repeat(batch, 1, 1, 1)
            out = F.scaled_dot_product_attention(query, key, value, added, scale=1.0)
        else:
            logits = query @ key.transpose(-2, -1) + bias
            if mask is not None:
                logits = logits.unflatten(0, (batch, -1)) + mask[:, None]
                logits = logits.flatten(0, 1)
            out = logits.softmax(-1) @ value
        out = _join(out.transpose(1, 2).flatten(2), batch, case.size + padding, case.window)
        if case.shift:
            out = out.roll((case.shift, case.shift), (1, 2))
        return out[:, : case.size, : case.size].contiguous() if padding else out

    return attention


def _window_sdpa(case: WindowCase) -> WindowAttention:
    return window_sequence(case, with_sdpa=True)


def _uneven(case: WindowCase, dtype: torch.dtype) -> str | None:
    if case.size % case.window:
        return "shifts before it pads, ours here after"
    return None


def _timm_windows(case: WindowCase) -> WindowAttention:
    """The steps of timm's blocks, with its own functions that cut and join windows."""
    from vlmfast._torchvision_ops import import_torchvision

    import_torchvision()
    from timm.models.swin_transformer import window_partition, window_reverse

    window = (case.window, case.window)
    region_mask = functools.cache(functools.partial(_region_mask, case))

    def attention(qkv: Tensor, bias: Tensor, logit_scale: Tensor | None) -> Tensor:
        mask = region_mask(qkv.device)
        mask = None if mask is None else mask.to(qkv.dtype)
        if case.shift:
            qkv = qkv.roll((-case.shift, -case.shift), (1, 2))
        windows = window_partition(qkv, window).flatten(1, 2)
        windows = windows.unflatten(-1, (3, case.heads, case.head_dim))
        query, key, value = windows.permute(2, 0, 3, 1, 4).unbind(0)
        if logit_scale is None:
            logits = (query * case.head_dim**-0.5) @ key.transpose(-2, -1)
        else:
            cosines = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
            logits = cosines * logit_scale[:, None, None]
        logits = logits + bias
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None]).flatten(0, 1)
        out = (logits.softmax(-1) @ value).transpose(1, 2).flatten(2)
        out = out.unflatten(1, window)
        out = window_reverse(out, window, case.size, case.size)
        return out.roll((case.shift, case.shift), (1, 2)) if case.shift else out

    return attention


WINDOW_ATTENTION = Contestant(OURS, _never, _our_windows)
WINDOW_SEQUENCE = Contestant("torchvision's steps", _never, window_sequence)
WINDOW_SDPA = Contestant("steps with SDPA", _never, _window_sdpa)


def _our_loss(case: LossCase) -> Loss:
    if case.loss == "siglip":
        return lambda image, text, scale: VF.siglip_loss(image, text, scale, -10.0)
    return VF.clip_loss


def dense_loss(case: LossCase) -> Loss:
    """The loss by one matrix of logits, each step torch's own."""

    def clip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T
        labels = torch.arange(case.pairs, device=image.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        logits = scale * image @ text.T - 10.0
        signs = 2 * torch.eye(case.pairs, dtype=logits.dtype, device=image.device) - 1
        return -F.logsigmoid(signs * logits).sum() / case.pairs

    return siglip if case.loss == "siglip" else clip


def _logits_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    # Logits, softmaxes along rows and columns and their gradients are alive at once in backward.
    matrices = 5 * case.pairs**2 * dtype.itemsize
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if matrices > memory // 2:
        return f"five N x N matrices take {matrices / 2**30:.1f} GiB, over half of the memory"
    return None


def _open_clip(case: LossCase) -> Loss:
    from vlmfast._torchvision_ops import import_torchvision

    import_torchvision()
    from open_clip.loss import ClipLoss, SigLipLoss

    if case.loss == "siglip":
        module = SigLipLoss()
        return lambda image, text, scale: module(image, text, scale, -10.0)
    return ClipLoss()


def _no_siglip(case: LossCase, dtype: torch.dtype) -> str | None:
    return "computes a softmax, not SigLIP's sigmoids" if case.loss == "siglip" else None


def _linear_cross_entropy_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} does not have it"
    return _no_siglip(case, dtype)


def _linear_cross_entropy(case: LossCase) -> Loss:
    """Images as weights of the texts' classifier and the other way round, some rows at a time."""
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    entropy = functools.partial(F.linear_cross_entropy, options=options)

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        labels = torch.arange(case.pairs, device=image.device)
        return (entropy(scale * image, text, labels) + entropy(scale * text, image, labels)) / 2

    return loss


def _inf_cl_refusal(case: LossCase, dtype: torch.dtype) -> str | None:
    if case.dim % 256:
        return "takes features in pieces of 256"
    return _no_siglip(case, dtype)


def _inf_cl(case: LossCase) -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        losses = (cal_flash_loss(x, y, scale=scale) for x, y in ((image, text), (text, image)))
        return sum(x.mean() for x in losses) / 2

    return loss


def _our_module(case: ModuleCase) -> PrepareModule:
    """A patched copy; where no gradient is asked for, packed for inference as well."""

    def prepare(module: nn.Module, mode: str) -> nn.Module:
        patched = copy.deepcopy(module)
        report = vlmfast.patch(patched, inference=mode == "fwd")
        if not report.replaced:
            raise RuntimeError(f"vlmfast.patch replaced nothing: {report}")
        return patched

    return prepare


def _original_module(case: ModuleCase) -> PrepareModule:
    return lambda module, mode: module


def _compiled_module(case: ModuleCase) -> PrepareModule:
    def prepare(module: nn.Module, mode: str) -> nn.Module:
        functorch_config.donated_buffer = False
        return torch.compile(copy.deepcopy(module))

    return prepare


_GPU = ("cuda",)
_MODULES = (
    Contestant(OURS, _never, _our_module),
    Contestant("original", _never, _original_module),
    Contestant("torch.compile", _never, _compiled_module, compiles=True),
)
_FLASH, _EFFICIENT, _CUDNN, _MATH = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)

CONTESTANTS: dict[str, Sequence[Contestant]] = {
    "flash_attention": (
        FLASH_ATTENTION,
        SDPA,
        EAGER,
        Contestant("SDPA math", _eager_refusal, _forced(_sdpa, _MATH)),
        Contestant("SDPA flash", _half_only, _forced(_sdpa, _FLASH), _GPU),
        Contestant("SDPA efficient", _never, _forced(_sdpa, _EFFICIENT), _GPU),
        Contestant("SDPA cuDNN", _half_only, _forced(_sdpa, _CUDNN), _GPU),
        Contestant("torch.compile", _eager_refusal, _compiled(eager_attention), compiles=True),
        Contestant("FlexAttention", _never, _flex, compiles=True),
        Contestant("xformers", _needs("xformers", _half_only), _xformers, _GPU),
        Contestant(
            "flash-attn", _needs("flash_attn", _half_only, _bottom_right), _flash_attn, _GPU
        ),
        Contestant(
            "torch varlen",
            _needs("torch.nn.attention.varlen", _half_only, _bottom_right),
            _torch_varlen,
            _GPU,
        ),
    ),
    "window_attention": (
        WINDOW_ATTENTION,
        WINDOW_SEQUENCE,
        WINDOW_SDPA,
        Contestant("timm's steps", _needs("timm", _uneven), _timm_windows),
        Contestant("steps, SDPA efficient", _never, _forced(_window_sdpa, _EFFICIENT), _GPU),
        Contestant("steps, SDPA cuDNN", _half_only, _forced(_window_sdpa, _CUDNN), _GPU),
        Contestant("torch.compile", _never, _compiled(window_sequence), compiles=True),
    ),
    "cross_attention": (
        CROSS_ATTENTION,
        IMAGE_SDPA,
        IMAGE_EAGER,
        Contestant("SDPA efficient", _never, _forced(_sdpa_image_attention, _EFFICIENT), _GPU),
        Contestant("SDPA cuDNN", _half_only, _forced(_sdpa_image_attention, _CUDNN), _GPU),
        Contestant("torch.compile", _never, _compiled(eager_image_attention), compiles=True),
        Contestant("FlexAttention", _never, _flex_image_attention, compiles=True),
    ),
    "contrastive_loss": (
        Contestant(OURS, _never, _our_loss),
        Contestant("dense", _logits_refusal, dense_loss),
        Contestant("open_clip", _needs("open_clip", _logits_refusal), _open_clip),
        Contestant("linear_cross_entropy", _linear_cross_entropy_refusal, _linear_cross_entropy),
        Contestant("torch.compile", _logits_refusal, _compiled(dense_loss), compiles=True),
        Contestant("inf-cl", _needs("inf_cl", _inf_cl_refusal), _inf_cl, _GPU),
    ),
    "layers": _MODULES,
    "models": _MODULES,
}
"""By family; the first one is ours."""

_PATCHED = (
    "forward is that of vlmfast.patch(module, inference=True), which packs Linear weights, too"
)
REMARKS = {
    "window_attention": "every contestant begins at the projected qkv, whose 3C channels the "
    "libraries' steps then shift and cut; the libraries themselves do that before they project, on "
    "C channels: for a whole layer see layers",
    "layers": _PATCHED,
    "models": _PATCHED,
}
"""By family: what a reader of its table should know."""
