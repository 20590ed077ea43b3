"""patch on attention of transformers that goes through AttentionInterface."""

import copy
import itertools
import subprocess
import sys

import pytest
import torch

import vlmfast
from tools.models import (
    assert_as_right_as,
    assert_decodes_as_before,
    assert_drops_at_random,
    assert_patched_model_right,
    assert_same_in_float64,
    spy_on_attention,
)
from tools.samples import (
    BATCH,
    IMAGE,
    MODELS,
    SIZES,
    TOKENS,
    WORDS,
    features,
    inputs_of,
    make,
    make_clip,
    make_vit,
    padding,
)
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTModel,
)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models(name, implementation, dtype):
    model, exact = (MODELS[name](kind).to(dtype) for kind in (implementation, "sdpa"))
    assert_patched_model_right(model, inputs_of(name), features, exact)


# Padding on the left of causal text leaves rows that see nothing. Eager attention gives them a mean
# over all keys and sdpa zero, so that eager has a test of its own.
PADDED = [
    *itertools.product(["clip", "siglip"], ["sdpa", "eager"], ["none", "right"]),
    *[("clip", "sdpa", "left"), ("siglip", "sdpa", "left"), ("siglip", "eager", "left")],
]


@pytest.mark.parametrize(("name", "implementation", "side"), PADDED)
def test_padding_masks(name, implementation, side):
    model, exact = (MODELS[name](kind) for kind in (implementation, "sdpa"))
    assert_patched_model_right(model, inputs_of(name, side), features, exact)


def test_rows_that_see_nothing_keep_what_eager_gives_them():
    model = make_clip("eager").eval()
    inputs = inputs_of("clip", "left")(0)
    expected = model(**inputs).text_model_output.last_hidden_state
    sdpa = make_clip("sdpa").eval()(**inputs).text_model_output.last_hidden_state
    vlmfast.patch(model)
    torch.testing.assert_close(model(**inputs).text_model_output.last_hidden_state, expected)
    assert not torch.allclose(expected[1, 0], sdpa[1, 0], atol=1e-2)


