"""Softmax attention with the calls of torch, flash-attn and xformers."""

import itertools
import sys
from typing import Any

import torch
from torch import Tensor

from vlmfast import checks, dispatch
from vlmfast.checks import check_flag, check_group, reject, reject_type

_NAMES = ("query", "key", "value")

NO_CAUSALITY, TOP_LEFT, BOTTOM_RIGHT = 0, 1, 2

_LIMITS = checks.Limits(
    ("batch entries", "heads", "tokens", "features of a head"),
    (checks.MOST_INT64, 1 << 29, 1 << 29, 1 << 16),
)

# cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
Packed = tuple[Tensor | None, Tensor | None, int, int]
NOT_PACKED: Packed = (None, None, 0, 0)

_XFORMERS_CAUSALITY = {
    "NoneType": NO_CAUSALITY,
    "Tensor": NO_CAUSALITY,
    "LowerTriangularMask": TOP_LEFT,
    "LowerTriangularMaskWithTensorBias": TOP_LEFT,
    "LowerTriangularFromBottomRightMask": BOTTOM_RIGHT,
    "BlockDiagonalMask": NO_CAUSALITY,
    "BlockDiagonalCausalMask": TOP_LEFT,
    "BlockDiagonalCausalFromBottomRightMask": BOTTOM_RIGHT,
}


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, call for call.

        out = dropout(softmax(scale * query @ key^T + attn_mask)) @ value

    Differences from torch: attn_mask and is_causal may be given together (both apply); attn_mask
    may be of any floating dtype and of any shape that broadcasts, 1-D included; autocast leaves it
    as it is.

    Args:
        query: (..., Hq, L, D); any leading dimensions, or none; any strides.
        key: (..., H, S, D); leading dimensions broadcast with query's.
        value: (..., H, S, Dv).
        attn_mask: broadcastable to (..., Hq, L, S). bool: True takes part. Floating: added to the
            logits in float32; it gets its gradient, summed over the dimensions that it broadcasts.
        dropout_p: probability with which a weight is dropped. As in torch it applies always, so
            pass 0.0 in evaluation.
        is_causal: key j is visible to query i iff j <= i, also where L != S.
        scale: factor of the logits; 1 / sqrt(D) for None.
        enable_gqa: heads of key and value may be fewer than Hq and divide it; query head h reads
            head h // (Hq // H).
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        (..., Hq, L, Dv) in query's dtype. A row that sees no key is 0, and so are its gradients.

    A NaN in one head or batch element does not reach another, nor does one in a key reach the
    output of a query that causality or a bool mask hides it from. A hidden value, and in backward a
    hidden key, takes part with weight 0, as in torch, so a NaN there may reach out or grad_query.

    Raises:
        TypeError: an argument is of a wrong type; query, key and value differ in dtype or are not
            floating.
        ValueError: shapes do not fit or are of head dim 0, devices differ, dropout_p is outside
            [0, 1], or backend is unknown.
        NotImplementedError: the forced backend cannot run the call.
    """
    query, key, value = checks.cast_alike(_NAMES, (query, key, value))
    shape, key_shape, value_shape = query.shape, key.shape, value.shape
    _check_shapes(shape, key_shape, value_shape)
    scale = checks.softmax_scale(scale, shape[-1], query.dtype)
    dropout_p = checks.check_dropout("dropout_p", dropout_p)
    causal = TOP_LEFT if check_flag("is_causal", is_causal) else NO_CAUSALITY
    check_flag("enable_gqa", enable_gqa)
    if attn_mask is not None:
        if _is_causal_bias(attn_mask):
            causal, attn_mask = _read_causal_bias(attn_mask, query, key, is_causal), None
        else:
            attn_mask = _check_mask("attn_mask", attn_mask, query)

    if value_shape[-2] != key_shape[-2]:
        reject("value", f"the length of key, {key_shape[-2]}", tuple(value_shape))
    leading: tuple[int, ...] = shape[:2]
    is_4d = len(shape) == len(key_shape) == len(value_shape) == 4
    if not is_4d or key_shape[:2] != leading or value_shape[:2] != leading:
        query, key, value, leading = _broadcast_to_4d(query, key, value, enable_gqa)
    if attn_mask is not None:
        scores_shape = (*leading, shape[-2], key_shape[-2])
        attn_mask = _broadcastable("attn_mask", attn_mask, scores_shape)
        attn_mask = _merge_batches(attn_mask, scores_shape)
    out, _ = _attend(query, key, value, attn_mask, causal, scale, dropout_p, backend)
    return out if len(leading) == 2 else out.reshape(*leading, *out.shape[2:])


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention within each sequence of a packed batch, as flash_attn_varlen_func computes it.

    Sequence n has queries cu_seqlens_q[n] to cu_seqlens_q[n + 1] and keys cu_seqlens_k[n] to
    cu_seqlens_k[n + 1]; either may be empty.

    Args:
        query: (total_q, Hq, D), float32, bfloat16 or float16; any strides.
        key: (total_k, Hkv, D); Hkv divides Hq, and query head h reads head h // (Hq // Hkv).
        value: (total_k, Hkv, Dv).
        cu_seqlens_q: int32 (sequences + 1,) on query's device: starts at 0, never decreases, ends
            at total_q at most. Rows beyond its end give 0.
        cu_seqlens_k: int32 (sequences + 1,), likewise with total_k.
        max_seqlen_q: length of the longest sequence of queries, or more.
        max_seqlen_k: likewise of keys.
        is_causal: key j is visible to query i iff j <= i + keys - queries, indices and lengths
            within the sequence (aligned at the bottom right).
        scale: factor of the logits; 1 / sqrt(D) for None.
        return_lse: also return the logsumexp of each row's logits; it is differentiable.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        out (total_q, Hq, Dv) in query's dtype; with return_lse also (Hq, total_q) float32. A row
        that sees no key has out 0 and logsumexp -inf.

    Raises:
        TypeError: an argument is of a wrong type or dtype.
        ValueError: shapes or devices do not fit, or cumulative lengths are wrong. Their values
            are checked for CPU tensors, elsewhere with VLMFAST_CHECKS=1; kernels bound every index.
        RuntimeError: cumulative lengths are wrong under torch.vmap, or in a subclass of Tensor.
        NotImplementedError: the forced backend cannot run the call.
    """
    query, key, value = checks.cast_alike(_NAMES, (query, key, value))
    _check_shapes(query.shape, key.shape, value.shape)
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 3:
            reject(name, "shape (total, heads, head dim)", tuple(tensor.shape))
    if value.shape[:2] != key.shape[:2]:
        reject("value", f"total and heads of key, {tuple(key.shape)}", tuple(value.shape))
    check_group("key", query.shape[1], key.shape[1])
    scale = checks.softmax_scale(scale, query.shape[-1], query.dtype)
    packed = _check_packed(query, key, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    causal = BOTTOM_RIGHT if check_flag("is_causal", is_causal) else NO_CAUSALITY
    check_flag("return_lse", return_lse)
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    out, logsumexp = _attend(query, key, value, None, causal, scale, 0.0, backend, packed)
    out = out.squeeze(0).transpose(0, 1)
    return (out, logsumexp.squeeze(0)) if return_lse else out


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """xformers.ops.memory_efficient_attention: its call, its layouts and its bias classes.

    Args:
        query: (B, M, H, K); or (B, M, K), one head; or (B, M, G, H, K), G groups of H heads. Any
            strides.
        key: (B, N, H, K), (B, N, K) or (B, N, G, H, K). Heads do not broadcast: expand a group's
            one head to H. It is then read in place where no gradient is asked for, else copied.
        value: as key, with last dimension Kv.
        attn_bias: None; a floating tensor broadcastable to (B, H, M, N), (B, M, N) or
            (B, G, H, M, N), which gets its gradient; or, of xformers.ops.fmha.attn_bias,
            LowerTriangularMask, LowerTriangularFromBottomRightMask,
            LowerTriangularMaskWithTensorBias, and with B == 1 BlockDiagonalMask,
            BlockDiagonalCausalMask, BlockDiagonalCausalFromBottomRightMask.
        p: dropout probability.
        scale: factor of the logits; 1 / sqrt(K) for None.
        backend: "cpu" | "triton" | "cuda" | "reference" to force one; None to choose.

    Returns:
        (B, M, H, Kv), (B, M, Kv) or (B, M, G, H, Kv) in query's dtype. A row that sees no key is 0.

    Raises:
        TypeError: an argument is of a wrong type; query, key and value differ in dtype or are not
            floating.
        ValueError: shapes or devices do not fit, p is outside [0, 1], or backend is unknown.
        NotImplementedError: the class of attn_bias is not one of those above, or the forced backend
            cannot run the call.
    """
    query, key, value = checks.cast_alike(_NAMES, (query, key, value))
    _check_shapes(query.shape, key.shape, value.shape)
    scale = checks.softmax_scale(scale, query.shape[-1], query.dtype)
    p = checks.check_dropout("p", p)
    if query.dim() not in (3, 4, 5):
        reject("query", "layout BMHK, BMK or BMGHK", tuple(query.shape))
    heads_shape = query.shape[2:-1]
    for name, tensor in (("key", key), ("value", value)):
        if tensor.shape[:1] != query.shape[:1] or tensor.shape[2:-1] != heads_shape:
            expected = f"batch and heads of query, {tuple(query.shape)} (expand to broadcast)"
            reject(name, expected, tuple(tensor.shape))
    if value.shape[1] != key.shape[1]:
        reject("value", f"the length of key, {key.shape[1]}", tuple(value.shape))

    bias_class = _xformers_class(attn_bias)
    causal = _XFORMERS_CAUSALITY[bias_class]
    mask = attn_bias if bias_class == "Tensor" else getattr(attn_bias, "_bias", None)
    if mask is not None:
        mask = _check_mask("attn_bias", mask, query)
        if mask.dtype == torch.bool:
            reject_type("attn_bias", "a floating dtype", mask.dtype)
        scores_shape = (query.shape[0], *heads_shape, query.shape[1], key.shape[1])
        mask = _broadcastable("attn_bias", mask, scores_shape)
        mask = _merge_heads(mask, scores_shape)
    packed = NOT_PACKED
    if bias_class.startswith("BlockDiagonal"):
        packed = _read_block_diagonal(attn_bias, query, key)

    if _is_shared_in_groups(key) and _is_shared_in_groups(value):
        key, value = key[:, :, :, 0], value[:, :, :, 0]
    query, key, value = map(_heads_first, (query, key, value))
    out, _ = _attend(query, key, value, mask, causal, scale, p, backend, packed)
    out = out.transpose(1, 2)
    return out.reshape(*out.shape[:2], *heads_shape, out.shape[-1])


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    causal: int,
    scale: float,
    dropout_p: float,
    backend: str | None,
    packed: Packed = NOT_PACKED,
) -> tuple[Tensor, Tensor]:
    """Runs the backend. Shapes are those of the operators, already checked but for their sizes."""
    return dispatch.run(
        "flash_attention",
        (query, key, value, attn_mask, *packed, causal, scale, dropout_p),
        backend,
        (query, key, value, attn_mask),
        dropout_p=dropout_p,
        out_like_query=True,
        limits=(("query", query, _LIMITS), ("value", value, _LIMITS)),  # key has no other sizes
    )


