"""patch on the layers of transformers that attend to images."""

import copy

import pytest
import torch

import vlmfast
from tools.models import (
    CHANGES,
    assert_decodes_as_before,
    assert_patched_model_right,
    assert_same_in_float64,
    assert_same_where_submodules_change,
    decode,
    open_gates,
    spy_on_attention,
)
from tools.samples import BATCH, IMAGE, SIZES, TOKENS, last_hidden_state, make
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from transformers import (  # noqa: E402
    BlipTextConfig,
    BlipTextModel,
    DynamicCache,
    EncoderDecoderCache,
    IdeficsConfig,
    IdeficsModel,
    MllamaConfig,
    MllamaModel,
)
from transformers.models.idefics2.modeling_idefics2 import (  # noqa: E402
    Idefics2PerceiverConfig,
    Idefics2PerceiverResampler,
)
from transformers.models.mllama import modeling_mllama  # noqa: E402

from vlmfast.integrations.transformers.cross_attention import IMAGE_MASK  # noqa: E402

IMAGES = 3


# The models are called without their vision towers.
def make_open(cls, config, wide_gates=True):
    model = make(cls, config)
    open_gates(model, SIZES["hidden_size"] if wide_gates else None)
    return model


def make_idefics(implementation="sdpa", resampler=False, wide_gates=True, **arguments):
    vision = {"embed_dim": 24, **IMAGE, "num_hidden_layers": 1, "num_attention_heads": 2}
    perceiver = {"use_resampler": resampler, "resampler_n_latents": 4, "resampler_depth": 2}
    perceiver |= {"resampler_n_heads": 2, "resampler_head_dim": 8}
    perceiver["qk_layer_norms_perceiver"] = arguments.get("qk_layer_norms", False)
    config = IdeficsConfig(
        **SIZES,
        vocab_size=50,
        use_resampler=resampler,
        vision_config={**vision, "intermediate_size": 48},
        perceiver_config=perceiver,
        attn_implementation=implementation,
        **arguments,
    )
    return make_open(IdeficsModel, config, wide_gates)


def image_mask():
    """Tokens of no image before, between and behind; of one image, and of several."""
    mask = torch.zeros(BATCH, TOKENS, IMAGES, dtype=torch.long)
    mask[0, 2:5, 0] = mask[0, 5:8, 1] = mask[0, 9, :] = 1
    mask[1, :3, 1:] = mask[1, 3:, 2] = 1
    return mask


def words_and_images(seed, width=24):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, 48, (BATCH, TOKENS), generator=generator),
        "image_encoder_embeddings": torch.randn(BATCH, IMAGES, 5, width, generator=generator),
        "image_attention_mask": image_mask(),
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qk_layer_norms": True, "resampler": True},
        {"alpha_type": "vector", "cross_layer_interval": 2},
    ],
    ids=str,
)
def test_idefics(implementation, arguments):
    model, exact = (make_idefics(kind, **arguments) for kind in (implementation, "sdpa"))
    assert_patched_model_right(model, words_and_images, last_hidden_state, exact)


@pytest.mark.parametrize("gates", ["float", "vector"])
def test_idefics_in_float64(gates):
    arguments = {"alpha_type": gates, "wide_gates": False}
    model = make_idefics(qk_layer_norms=True, resampler=True, **arguments).double()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    assert_same_in_float64(patched, model, words_and_images(0), last_hidden_state)


def test_idefics_runs_our_kernels_on_the_mask_as_it_comes(monkeypatch):
    model = make_idefics(resampler=True).eval()
    report = vlmfast.patch(model, families=["cross_attention"])
    assert [e.path for e in report.replaced] == [
        "",
        "perceiver_resampler.blocks.0.0",
        "perceiver_resampler.blocks.1.0",
        "gated_cross_attn_layers.0.cross_attn",
        "gated_cross_attn_layers.1.cross_attn",
    ]
    calls = spy_on_attention(monkeypatch)
    plans = []
    make_plan = vlmfast.functional.cross_attention_plan

    def plan(*args, **kwargs):
        plans.append(args)
        return make_plan(*args, **kwargs)

    monkeypatch.setattr(vlmfast.functional, "cross_attention_plan", plan)
    inputs = words_and_images(0)
    for arguments, keywords in (
        ((), inputs),
        ((inputs["input_ids"], *(None,) * 5, *list(inputs.values())[1:2], None), {}),
    ):
        calls.clear(), plans.clear()
        if arguments:  # image_attention_mask by its place
            arguments = (*arguments, inputs["image_attention_mask"])
        with torch.no_grad():
            model(*arguments, **keywords)
        assert [c.function for c in calls] == [
            *["varlen_attention"] * 4,
            *["image_cross_attention"] * 2,
        ]
        assert len(plans) <= 1


