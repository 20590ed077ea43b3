"""Inputs, calls and formulas of the `flash_attention` family."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import vlmfast
import vlmfast.functional as VF
from bench.cases import AttentionCase
from bench.measure import Work
from bench.peers import Attention, eager_attention
from vlmfast.reference.flash_attention import flash_attention
from vlmfast.verify.common import SEEDS, relative_error


@dataclass(frozen=True)
class Inputs:
    """query (B, H, L, D), key and value (B, H, S, D), and the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """Inputs laid out as a model's projections leave them.

    The slices are leaves of their own: a gradient of the packed projection would add the same copy
    to every contestant and blur what is compared.
    """
    generator = torch.Generator().manual_seed(seed)

    def projection(length: int, parts: int) -> tuple[Tensor, ...]:
        shape = (case.batch, length, parts, case.heads, case.head_dim)
        packed = torch.randn(shape, generator=generator).to(device, dtype)
        return packed.permute(2, 0, 3, 1, 4).unbind(0)  # parts of (B, H, length, D)

    if case.query_length == case.key_length:
        query, key, value = projection(case.query_length, 3)
    else:
        (query,) = projection(case.query_length, 1)
        key, value = projection(case.key_length, 2)
    (grad_out,) = projection(case.query_length, 1)
    needs_grad = mode != "fwd"
    query, key, value = (x.detach().requires_grad_(needs_grad) for x in (query, key, value))
    return Inputs(query, key, value, grad_out)


def make_call(attention: Attention, inputs: Inputs, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call to be timed, without arguments.

    It returns (out,) for "fwd", the three gradients for "bwd" (of a forward pass done here, once),
    and (out, three gradients) for "fwd+bwd".
    """
    sources = (inputs.query, inputs.key, inputs.value)

    def forward() -> tuple[Tensor, ...]:
        return (attention(*sources),)

    def both() -> tuple[Tensor, ...]:
        out = attention(*sources)
        return (out, *torch.autograd.grad(out, sources, inputs.grad_out))

    if mode == "fwd":
        return forward
    if mode == "fwd+bwd":
        return both

    out = attention(*sources)

    def backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, sources, inputs.grad_out, retain_graph=True)

    return backward


def chosen_backend(case: AttentionCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    sources = (inputs.query, inputs.key, inputs.value)
    function = VF.scaled_dot_product_attention
    return vlmfast.explain(function, *sources, is_causal=case.is_causal).backend


def reference(case: AttentionCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """What `make_call` of a perfect contestant returns, in float64.

    One image after the other and one head after the other: the reference holds the scores in
    memory, eight bytes each.
    """
    heads = [
        _truth(case, _one_head(inputs, image, head), mode)
        for image in range(case.batch)
        for head in range(case.heads)
    ]
    grid = (case.batch, case.heads)
    return tuple(
        torch.cat(results).unflatten(0, grid).squeeze(2) for results in zip(*heads, strict=True)
    )


def yardsticks(case: AttentionCase, dtype: torch.dtype, mode: str) -> list[float]:
    """The errors of the eager formula, one for each result of a call: the worst over eight seeds.

    One head for each seed: heads differ no more than seeds do.
    """
    eager = eager_attention(case)
    errors = []
    for seed in SEEDS:
        inputs = _one_head(make_inputs(case, dtype, mode, seed), 0, 0)
        results = make_call(eager, inputs, mode)()
        truths = _truth(case, inputs, mode)
        errors.append([relative_error(*pair) for pair in zip(results, truths, strict=True)])
    return [max(column) for column in zip(*errors, strict=True)]


def _one_head(inputs: Inputs, image: int, head: int) -> Inputs:
    """The inputs of one head of one image, (1, 1, L, D), as leaves of their own."""
    part = (slice(image, image + 1), slice(head, head + 1))
    return _map(inputs, lambda x: x.detach()[part])


def _truth(case: AttentionCase, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    """In float64, a few rows of queries at a time: their scores then lie in memory used before."""
    exact = _map(inputs, lambda x: x.detach().double())
    rows = max(1, 2**21 // case.key_length)
    outs, grad_queries = [], []
    grad_key, grad_value = torch.zeros_like(exact.key), torch.zeros_like(exact.value)
    for first in range(0, case.query_length, rows):
        last = min(first + rows, case.query_length)
        query, grad_out = (x[:, :, first:last].detach() for x in (exact.query, exact.grad_out))
        seen = min(last, case.key_length) if case.is_causal else case.key_length
        tensors = (query, exact.key[:, :, :seen], exact.value[:, :, :seen])
        leaves = (x.detach().requires_grad_(mode != "fwd") for x in tensors)
        part = Inputs(*leaves, grad_out)
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


def _map(inputs: Inputs, function: Callable[[Tensor], Tensor]) -> Inputs:
    """Applies `function` to every tensor; those that require a gradient still do."""
    tensors = (inputs.query, inputs.key, inputs.value, inputs.grad_out)
    return Inputs(*(function(x).requires_grad_(x.requires_grad) for x in tensors))


def work(case: AttentionCase, dtype: torch.dtype, mode: str) -> Work:
    """What one call cannot do without.

    With P = B * H * (visible query-key pairs), forward is two products, 4 P D; backward is five
    (the scores again, dP, dV, dQ, dK), 10 P D; each takes P exponentials. Forward reads query, key
    and value and writes the output, and the float32 logsumexp if there is a backward to come;
    backward reads all these and the output's gradient, and writes three gradients.
    """
    length, keys = case.query_length, case.key_length
    pairs = length * keys
    if case.is_causal:
        full_rows = max(length - keys, 0)
        rising_rows = length - full_rows
        pairs = rising_rows * (rising_rows + 1) // 2 + full_rows * keys
    products = {"fwd": 2, "bwd": 5, "fwd+bwd": 7}[mode]
    flops = products * 2 * case.batch * case.heads * pairs * case.head_dim

    width = case.batch * case.heads * case.head_dim * dtype.itemsize
    logsumexp = case.batch * case.heads * length * torch.float32.itemsize
    inputs = (length + 2 * keys) * width
    forward = inputs + length * width
    backward = inputs + 2 * length * width + logsumexp + inputs
    least_bytes = {
        "fwd": forward,
        "bwd": backward,
        "fwd+bwd": forward + logsumexp + backward,
    }[mode]
    passes = {"fwd": 1, "bwd": 1, "fwd+bwd": 2}[mode]
    return Work(flops, least_bytes, passes * case.batch * case.heads * pairs)