def _check_shapes(*shapes: torch.Size) -> None:
    """What no layout of query, key and value changes."""
    for name, shape in zip(_NAMES, shapes, strict=True):
        if len(shape) < 2:
            reject(name, "at least 2 dimensions", tuple(shape))
    checks.check_head_dims(*shapes)


def _check_mask(argument: str, mask: Any, query: Tensor) -> Tensor:
    """The mask in a dtype that kernels take: bool, or floating of at most 32 bits."""
    checks.check_strided(argument, mask, "a tensor or None")
    if mask.dtype != torch.bool and mask.dtype not in checks.FLOATING:
        reject_type(argument, f"a bool or {checks.floating_dtype(mask)}", mask.dtype)
    if mask.dtype == torch.float64 and query.dtype != torch.float64:
        mask = mask.to(torch.float32)
    checks.check_device(argument, mask, "query", query)
    return mask


def _broadcastable(argument: str, mask: Tensor, scores_shape: tuple[int, ...]) -> Tensor:
    """The mask with the rank of the scores; its dimensions are those of the scores, or 1."""
    missing = len(scores_shape) - mask.dim()
    fits = missing >= 0 and all(
        size == 1 or size == wanted
        for size, wanted in zip(mask.shape, scores_shape[missing:], strict=True)
    )
    if not fits:
        reject(argument, f"a shape that broadcasts to {scores_shape}", tuple(mask.shape))
    return mask[(None,) * missing] if missing else mask