def test_padding_mask_matters():
    model = make_clip().eval()
    vlmfast.patch(model)
    plain, padded = (
        features(model, {**inputs_of("clip")(0), "attention_mask": padding(side)})[2]
        for side in ("none", "left")
    )
    assert torch.allclose(plain[0], padded[0], atol=1e-5)
    assert not torch.allclose(plain[1], padded[1], atol=1e-2)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_every_layer_runs_our_kernels(monkeypatch, implementation):
    model = make_clip(implementation).eval()
    report = vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    with torch.inference_mode():
        model(**inputs_of("clip")(0))
    model_itself = ""  # its loss
    assert [entry.path for entry in report.replaced] == [
        model_itself,
        *(
            f"{tower}.encoder.layers.{layer}.self_attn"
            for tower in ("text_model", "vision_model")
            for layer in (0, 1)
        ),
    ]
    text = [c for c in calls if c.query.shape[2] == TOKENS]
    assert len(calls) == 4 and len(text) == 2
    # sdpa's masks leave a causal mask to the flag, eager's never do.
    by_flag = implementation == "sdpa"
    assert [(c.is_causal, c.attn_mask is None) for c in text] == [(by_flag, by_flag)] * 2


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_output_attentions(monkeypatch, name, implementation):
    eager, model = MODELS[name]("eager").eval(), MODELS[name](implementation).eval()
    vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    inputs = inputs_of(name, None if name == "vit" else "right")(0)
    expected, outputs = (m(**inputs, output_attentions=True) for m in (eager, model))
    towers = ("text_model_output", "vision_model_output") if name != "vit" else (None,)
    for tower in towers:
        mine, original = (o[tower] if tower else o for o in (outputs, expected))
        assert len(mine.attentions) == len(original.attentions) == 2
        for a, b in zip(mine.attentions, original.attentions, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(mine.last_hidden_state, original.last_hidden_state)
    assert not calls
    model(**inputs)
    assert calls


def test_output_attentions_of_an_eager_config():
    eager = make_vit("eager").eval()
    model = copy.deepcopy(eager)
    vlmfast.patch(model)
    for m in (eager, model):
        m.config.output_attentions = True
    expected, outputs = (m(**inputs_of("vit")(0)).attentions for m in (eager, model))
    assert len(outputs) == 2
    for mine, original in zip(outputs, expected, strict=True):
        assert torch.equal(mine, original)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_configs_are_respected_and_restored(implementation):
    model = make_clip(implementation)
    attention = model.text_model.encoder.layers[0].self_attn
    config, before = attention.config, copy.deepcopy(model.config.to_dict())
    vlmfast.patch(model)
    assert model.config._attn_implementation == implementation
    assert model.text_model.config._attn_implementation == implementation
    assert model.config.to_dict() == before
    vlmfast.unpatch(model)
    assert attention.config is config is model.text_model.config
    assert config._attn_implementation == implementation
    assert set(attention.__dict__) == set(
        make_clip().text_model.encoder.layers[0].self_attn.__dict__
    )


def test_models_that_share_a_config_are_apart(monkeypatch):
    config = ViTConfig(**SIZES, **IMAGE)
    one, other = make(ViTModel, config), make(ViTModel, config)
    vlmfast.patch(one, backend="reference")
    calls = spy_on_attention(monkeypatch)
    other(**inputs_of("vit")(0))
    assert not calls
    one(**inputs_of("vit")(0))
    assert [c.backend for c in calls] == ["reference"] * 2


def test_filter_leaves_layers_of_the_same_config(monkeypatch):
    model = make_clip()
    report = vlmfast.patch(model, filter=lambda path, module: "layers.1" in path)
    assert len(report.replaced) == 2
    assert [entry.path for entry in report.skipped if "layers" not in entry.path] == [""]
    assert len(report.skipped) == 3
    calls = spy_on_attention(monkeypatch)
    model(**inputs_of("clip")(0))
    assert len(calls) == 2


def test_a_user_may_choose_it_by_name(monkeypatch):
    vlmfast.patch(make_vit())
    sdpa, ours = make_clip(), make_clip("vlmfast")
    assert_as_right_as(ours, sdpa, inputs_of("clip", "right"), features)
    calls = spy_on_attention(monkeypatch)
    ours(**inputs_of("clip")(0))
    assert [c.is_causal for c in calls].count(True) == 2


def test_implementation_changed_behind_the_patch_is_an_error():
    model = make_vit()
    vlmfast.patch(model)
    model.set_attn_implementation("paged|eager")
    with pytest.raises(ValueError, match=r"'paged\|eager', set after vlmfast.patch"):
        model(**inputs_of("vit")(0))


def test_other_implementations_are_left():
    model = make_vit("flex_attention")
    report = vlmfast.patch(model)
    assert not report.replaced
    assert {entry.why for entry in report.skipped} == {
        "attn_implementation is 'flex_attention'; only sdpa and eager are replaced"
    }


@pytest.mark.parametrize(
    ("cls", "config"),
    [(BlipVisionModel, BlipVisionConfig(**SIZES, **IMAGE)), (ViltModel, ViltConfig(**SIZES))],
    ids=["BLIP", "ViLT"],
)
def test_attention_outside_the_interface_is_left(cls, config):
    report = vlmfast.patch(cls(config))
    assert not report.replaced and len(report.skipped) == SIZES["num_hidden_layers"]
    assert {entry.why for entry in report.skipped} == {"does not go through AttentionInterface"}


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_decoder_with_grouped_heads_and_cache(implementation):
    config = LlamaConfig(
        **SIZES, **WORDS, num_key_value_heads=2, attn_implementation=implementation
    )
    model = make(LlamaModel, config).eval()
    assert len(vlmfast.patch(copy.deepcopy(model)).replaced) == 2
    words = inputs_of("clip")(0)["input_ids"]
    assert_decodes_as_before(
        model,
        lambda piece, last: {"input_ids": words[:, piece]},
        pieces=(slice(0, 6), slice(6, 7), slice(7, None)),
    )


def test_encoder_with_padding():
    config = BertConfig(**SIZES, vocab_size=50, max_position_embeddings=16)
    model = make(BertModel, config).eval()

    def call(model, inputs):
        return model(inputs["input_ids"], attention_mask=padding("right")).last_hidden_state

    assert_patched_model_right(model, inputs_of("clip"), call)


def test_learned_bias_gets_its_gradient():
    config = SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[2], num_heads=[2], window_size=4
    )
    model = make(SwinModel, config)
    ours = copy.deepcopy(model)
    report = vlmfast.patch(ours, families=["flash_attention"])
    assert {entry.what for entry in report.replaced} == {"attention function 'vlmfast'"}

    def call(model, inputs):
        return model(inputs["pixel_values"]).last_hidden_state

    assert_as_right_as(ours, model, inputs_of("vit"), call)


