"""Cases of shifted-window attention, and the norms of the terms that it sums."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops import window_attention as ops
from vlmfast.reference.common import dropout_keep_mask
from vlmfast.reference.window_attention import window_attention as reference
from vlmfast.verify.common import Case, Inputs, Tensors, softmax_terms

TENSORS = ("query", "key", "value", "bias", "logit_scale", "pad_value")
_DEFAULTS = {
    "shift_height": 0,
    "shift_width": 0,
    "wrap_padded": True,
    "mask_value": -100.0,
    "dropout_p": 0.0,
    "dropout_seed": None,
}


def _arguments(inputs: Inputs) -> dict[str, Any]:
    """Arguments of the reference and of the operators."""
    return {**dict.fromkeys(TENSORS), **_DEFAULTS, **inputs}


def _by_reference(inputs: Inputs) -> Tensors:
    return {"out": reference(**_arguments(inputs))[0]}


def _by_kernel(inputs: Inputs, backend: str) -> Tensors:
    return {"out": ops.FORWARD[backend](**_arguments(inputs))[0]}


class Windows:
    """The map of a call cut into windows, by the steps that the models' own code takes."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.heads = arguments["num_heads"]
        self.window = (arguments["window_height"], arguments["window_width"])
        self.shift = (arguments["shift_height"], arguments["shift_width"])
        self.wrap_padded = arguments["wrap_padded"]
        height, width = arguments["query"].shape[1:3]
        self.size = (height, width)
        self.padded = tuple(
            -(-size // by) * by for size, by in zip(self.size, self.window, strict=True)
        )

    def cut(self, tokens: Tensor, pad: Tensor | None) -> Tensor:
        """(B, H, W, C) to (B, windows, heads, M, D)."""
        back = tuple(-by for by in self.shift)
        if not self.wrap_padded:
            tokens = tokens.roll(back, (1, 2))
        if self.padded != self.size:
            batch, height, width, channels = tokens.shape
            filler = tokens.new_zeros(channels) if pad is None else pad.to(tokens.dtype)
            right = filler.expand(batch, height, self.padded[1] - width, channels)
            tokens = torch.cat([tokens, right], 2)
            below = filler.expand(batch, self.padded[0] - height, self.padded[1], channels)
            tokens = torch.cat([tokens, below], 1)
        if self.wrap_padded:
            tokens = tokens.roll(back, (1, 2))
        return self._partition(tokens, self.heads)

    def join(self, windows: Tensor) -> Tensor:
        """(B, windows, heads, M, D) to (B, H, W, C)."""
        batch, _, heads, _, dim = windows.shape
        grid = [size // by for size, by in zip(self.padded, self.window, strict=True)]
        tokens = windows.reshape(batch, *grid, heads, *self.window, dim)
        tokens = tokens.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, *self.padded, heads * dim)
        if self.wrap_padded:
            tokens = tokens.roll(self.shift, (1, 2))
        tokens = tokens[:, : self.size[0], : self.size[1]]
        return tokens if self.wrap_padded else tokens.roll(self.shift, (1, 2))

    def mask(self, like: Tensor, mask_value: float) -> Tensor:
        """(windows, 1, M, M)."""
        regions = like.new_zeros(self.padded)
        if self.shift[0]:
            regions[-self.shift[0] :] += 2
        if self.shift[1]:
            regions[:, -self.shift[1] :] += 1
        regions = self._partition(regions[None, :, :, None], 1)[0, ..., 0]  # (windows, 1, M)
        differs = regions[..., :, None] != regions[..., None, :]
        lowest = torch.finfo(like.dtype).min
        masked = torch.zeros_like(differs, dtype=like.dtype)
        return masked.masked_fill(differs, max(mask_value, lowest))

    def _partition(self, tokens: Tensor, heads: int) -> Tensor:
        batch, height, width, channels = tokens.shape
        down, across = height // self.window[0], width // self.window[1]
        dim = channels // heads
        tokens = tokens.reshape(batch, down, self.window[0], across, self.window[1], heads, dim)
        tokens = tokens.permute(0, 1, 3, 5, 2, 4, 6)
        return tokens.reshape(batch, down * across, heads, self.window[0] * self.window[1], dim)


def _cut_all(arguments: dict[str, Any]) -> tuple[Windows, list[Tensor]]:
    windows = Windows(arguments)
    tensors = [arguments[name] for name in ("query", "key", "value")]
    if tensors[1] is None:
        tensors = list(tensors[0].chunk(3, -1))
    pad = arguments["pad_value"]
    pads = (None,) * 3 if pad is None else pad.chunk(3)
    return windows, [windows.cut(*pair) for pair in zip(tensors, pads, strict=True)]


def by_torch(inputs: Inputs) -> Tensors:
    """The steps of the models' own code, each by torch in the dtype of the inputs."""
    arguments = _arguments(inputs)
    windows, (query, key, value) = _cut_all(arguments)
    dtype, logit_scale = query.dtype, arguments["logit_scale"]
    if logit_scale is None:
        logits = (query * arguments["scale"]) @ key.transpose(-2, -1)
    else:
        logits = F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).transpose(-2, -1)
        logits = logits * logit_scale.to(dtype)[:, None, None]
    if arguments["bias"] is not None:
        logits = logits + arguments["bias"].to(dtype)
    if any(windows.shift):
        logits = logits + windows.mask(logits, arguments["mask_value"])
    weights = logits.softmax(-1)
    if arguments["dropout_seed"] is not None:
        weights = weights * _keep_mask(arguments, weights) / (1.0 - arguments["dropout_p"])
    return {"out": windows.join(weights.to(dtype) @ value)}


