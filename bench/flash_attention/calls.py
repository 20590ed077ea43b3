"""Inputs, calls and formulas of the `flash_attention` family."""

import math
from dataclasses import replace

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench import common
from bench.common import Attention, AttentionInputs, attention_work, by_heads, head_errors
from bench.common import attention_call as make_call
from bench.flash_attention.cases import AttentionCase
from bench.flash_attention.peers import eager_attention
from bench.measure import Truth, Work
from vlmfast.reference.flash_attention import flash_attention
from vlmfast.verify.common import SEEDS

__all__ = ["chosen_backend", "make_call", "make_inputs", "reference", "work", "yardsticks"]


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> AttentionInputs:
    """Inputs laid out as a model's projections leave them.

    The slices are leaves of their own: a gradient of the packed projection would add the same copy
    to every contestant and blur what is compared.
    """
    normal = common.normal_numbers(seed, device)

    def projection(length: int, parts: int) -> tuple[Tensor, ...]:
        packed = normal(case.batch, length, parts, case.heads, case.head_dim).to(dtype)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)  # parts of (B, H, length, D)

    if case.query_length == case.key_length:
        query, key, value = projection(case.query_length, 3)
    else:
        (query,) = projection(case.query_length, 1)
        key, value = projection(case.key_length, 2)
    (grad_out,) = projection(case.query_length, 1)
    needs_grad = mode != "fwd"
    query, key, value = (x.detach().requires_grad_(needs_grad) for x in (query, key, value))
    return AttentionInputs(query, key, value, grad_out)


def chosen_backend(case: AttentionCase, inputs: AttentionInputs) -> str:
    """The backend that our own call runs on."""
    function = VF.scaled_dot_product_attention
    return vlmfast.explain(function, *inputs.sources, is_causal=case.is_causal).backend


def reference(case: AttentionCase, inputs: AttentionInputs, mode: str) -> tuple[Truth, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""
    return by_heads(inputs, lambda head: _truth(case, head, mode))


def yardsticks(
    case: AttentionCase, dtype: torch.dtype, mode: str, device: str = "cpu"
) -> list[float]:
    """The errors of the eager formula, one for each result of a call: the worst over eight seeds.

    One head for each seed: heads differ no more than seeds do, nor batch elements.
    """
    case = replace(case, batch=1)
    eager = eager_attention(case)
    heads = (make_inputs(case, dtype, mode, seed, device).head(0, 0) for seed in SEEDS)
    return head_errors(heads, eager, lambda head: _truth(case, head, mode), mode)


def _truth(case: AttentionCase, inputs: AttentionInputs, mode: str) -> tuple[Tensor, ...]:
    """In float64, a few rows of queries at a time: their scores then lie in memory used before."""
    exact = inputs.double()
    rows = max(1, 2**21 // case.key_length)
    outs, grad_queries = [], []
    grad_key, grad_value = torch.zeros_like(exact.key), torch.zeros_like(exact.value)
    for first in range(0, case.query_length, rows):
        last = min(first + rows, case.query_length)
        query, grad_out = (x[:, :, first:last].detach() for x in (exact.query, exact.grad_out))
        seen = min(last, case.key_length) if case.is_causal else case.key_length
        tensors = (query, exact.key[:, :, :seen], exact.value[:, :, :seen])
        leaves = (x.detach().requires_grad_(mode != "fwd") for x in tensors)
        part = AttentionInputs(*leaves, grad_out)
        results = make_call(_exact_attention(case, first), part, mode)()
        if mode != "bwd":
            outs.append(results[0].detach())
        if mode != "fwd":
            *_, grad_query, grad_key_part, grad_value_part = results
            grad_queries.append(grad_query)
            grad_key[:, :, :seen] += grad_key_part
            grad_value[:, :, :seen] += grad_value_part
    gradients = () if mode == "fwd" else (torch.cat(grad_queries, 2), grad_key, grad_value)
    return (*((torch.cat(outs, 2),) if outs else ()), *gradients)


def _exact_attention(case: AttentionCase, first_row: int) -> Attention:
    """The reference for the queries from `first_row` on and all keys that they see."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = None
        if case.is_causal:
            visible = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool)
            mask = visible.tril(first_row)
        scale = 1 / math.sqrt(case.head_dim)
        return flash_attention(query, key, value, mask, scale=scale)[0]

    return attention


def work(case: AttentionCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without."""
    length, keys = case.query_length, case.key_length
    pairs = length * keys
    if case.is_causal:
        full_rows = max(length - keys, 0)
        rising_rows = length - full_rows
        pairs = rising_rows * (rising_rows + 1) // 2 + full_rows * keys
    heads = case.batch * case.heads
    return attention_work(heads * pairs, heads * length, heads * keys, case.head_dim, dtype, mode)