def _merge_batches(mask: Tensor, scores_shape: tuple[int, ...]) -> Tensor:
    """(..., H, L, S) to (B, H, L, S); a batch that is 1 throughout stays 1."""
    missing = 4 - mask.dim()
    if missing == 0:
        return mask
    if missing > 0:
        return mask[(None,) * missing]
    batch_shape = mask.shape[:-3]
    if any(size != 1 for size in batch_shape):
        mask = mask.expand(*scores_shape[:-3], -1, -1, -1)
    return mask.flatten(0, -4)


def _merge_heads(mask: Tensor, scores_shape: tuple[int, ...]) -> Tensor:
    """(B, M, N), (B, H, M, N) or (B, G, H, M, N) to (B, heads, M, N)."""
    if mask.dim() == 3:
        return mask.unsqueeze(1)
    if mask.dim() == 4:
        return mask
    if mask.shape[1] != 1 or mask.shape[2] != 1:
        mask = mask.expand(-1, *scores_shape[1:3], -1, -1)
    return mask.flatten(1, 2)


def _broadcast_sizes(sizes: tuple[int, int, int], what: str) -> int:
    """The size that query's, key's and value's broadcast to."""
    wanted = 1
    for argument, size in zip(("query", "key", "value"), sizes, strict=True):
        if size == 1 or size == wanted:
            continue
        if wanted != 1:
            reject(argument, f"{what} that broadcasts to {wanted}", size)
        wanted = size
    return wanted