def _keep_mask(arguments: dict[str, Any], weights: Tensor) -> Tensor:
    batch, windows, heads, rows, columns = weights.shape
    p, seed = arguments["dropout_p"], arguments["dropout_seed"]
    keep = dropout_keep_mask(batch * windows, heads, rows, columns, p, seed)
    return keep.unflatten(0, (batch, windows))


def summed_terms(inputs: Inputs, grads: Tensors) -> dict[str, float]:
    """Norms of the terms whose sums the outputs and gradients are; everything in float64.

    With weights P, out sums P V, grad_value P dO, and the others terms of P `softmax_terms`.
    """
    arguments = _arguments(inputs)
    windows, (query, key, value) = _cut_all(arguments)
    grad_out = Windows({**arguments, "query": grads["out"]}).cut(grads["out"], None)
    logit_scale = arguments["logit_scale"]
    # A gradient through x / |x| is divided by |x|.
    query_norm = key_norm = query.new_ones(1, 1)
    if logit_scale is None:
        factor: Tensor | float = arguments["scale"]
    else:
        query_norm, key_norm = (x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (query, key))
        query, key = query / query_norm, key / key_norm
        factor = logit_scale[:, None, None]
    cosines = query @ key.transpose(-2, -1)
    logits = factor * cosines
    if arguments["bias"] is not None:
        logits = logits + arguments["bias"]
    if any(windows.shift):
        logits = logits + windows.mask(logits, arguments["mask_value"])
    weights = logits.softmax(-1)
    kept = weights
    if arguments["dropout_seed"] is not None:
        kept = weights * _keep_mask(arguments, weights) / (1.0 - arguments["dropout_p"])
    products = kept * softmax_terms(kept, value, grad_out)

    def norm(equation: str, *tensors: Tensor) -> float:
        return torch.einsum(f"{equation}->", *(x.square() for x in tensors)).sqrt().item()

    scaled = products * factor
    grad_query = norm("bwhij,bwhjd", scaled / query_norm, key)
    grad_key = norm("bwhij,bwhid", scaled / key_norm.transpose(-2, -1), query)
    grad_value = norm("bwhij,bwhid", kept, grad_out)
    packed = (grad_query**2 + grad_key**2 + grad_value**2) ** 0.5
    return {
        "out": norm("bwhij,bwhjd", kept, value),
        "grad_query": grad_query if arguments["key"] is not None else packed,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_bias": products.norm().item(),
        "grad_logit_scale": (products * cosines).norm().item(),
        "grad_pad_value": packed,
    }


