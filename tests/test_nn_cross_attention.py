"""vlmfast.nn's Flamingo layers against flamingo-pytorch's, and against OpenFlamingo's formula."""

import copy
import inspect
import pickle

import flamingo_pytorch.flamingo_pytorch as original
import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.functional as VF
import vlmfast.nn as vnn
from tools import open_flamingo, open_flamingo_v1
from tools.models import (
    assert_as_right_as,
    assert_same_in_float64,
    measure,
    open_gates,
    spy_on_attention,
)
from tools.samples import FLAMINGO_SIZES as SIZES
from tools.samples import IMAGES, LATENTS, LOCATIONS, WIDTH, make_pair, text_and_media

VISUAL = 24
BATCH, TOKENS = LOCATIONS.shape


def assert_right(ours, theirs, make_inputs):
    assert_same_in_float64(ours, theirs, make_inputs(0))
    for module in (ours, theirs):
        open_gates(module, WIDTH)
    assert_as_right_as(ours, theirs, make_inputs)


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
@pytest.mark.parametrize("locations", [LOCATIONS, None], ids=["media", "absent"])
def test_flamingo_pytorch(name, immediate, locations):
    ours, theirs = make_pair(name, **SIZES, only_attend_immediate_media=immediate)
    assert_right(ours, theirs, lambda s: text_and_media(s, media_locations=locations))


@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
def test_no_image_before(immediate):
    ours, theirs = make_pair("MaskedCrossAttention", **SIZES, only_attend_immediate_media=immediate)
    none = torch.zeros_like(LOCATIONS)
    if immediate:
        out = ours(**text_and_media(0, media_locations=none))
        assert torch.equal(out, torch.zeros_like(out))
    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=none))


def test_locations_may_be_numbers():
    ours, theirs = make_pair("MaskedCrossAttention", **SIZES)
    inputs = text_and_media(0, media_locations=LOCATIONS.long())
    torch.testing.assert_close(ours(**inputs), theirs(**inputs))


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False], ids=["immediate", "all previous"])
@pytest.mark.parametrize("cached", [False, True])
def test_open_flamingo(name, immediate, cached):
    ours, theirs = make_pair(
        name, open_flamingo, **SIZES, dim_visual=VISUAL, only_attend_immediate_media=immediate
    )
    others = {"media_locations": LOCATIONS, "use_cached_media": cached}
    tokens = 4 if cached else TOKENS
    assert_right(ours, theirs, lambda s: text_and_media(s, width=VISUAL, tokens=tokens, **others))


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("previous", [False, True])
def test_attend_previous(name, previous):
    theirs = getattr(open_flamingo_v1, name)(**SIZES, dim_visual=VISUAL)
    ours = getattr(vnn, name)(**SIZES, dim_visual=VISUAL)
    open_gates(theirs)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    others = {"media_locations": LOCATIONS, "attend_previous": previous}
    assert_right(ours, theirs, lambda s: text_and_media(s, images=3, width=VISUAL, **others))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes(dtype):
    ours, theirs = (m.to(dtype) for m in make_pair("GatedCrossAttentionBlock", **SIZES))
    for module in (ours, theirs):
        open_gates(module, WIDTH)
    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=LOCATIONS))
    ours, theirs = (m.to(dtype) for m in make_pair("PerceiverAttention", **SIZES))
    assert_as_right_as(ours, theirs, features_and_latents)


def test_autocast():
    ours, theirs = make_pair("GatedCrossAttentionBlock", **SIZES)
    for module in (ours, theirs):
        open_gates(module, WIDTH)

    def call(module, inputs):
        with torch.autocast("cpu", torch.bfloat16):
            out = module(**inputs)
        assert out.dtype == inputs["x"].dtype
        return out

    assert_as_right_as(ours, theirs, lambda s: text_and_media(s, media_locations=LOCATIONS), call)


def test_fresh_block_is_the_identity_and_its_gates_learn():
    theirs = original.GatedCrossAttentionBlock(**SIZES)
    ours = vnn.GatedCrossAttentionBlock(**SIZES)
    ours.load_state_dict(theirs.state_dict())

    def call(module, inputs):  # with all that has a gradient: closed gates let none through
        module.requires_grad_(False)
        for gate in (module.attn_gate, module.ff_gate):
            gate.requires_grad_()
        inputs["media"].requires_grad_(False)
        return module(**inputs)

    inputs = text_and_media(0, media_locations=LOCATIONS)
    assert_same_in_float64(ours, theirs, inputs, call)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = ours.to(dtype).requires_grad_()
        inputs = text_and_media(0)
        x, media = (tensor.to(dtype) for tensor in inputs.values())
        out = ours(x, media, LOCATIONS)
        assert torch.equal(out, x)
        out.sum().backward()
        assert ours.attn_gate.grad != 0 and ours.ff_gate.grad != 0
        ours.zero_grad()


