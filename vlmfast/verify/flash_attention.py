"""Cases of softmax attention, and the norms of the terms that it sums."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmfast.ops import flash_attention as ops
from vlmfast.reference.common import dropout_keep_mask
from vlmfast.reference.flash_attention import flash_attention as reference
from vlmfast.verify.common import Case, Inputs, Tensors, softmax_terms


def summed_terms(inputs: Inputs, grads: Tensors) -> dict[str, float]:
    """Norms of the terms whose sums the outputs and gradients are; everything in float64.

    With weights P, out sums P V, grad_value P dO, and the others terms of P `softmax_terms`.
    """
    arguments, grad_out = _operator_arguments(inputs), grads["out"]
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    if "cu_seqlens_q" in inputs:
        grad_out = grad_out.transpose(0, 1).unsqueeze(0)
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    identity = torch.eye(key.shape[2], dtype=query.dtype, device=query.device)
    identity = identity.expand(*query.shape[:2], -1, -1)
    weights, logsumexp = reference(**{**arguments, "key": key, "value": identity})
    products = weights * softmax_terms(weights, value, grad_out, grads.get("logsumexp"))

    def norm(equation: str, *tensors: Tensor) -> float:
        return torch.einsum(f"{equation}->", *(x.square() for x in tensors)).sqrt().item()

    scale = abs(arguments["scale"])
    return {
        "out": norm("bhij,bhjd", weights, value),
        "logsumexp": logsumexp[logsumexp.isfinite()].norm().item(),
        "grad_query": scale * norm("bhij,bhjd", products, key),
        "grad_key": scale * norm("bhij,bhid", products, query),
        "grad_value": norm("bhij,bhid", weights, grad_out),
        "grad_attn_mask": products.norm().item(),
    }


def _operator_arguments(inputs: Inputs) -> dict[str, Any]:
    """Arguments of the reference and of the operators.

    The inputs are named as those of `scaled_dot_product_attention`, or, where there are cumulative
    lengths, of `varlen_attention`.
    """
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    packed = "cu_seqlens_q" in inputs
    if packed:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))
    return {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": inputs.get("attn_mask"),
        "cu_seqlens_q": inputs.get("cu_seqlens_q"),
        "cu_seqlens_k": inputs.get("cu_seqlens_k"),
        "max_seqlen_q": inputs.get("max_seqlen_q", 0),
        "max_seqlen_k": inputs.get("max_seqlen_k", 0),
        "causal": _causality(inputs),
        "scale": inputs.get("scale", query.shape[-1] ** -0.5),
        "dropout_p": inputs.get("dropout_p", 0.0),
        "dropout_seed": inputs.get("dropout_seed"),
    }


def _causality(inputs: Inputs) -> int:
    """The operators' `causal`; dense calls may say it themselves, as a CausalBias does."""
    if "causal" in inputs:
        return inputs["causal"]
    if not inputs.get("is_causal", False):
        return 0
    return 2 if "cu_seqlens_q" in inputs else 1


def _outputs(inputs: Inputs, compute: Callable[..., tuple[Tensor, Tensor]]) -> Tensors:
    out, logsumexp = compute(**_operator_arguments(inputs))
    if "cu_seqlens_q" in inputs:
        return {"out": out.squeeze(0).transpose(0, 1), "logsumexp": logsumexp.squeeze(0)}
    return {"out": out}


def _by_reference(inputs: Inputs) -> Tensors:
    return _outputs(inputs, reference)


def _by_kernel(inputs: Inputs, backend: str) -> Tensors:
    return _outputs(inputs, ops.FORWARD[backend])