def window_case(
    name: str,
    size: tuple[int, int, int],
    heads: int,
    head_dim: int,
    window: tuple[int, int],
    shift: tuple[int, int] = (0, 0),
    *,
    cosine: bool = False,
    bias_std: float | None = 1.0,
    bias_mean: float = 0.0,
    bias_dtype: torch.dtype | None = torch.float32,
    pad_value: bool = True,
    packed: bool = True,
    **options: Any,
) -> Case:
    """A call of the operator.

    Args:
        name: of the case.
        size: (B, H, W).
        heads: their number.
        head_dim: channels of each.
        window: height and width.
        shift: of height and width.
        cosine: with a logit_scale of 5 to 10.
        bias_std: standard deviation of the bias; None for no bias.
        bias_mean: its mean.
        bias_dtype: of the tensors beside qkv; that of the inputs for None.
        pad_value: give one.
        packed: query, key and value are one tensor.
        options: scale, mask_value, wrap_padded, dropout_p.
    """
    channels, tokens = heads * head_dim, window[0] * window[1]

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        inputs: Inputs = {
            "num_heads": heads,
            "window_height": window[0],
            "window_width": window[1],
            "shift_height": shift[0],
            "shift_width": shift[1],
            "scale": head_dim**-0.5,
            **options,
        }
        if packed:
            inputs["query"] = normal(*size, 3 * channels).to(dtype)
        else:
            for part in ("query", "key", "value"):
                inputs[part] = normal(*size, channels).to(dtype)
        beside = bias_dtype or dtype
        if bias_std is not None:
            bias = bias_mean + bias_std * normal(heads, tokens, tokens)
            inputs["bias"] = bias.to(beside)
        if cosine:
            logit_scale = 5.0 + 5.0 * torch.rand(heads, generator=generator)
            inputs["logit_scale"] = logit_scale.to(beside)
        if pad_value:
            inputs["pad_value"] = normal(3 * channels).to(beside)
        if "dropout_p" in options:
            inputs["dropout_seed"] = torch.randint(0, 2**62, (1,), generator=generator)
        return {key: x.to(device) if isinstance(x, Tensor) else x for key, x in inputs.items()}

    given = {
        "query": True,
        "key": not packed,
        "value": not packed,
        "bias": bias_std is not None,
        "logit_scale": cosine,
        # Where nothing is padded torch has no gradient to compare with.
        "pad_value": pad_value and (size[1] % window[0] or size[2] % window[1]),
    }
    differentiable = tuple(part for part in TENSORS if given[part])
    return Case(name, make, differentiable, _by_kernel, by_torch, _by_reference, summed_terms)


CASES = [
    window_case("Swin", (2, 14, 14), 3, 32, (7, 7)),
    window_case("Swin, shifted", (1, 21, 14), 3, 32, (7, 7), (3, 3)),
    window_case("Swin, padded", (1, 12, 17), 2, 32, (7, 7), (3, 3)),
    window_case(
        "Swin, shifted before padding", (1, 12, 17), 2, 32, (7, 7), (3, 3), wrap_padded=False
    ),
    window_case("Swin V2", (1, 16, 16), 2, 32, (8, 8), (4, 4), cosine=True),
    window_case("Swin V2, padded", (1, 13, 9), 2, 24, (7, 7), (3, 3), cosine=True),
    window_case("rectangles", (1, 10, 21), 2, 16, (4, 6), (1, 5), packed=False),
    window_case("window above the map", (2, 5, 6), 2, 16, (8, 8)),
    window_case("large bias", (1, 14, 14), 2, 32, (7, 7), bias_std=20.0, bias_dtype=None),
    window_case("dropout", (1, 14, 14), 2, 32, (7, 7), (3, 3), dropout_p=0.3),
]
