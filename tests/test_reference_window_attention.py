"""The specification: against the libraries' own layers in float64, and numerical gradients."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from tools.gradients import assert_same
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.reference.window_attention import window_attention

import_torchvision()
from timm.models import swin_transformer as timm_swin  # noqa: E402
from timm.models import swin_transformer_v2 as timm_swin_v2  # noqa: E402
from torchvision.models import swin_transformer as torchvision_swin  # noqa: E402

HEADS, DIM = 3, 8
CHANNELS = HEADS * DIM


def normal(*shape, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype)


def randomize(module):
    """Parameters in float64 of which none is small: biases start at 0 otherwise."""
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    return module


# size of the map, window, shift
GEOMETRIES = [
    ((14, 14), (7, 7), (0, 0)),
    ((14, 14), (7, 7), (3, 3)),
    ((13, 17), (7, 7), (3, 3)),
    ((9, 16), (4, 8), (2, 4)),
    ((10, 11), (4, 5), (3, 0)),
    ((10, 11), (4, 5), (0, 2)),
    ((24, 13), (12, 12), (6, 6)),
]


@pytest.mark.parametrize("size, window, shift", GEOMETRIES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_agrees_with_torchvision(version, size, window, shift):
    layer_class = (
        torchvision_swin.ShiftedWindowAttention
        if version == 1
        else torchvision_swin.ShiftedWindowAttentionV2
    )
    layer = randomize(layer_class(CHANNELS, list(window), list(shift), HEADS))
    x = normal(2, *size, CHANNELS).requires_grad_()
    qkv_bias, logit_scale = layer.qkv.bias, None
    if version == 2:
        logit_scale = layer.logit_scale.clamp(max=math.log(100.0)).exp().flatten()
        query_bias, _, value_bias = layer.qkv.bias.chunk(3)
        qkv_bias = torch.cat([query_bias, torch.zeros_like(query_bias), value_bias])
    # torchvision itself drops the shift of an axis that one window covers
    shift = [
        0 if by >= length else of
        for by, length, of in zip(
            window,
            (-(-size[0] // window[0]) * window[0], -(-size[1] // window[1]) * window[1]),
            shift,
            strict=True,
        )
    ]
    out, _ = window_attention(
        F.linear(x, layer.qkv.weight, qkv_bias),
        None,
        None,
        layer.get_relative_position_bias().squeeze(0),
        logit_scale,
        qkv_bias,
        HEADS,
        *window,
        *shift,
        scale=DIM**-0.5,
    )
    assert_same(layer.proj(out), layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("size, window, shift", GEOMETRIES, ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_agrees_with_timm(version, size, window, shift):
    module = timm_swin if version == 1 else timm_swin_v2
    block_class = module.SwinTransformerBlock if version == 1 else module.SwinTransformerV2Block
    block = randomize(
        block_class(
            CHANNELS,
            size,
            num_heads=HEADS,
            window_size=window,
            shift_size=shift,
            always_partition=True,
        )
    )
    attention = block.attn
    x = normal(2, *size, CHANNELS).requires_grad_()
    if version == 1:
        qkv_bias, logit_scale = attention.qkv.bias, None
        bias = attention._get_rel_pos_bias().squeeze(0)
    else:
        qkv_bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        logit_scale = attention.logit_scale.clamp(max=math.log(100.0)).exp().flatten()
        table = attention.cpb_mlp(attention.relative_coords_table).view(-1, HEADS)
        bias = table[attention.relative_position_index].permute(2, 0, 1)
        bias = 16 * torch.sigmoid(bias)
    out, _ = window_attention(
        F.linear(x, attention.qkv.weight, qkv_bias),
        None,
        None,
        bias,
        logit_scale,
        qkv_bias,
        HEADS,
        *window,
        *shift,
        wrap_padded=False,
        scale=DIM**-0.5,
    )
    assert_same(attention.proj(out), block._attn(x), [x, *attention.parameters()])


def arguments(size=(5, 6), window=(2, 3), shift=(1, 2), cosine=False, heads=2, dim=3, batch=1):
    channels, tokens = heads * dim, window[0] * window[1]
    tensors = [
        normal(batch, *size, 3 * channels),
        None,
        None,
        normal(heads, tokens, tokens),
        1.0 + torch.rand(heads, dtype=torch.float64) if cosine else None,
        normal(3 * channels),
    ]
    tensors = [None if x is None else x.requires_grad_() for x in tensors]
    return tensors, (heads, *window, *shift)


@pytest.mark.parametrize("wrap_padded", [True, False])
@pytest.mark.parametrize("cosine", [False, True])
def test_gradients_are_right_numerically(cosine, wrap_padded):
    tensors, geometry = arguments(size=(3, 4), cosine=cosine)
    given = [x for x in tensors if x is not None]
    seed = torch.tensor([5])

    def function(*given):
        left = iter(given)
        args = [None if x is None else next(left) for x in tensors]
        return window_attention(
            *args, *geometry, wrap_padded, 0.5, -1.5, dropout_p=0.3, dropout_seed=seed
        )

    assert torch.autograd.gradcheck(function, given)


@pytest.mark.parametrize("wrap_padded", [True, False])
def test_three_tensors_are_the_packed_one(wrap_padded):
    (qkv, _, _, bias, _, pad), geometry = arguments()
    parts = [x.detach().requires_grad_() for x in qkv.chunk(3, -1)]
    packed, lse = window_attention(qkv, None, None, bias, None, pad, *geometry, wrap_padded)
    apart, same = window_attention(*parts, bias, None, pad, *geometry, wrap_padded)
    assert torch.equal(packed, apart) and torch.equal(lse, same)


def test_mask_value_is_added_once_between_regions():
    (qkv, *_), geometry = arguments(size=(4, 6), window=(4, 3), shift=(2, 0))
    masked, _ = window_attention(qkv, None, None, None, None, None, *geometry, mask_value=-1e9)
    tokens = qkv.roll(-2, 1)
    halves = [
        window_attention(half, None, None, None, None, None, 2, 2, 3)[0]
        for half in (tokens[:, :2], tokens[:, 2:])
    ]
    assert_close(masked, torch.cat(halves, 1).roll(2, 1))
    unmasked, _ = window_attention(qkv, None, None, None, None, None, *geometry, mask_value=0.0)
    whole, _ = window_attention(tokens, None, None, None, None, None, 2, 4, 3)
    assert_close(unmasked, whole.roll(2, 1))


def test_padded_tokens_are_keys():
    """One token in a window of four: three keys are padding, zeros where nothing is given."""
    qkv = normal(1, 1, 1, 6)
    query, key, value = qkv[0, 0, 0].chunk(3)
    logit = (query * key).sum().exp()
    out, _ = window_attention(qkv, None, None, None, None, None, 1, 2, 2)
    assert_close(out[0, 0, 0], value * logit / (logit + 3))
    pad = normal(6)
    other = (query * pad[2:4]).sum().exp()
    out, logsumexp = window_attention(qkv, None, None, None, None, pad, 1, 2, 2)
    assert_close(out[0, 0, 0], (value * logit + 3 * pad[4:] * other) / (logit + 3 * other))
    assert_close(logsumexp[0, 0, 0, 0], (logit + 3 * other).log())


def test_vectors_of_length_zero_have_cosine_zero():
    (qkv, *_), geometry = arguments(size=(2, 3), shift=(0, 0))
    qkv = torch.zeros_like(qkv).requires_grad_()
    scale = torch.full((2,), 7.0, dtype=torch.float64)
    out, logsumexp = window_attention(qkv, None, None, None, scale, None, *geometry)
    assert not out.any()
    assert_close(logsumexp, torch.full_like(logsumexp, math.log(6)))
    (gradient,) = torch.autograd.grad(out.sum(), qkv)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("size", [(0, 5, 6), (2, 0, 6), (2, 5, 0)])
def test_empty_sizes(size):
    qkv = normal(*size, 18).requires_grad_()
    out, logsumexp = window_attention(qkv, None, None, None, None, None, 2, 2, 3, 1, 1)
    assert out.shape == (*size, 6)
    assert logsumexp.numel() == 0
    out.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype):
    (qkv, _, _, bias, _, pad), geometry = arguments()
    qkv, bias, pad = qkv.detach().to(dtype), bias.detach().float(), pad.detach().float()
    out, logsumexp = window_attention(qkv, None, None, bias, None, pad, *geometry)
    exact, _ = window_attention(qkv.float(), None, None, bias, None, pad, *geometry)
    assert torch.equal(out, exact.to(dtype))
    assert logsumexp.dtype == torch.float32
