"""patch on the layers of flamingo-pytorch, of OpenFlamingo, and of what looks like them."""

import copy
import pickle

import flamingo_pytorch
import flamingo_pytorch.flamingo_pytorch as layers
import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.nn as vnn
from tools import open_flamingo, open_flamingo_v1
from tools.models import (
    CHANGES,
    assert_patched_model_right,
    assert_same_where_submodules_change,
    open_gates,
    spy_on_attention,
)
from vlmfast.integrations import flamingo

WIDTH, MEDIA = 32, 3
SIZES = {"dim": WIDTH, "dim_head": 8, "heads": 4}


def make_palm(**arguments):
    torch.manual_seed(0)
    model = flamingo_pytorch.FlamingoPaLM(
        **SIZES,
        num_tokens=50,
        img_encoder=nn.Identity(),
        depth=3,
        media_token_id=MEDIA,
        cross_attn_every=2,
        perceiver_num_latents=5,
        perceiver_depth=2,
        **arguments,
    )
    open_gates(model, WIDTH)
    return model


def text_with_images(seed):
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(4, 50, (2, 11), generator=generator)
    text[0, [3, 7]] = MEDIA
    text[1, [0]] = MEDIA
    return {"text": text, "images": torch.randn(2, 2, 9, WIDTH, generator=generator)}


LAYERS = [
    *(f"perceiver_resampler.layers.{i}.0" for i in range(2)),
    *(f"layers.{i}.1{part}" for i in (0, 2) for part in ("", ".attn")),
]


@pytest.mark.parametrize("immediate", [True, False])
def test_a_whole_model(immediate, monkeypatch):
    model = make_palm(only_attend_immediate_media=immediate)
    assert_patched_model_right(model, text_with_images)
    report = vlmfast.patch(model)
    assert [entry.path for entry in report.replaced] == LAYERS and not report.skipped
    assert {entry.why.partition(" for ")[0] for entry in report.replaced} == {"cross_attention"}
    calls = spy_on_attention(monkeypatch)
    model(**text_with_images(0))
    assert [c.function for c in calls].count("image_cross_attention") == 2
    assert [c.function for c in calls].count("varlen_attention") == 4


def test_the_whole_model_in_half_precision():
    assert_patched_model_right(make_palm().bfloat16(), text_with_images)


def test_unpatch_and_backend():
    model = make_palm()
    before = [(type(m), set(m.__dict__)) for m in model.modules()]
    parameters = list(model.parameters())
    vlmfast.patch(model, backend="reference")
    assert all(model.get_submodule(path).backend == "reference" for path in LAYERS)
    with torch.no_grad():
        model(**text_with_images(0))
    vlmfast.unpatch(model)
    assert [(type(m), set(m.__dict__)) for m in model.modules()] == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    model = make_palm().eval()
    expected = model(**text_with_images(0))
    vlmfast.patch(model)
    with torch.no_grad():
        model(**text_with_images(0))
        again = copied(model)
        torch.testing.assert_close(again(**text_with_images(0)), expected)
    vlmfast.unpatch(again)
    assert type(again.layers[0][1]) is layers.GatedCrossAttentionBlock
    torch.testing.assert_close(again(**text_with_images(0)), expected)


def make_layer(library, name, **arguments):
    torch.manual_seed(0)
    layer = getattr(library, name)(**SIZES, **arguments)
    open_gates(layer, WIDTH)
    return layer


def text_and_media(**options):
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        locations = torch.zeros(2, 7, dtype=torch.bool)
        locations[0, [2, 4]] = locations[1, 0] = True
        return {
            "x": torch.randn(2, 7, WIDTH, generator=generator),
            "media": torch.randn(2, 2, 5, 24, generator=generator),
            "media_locations": locations,
            **options,
        }

    return inputs


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("cached", [False, True])
def test_open_flamingo(name, cached):
    layer = make_layer(open_flamingo, name, dim_visual=24)
    assert_patched_model_right(layer, text_and_media(use_cached_media=cached))
    vlmfast.patch(layer)
    assert type(layer) is getattr(vnn, name)


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("previous", [False, True])
def test_open_flamingo_1(name, previous):
    layer = make_layer(open_flamingo_v1, name, dim_visual=24)
    assert_patched_model_right(layer, text_and_media(attend_previous=previous))

    def by_place(model, inputs):
        return model(*inputs.values())

    assert_patched_model_right(layer, text_and_media(attend_previous=previous), by_place)
    vlmfast.patch(layer)
    assert type(layer) is getattr(flamingo, f"{name}V1")
    assert type(pickle.loads(pickle.dumps(layer))) is type(layer)


def test_resampler_of_open_flamingo():
    torch.manual_seed(0)
    model = open_flamingo.PerceiverResampler(
        **SIZES, depth=2, num_latents=6, max_num_media=3, max_num_frames=2
    )

    def video(seed):
        generator = torch.Generator().manual_seed(seed)
        return {"x": torch.randn(2, 3, 2, 4, WIDTH, generator=generator)}

    assert_patched_model_right(model, video)
    assert [e.path for e in vlmfast.patch(model).replaced] == ["layers.0.0", "layers.1.0"]