def features_and_latents(seed, features=9):
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(2, 3, features, WIDTH, generator=generator),
        "latents": torch.randn(2, 3, 4, WIDTH, generator=generator),
    }


@pytest.mark.parametrize("features", [1, 9])
def test_perceiver_attention(features):
    ours, theirs = make_pair("PerceiverAttention", **SIZES)
    assert_right(ours, theirs, lambda seed: features_and_latents(seed, features))


def test_perceiver_attention_of_sources_far_apart():
    # The softmax is one over both: a source whose logits are all small must all but vanish.
    ours, theirs = (m.double() for m in make_pair("PerceiverAttention", **SIZES))
    for norm in ("norm_media", "norm_latents"):
        for factor in (1e-3, 6.0):
            for m in (ours, theirs):
                nn.init.constant_(getattr(m, norm).weight, factor)
            assert_same_in_float64(ours, theirs, features_and_latents(0))


def test_perceiver_attention_puts_nothing_together(monkeypatch):
    ours, _ = make_pair("PerceiverAttention", **SIZES)
    for name in ("cat", "concat", "concatenate", "stack"):
        monkeypatch.setattr(torch, name, lambda *args, **kwargs: pytest.fail("put together"))
    calls = spy_on_attention(monkeypatch)
    ours(**features_and_latents(0))
    assert [c.function for c in calls] == ["varlen_attention"] * 2


def video(seed, shape):
    return {"x": torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(seed))}


RESAMPLER = {**SIZES, "depth": 2, "num_latents": 6, "ff_mult": 2}


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 9), (2, 4, 1)], ids=str)
def test_resampler_of_flamingo_pytorch(shape):
    ours, theirs = make_pair("PerceiverResampler", **RESAMPLER)
    assert_right(ours, theirs, lambda seed: video(seed, shape))


@pytest.mark.parametrize("media", [None, 5])
@pytest.mark.parametrize("frames", [None, 4])
def test_resampler_of_open_flamingo(media, frames):
    torch.manual_seed(0)
    theirs = open_flamingo.PerceiverResampler(
        **RESAMPLER, max_num_media=media, max_num_frames=frames
    )
    ours = vnn.PerceiverResampler(
        **RESAMPLER, max_num_media=media, max_num_frames=frames, num_media_embeds=None
    )
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_right(ours, theirs, lambda seed: video(seed, (2, 3, 4, 5)))


