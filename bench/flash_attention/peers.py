"""Who else computes attention."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import vlmfast.functional as VF
from bench.common import Attention
from bench.contestant import (
    GPU,
    OURS,
    Contestant,
    beyond_memory,
    compiled,
    forced,
    half_only,
    needs,
    never,
)
from bench.flash_attention.cases import AttentionCase


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
    return beyond_memory("four score matrices", matrices)


def _flex(case: AttentionCase) -> Attention:
    attend = torch.compile(flex_attention, fullgraph=True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return j <= i

    @functools.cache
    def mask(device: torch.device) -> BlockMask:
        sizes = (None, None, case.query_length, case.key_length)
        return create_block_mask(visible, *sizes, device=device)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not case.is_causal:
            return attend(query, key, value)
        return attend(query, key, value, block_mask=mask(query.device))

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


CONTESTANTS = (
    Contestant(OURS, never, _ours),
    Contestant("torch SDPA", never, _sdpa),
    Contestant("eager", _eager_refusal, eager_attention),
    Contestant("SDPA math", _eager_refusal, forced(_sdpa, SDPBackend.MATH)),
    Contestant("SDPA flash", half_only, forced(_sdpa, SDPBackend.FLASH_ATTENTION), GPU),
    Contestant("SDPA efficient", never, forced(_sdpa, SDPBackend.EFFICIENT_ATTENTION), GPU),
    Contestant("SDPA cuDNN", half_only, forced(_sdpa, SDPBackend.CUDNN_ATTENTION), GPU),
    Contestant("torch.compile", _eager_refusal, compiled(eager_attention), compiles=True),
    Contestant("FlexAttention", never, _flex, compiles=True),
    Contestant("xformers", needs("xformers", half_only), _xformers, GPU),
    Contestant("flash-attn", needs("flash_attn", half_only, _bottom_right), _flash_attn, GPU),
    Contestant(
        "torch varlen",
        needs("torch.nn.attention.varlen", half_only, _bottom_right),
        _torch_varlen,
        GPU,
    ),
)