def _broadcast_to_4d(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """query, key, value as (B, H, L, D), and the leading dimensions of the result."""
    rank = max(query.dim(), key.dim(), value.dim())
    # At least heads; ranks align at the right, as in torch's broadcasting.
    tensors = [x[(None,) * (max(rank, 3) - x.dim())] for x in (query, key, value)]
    heads, key_heads, value_heads = (x.shape[-3] for x in tensors)
    if enable_gqa:
        check_group("key", heads, key_heads)
        check_group("value", heads, value_heads)
    else:
        heads = _broadcast_sizes((heads, key_heads, value_heads), "a number of heads")
    batch_shape = tuple(
        _broadcast_sizes(sizes, "a batch size")
        for sizes in zip(*(x.shape[:-3] for x in tensors), strict=True)
    )

    query, key, value = tensors
    if key_heads != value_heads:
        key = key.repeat_interleave(heads // key_heads, dim=-3)
        value = value.repeat_interleave(heads // value_heads, dim=-3)
    query = query.expand(*batch_shape, heads, -1, -1)
    key = key.expand(*batch_shape, -1, -1, -1)
    value = value.expand(*batch_shape, -1, -1, -1)
    if len(batch_shape) == 0:
        query, key, value = query[None], key[None], value[None]
    elif len(batch_shape) > 1:
        query, key, value = (x.flatten(0, -4) for x in (query, key, value))
    return query, key, value, (*batch_shape, heads) if rank > 2 else ()


def _check_packed(
    query: Tensor,
    key: Tensor,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
) -> Packed:
    """Checks cumulative lengths; query and key are (total, H, D)."""
    for name, cu_seqlens in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        _check_starts(name, cu_seqlens, query)
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        expected = f"the shape of cu_seqlens_q, {tuple(cu_seqlens_q.shape)}"
        reject("cu_seqlens_k", expected, tuple(cu_seqlens_k.shape))
    max_seqlen_q = checks.check_integer("max_seqlen_q", max_seqlen_q)
    max_seqlen_k = checks.check_integer("max_seqlen_k", max_seqlen_k)
    if checks.may_read_values(cu_seqlens_q) and checks.may_read_values(cu_seqlens_k):
        _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q.tolist(), query.shape[0], max_seqlen_q)
        _check_cu_seqlens("cu_seqlens_k", cu_seqlens_k.tolist(), key.shape[0], max_seqlen_k)
    return cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous(), max_seqlen_q, max_seqlen_k


def _check_starts(argument: str, starts: Any, query: Tensor) -> None:
    """Whether a tensor can say where sequences start."""
    checks.check_strided(argument, starts)
    checks.check_memory(argument, starts)
    if starts.dtype != torch.int32:
        reject_type(argument, "dtype torch.int32", starts.dtype)
    checks.check_device(argument, starts, "query", query)
    if starts.dim() != 1 or starts.shape[0] == 0:
        reject(argument, "shape (sequences + 1,)", tuple(starts.shape))


def _check_cu_seqlens(argument: str, starts: list[int], total: int, longest: int) -> None:
    if starts[0] != 0:
        reject(argument, "to start at 0", starts[0])
    for i, (start, end) in enumerate(itertools.pairwise(starts)):
        if end < start:
            reject(argument, "lengths that never decrease", f"{start} then {end} at {i}")
        if end - start > longest:
            name = argument.replace("cu_seqlens", "max_seqlen")
            reject(name, f"at least {end - start}, the length of sequence {i}", longest)
    if starts[-1] > total:
        reject(argument, f"to end at {total} at most, the total length", starts[-1])


def _is_causal_bias(mask: Any) -> bool:
    """Whether the mask is a torch.nn.attention.bias.CausalBias."""
    if type(mask) is Tensor:
        return False
    module = sys.modules.get("torch.nn.attention.bias")
    return module is not None and isinstance(mask, module.CausalBias)


def _read_causal_bias(bias: Any, query: Tensor, key: Tensor, is_causal: bool) -> int:
    if is_causal:
        reject("is_causal", "False where attn_mask is a CausalBias", is_causal)
    lengths = (bias.seq_len_q, bias.seq_len_kv)
    if lengths != (query.shape[-2], key.shape[-2]):
        reject("attn_mask", f"a CausalBias of {query.shape[-2]} x {key.shape[-2]}", lengths)
    return TOP_LEFT if bias.variant.name == "UPPER_LEFT" else BOTTOM_RIGHT


def _xformers_class(bias: Any) -> str:
    """The class of a bias among those that are supported, found without importing xformers."""
    if bias is None or isinstance(bias, Tensor):
        return "NoneType" if bias is None else "Tensor"
    # The very class, not a base: a subclass masks differently, and ignoring how would be wrong.
    name, module = type(bias).__name__, type(bias).__module__
    if module.partition(".")[0] == "xformers" and name in _XFORMERS_CAUSALITY:
        return name
    supported = ", ".join(_XFORMERS_CAUSALITY)
    raise NotImplementedError(
        f"attn_bias: expected one of {supported} (of xformers.ops.fmha.attn_bias), "
        f"got {module}.{name}"
    )


def _read_block_diagonal(bias: Any, query: Tensor, key: Tensor) -> Packed:
    """How a BlockDiagonalMask divides query and key, which are (1, total, ...)."""
    if query.shape[0] != 1:
        reject("query", "a batch of 1 with a block-diagonal attn_bias", tuple(query.shape))
    sequences_q, sequences_k = bias.q_seqinfo, bias.k_seqinfo
    for name, tensor, sequences in (("query", query, sequences_q), ("key", key, sequences_k)):
        total = sequences.seqstart_py[-1]
        if tensor.shape[1] != total:
            reject(name, f"{total} tokens, as attn_bias has", tuple(tensor.shape))
        _check_starts("attn_bias", sequences.seqstart, query)
        if checks.may_read_values(sequences.seqstart):
            starts, longest = sequences.seqstart.tolist(), max(sequences.max_seqlen, 0)
            _check_cu_seqlens("attn_bias", starts, total, longest)
    return (
        sequences_q.seqstart.contiguous(),
        sequences_k.seqstart.contiguous(),
        max(sequences_q.max_seqlen, 0),
        max(sequences_k.max_seqlen, 0),
    )


def _is_shared_in_groups(tensor: Tensor) -> bool:
    """Whether the heads of each group of a (B, N, G, H, K) tensor are one head, expanded.

    Not where a gradient is asked for: every expanded head must then get its own.
    """
    if tensor.dim() != 5 or (tensor.requires_grad and torch.is_grad_enabled()):
        return False
    return tensor.shape[3] > 1 and tensor.stride(3) == 0


def _heads_first(tensor: Tensor) -> Tensor:
    """(B, M, K), (B, M, H, K) or (B, M, G, H, K) to (B, heads, M, K)."""
    if tensor.dim() == 3:
        return tensor.unsqueeze(1)
    if tensor.dim() == 5:
        tensor = tensor.flatten(2, 3)
    return tensor.transpose(1, 2)