def test_idefics_refuses_a_mask_of_fewer_images_as_before():
    model = make_idefics().eval()
    inputs = words_and_images(0)
    inputs["image_attention_mask"] = inputs["image_attention_mask"][..., :1]
    with pytest.raises(RuntimeError, match="size"):
        last_hidden_state(model, inputs)
    vlmfast.patch(model)
    with pytest.raises(ValueError, match="attn_mask: expected"):
        last_hidden_state(model, inputs)


def test_masks_of_images_shorter_than_the_text_are_named():
    for make_model, make_inputs, name in (
        (make_idefics, words_and_images, "image_attention_mask"),
        (make_mllama, words_and_tiles, "cross_attention_mask"),
    ):
        model, inputs = make_model().eval(), make_inputs(0)
        inputs[name] = inputs[name][:, : TOKENS - 2]
        with pytest.raises(RuntimeError, match="size"):
            last_hidden_state(model, inputs)
        vlmfast.patch(model)
        says = rf"{name}: expected a row for each of {TOKENS} tokens of {BATCH} texts, got"
        with pytest.raises(ValueError, match=says):
            last_hidden_state(model, inputs)


def test_idefics_rows_without_an_image_are_left_as_they_are():
    model = make_idefics().eval()
    vlmfast.patch(model)
    layer, mask = model.gated_cross_attn_layers[0], image_mask()
    seen = []
    layer.cross_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    inputs = words_and_images(0)
    inputs["image_encoder_embeddings"][0, 2] = float("nan")
    model(**inputs)
    none = ~mask.any(-1)
    assert seen[0][none].eq(0).all()
    assert torch.equal(
        seen[0].isnan().any(-1), (mask[..., 2] == 1) & torch.tensor([[True], [False]])
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_idefics_dropout_and_weights_stay_with_the_original(monkeypatch, dropout):
    model = make_idefics(dropout=dropout).train()
    vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    model(**words_and_images(0))
    kernels = [c.function for c in calls].count("image_cross_attention")
    assert kernels == (0 if dropout else 2)
    calls.clear()
    eager = make_idefics("eager").eval()
    model = make_idefics().eval()
    vlmfast.patch(model)
    inputs = words_and_images(0)
    result, expected = (m(**inputs, output_attentions=True) for m in (model, eager))
    assert not calls and len(result.attentions) == 2
    for mine, original in zip(result.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, original)
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)


@torch.no_grad()
def test_idefics_layer_fills_a_cache_as_before():
    model = make_idefics().eval()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    media = words_and_images(0)["image_encoder_embeddings"].flatten(1, 2)
    words = torch.randn(BATCH, TOKENS, SIZES["hidden_size"])

    def twice(model, **arguments):
        attention, cache = model.gated_cross_attn_layers[0].cross_attn, DynamicCache()
        for seen in (media.shape[1], 2 * media.shape[1]):
            mask = torch.zeros(BATCH, 1, TOKENS, seen)
            out, _ = attention(words, media, mask, past_key_values=cache, **arguments)
        return out, cache.layers[attention.layer_idx].keys

    results = twice(patched, **{IMAGE_MASK: image_mask()}), twice(model)
    torch.testing.assert_close(*results)


def test_idefics_decoding():
    inputs = words_and_images(0)
    words, mask = inputs.pop("input_ids"), inputs.pop("image_attention_mask")
    assert_decodes_as_before(
        make_idefics(resampler=True).eval(),
        lambda piece, last: {
            "input_ids": words[:, piece],
            "image_attention_mask": mask[:, piece],
            **inputs,
        },
    )


@pytest.mark.parametrize("resampler", [False, True])
def test_idefics_projects_its_media_once_while_it_generates(monkeypatch, resampler):
    model = make_idefics(resampler=resampler, qk_layer_norms=True).eval()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    inputs = words_and_images(0)
    words, mask = inputs.pop("input_ids"), inputs.pop("image_attention_mask")
    projected = []
    forward = torch.nn.Linear.forward

    def spy(module, input):
        projected.append(module)
        return forward(module, input)

    def arguments(piece, last):
        name = "perceiver_embeddings" if resampler else "image_encoder_embeddings"
        media = inputs if last is None else {name: last.image_hidden_states}
        return {"input_ids": words[:, piece], "image_attention_mask": mask[:, piece], **media}

    def generate(model):
        return decode(model, arguments)

    with torch.no_grad():
        expected = generate(model)
        monkeypatch.setattr(torch.nn.Linear, "forward", spy)
        torch.testing.assert_close(generate(patched), expected)
        attention = patched.gated_cross_attn_layers[0].cross_attn
        assert projected.count(attention.k_proj) == projected.count(attention.v_proj) == 1
        for weight in (attention.v_proj.weight, attention.k_layer_norm.weight):
            weight.mul_(2)
            assert not torch.allclose(generate(patched), expected)
            weight.div_(2)
            torch.testing.assert_close(generate(patched), expected)