def test_a_block_whose_attention_stays():
    block = make_layer(layers, "GatedCrossAttentionBlock")
    patched = copy.deepcopy(block)
    vlmfast.patch(patched, filter=lambda path, module: path == "")
    assert type(patched.attn) is layers.MaskedCrossAttention
    inputs = text_and_media()(0)
    inputs["media"] = torch.randn(2, 2, 5, WIDTH)
    torch.testing.assert_close(patched(**inputs), block(**inputs))


def test_decoding_on_a_patched_layer_keeps_the_media(monkeypatch):
    block = make_layer(open_flamingo, "GatedCrossAttentionBlock", dim_visual=24).eval()
    inputs = text_and_media()(0)
    x, media, locations = inputs.values()
    with torch.no_grad():
        expected = block(x, media, locations)
        vlmfast.patch(block)
        seen = []
        forward = nn.Linear.forward

        def spy(module, input):
            seen.append(module)
            return forward(module, input)

        monkeypatch.setattr(nn.Linear, "forward", spy)
        steps = [
            block(x[:, t : t + 1], media, locations[:, : t + 1], use_cached_media=True)
            for t in range(x.shape[1])
        ]
    torch.testing.assert_close(torch.cat(steps, 1), expected)
    assert seen.count(block.attn.to_kv) == 1


def test_inference_keeps_the_media_too():
    attention = make_layer(open_flamingo, "MaskedCrossAttention", dim_visual=24).eval()
    inputs = text_and_media()(0)
    expected = attention(**inputs)
    report = vlmfast.patch(attention, inference=True)
    assert len(report.replaced) == 4
    with torch.no_grad():
        torch.testing.assert_close(attention(**inputs), expected)
        inputs["media"] *= 2
        doubled = attention(**inputs)
    vlmfast.unpatch(attention)
    torch.testing.assert_close(doubled, attention(**inputs))


class Subclass(layers.MaskedCrossAttention):
    pass


class MaskedCrossAttention(layers.MaskedCrossAttention):
    """A subclass under the same name."""


def with_dropout():
    attention = make_layer(layers, "MaskedCrossAttention")
    attention.dropout = nn.Dropout(0.1)
    return attention


def with_another_forward():
    attention = make_layer(layers, "MaskedCrossAttention")
    attention.forward = lambda x, media: x
    return attention


def with_other_arguments():
    class MaskedCrossAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.__dict__.update(make_layer(layers, "MaskedCrossAttention").__dict__)

        def forward(self, x, media, mask):
            return x

    return MaskedCrossAttention()


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: Subclass(**SIZES), "a subclass may compute something else"),
        (lambda: MaskedCrossAttention(**SIZES), "a subclass may compute something else"),
        (with_dropout, "it is not made as Flamingo's is: dropout"),
        (with_other_arguments, "its forward takes x, media, mask"),
        (with_another_forward, "its forward was replaced by another"),
    ],
)
def test_left_and_reported(make, why):
    model = nn.Sequential(make())
    report = vlmfast.patch(model)
    assert not report.replaced and [entry.why for entry in report.skipped] == [why]
    with pytest.raises(RuntimeError, match=why):
        vlmfast.patch(model, strict=True)


def test_other_classes_of_these_names_are_unknown():
    class PerceiverAttention(nn.Module):
        pass

    report = vlmfast.patch(nn.Sequential(PerceiverAttention()), strict=True)
    assert not report.replaced and not report.skipped


def test_our_own_layers_need_no_replacement():
    model = vnn.GatedCrossAttentionBlock(**SIZES)
    report = vlmfast.patch(nn.Sequential(model, vnn.PerceiverResampler(**SIZES, depth=1)))
    assert not report.replaced and not report.skipped


def test_families():
    model = make_palm()
    report = vlmfast.patch(model, families=["flash_attention"])
    assert not report.replaced
    assert {e.why for e in report.skipped} == {"cross_attention is not asked for"}
    assert len(vlmfast.patch(model, families=["cross_attention"]).replaced) == len(LAYERS)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules(change):
    assert_same_where_submodules_change(make_palm(), change, text_with_images(0))


@pytest.mark.parametrize("name", ["perceiver", "block"])
def test_submodules_are_called_with_what_the_originals_call_them_with(name):
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    media = torch.randn(2, 3, 9, WIDTH, generator=generator)
    if name == "perceiver":
        layer = layers.PerceiverAttention(**SIZES)
        inputs = media, torch.randn(2, 3, 5, WIDTH, generator=generator)
    else:
        layer = layers.GatedCrossAttentionBlock(**SIZES)
        inputs = torch.randn(2, 7, WIDTH, generator=generator), media
    seen = []
    for path, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(
                lambda module, args, out, path=path: seen.append((path, *args))
            )
    calls = []
    for _ in range(2):
        seen.clear()
        layer(*inputs)
        calls.append(sorted(seen, key=lambda call: call[0]))
        vlmfast.patch(layer)
    assert isinstance(layer, (vnn.PerceiverAttention, vnn.GatedCrossAttentionBlock))
    for (path, x), (their_path, theirs) in zip(*calls, strict=True):
        assert path == their_path
        torch.testing.assert_close(x, theirs)