def test_resampler_takes_open_flamingos_arguments_as_they_are():
    arguments = {**RESAMPLER, "max_num_media": 2}
    theirs = open_flamingo.PerceiverResampler(**arguments)
    assert list(vnn.PerceiverResampler(**arguments).state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize(
    "name",
    [
        "MaskedCrossAttention",
        "GatedCrossAttentionBlock",
        "PerceiverAttention",
        "PerceiverResampler",
    ],
)
def test_same_constructor_and_state(name):
    ours, theirs = (
        inspect.signature(getattr(library, name)).parameters for library in (vnn, original)
    )
    for argument, parameter in theirs.items():
        assert ours[argument].kind == parameter.kind
        if parameter.default is not parameter.empty:
            assert ours[argument].default == parameter.default
    arguments = RESAMPLER if name == "PerceiverResampler" else SIZES
    mine, original_layer = make_pair(name, **arguments)
    assert list(mine.state_dict()) == list(original_layer.state_dict())
    original_layer.load_state_dict(mine.state_dict(), strict=True)


def test_images_that_are_not_attended_to_do_not_matter():
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    inputs = text_and_media(0)
    index = VF.image_index(LOCATIONS)
    before = ours(**inputs, media_locations=LOCATIONS)
    for image in range(IMAGES):
        media = inputs["media"].clone()
        media[:, image] += 1
        changed = ours(inputs["x"], media, LOCATIONS) != before
        sees = (index == image + 1) | (index > IMAGES)  # the overflowing see all, as a mean
        assert torch.equal(changed.any(-1), sees)
        media[:, image] = float("nan")
        assert torch.equal(ours(inputs["x"], media, LOCATIONS).isnan().any(-1), sees)


def test_permuting_the_batch_permutes_the_result():
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    order = torch.tensor([2, 0, 1])
    permuted = {name: tensor[order] for name, tensor in inputs.items()}
    torch.testing.assert_close(ours(**permuted), ours(**inputs)[order])


@pytest.mark.parametrize("name", ["MaskedCrossAttention", "GatedCrossAttentionBlock"])
@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_steps_of_decoding_give_what_the_prefill_gives(name, immediate, mode):
    ours, theirs = make_pair(name, **SIZES, only_attend_immediate_media=immediate)
    with mode():
        inputs = text_and_media(0)
        x, media = inputs["x"], inputs["media"]
        whole = ours(x, media, LOCATIONS)
        steps = [
            ours(x[:, t : t + 1], media, LOCATIONS[:, : t + 1], use_cached_media=True)
            for t in range(TOKENS)
        ]
        torch.testing.assert_close(torch.cat(steps, 1), whole)
        torch.testing.assert_close(whole, theirs(x, media, LOCATIONS))


@pytest.mark.parametrize("immediate", [True, False])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_layers_take_other_tokens_media_and_locations(immediate):
    block, _ = make_pair("GatedCrossAttentionBlock", **SIZES, only_attend_immediate_media=immediate)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    traced = torch.jit.trace(block, tuple(inputs.values()))
    others = text_and_media(1, media_locations=LOCATIONS.flip(0)).values()
    torch.testing.assert_close(traced(*others), block(*others))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    ours.attn.backend = "reference"
    inputs = text_and_media(0, media_locations=LOCATIONS)
    with torch.no_grad():
        expected = ours(**inputs)
        again = copied(ours)
        assert again.attn.backend == "reference"
        assert torch.equal(again(**inputs), expected)
        ours.attn.to_kv.weight.zero_()
        assert torch.equal(again(**inputs), expected)


def test_backend_is_forced(monkeypatch):
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    calls = spy_on_attention(monkeypatch)
    for backend in (None, "reference"):
        ours.backend = backend
        ours(**text_and_media(0, media_locations=LOCATIONS))
        ours(**text_and_media(0))
    assert [(c.function, c.backend) for c in calls] == [
        ("image_cross_attention", None),
        ("scaled_dot_product_attention", None),
        ("image_cross_attention", "reference"),
        ("scaled_dot_product_attention", "reference"),
    ]


def test_explain():
    ours, _ = make_pair("MaskedCrossAttention", **SIZES)
    explanation = vlmfast.explain(ours, **text_and_media(0, media_locations=LOCATIONS))
    assert explanation.family == "cross_attention"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_into_one_graph(dynamic):
    torch._dynamo.reset()
    ours, _ = make_pair("GatedCrossAttentionBlock", **SIZES)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    inputs = text_and_media(0, media_locations=LOCATIONS)
    results, expected = (
        measure(ours, inputs, lambda _, given, m=m: m(**given)) for m in (compiled, ours)
    )
    for name in expected:
        torch.testing.assert_close(results[name], expected[name])


def test_resampler_compiles_into_one_graph():
    torch._dynamo.reset()
    ours, _ = make_pair("PerceiverResampler", **RESAMPLER)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    inputs = video(0, (2, 3, 9))
    torch.testing.assert_close(compiled(**inputs), ours(**inputs))


@pytest.mark.parametrize(("batch", "tokens", "images"), [(0, 4, 2), (2, 0, 2), (2, 4, 0)])
def test_empty(batch, tokens, images):
    ours = vnn.GatedCrossAttentionBlock(**SIZES)
    x = torch.randn(batch, tokens, WIDTH)
    media = torch.randn(batch, images, LATENTS, WIDTH)
    out = ours(x, media, torch.ones(batch, tokens, dtype=torch.bool))
    assert torch.equal(out, x)


GOOD = {
    "x": torch.zeros(2, 4, WIDTH),
    "media": torch.zeros(2, 3, 5, WIDTH),
    "media_locations": torch.zeros(2, 4, dtype=torch.bool),
}


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x: expected a tensor, got list"),
        ({"x": torch.zeros(2, 4, WIDTH).long()}, TypeError, "x: expected a floating dtype"),
        ({"x": torch.zeros(2, 4, WIDTH).double()}, TypeError, "x: expected the dtype of the wei"),
        ({"x": torch.zeros(4, WIDTH)}, ValueError, r"x: expected shape \(B, T, dim\)"),
        ({"x": torch.zeros(2, 4, 7)}, ValueError, "x: expected a last dimension of size 32"),
        ({"media": None}, TypeError, "media: expected a tensor, got NoneType"),
        ({"media": torch.zeros(2, 5, WIDTH)}, ValueError, r"media: expected shape \(2, I, L"),
        ({"media": torch.zeros(1, 3, 5, WIDTH)}, ValueError, r"media: expected shape \(2, I, L"),
        ({"media": torch.zeros(2, 3, 5, 7)}, ValueError, "media: expected a last dimension"),
        ({"media": torch.zeros(2, 3, 5, WIDTH, device="meta")}, ValueError, "media: expected the"),
        ({"media_locations": [[True]]}, TypeError, "media_locations: expected a tensor or None"),
        ({"media_locations": torch.zeros(2, 4)}, TypeError, "media_locations: expected dtype"),
        ({"media_locations": torch.zeros(2, 5).bool()}, ValueError, r"media_locations: .*\(2, 4\)"),
        (
            {"media_locations": torch.zeros(3, 5).bool(), "use_cached_media": True},
            ValueError,
            r"media_locations: .*\(2, any\)",
        ),
        (
            {"attend_previous": False, "use_cached_media": True},
            ValueError,
            "attend_previous: expected True with use_cached_media",
        ),
        (
            {"attend_previous": False, "media_locations": torch.zeros(2, 4).long()},
            TypeError,
            "media_locations: expected dtype torch.bool with attend_previous=False",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    layer = vnn.MaskedCrossAttention(**SIZES)
    with pytest.raises(error, match=message):
        layer(**{**GOOD, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"latents": 3}, TypeError, "latents: expected a tensor, got int"),
        ({"x": torch.zeros(2, 9, WIDTH)}, ValueError, r"x: expected shape \(B, I, tokens, dim\)"),
        ({"x": torch.zeros(2, 3, 9, 7)}, ValueError, "x: expected a last dimension of size 32"),
        ({"x": torch.zeros(2, 4, 9, WIDTH)}, ValueError, r"latents: expected batch and images"),
        ({"latents": torch.zeros(2, 3, 4, WIDTH).half()}, TypeError, "latents: expected the dty"),
    ],
)
def test_bad_arguments_of_perceiver_attention(arguments, error, message):
    layer = vnn.PerceiverAttention(**SIZES)
    with pytest.raises(error, match=message):
        layer(**{**features_and_latents(0), **arguments})


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (WIDTH,), "x: expected 3 to 5 dimensions, the last of size 32"),
        ({}, (2, 3, 9, 7), "x: expected 3 to 5 dimensions, the last of size 32"),
        ({}, (2, 5, 9, WIDTH), "x: expected at most 4 images, as there are embeddings, got 5"),
        ({"max_num_frames": 2}, (2, 3, 9, WIDTH), "x: expected shape .*, having frame_embs"),
        ({"max_num_frames": 2}, (2, 1, 3, 9, WIDTH), "x: expected at most 2 frames"),
        ({"max_num_media": 2}, (2, 3, 9, WIDTH), "x: expected at most 2 images"),
    ],
)
def test_bad_arguments_of_the_resampler(arguments, shape, message):
    layer = vnn.PerceiverResampler(**RESAMPLER, **arguments)
    with pytest.raises(ValueError, match=message):
        layer(torch.zeros(shape))
    with pytest.raises(TypeError, match="x: expected a floating dtype"):
        layer(torch.zeros(shape, dtype=torch.long))