def _dense_by_torch(inputs: Inputs) -> Tensors:
    query, key, value = inputs["query"], inputs["key"], inputs["value"]
    scale = inputs.get("scale", query.shape[-1] ** -0.5)
    mask, causality = inputs.get("attn_mask"), _causality(inputs)
    # Torch refuses a mask beside is_causal and knows one alignment, so causality joins the mask.
    # Of large logits its fused function for CPUs takes weights from a rounded log-sum-exp, and it
    # hides keys before it multiplies by the scale: a negative one makes inf of -inf. Its gradients
    # are then NaN, and NaN bounds nothing.
    ordinary_scale = 0 <= scale <= 1
    if causality == 2 or (causality and (mask is not None or not ordinary_scale)):
        rows, columns = query.shape[2], key.shape[2]
        seen = torch.ones(rows, columns, dtype=torch.bool, device=query.device)
        seen = seen.tril(columns - rows if causality == 2 else 0)
        if mask is None or mask.dtype == torch.bool:
            mask = seen if mask is None else mask & seen
        else:
            mask = mask.masked_fill(~seen, -torch.inf)
        causality = 0
    floating_mask = mask is not None and mask.is_floating_point()
    mixed = floating_mask and query.dtype != torch.float32
    if "dropout_seed" not in inputs and ordinary_scale and not mixed:
        if mask is not None and floating_mask:
            mask = mask.to(query.dtype)
        out = F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=causality == 1, scale=scale, enable_gqa=True
        )
        return {"out": out}
    # With a floating mask beside half precision torch's function computes in float32 throughout,
    # which is no peer for half precision: the formula written out is. And it takes a keep mask.
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    logits = query @ key.transpose(-2, -1) * scale
    if causality:
        hidden = torch.ones(logits.shape[2:], dtype=torch.bool, device=query.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    if mask is not None:
        floating = mask.dtype != torch.bool
        logits = logits + mask if floating else logits.masked_fill(~mask, -torch.inf)
    weights, _ = _softmax(logits)
    if "dropout_seed" in inputs:
        p, seed = inputs["dropout_p"], inputs["dropout_seed"]
        batch, heads, rows, columns = weights.shape
        keep = dropout_keep_mask(batch, heads, rows, columns, p, seed)
        weights = weights * keep / (1.0 - p)
    return {"out": weights.to(value.dtype) @ value}


def _softmax(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Weights and logsumexp of each row, 0 and -inf where it sees nothing."""
    unseeing = (logits == -torch.inf).all(-1, keepdim=True)
    logits = logits.masked_fill(unseeing, 0.0)
    weights = logits.softmax(-1).masked_fill(unseeing, 0.0)
    return weights, logits.logsumexp(-1).masked_fill(unseeing.squeeze(-1), -torch.inf)


def _packed_by_torch(inputs: Inputs) -> Tensors:
    query, key, value = (inputs[name].transpose(0, 1) for name in ("query", "key", "value"))
    scale = inputs.get("scale", query.shape[-1] ** -0.5)
    starts_q, starts_k = inputs["cu_seqlens_q"].tolist(), inputs["cu_seqlens_k"].tolist()
    group = query.shape[0] // key.shape[0]
    outs, logsumexps = [], []
    for i in range(len(starts_q) - 1):
        q = query[:, starts_q[i] : starts_q[i + 1]]
        k, v = (
            x[:, starts_k[i] : starts_k[i + 1]].repeat_interleave(group, 0) for x in (key, value)
        )
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
        if _causality(inputs):
            visible = visible.tril(k.shape[1] - q.shape[1])
        logits = (q @ k.transpose(-2, -1) * scale).masked_fill(~visible, -torch.inf)
        weights, logsumexp = _softmax(logits)
        outs.append(weights @ v)
        logsumexps.append(logsumexp)
    rest = query.shape[1] - starts_q[-1]  # rows of no sequence, which see nothing
    outs.append(query.new_zeros(query.shape[0], rest, value.shape[2]))
    logsumexps.append(query.new_full((query.shape[0], rest), -torch.inf))
    return {"out": torch.cat(outs, 1).transpose(0, 1), "logsumexp": torch.cat(logsumexps, 1)}


def dense_case(
    name: str,
    query_shape: tuple[int, int, int, int],
    key_shape: tuple[int, int, int] | None = None,
    value_dim: int | None = None,
    mask: Callable[[torch.Generator], Tensor] | None = None,
    bias_dtype: torch.dtype | None = torch.float32,
    **options: Any,
) -> Case:
    """A call of `scaled_dot_product_attention`.

    Args:
        name: of the case.
        query_shape: (B, Hq, L, D).
        key_shape: (B, Hkv, S); as the query's for None.
        value_dim: Dv; D for None.
        mask: makes attn_mask, bool or floating; the latter gets its gradient.
        bias_dtype: of a floating attn_mask; that of the inputs for None.
        options: is_causal, or the operators' causal; scale, dropout_p.
    """
    keys = key_shape or query_shape[:3]
    dim = query_shape[3]

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        inputs: Inputs = {
            "query": normal(*query_shape),
            "key": normal(*keys, dim),
            "value": normal(*keys, value_dim or dim),
            **options,
        }
        if mask is not None:
            attn_mask = mask(generator).to(device)
            if attn_mask.is_floating_point():
                attn_mask = attn_mask.to(bias_dtype or dtype)
            inputs["attn_mask"] = attn_mask
        if "dropout_p" in options:
            seed = torch.randint(0, 2**62, (1,), generator=generator)
            inputs["dropout_seed"] = seed.to(device)
        return inputs

    differentiable: tuple[str, ...] = ("query", "key", "value")
    if mask is not None and mask(torch.Generator()).is_floating_point():
        differentiable += ("attn_mask",)
    return Case(
        name, make, differentiable, _by_kernel, _dense_by_torch, _by_reference, summed_terms
    )


def packed_case(
    name: str,
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    dim: int,
    is_causal: bool = False,
    value_dim: int | None = None,
    spare: tuple[int, int] = (0, 0),
    **options: Any,
) -> Case:
    """A call of `varlen_attention` with the logsumexp.

    Args:
        name: of the case.
        lengths: queries and keys of each sequence.
        heads: Hq and Hkv.
        dim: head dim.
        is_causal: as the function's.
        value_dim: Dv; D for None.
        spare: queries and keys behind those of the last sequence.
        options: scale.
    """
    queries, keys = zip(*lengths, strict=True)

    def starts(sizes: tuple[int, ...], device: str) -> Tensor:
        return torch.tensor((0, *sizes), device=device).cumsum(0).to(torch.int32)

    def make(generator: torch.Generator, dtype: torch.dtype, device: str) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(dtype).to(device)

        return {
            "query": normal(sum(queries) + spare[0], heads[0], dim),
            "key": normal(sum(keys) + spare[1], heads[1], dim),
            "value": normal(sum(keys) + spare[1], heads[1], value_dim or dim),
            "cu_seqlens_q": starts(queries, device),
            "cu_seqlens_k": starts(keys, device),
            "max_seqlen_q": max(queries),
            "max_seqlen_k": max(keys),
            "is_causal": is_causal,
            **options,
        }

    differentiable = ("query", "key", "value")
    return Case(
        name, make, differentiable, _by_kernel, _packed_by_torch, _by_reference, summed_terms
    )


def normal_bias(*shape: int, std: float = 1.0) -> Callable[[torch.Generator], Tensor]:
    """Makes a bias of a shape and a standard deviation."""
    return lambda generator: std * torch.randn(shape, generator=generator)


def random_mask(*shape: int) -> Callable[[torch.Generator], Tensor]:
    """Makes a bool mask of a shape that keeps two keys of three."""
    return lambda generator: torch.rand(shape, generator=generator) < 2 / 3


CASES = [
    dense_case("self", (2, 3, 70, 64)),
    dense_case("cross, head dims 72 and 40", (1, 2, 33, 72), (1, 2, 91), 40),
    dense_case("causal, grouped heads", (2, 4, 45, 80), (2, 2, 45), is_causal=True),
    dense_case("bool mask", (2, 2, 37, 32), (2, 2, 50), mask=random_mask(2, 1, 37, 50)),
    dense_case("bias", (2, 3, 49, 32), mask=normal_bias(1, 3, 49, 49)),
    dense_case(
        "large bias",
        (1, 2, 65, 64),
        mask=normal_bias(1, 2, 65, 65, std=20.0),
        bias_dtype=None,
    ),
    dense_case("bias over keys", (2, 3, 49, 32), mask=normal_bias(2, 1, 1, 49)),
    dense_case("dropout", (2, 2, 40, 64), dropout_p=0.3),
    packed_case("packed", [(17, 30), (0, 5), (40, 9), (1, 1)], (4, 2), 64),
    packed_case("packed, causal", [(17, 30), (0, 5), (33, 33), (1, 1)], (2, 2), 88, is_causal=True),
]
