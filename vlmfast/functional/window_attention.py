"""Shifted-window attention of Swin and Swin V2 on the packed projection of a whole map."""

from typing import Any

import torch
from torch import Tensor

from vlmfast import checks, dispatch
from vlmfast.checks import check_floating_tensor, reject, reject_type

# As kernels count them: batch, height and width; and channels.
_COUNTED, _MOST_CHANNELS = ("images", "rows", "columns", "channels"), 1 << 24
_PACKED, _APART = (
    checks.Limits(_COUNTED, (checks.MOST_INT64, 1 << 30, 1 << 30, most))
    for most in (3 * _MOST_CHANNELS, _MOST_CHANNELS)
)


def shifted_window_attention(
    qkv: Tensor | tuple[Tensor, Tensor, Tensor],
    num_heads: int,
    window_size: tuple[int, int],
    shift_size: tuple[int, int] = (0, 0),
    relative_position_bias: Tensor | None = None,
    *,
    logit_scale: Tensor | None = None,
    scale: float | None = None,
    mask_value: float = -100.0,
    pad_value: Tensor | None = None,
    wrap: str = "padded",
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """Swin's attention from the output of the qkv projection to the input of the output projection.

    The map is padded below and at the right to whole windows, rolled by -shift_size and cut into
    windows of M = window_size[0] * window_size[1] tokens. In each window and head

        logits = scale * query @ key^T + relative_position_bias + mask      (Swin)
        logits = logit_scale * cos(query, key) + relative_position_bias + mask      (Swin V2)
        out    = dropout(softmax(logits)) @ value

    and windows, roll and padding are undone. cos normalises by x / max(|x|, 1e-12). The mask is
    `mask_value` between tokens of different regions, else 0: the last shift_size[0] rows and the
    last shift_size[1] columns of the padded, rolled map came from its other side. Nothing of this
    is copied: kernels find the tokens of a window, and the mask, from coordinates.

    Args:
        qkv: (B, H, W, 3C): query, key and value, each of num_heads * D channels; or a tuple of the
            three, each (B, H, W, C). Any strides.
        num_heads: divides C.
        window_size: height and width of a window in tokens. It may exceed the map.
        shift_size: of height and width, each at least 0 and below the window's. It is obeyed also
            where one window covers the map; layers that drop it there must pass 0.
        relative_position_bias: (num_heads, M, M), added to the logits as it is, whatever its
            dtype; it gets its gradient.
        logit_scale: (num_heads,): factor of the cosines, already clamped and exponentiated. None
            for scaled dot products.
        scale: factor of the logits; 1 / sqrt(D) for None. Unused with logit_scale.
        mask_value: a finite number.
        pad_value: (3C,): query, key and value of padded tokens, which is the projection's bias
            where a model pads before it projects; zeros for None. Padded tokens are keys like any
            other, in the region that they lie in.
        wrap: "padded" rolls the padded map (torchvision, transformers), "unpadded" the map before
            it is padded (timm).
        dropout_p: probability with which a weight is dropped. It applies always, so pass 0.0 in
            evaluation.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        (B, H, W, C), contiguous, in the dtype of qkv.

    A NaN in one window, head or batch element does not reach another.

    Raises:
        TypeError: an argument is of a wrong type; the tensors of qkv differ in dtype or are not
            floating.
        ValueError: shapes do not fit, a float64 tensor beside a narrower qkv exceeds float32 (seen
            on the CPU), num_heads does not divide the channels, a window has no tokens, a shift is
            negative or not below the window, mask_value is not finite, devices differ, dropout_p
            is outside [0, 1], or wrap or backend is unknown.
        NotImplementedError: the forced backend cannot run the call.

    Source: Liu et al., "Swin Transformer" (2021) and "Swin Transformer V2" (2022).
    """
    query, key, value = _cast_and_check(qkv)
    packed = 3 if key is None else 1
    channels = query.shape[3] // packed
    num_heads = checks.check_integer("num_heads", num_heads, least=1)
    if channels == 0 or channels % num_heads:
        reject("num_heads", f"a number that divides the {channels} channels", num_heads)
    head_dim = channels // num_heads
    window = _check_pair("window_size", window_size)
    shift = _check_pair("shift_size", shift_size)
    for size, by in zip(window, shift, strict=True):
        if size < 1:
            reject("window_size", "at least 1 token in each direction", window)
        if by < 0 or by >= size:
            reject("shift_size", f"at least 0 and below window_size, {window}", shift)
    tokens = window[0] * window[1]
    bias = _check_parameter(
        "relative_position_bias", relative_position_bias, (num_heads, tokens, tokens), query
    )
    logit_scale = _check_parameter("logit_scale", logit_scale, (num_heads,), query)
    pad_value = _check_parameter("pad_value", pad_value, (3 * channels,), query)
    scale = checks.softmax_scale(scale, head_dim, query.dtype)
    mask_value = checks.check_number("mask_value", mask_value, query.dtype)
    if not isinstance(wrap, str):
        reject_type("wrap", "'padded' or 'unpadded'", type(wrap).__name__)
    if wrap not in ("padded", "unpadded"):
        reject("wrap", "'padded' or 'unpadded'", repr(wrap))
    dropout_p = checks.check_dropout("dropout_p", dropout_p)

    args = (
        *(query, key, value, bias, logit_scale, pad_value),
        *(num_heads, *window, *shift, wrap == "padded", scale, mask_value, dropout_p),
    )
    inputs = (query, bias, logit_scale, pad_value, head_dim, window)
    out, _ = dispatch.run(
        "window_attention",
        args,
        backend,
        inputs,
        dropout_p=dropout_p,
        limits=(("qkv", query, _PACKED if key is None else _APART),),
    )
    return out


def _cast_and_check(qkv: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Casts for autocast; the packed tensor comes back as the query, without key and value."""
    if isinstance(qkv, Tensor):
        check_floating_tensor("qkv", qkv)
        if qkv.dim() != 4 or qkv.shape[3] % 3:
            reject("qkv", "shape (batch, height, width, 3 * channels)", tuple(qkv.shape))
        return checks.autocast(qkv)[0], None, None
    if not isinstance(qkv, (tuple, list)):
        reject_type("qkv", "a tensor or a tuple of three", type(qkv).__name__)
    if len(qkv) != 3:
        reject("qkv", "a tensor or a tuple of three", f"a {type(qkv).__name__} of {len(qkv)}")
    names = ("qkv[0]", "qkv[1]", "qkv[2]")
    query, key, value = checks.cast_alike(names, qkv)
    if query.dim() != 4:
        reject(names[0], "shape (batch, height, width, channels)", tuple(query.shape))
    for name, tensor in zip(names[1:], (key, value), strict=True):
        if tensor.shape != query.shape:
            reject(name, f"the shape of qkv[0], {tuple(query.shape)}", tuple(tensor.shape))
    return query, key, value


def _check_pair(argument: str, pair: Any) -> tuple[int, int]:
    if not isinstance(pair, (tuple, list)):
        reject_type(argument, "a pair of ints", type(pair).__name__)
    if len(pair) != 2:
        reject(argument, "a pair of ints", pair)
    least = -checks.MOST_INT32  # the caller says better how small they may be
    height, width = (checks.check_integer(argument, number, least) for number in pair)
    return height, width


def _check_parameter(
    argument: str, tensor: Any, shape: tuple[int, ...], query: Tensor
) -> Tensor | None:
    """A tensor beside qkv, in a dtype that kernels take where qkv's is such a one."""
    if tensor is None:
        return None
    check_floating_tensor(argument, tensor)
    checks.check_device(argument, tensor, "qkv", query)
    if tuple(tensor.shape) != shape:
        reject(argument, f"shape {shape}", tuple(tensor.shape))
    if tensor.dtype == torch.float64 and query.dtype != torch.float64:
        narrowed = tensor.to(torch.float32)
        if checks.may_read_values(tensor):
            overflows = narrowed.detach().isinf() & tensor.detach().isfinite()
            if overflows.any():
                got = tensor.detach()[overflows][0].item()
                reject(argument, "values that float32 holds beside a narrower qkv", got)
        return narrowed
    return tensor