@pytest.mark.parametrize(
    "layer",
    [
        vnn.MaskedCrossAttention,
        vnn.GatedCrossAttentionBlock,
        vnn.PerceiverAttention,
        vnn.PerceiverResampler,
    ],
)
@pytest.mark.parametrize(
    ("sizes", "error", "message"),
    [
        ({"dim": -1}, ValueError, "dim: expected at least 1, got -1"),
        ({"heads": 0}, ValueError, "heads: expected at least 1, got 0"),
        ({"dim_head": 0}, ValueError, "dim_head: expected at least 1, got 0"),
        ({"heads": 2.0}, TypeError, "heads: expected an int, got float"),
    ],
)
def test_bad_sizes(layer, sizes, error, message):
    with pytest.raises(error, match=message):
        layer(**{"dim": WIDTH, **sizes})


def test_bad_sizes_of_single_layers():
    with pytest.raises(ValueError, match="dim_visual: expected at least 1, got 0"):
        vnn.MaskedCrossAttention(dim=WIDTH, dim_visual=0)
    for name in ("num_latents", "depth", "num_media_embeds", "max_num_media", "max_num_frames"):
        for bad, error in (
            (0, ValueError),
            (-1, ValueError),
            (2**63, ValueError),
            (1.5, TypeError),
        ):
            with pytest.raises(error, match=f"{name}: expected"):
                vnn.PerceiverResampler(dim=WIDTH, **{name: bad})
    for bad, error in ((0, ValueError), (-1, ValueError), (1e300, ValueError), ("4", TypeError)):
        for layer in (vnn.PerceiverResampler, vnn.GatedCrossAttentionBlock):
            with pytest.raises(error, match="ff_mult: expected"):
                layer(dim=WIDTH, ff_mult=bad)
