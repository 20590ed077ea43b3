"""The specification of per-image cross-attention: against a loop, torch and flamingo-pytorch."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from vlmfast.functional.cross_attention import cross_attention_plan
from vlmfast.reference.cross_attention import cross_attention

BATCH, HEADS, KEY_HEADS, TOKENS, IMAGES, LATENTS, DIM = 2, 4, 2, 9, 3, 5, 8
SCALE = 0.3


def leaves():
    shapes = ((HEADS, TOKENS), (KEY_HEADS, IMAGES, LATENTS), (KEY_HEADS, IMAGES, LATENTS))
    return [
        torch.randn(BATCH, *shape, DIM, dtype=torch.float64).requires_grad_() for shape in shapes
    ]


def seen_images(index, mode):
    """For one token: the images that it sees (0-based), or what kind of row it is."""
    if index.dim() == 1:
        images = index.nonzero().flatten().tolist()
        return images or "empty"
    if index == 0:
        return "empty"
    if mode == "all_previous":
        return list(range(min(int(index), IMAGES)))
    return [int(index) - 1] if index <= IMAGES else "overflow"


def by_loop(query, key, value, index, mode, treatment, lengths):
    """One token of one head after the other, as the documentation has it."""
    outs, logsumexps = [], []
    for b, h, t in itertools.product(range(BATCH), range(HEADS), range(TOKENS)):
        keys, values = key[b, h * KEY_HEADS // HEADS], value[b, h * KEY_HEADS // HEADS]
        images = seen_images(index[b, t], mode)
        kind = treatment[images] if isinstance(images, str) else "images"
        if kind == "images":
            sizes = [LATENTS if lengths is None else int(lengths[b, i]) for i in images]
            keys = torch.cat([keys[i, :n] for i, n in zip(images, sizes, strict=True)])
            values = torch.cat([values[i, :n] for i, n in zip(images, sizes, strict=True)])
        else:
            keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        logits = SCALE * keys @ query[b, h, t]
        if kind == "uniform":
            logits = torch.zeros_like(logits)
        if kind == "zero" or len(keys) == 0:
            outs.append(torch.zeros(DIM, dtype=torch.float64))
            logsumexps.append(torch.tensor(-torch.inf, dtype=torch.float64))
        else:
            outs.append(logits.softmax(0) @ values)
            logsumexps.append(logits.logsumexp(0))
    shape = (BATCH, HEADS, TOKENS)
    return torch.stack(outs).view(*shape, DIM), torch.stack(logsumexps).view(shape)


LENGTHS = torch.tensor([[5, 0, 2], [1, 3, 9]])


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["whole", "lengths"])
@pytest.mark.parametrize("overflow", ["zero", "uniform"])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform", "dense"])
@pytest.mark.parametrize("mode", ["last", "all_previous", "bits"])
def test_agrees_with_a_loop(mode, empty_rows, overflow, lengths):
    if mode == "bits":
        index, mode = torch.rand(BATCH, TOKENS, IMAGES) < 0.4, "last"
        index[0, 0] = False
    else:
        index = torch.randint(0, IMAGES + 3, (BATCH, TOKENS))
        index[0, :2] = torch.tensor([0, IMAGES + 1])
    inputs = leaves()
    plan = cross_attention_plan(index, IMAGES, mode, empty_rows, overflow, lengths)
    ours = cross_attention(*inputs, *plan, SCALE)
    treatment = {"empty": empty_rows, "overflow": overflow}
    expected = by_loop(*inputs, index, mode, treatment, lengths)
    grads = []
    for out, logsumexp in (ours, expected):
        finite = logsumexp.masked_fill(logsumexp == -torch.inf, 0.0)
        grads.append(torch.autograd.grad((out.square() + finite[..., None]).sum(), inputs))
    for actual, wanted in zip((*ours, *grads[0]), (*expected, *grads[1]), strict=True):
        assert_close(actual, wanted)


def test_agrees_with_torch_under_its_mask():
    query, key, value = leaves()
    phi = torch.randint(1, IMAGES + 1, (BATCH, TOKENS))
    out, _ = cross_attention(query, key, value, *cross_attention_plan(phi, IMAGES), SCALE)
    mask = phi[:, None, :, None] == torch.arange(1, IMAGES + 1).repeat_interleave(LATENTS)
    expected = F.scaled_dot_product_attention(
        query, key.flatten(2, 3), value.flatten(2, 3), mask, scale=SCALE, enable_gqa=True
    )
    assert_close(out, expected)


@pytest.mark.parametrize("only_immediate", [True, False])
def test_gives_the_numbers_of_flamingo_pytorch(only_immediate):
    flamingo = pytest.importorskip("flamingo_pytorch.flamingo_pytorch")
    layer = flamingo.MaskedCrossAttention(
        dim=6, dim_head=4, heads=2, only_attend_immediate_media=only_immediate
    ).double()
    text, media = torch.randn(2, 10, 6).double(), torch.randn(2, 2, 5, 6).double()
    # No image at first; and more media tokens than there are images.
    locations = torch.zeros(2, 10, dtype=torch.bool)
    locations[0, [2, 5]] = True
    locations[1, [1, 4, 7]] = True
    expected = layer(text, media, media_locations=locations)

    query = layer.to_q(layer.norm(text)).unflatten(-1, (2, 4)).transpose(1, 2)
    key, value = layer.to_kv(media).unflatten(-1, (2, 2, 4)).permute(3, 0, 4, 1, 2, 5)
    options = (
        {"overflow": "uniform"}
        if only_immediate
        else {"mode": "all_previous", "empty_rows": "uniform"}
    )
    plan = cross_attention_plan(locations.cumsum(-1), 2, **options)
    out, _ = cross_attention(query, key, value, *plan, layer.scale)
    assert_close(layer.to_out(out.transpose(1, 2).flatten(2)), expected)


@pytest.mark.parametrize("mode", ["last", "all_previous"])
def test_gradients_are_those_of_finite_differences(mode):
    phi = torch.tensor([[0, 2, 1, 4]])
    lengths = torch.tensor([[2, 3]])
    inputs = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, 4, 3), (1, 1, 2, 3, 3), (1, 1, 2, 3, 2))
    ]
    plan = cross_attention_plan(phi, 2, mode, "uniform", "uniform", lengths)
    torch.autograd.gradcheck(lambda *x: cross_attention(*x, *plan, SCALE), inputs)
