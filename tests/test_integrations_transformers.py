"""patch on transformers' models."""

import collections
import copy
import dataclasses
import itertools
import pickle
import subprocess
import sys

import pytest
import torch

import vlmfast
from tools.models import assert_as_right_as, assert_patched_model_right, spy_on_attention
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    Blip2QFormerConfig,
    Blip2QFormerModel,
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    SiglipConfig,
    SiglipModel,
    SwinConfig,
    SwinModel,
    T5Config,
    T5Model,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTModel,
)

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
IMAGE = {"image_size": 32, "patch_size": 8}
WORDS = {
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 48,
    "eos_token_id": 49,
    "pad_token_id": 0,
}
BATCH, TOKENS = 2, 10


# transformers' eager attention takes its softmax in float32 whatever the model's dtype, so the
# truth is always sdpa's.
def make(cls, config, seed=0):
    torch.manual_seed(seed)
    model = cls(config)
    for parameter in model.parameters():
        # The initial values are so small that attention is nearly uniform.
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def make_clip(implementation="sdpa", **arguments):
    text, vision = {**SIZES, **WORDS, **arguments}, {**SIZES, **IMAGE, **arguments}
    return make(
        CLIPModel,
        CLIPConfig(text_config=text, vision_config=vision, attn_implementation=implementation),
    )


def make_siglip(implementation="sdpa"):
    text, vision = {**SIZES, **WORDS}, {**SIZES, **IMAGE}
    config = SiglipConfig(
        text_config=text, vision_config=vision, attn_implementation=implementation
    )
    return make(SiglipModel, config)


def make_vit(implementation="sdpa", **arguments):
    config = ViTConfig(**SIZES, **IMAGE, attn_implementation=implementation, **arguments)
    return make(ViTModel, config)


MODELS = {"clip": make_clip, "siglip": make_siglip, "vit": make_vit}


def padding(side):
    mask = torch.ones(BATCH, TOKENS, dtype=torch.long)
    if side == "right":
        mask[1, 6:] = 0
    elif side == "left":
        mask[1, :4] = 0
    return mask


def inputs_of(name, side=None):
    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        made = {"pixel_values": torch.randn(BATCH, 3, 32, 32, generator=generator)}
        if name != "vit":
            words = torch.randint(1, 48, (BATCH, TOKENS), generator=generator)
            words[:, -1] = WORDS["eos_token_id"]
            made["input_ids"] = words
        if side is not None:
            made["attention_mask"] = padding(side)
        return made

    return inputs


def features(model, inputs):
    """Hidden states rather than logits, where errors would cancel."""
    outputs = model(**inputs)
    if isinstance(model, ViTModel):
        return outputs.last_hidden_state, outputs.pooler_output
    return (
        outputs.text_embeds,
        outputs.image_embeds,
        outputs.text_model_output.last_hidden_state,
        outputs.vision_model_output.last_hidden_state,
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
    patched = copy.deepcopy(model)
    assert len(vlmfast.patch(patched).replaced) == 2
    words = inputs_of("clip")(0)["input_ids"]
    with torch.inference_mode():
        results = []
        for m in (model, patched):
            first = m(words[:, :6], use_cache=True)
            second = m(words[:, 6:7], past_key_values=first.past_key_values, use_cache=True)
            third = m(words[:, 7:], past_key_values=second.past_key_values, use_cache=True)
            results.append([o.last_hidden_state for o in (first, second, third)])
    for mine, original in zip(*results, strict=True):
        torch.testing.assert_close(mine, original)


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

    def call(model, inputs):
        return model(inputs["pixel_values"]).last_hidden_state

    assert_patched_model_right(model, inputs_of("vit"), call)


def test_relative_position_bias_runs_our_kernels(monkeypatch):
    config = T5Config(vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    model = make(T5Model, config).eval()

    def call(model, inputs):
        tokens = inputs["input_ids"]
        mask = padding("right")
        outputs = model(tokens, attention_mask=mask, decoder_input_ids=tokens.flip(0))
        return outputs.last_hidden_state

    assert_patched_model_right(model, inputs_of("clip"), call)
    report = vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    call(model, inputs_of("clip")(0))
    assert len(calls) == len(report.replaced) == 6


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
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(**inputs).last_hidden_state)
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])


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


# --- Contrastive losses: return_loss=True without the matrix of logits ---