def make_t5(implementation):
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64}
    config = T5Config(**sizes, num_layers=2, num_heads=4, attn_implementation=implementation)
    return make(T5Model, config).eval()


def encode_and_decode(model, inputs):
    words, mask = inputs["input_ids"], padding("right")
    return model(words, attention_mask=mask, decoder_input_ids=words.flip(0)).last_hidden_state


def test_relative_position_bias_runs_our_kernels(monkeypatch):
    model = make_t5("sdpa")
    assert_patched_model_right(model, inputs_of("clip"), encode_and_decode)
    report = vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    encode_and_decode(model, inputs_of("clip")(0))
    assert len(calls) == len(report.replaced) == 6


def test_position_bias_of_eager_attention():
    model = make_t5("eager")
    patched = copy.deepcopy(model)
    assert len(vlmfast.patch(patched).replaced) == 6
    assert_same_in_float64(patched, model, inputs_of("clip")(0), encode_and_decode)


def test_cross_attention():
    config = Blip2QFormerConfig(
        **SIZES, vocab_size=50, encoder_hidden_size=24, cross_attention_frequency=1
    )
    model = make(Blip2QFormerModel, config).eval()
    hidden = torch.ones(BATCH, 7, dtype=torch.long)
    hidden[1, 4:] = 0

    def call(model, inputs):
        return model(**inputs, encoder_attention_mask=hidden).last_hidden_state

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        return {
            "query_embeds": torch.randn(BATCH, 5, 32, generator=generator),
            "encoder_hidden_states": torch.randn(BATCH, 7, 24, generator=generator),
        }

    assert_patched_model_right(model, inputs, call)


def test_attention_dropout_follows_training(monkeypatch):
    model = make_vit(attention_probs_dropout_prob=0.5).train()
    vlmfast.patch(model)
    inputs = inputs_of("vit")(0)
    assert_drops_at_random(lambda: model(**inputs).last_hidden_state)


def test_gradient_checkpointing():
    def call(model, inputs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return features(model, inputs)

    assert_patched_model_right(make_clip(), inputs_of("clip"), call)


def test_saved_model_loads_unpatched(tmp_path):
    model = make_vit().eval()
    vlmfast.patch(model)
    model.save_pretrained(tmp_path)
    again = ViTModel.from_pretrained(tmp_path).eval()
    assert again.config._attn_implementation == "sdpa"
    inputs = inputs_of("vit")(0)
    torch.testing.assert_close(again(**inputs).pooler_output, model(**inputs).pooler_output)


def test_pickled_model_runs_in_a_process_that_never_patched(tmp_path):
    model = make(CLIPTextModel, CLIPTextConfig(**SIZES, **WORDS)).eval()
    vlmfast.patch(model)
    words = inputs_of("clip")(0)["input_ids"]
    saved = {"model": model, "words": words, "out": model(words).last_hidden_state.detach()}
    torch.save(saved, tmp_path / "saved.pt")
    program = (
        "import sys, torch\n"
        "from vlmfast._torchvision_ops import import_torchvision\n"
        "import_torchvision()\n"
        "saved = torch.load(sys.argv[1], weights_only=False)\n"
        "out = saved['model'](saved['words']).last_hidden_state\n"
        "torch.testing.assert_close(out, saved['out'])\n"
    )
    subprocess.run([sys.executable, "-c", program, tmp_path / "saved.pt"], check=True)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_compiles_into_one_graph(implementation):
    torch._dynamo.reset()
    model = make_clip(implementation).eval()
    vlmfast.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = inputs_of("clip", "right")(0)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).text_embeds, model(**inputs).text_embeds)
