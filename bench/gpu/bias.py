"""Attention with a learned bias that all batch elements share: inputs, calls and peers.

The row `flash_attention` of the benchmark, whose cases these are, has no bias.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import flex_attention

import vlmfast
import vlmfast.functional as VF
from bench import common
from bench.contestant import GPU, OURS, Contestant, compiled, forced, half_only, never
from bench.family import Family
from bench.flash_attention import calls as unbiased
from bench.flash_attention.cases import AttentionCase
from bench.measure import Call, Truth, Work
from vlmfast.reference.flash_attention import flash_attention
from vlmfast.verify.common import SEEDS
from vlmfast.verify.flash_attention import summed_terms

BiasedAttention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # query, key, value, bias


@dataclass(frozen=True)
class Inputs:
    """query, key, value (B, H, L, D), bias (1, H, L, S), and the gradient of the output."""

    query: Tensor
    key: Tensor
    value: Tensor
    bias: Tensor
    grad_out: Tensor

    @property
    def sources(self) -> tuple[Tensor, ...]:
        return (self.query, self.key, self.value, self.bias)

    def double(self) -> "Inputs":
        """The same numbers in float64, as leaves of their own."""
        exact = (
            x.detach().double().requires_grad_(x.requires_grad)
            for x in (*self.sources, self.grad_out)
        )
        return Inputs(*exact)


def make_inputs(
    case: AttentionCase, dtype: torch.dtype, mode: str, seed: int = 0, device: str = "cpu"
) -> Inputs:
    """As those without a bias, which lie as a model's projections leave them."""
    inputs = unbiased.make_inputs(case, dtype, mode, seed, device)
    shape = (1, case.heads, case.query_length, case.key_length)
    bias = common.normal_numbers(seed + 1, device)(*shape).to(dtype)
    return Inputs(*inputs.sources, bias.requires_grad_(mode != "fwd"), inputs.grad_out)


def make_call(attention: BiasedAttention, inputs: Inputs, mode: str) -> Call:
    """The call to be timed; its gradients are those of query, key, value and bias."""
    sources = inputs.sources
    return common.make_call(lambda: attention(*sources), sources, inputs.grad_out, mode)


def chosen_backend(case: AttentionCase, inputs: Inputs) -> str:
    """The backend that our own call runs on."""
    return vlmfast.explain(VF.scaled_dot_product_attention, *inputs.sources).backend


def reference(case: AttentionCase, inputs: Inputs, mode: str) -> tuple[Truth, ...]:
    """What `make_call` of a perfect contestant returns, in float64."""
    exact = inputs.double()
    scale = case.head_dim**-0.5
    results = make_call(lambda *x: flash_attention(*x, scale=scale)[0], exact, mode)()
    truths = [Truth(result.detach()) for result in results]
    if mode != "fwd":  # the bias's gradient sums over the batch, and cancels
        names = ("query", "key", "value", "attn_mask")
        tensors = dict(zip(names, (x.detach() for x in exact.sources), strict=True))
        terms = summed_terms(tensors, {"out": exact.grad_out})
        truths[-1] = truths[-1]._replace(terms=terms["grad_attn_mask"])
    return tuple(truths)


def yardsticks(
    case: AttentionCase, dtype: torch.dtype, mode: str, device: str = "cpu"
) -> list[float]:
    """The errors of the eager formula on one batch element: the worst over eight seeds."""
    one = replace(case, batch=1)
    seeds = (make_inputs(one, dtype, mode, seed, device) for seed in SEEDS)
    return common.worst_errors(
        (make_call(eager_attention(one), inputs, mode)(), reference(one, inputs, mode))
        for inputs in seeds
    )


def work(case: AttentionCase, dtype: torch.dtype, mode: str) -> Work:
    """That of attention without a bias; each pass reads the bias, and backward writes as much."""
    attention = unbiased.work(case, dtype, mode)
    passes = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode]
    bias = case.heads * case.query_length * case.key_length * dtype.itemsize
    return replace(attention, least_bytes=attention.least_bytes + passes * bias)


def _ours(case: AttentionCase) -> BiasedAttention:
    return VF.scaled_dot_product_attention


def _sdpa(case: AttentionCase) -> BiasedAttention:
    return F.scaled_dot_product_attention


def eager_attention(case: AttentionCase) -> BiasedAttention:
    """softmax(scale q k^T + bias) v with the scores in memory, each step torch's own."""
    scale = 1 / math.sqrt(case.head_dim)

    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        scores = (query * scale) @ key.transpose(-2, -1) + bias
        return scores.softmax(dim=-1) @ value

    return attention


def _flex(case: AttentionCase) -> BiasedAttention:
    def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        def added(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + bias[0, h, i, j]

        return flex_attention(query, key, value, score_mod=added)

    return torch.compile(attention, fullgraph=True)


CONTESTANTS = (
    Contestant(OURS, never, _ours),
    Contestant("torch SDPA", never, _sdpa),
    Contestant("eager", never, eager_attention),
    Contestant("SDPA math", never, forced(_sdpa, SDPBackend.MATH)),
    Contestant("SDPA flash", half_only, forced(_sdpa, SDPBackend.FLASH_ATTENTION), GPU),
    Contestant("SDPA efficient", never, forced(_sdpa, SDPBackend.EFFICIENT_ATTENTION), GPU),
    Contestant("SDPA cuDNN", half_only, forced(_sdpa, SDPBackend.CUDNN_ATTENTION), GPU),
    Contestant("torch.compile", never, compiled(eager_attention), compiles=True),
    Contestant("FlexAttention", never, _flex, compiles=True),
)

FAMILY = Family((), (), CONTESTANTS, sys.modules[__name__])