def make_mllama(implementation="sdpa", wide_gates=True, **arguments):
    text = {**SIZES, "vocab_size": 50, "num_key_value_heads": 2, "cross_attention_layers": [1, 2]}
    text |= {"num_hidden_layers": 4, "pad_token_id": 0, **arguments}
    vision = {**IMAGE, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    vision |= {"num_global_layers": 1, "attention_heads": 2, "vision_output_dim": 32}
    vision |= {"intermediate_layers_indices": [0]}
    config = MllamaConfig(
        text_config=text, vision_config=vision, attn_implementation=implementation
    )
    return make_open(MllamaModel, config, wide_gates)


TILES, PATCHES = 2, 17  # those of an image and of a tile


def words_and_tiles(seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(BATCH, TOKENS, 2, TILES, dtype=torch.long)
    mask[0, 2:, 0] = mask[0, 6:, 1, 0] = mask[1, 0, 1] = mask[1, 4:8, 0, 1] = 1
    return {
        "input_ids": torch.randint(3, 48, (BATCH, TOKENS), generator=generator),
        "cross_attention_states": torch.randn(
            BATCH * 2 * TILES, PATCHES, SIZES["hidden_size"], generator=generator
        ),
        "cross_attention_mask": mask,
    }


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_mllama(implementation):
    model, exact = (make_mllama(kind) for kind in (implementation, "sdpa"))
    assert_patched_model_right(model, words_and_tiles, last_hidden_state, exact)


def test_mllama_in_float64():
    model = make_mllama(wide_gates=False).double()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    assert_same_in_float64(patched, model, words_and_tiles(0), last_hidden_state)


MLLAMA_LAYERS = [f"language_model.layers.{i}.cross_attn" for i in (1, 2)]


def test_mllama_expands_no_mask(monkeypatch):
    model = make_mllama().eval()
    report = vlmfast.patch(model, families=["cross_attention"])
    assert [e.path for e in report.replaced] == ["", *MLLAMA_LAYERS]
    calls = spy_on_attention(monkeypatch)
    monkeypatch.setattr(
        modeling_mllama, "_prepare_cross_attention_mask", lambda *a, **k: pytest.fail("expanded")
    )
    inputs = words_and_tiles(0)
    with torch.no_grad():
        by_name = model(**inputs).last_hidden_state
        words, states, mask = inputs.values()
        by_place = model(words, None, None, None, None, mask, states).last_hidden_state
    assert torch.equal(by_name, by_place)
    assert [c.function for c in calls] == ["image_cross_attention"] * 4


def test_mllama_refuses_a_mask_of_fewer_tiles_as_before():
    model = make_mllama().eval()
    inputs = words_and_tiles(0)
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"][..., :1]
    with pytest.raises(RuntimeError, match="size"):
        last_hidden_state(model, inputs)
    vlmfast.patch(model)
    with pytest.raises(ValueError, match="attn_mask: expected"):
        last_hidden_state(model, inputs)


def test_mllama_with_a_layer_left_keeps_its_mask():
    model = make_mllama().eval()
    inputs = words_and_tiles(0)
    expected = last_hidden_state(model, inputs)
    vlmfast.patch(model, filter=lambda path, module: path != MLLAMA_LAYERS[0])
    torch.testing.assert_close(last_hidden_state(model, inputs), expected)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("sliced", [True, False])
def test_mllama_decoding(masked, sliced):
    words, states, mask = words_and_tiles(0).values()
    assert_decodes_as_before(
        make_mllama().eval(),
        lambda piece, last: {
            "input_ids": words[:, piece],
            "cross_attention_states": states if last is None else None,
            "cross_attention_mask": (mask[:, piece] if sliced else mask) if masked else None,
        },
    )


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mllama_dropout_and_weights_stay_with_attention_functions(monkeypatch, dropout):
    model = make_mllama(dropout=dropout).train()
    vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    model(**words_and_tiles(0))
    kernels = [c.function for c in calls].count("image_cross_attention")
    assert kernels == (0 if dropout else 2)
    calls.clear()
    eager, model = make_mllama("eager").eval(), make_mllama().eval()
    vlmfast.patch(model)
    inputs = words_and_tiles(0)
    result, expected = (
        m.language_model(
            inputs["input_ids"],
            cross_attention_states=inputs["cross_attention_states"],
            output_attentions=True,
        )
        for m in (model, eager)
    )
    assert not calls and len(result.attentions) == 4
    result, expected = (m(**inputs, output_attentions=True) for m in (model, eager))
    torch.testing.assert_close(result.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("made", [make_idefics, make_mllama])
def test_models_with_image_masks_are_restored(made):
    model = made()
    state = [(type(m), set(m.__dict__), len(m._forward_pre_hooks)) for m in model.modules()]
    vlmfast.patch(model)
    again = copy.deepcopy(model)
    for m in (model, again):
        vlmfast.unpatch(m)
        assert state == [(type(x), set(x.__dict__), len(x._forward_pre_hooks)) for x in m.modules()]


def test_mllama_compiles_into_one_graph():
    torch._dynamo.reset()
    model = make_mllama().eval()
    vlmfast.patch(model)
    inputs = words_and_tiles(0)
    with torch.no_grad():
        expected = model(**inputs, use_cache=False).last_hidden_state
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(**inputs, use_cache=False).last_hidden_state, expected)


def make_blip_text(**arguments):
    config = BlipTextConfig(
        **SIZES, vocab_size=50, encoder_hidden_size=24, projection_dim=16, **arguments
    )
    return make(BlipTextModel, config)


def blip_inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, 48, (BATCH, TOKENS), generator=generator),
        "attention_mask": (torch.arange(TOKENS) < torch.tensor([[TOKENS], [6]])).long(),
        "encoder_hidden_states": torch.randn(BATCH, 7, 24, generator=generator),
        "encoder_attention_mask": torch.tensor([[1] * 7, [1] * 4 + [0] * 3]),
    }