def image_text_pairs(seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(1, 48, (5, TOKENS), generator=generator)
    words[:, -1] = 49
    return {"input_ids": words, "pixel_values": torch.randn(5, 3, 32, 32, generator=generator)}


def with_loss(model, inputs):
    return model(**inputs, return_loss=True)


def loss_alone(model, inputs):
    return with_loss(model, inputs).loss


def patched_for_loss(model):
    patched = copy.deepcopy(model)
    report = vlmfast.patch(patched, families=["contrastive_loss"])
    assert [entry.path for entry in report.replaced] == [""]
    return patched


TWO_TOWERS = pytest.mark.parametrize("make_model", [make_clip, make_siglip])


@TWO_TOWERS
@pytest.mark.parametrize("call", [with_loss, loss_alone])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contrastive_loss(make_model, call, dtype):
    model = make_model().to(dtype)
    assert_as_right_as(patched_for_loss(model), model, image_text_pairs, call)


READERS = {
    "attribute": lambda out: out.logits_per_text,
    "getattr": lambda out: getattr(out, "logits_per_text"),  # noqa: B009
    "key": lambda out: out["logits_per_text"],
    "index": lambda out: out[2],
    "negative index": lambda out: out[-5],
    "slice": lambda out: out[1:3][1],
    "to_tuple": lambda out: out.to_tuple()[2],
    "items": lambda out: dict(out.items())["logits_per_text"],
    "values": lambda out: list(out.values())[2],
    "iteration": lambda out: [out[key] for key in out][2],
    "get": lambda out: out.get("logits_per_text"),
    "dict": lambda out: dict(out)["logits_per_text"],
    "OrderedDict": lambda out: collections.OrderedDict(out)["logits_per_text"],
    "double star": lambda out: dict(**out)["logits_per_text"],
    "update": lambda out: {"a": 1, **out}["logits_per_text"],
    "or": lambda out: (out | {})["logits_per_text"],
    "reflected or": lambda out: ({} | out)["logits_per_text"],
    "vars": lambda out: vars(out)["logits_per_text"],
    "copy": lambda out: copy.copy(out).logits_per_text,
    "pickle": lambda out: pickle.loads(pickle.dumps(out)).logits_per_text,
    "replace": lambda out: dataclasses.replace(out, loss=None).logits_per_text,
    "pytree": lambda out: torch.utils._pytree.tree_leaves(out)[2],
    "tree_map": lambda out: torch.utils._pytree.tree_map(torch.clone, out).logits_per_text,
    "rebuilt": lambda out: type(out)(out.items()).logits_per_text,
    "transposed": lambda out: out.logits_per_image.t(),
}


@TWO_TOWERS
def test_logits_are_computed_when_read_by_whatever_path(make_model, monkeypatch):
    model = make_model().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.no_grad():
        expected = with_loss(model, inputs)
        for path, read in READERS.items():
            products = count_products(monkeypatch)
            out = with_loss(patched, inputs)
            before = len(products)
            # Nothing of this reads logits.
            assert isinstance(out, type(expected)) and out.__class__ is type(expected)
            assert torch.equal(out.loss, out["loss"]) and torch.equal(out[0], out.get("loss"))
            assert list(out) == list(expected) == list(out.keys()) and len(out) == 7
            assert "loss" in out and out.image_embeds is out["image_embeds"]
            assert out.text_model_output.pooler_output is not None
            assert len(products) == before, path
            logits = read(out)
            assert len(products) == before + 1, path
            torch.testing.assert_close(logits, expected.logits_per_text, msg=path)
            # From now on it is the library's own, and computes nothing again.
            assert type(out) is type(expected) and out.logits_per_text is out[2]
            assert list(out) == list(expected) and repr(out).startswith(type(expected).__name__)
            assert len(products) == before + 1, path
            monkeypatch.undo()


def count_products(monkeypatch):
    """The list to which every matrix of logits is added from now on."""
    products, original = [], torch.matmul

    def matmul(a, b):
        products.append(original(a, b))
        return products[-1]

    monkeypatch.setattr(torch, "matmul", matmul)
    return products


@TWO_TOWERS
def test_without_loss_the_library_computes(make_model):
    model = make_model().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.no_grad():
        out, expected = patched(**inputs), model(**inputs)
        assert out.loss is None and type(out) is type(expected)
        assert torch.equal(out.logits_per_image, expected.logits_per_image)
        values = with_loss(patched, {**inputs, "return_dict": False})
        like = with_loss(model, {**inputs, "return_dict": False})
        assert type(values) is tuple and len(values) == len(like)
        torch.testing.assert_close(values[:5], like[:5])


@TWO_TOWERS
def test_logits_read_later_are_those_of_then(make_model):
    """Grad mode, autocast and parameters may have changed since."""
    model = make_model()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = with_loss(patched, inputs), with_loss(model, inputs)
    with torch.no_grad():
        for parameter in patched.parameters():
            parameter.zero_()
        logits = out.logits_per_text
    assert logits.requires_grad and logits.dtype == expected.logits_per_text.dtype
    assert torch.equal(logits, expected.logits_per_text)
    with torch.inference_mode():
        out = with_loss(model, inputs)
    assert not out.logits_per_text.requires_grad


def test_compiled_loss_computes_logits_as_before():
    model = make_clip().eval()
    patched, inputs = patched_for_loss(model), image_text_pairs(0)
    compiled = torch.compile(patched, backend="eager", fullgraph=True)
    with torch.no_grad():
        out, expected = with_loss(compiled, inputs), with_loss(model, inputs)
    assert type(out) is type(expected)
    torch.testing.assert_close(out.logits_per_text, expected.logits_per_text)
    torch.testing.assert_close(out.loss, expected.loss)


def test_saved_config_names_the_librarys_class(tmp_path):
    model = patched_for_loss(make_clip())
    model.save_pretrained(tmp_path)
    assert type(CLIPModel.from_pretrained(tmp_path)) is CLIPModel
    assert model.config.architectures == ["CLIPModel"]
    vlmfast.unpatch(model)
    assert type(model) is CLIPModel


def test_losses_of_unequal_numbers():
    inputs = image_text_pairs(0)
    inputs["input_ids"] = inputs["input_ids"][:3]
    with pytest.raises(ValueError, match="text_features: expected the shape"):
        with_loss(patched_for_loss(make_clip()), inputs)