@pytest.mark.parametrize("decoder", [False, True])
def test_blip_text(decoder, monkeypatch):
    model = make_blip_text().eval()
    assert_patched_model_right(
        model, blip_inputs, lambda m, inputs: m(**inputs, is_decoder=decoder).last_hidden_state
    )
    report = vlmfast.patch(model)
    assert len(report.replaced) == 4 and not report.skipped
    calls = spy_on_attention(monkeypatch)
    model(**blip_inputs(0))
    assert [c.query.shape[2] for c in calls] == [TOKENS] * 4


def test_blip_text_decoding():
    inputs = blip_inputs(0)
    words = inputs.pop("input_ids")
    del inputs["attention_mask"]
    assert_decodes_as_before(
        make_blip_text().eval(),
        lambda piece, last: {"input_ids": words[:, piece], "is_decoder": True, **inputs},
        lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
    )


def test_blip_text_weights():
    model = make_blip_text().eval()
    inputs = blip_inputs(0)
    expected = model(**inputs, output_attentions=True)
    vlmfast.patch(model)
    outputs = model(**inputs, output_attentions=True)
    for name in ("attentions", "cross_attentions"):
        pairs = list(zip(outputs[name], expected[name], strict=True))
        assert len(pairs) == 2 and all(torch.equal(*pair) for pair in pairs)


def test_idefics2_perceiver():
    config = Idefics2PerceiverConfig(
        hidden_size=32,
        resampler_n_latents=4,
        resampler_depth=2,
        resampler_n_heads=4,
        resampler_head_dim=8,
        num_key_value_heads=2,
    )
    model = make(Idefics2PerceiverResampler, config)
    torch.nn.init.normal_(model.latents)

    def inputs(seed):
        context = torch.randn(BATCH, 9, 32, generator=torch.Generator().manual_seed(seed))
        return {"context": context, "attention_mask": torch.arange(9).expand(BATCH, 9) < 6}

    assert_patched_model_right(model, inputs)
    assert len(vlmfast.patch(model).replaced) == 2


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules_of_idefics(change):
    model = make_idefics(qk_layer_norms=True, resampler=True)
    assert_same_where_submodules_change(model, change, words_and_images(0), last_hidden_state)


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules_of_blip(change):
    model = make(BlipTextModel, BlipTextConfig(**SIZES, vocab_size=50, encoder_hidden_size=24))
    inputs = {"encoder_hidden_states": torch.randn(BATCH, 5, 24), "is_decoder": True}
    inputs["input_ids"] = words_and_images(0)["input_ids"]
    assert_same_where_submodules_change(model, change, inputs, last_hidden_state)
