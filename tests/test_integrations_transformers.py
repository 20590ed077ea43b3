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
from tools import models
from tools.compatibility import small_config
from tools.models import (
    assert_as_right_as,
    assert_patched_model_right,
    assert_same_in_float64,
    cast,
    spy_on_attention,
    spy_on_windows,
    stir,
)
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.verify.common import SEEDS

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
    DeepseekV32Config,
    DeepseekV32Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    SiglipConfig,
    SiglipModel,
    Swin2SRConfig,
    Swin2SRModel,
    SwinBackbone,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2Model,
    T5Config,
    T5Model,
    ViltConfig,
    ViltModel,
    ViTConfig,
    ViTModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2Config  # noqa: E402
from transformers.models.kosmos2.modeling_kosmos2 import (  # noqa: E402
    Kosmos2ImageToTextProjection,
)
from transformers.models.kosmos2_5.configuration_kosmos2_5 import (  # noqa: E402
    Kosmos2_5Config,
    Kosmos2_5VisionConfig,
)
from transformers.models.kosmos2_5.modeling_kosmos2_5 import (  # noqa: E402
    Kosmos2_5ImageToTextProjection,
    Kosmos2_5VisionModel,
)
from transformers.models.llama import modeling_llama  # noqa: E402
from transformers.models.llama.modeling_llama import (  # noqa: E402
    LlamaAttention,
    LlamaRotaryEmbedding,
    eager_attention_forward,
)
from transformers.models.pix2struct.configuration_pix2struct import (  # noqa: E402
    Pix2StructVisionConfig,
)
from transformers.models.pix2struct.modeling_pix2struct import Pix2StructVisionModel  # noqa: E402
from transformers.models.t5 import modeling_t5  # noqa: E402

from vlmfast.integrations.transformers import attention, inspection  # noqa: E402

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
    ours = copy.deepcopy(model)
    report = vlmfast.patch(ours, families=["flash_attention"])
    assert {entry.what for entry in report.replaced} == {"attention function 'vlmfast'"}

    def call(model, inputs):
        return model(inputs["pixel_values"]).last_hidden_state

    assert_as_right_as(ours, model, inputs_of("vit"), call)


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


SWINS = {
    "v1": (SwinModel, SwinConfig),
    "v2": (Swinv2Model, Swinv2Config),
    "2sr": (Swin2SRModel, Swin2SRConfig),
}


@pytest.fixture(params=SWINS)
def version(request):
    return request.param


def make_swin(version, image_size=64, window=4, model=None, implementation="sdpa", **arguments):
    default, config = SWINS[version]
    torch.manual_seed(0)
    sizes = {"image_size": image_size, "window_size": window, "embed_dim": 16, **arguments}
    sizes = {"depths": [2, 2], "num_heads": [2, 4], "drop_path_rate": 0.0, **sizes}
    if version == "v1":
        sizes["attn_implementation"] = implementation
    # Swin2SR keeps its map through all stages, and starts from single pixels.
    return stir((model or default)(config(**sizes, patch_size=1 if version == "2sr" else 4)))


def pictures(height, width, batch=1):
    return models.pictures(height, width, batch, name="pixel_values")


def last_state(model, inputs):
    return model(**inputs).last_hidden_state


SWIN_SIZES = {
    # (image of the config, window, image)
    "v1": [
        (224, 7, (224, 224)),
        (256, 8, (256, 256)),
        (384, 12, (384, 384)),
        (64, 4, (60, 52)),
        (64, 4, (32, 32)),
        (64, 4, (32, 60)),
        (64, 8, (64, 64)),
    ],
    "v2": [
        (224, 7, (224, 224)),
        (256, 8, (256, 256)),
        (384, 12, (384, 384)),
        (64, 4, (60, 52)),
        (64, 4, (24, 100)),
        (64, 16, (64, 64)),
        (64, 4, (4, 4)),
    ],
    # Its own sizes are multiples of the window.
    "2sr": [(16, 4, (16, 16)), (16, 4, (8, 20)), (8, 8, (8, 8)), (16, 5, (10, 20))],
}


@pytest.mark.parametrize(
    ("version", "image", "window", "size"),
    [(version, *case) for version, cases in SWIN_SIZES.items() for case in cases],
)
def test_swin_in_float64(version, image, window, size):
    model = make_swin(version, image, window).eval()
    ours = copy.deepcopy(model)
    report = vlmfast.patch(ours, strict=True)
    assert len(report.replaced) == 4 and not report.skipped
    assert_same_in_float64(ours, model, pictures(*size)(0), last_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_swin(version, dtype, training):
    size = (16, 12) if version == "2sr" else (44, 32)
    model = make_swin(version, size[0]).train(training).to(dtype)
    assert_patched_model_right(model, pictures(*size, batch=2), last_state)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_swin_of_both_implementations(implementation):
    model, exact = (make_swin("v1", implementation=name) for name in (implementation, "sdpa"))
    assert_patched_model_right(model, pictures(60, 52), last_state, exact)


def test_swin_without_biases(version):
    model = make_swin(version, 16 if version == "2sr" else 64, qkv_bias=False)
    ours = copy.deepcopy(model)
    vlmfast.patch(ours, strict=True)
    size = (16, 12) if version == "2sr" else (60, 52)
    assert_same_in_float64(ours, model, pictures(*size)(0), last_state)


def test_swin_layers_are_what_is_replaced(version, monkeypatch):
    model = make_swin(version, 16 if version == "2sr" else 64).eval()
    report = vlmfast.patch(model, strict=True, backend="reference")
    stages, layers = ("stages", "layers") if version == "2sr" else ("layers", "blocks")
    assert [entry.path for entry in report.replaced] == [
        f"encoder.{stages}.{stage}.{layers}.{layer}" for stage in (0, 1) for layer in (0, 1)
    ]
    windows, others = spy_on_windows(monkeypatch), spy_on_attention(monkeypatch)
    with torch.inference_mode():
        model(**pictures(*((12, 16) if version == "2sr" else (60, 52)))(0))
    assert len(windows) == 4 and not others
    assert {call.backend for call in windows} == {"reference"}
    assert all(call.arguments["wrap"] == "padded" for call in windows)
    assert [call.arguments["shift_size"] for call in windows] == [(0, 0), (2, 2)] * 2
    mask_values = {call.arguments["mask_value"] for call in windows}
    assert mask_values == ({-100.0} if version == "v1" else {-200.0})


def test_mask_of_v2_is_added_twice():
    """Logits that differ by more than 100 tell one mask from two; not all random weights do."""
    attend = vlmfast.functional.shifted_window_attention
    inputs = pictures(32, 32)(0)
    once_differs = []
    for seed in SEEDS:
        model = make_swin("v2", 32, depths=[2], num_heads=[2]).eval()
        torch.manual_seed(seed)
        for block in model.encoder.layers[0].blocks:
            attention = block.attention.self
            torch.nn.init.constant_(attention.logit_scale, 4.6)
            torch.nn.init.normal_(attention.key.weight)
            with torch.no_grad():  # nobody likes the tokens of its own region, which are like it
                attention.query.weight.copy_(-attention.key.weight)
        ours = copy.deepcopy(model)
        vlmfast.patch(ours)
        assert ours.encoder.layers[0].blocks[1].shift_size == 2
        assert_same_in_float64(ours, model, inputs, last_state)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(
                vlmfast.functional,
                "shifted_window_attention",
                lambda *args, **kwargs: attend(*args, **{**kwargs, "mask_value": -100.0}),
            )
            once = last_state(ours, inputs)
            once_differs.append(not torch.allclose(once, last_state(model, inputs), atol=1e-4))
    assert any(once_differs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_output_attentions_of_swin(monkeypatch, implementation):
    eager = make_swin("v1", implementation="eager").eval()
    model = make_swin("v1", implementation=implementation).eval()
    vlmfast.patch(model)
    calls = spy_on_windows(monkeypatch)
    inputs = pictures(60, 52)(0)
    expected, outputs = (m(**inputs, output_attentions=True) for m in (eager, model))
    assert len(outputs.attentions) == len(expected.attentions) == 2
    for mine, original in zip(outputs.attentions, expected.attentions, strict=True):
        assert torch.equal(mine, original)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert not calls
    last_state(model, inputs)
    assert len(calls) == 4
    assert model.config._attn_implementation == implementation
    assert model.encoder.layers[0].blocks[0].attention.config is model.config


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_output_attentions_of_a_swin_config(version):
    model = make_swin(version, implementation="eager").eval()
    ours = copy.deepcopy(model)
    vlmfast.patch(ours)
    for m in (model, ours):
        m.config.output_attentions = True
    expected, outputs = (m(**pictures(60, 52)(0)).attentions for m in (model, ours))
    assert len(outputs) == 2
    for mine, original in zip(outputs, expected, strict=True):
        assert torch.equal(mine, original)


@pytest.mark.parametrize("version", ["v2", "2sr"])
def test_output_attentions_of_swin_v2(version, monkeypatch):
    model = make_swin(version, 16 if version == "2sr" else 64).eval()
    ours = copy.deepcopy(model)
    vlmfast.patch(ours)
    calls = spy_on_windows(monkeypatch)
    inputs = pictures(*((16, 12) if version == "2sr" else (60, 52)))(0)
    expected, outputs = (m(**inputs, output_attentions=True) for m in (model, ours))
    assert len(outputs.attentions) == len(expected.attentions) == 2
    for mine, original in zip(outputs.attentions, expected.attentions, strict=True):
        assert torch.equal(mine, original)
    assert torch.equal(outputs.last_hidden_state, expected.last_hidden_state)
    assert not calls
    last_state(ours, inputs)
    assert len(calls) == 4


@pytest.mark.parametrize("first", ["flash_attention", "window_attention"])
def test_families_of_swin_one_after_the_other(first, monkeypatch):
    eager = make_swin("v1", implementation="eager").eval().double()
    model = make_swin("v1").eval().double()
    original = copy.deepcopy(model)
    before = {path: type(module) for path, module in model.named_modules()}
    report = vlmfast.patch(model, families=[first])
    attentions = [f"encoder.layers.{i}.blocks.{j}.attention" for i in (0, 1) for j in (0, 1)]
    layers = [path.removesuffix(".attention") for path in attentions]
    inner = first == "flash_attention"
    assert [entry.path for entry in report.replaced] == (attentions if inner else layers)
    assert [entry.path for entry in report.skipped] == (layers if inner else [])
    report = vlmfast.patch(model, strict=True)
    assert [entry.path for entry in report.replaced] == (layers if inner else [])
    calls = spy_on_windows(monkeypatch)
    inputs = cast(pictures(60, 52)(0), torch.float64)
    torch.testing.assert_close(last_state(model, inputs), last_state(original, inputs))
    assert len(calls) == 4
    weights, expected = (m(**inputs, output_attentions=True).attentions for m in (model, eager))
    assert len(weights) == 2 and all(map(torch.equal, weights, expected))
    vlmfast.unpatch(model)
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert model.encoder.layers[0].blocks[0].attention.config is model.config


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_hidden_states_of_swin(version):
    model = make_swin(version).eval()
    ours = copy.deepcopy(model)
    vlmfast.patch(ours)

    def call(model, inputs):
        outputs = model(**inputs, output_hidden_states=True)
        assert len(outputs.hidden_states) == len(outputs.reshaped_hidden_states) == 3
        return outputs.hidden_states, outputs.reshaped_hidden_states

    assert_same_in_float64(ours, model, pictures(60, 52)(0), call)


@pytest.mark.parametrize(("version", "cls"), [("v1", SwinBackbone), ("v2", Swinv2Backbone)])
def test_swin_as_a_backbone(version, cls):
    # v1 asks its encoder to cut windows always, also where one is as large as the map.
    model = make_swin(version, 64, 4, cls, out_features=["stage1", "stage2"]).eval()
    ours = copy.deepcopy(model)
    assert len(vlmfast.patch(ours, strict=True).replaced) == 4

    def call(model, inputs):
        return model(**inputs).feature_maps

    for size in ((60, 52), (32, 32)):
        assert_same_in_float64(ours, model, pictures(*size)(0), call)


def test_swin_with_masked_patches():
    model = make_swin("v1", 32, model=SwinForMaskedImageModeling, encoder_stride=8).eval()
    ours = copy.deepcopy(model)
    vlmfast.patch(ours, strict=True)
    hidden = torch.rand(1, 64, generator=torch.Generator().manual_seed(0)) < 0.5

    def call(model, inputs):
        return model(**inputs, bool_masked_pos=hidden).loss

    assert_same_in_float64(ours, model, pictures(32, 32)(0), call)


def test_windows_of_swin_shrink_as_the_original_says(monkeypatch):
    """A map no larger than the window drops the shift for good; a smaller one never worked."""
    ours = make_swin("v1").eval().double()
    model = copy.deepcopy(ours)
    vlmfast.patch(ours)
    calls = spy_on_windows(monkeypatch)
    for size in ((64, 64), (32, 60), (64, 64)):
        inputs = cast(pictures(*size)(0), torch.float64)
        torch.testing.assert_close(last_state(ours, inputs), last_state(model, inputs))
    shifts = [call.arguments["shift_size"][0] for call in calls]
    assert shifts == [0, 2, 0, 2, 0, 2, 0, 0, 0, 2, 0, 0]
    says = "input_dimensions: expected a map of at least one window of 4 x 4 tokens, got 3 x 3"
    for m, error, message in ((model, RuntimeError, "."), (ours, ValueError, says)):
        with pytest.raises(error, match=message):
            last_state(m, cast(pictures(24, 24)(0), torch.float64))
    # What the refused map would have changed for good it has left alone.
    assert {layer.window_size for stage in ours.encoder.layers for layer in stage.blocks} == {4}


def test_swin_dropout_follows_training(version, monkeypatch):
    arguments = {"attention_probs_dropout_prob": 0.25, "hidden_dropout_prob": 0.1}
    model = make_swin(version, 16 if version == "2sr" else 64, **arguments).train()
    vlmfast.patch(model)
    calls = spy_on_windows(monkeypatch)
    inputs = pictures(*((16, 16) if version == "2sr" else (64, 64)))(0)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(last_state(model, inputs))
    assert torch.equal(outs[0], outs[1]) and not torch.allclose(outs[0], outs[2])
    assert {call.arguments["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    last_state(model.eval(), inputs)
    assert {call.arguments["dropout_p"] for call in calls} == {0.0}


def test_swin_drop_path_is_as_before(version):
    model = make_swin(version, 16 if version == "2sr" else 64, drop_path_rate=0.5).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ours = copy.deepcopy(model)
    vlmfast.patch(ours)

    def call(model, inputs):
        torch.manual_seed(5)
        return last_state(model, inputs)

    size = (16, 16) if version == "2sr" else (64, 64)
    assert_same_in_float64(ours, model, pictures(*size, batch=4)(0), call)


def test_swin_gradient_checkpointing(version):
    def call(model, inputs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return last_state(model, inputs)

    model = make_swin(version, 16 if version == "2sr" else 64)
    ours = copy.deepcopy(model)
    vlmfast.patch(ours)
    size = (16, 12) if version == "2sr" else (60, 52)
    assert_same_in_float64(ours, model, pictures(*size)(0), call)


def test_swin_of_another_implementation():
    model = make_swin("v1")
    model.config._attn_implementation_internal = "my_own"
    report = vlmfast.patch(model)
    assert not report.replaced
    assert {entry.why for entry in report.skipped} == {
        "attn_implementation is 'my_own'; only sdpa and eager are replaced"
    }
    model.config._attn_implementation_internal = "sdpa"
    vlmfast.patch(model)
    model.config._attn_implementation_internal = "my_own"
    with pytest.raises(ValueError, match=r"'my_own', set after vlmfast.patch"):
        model(**pictures(64, 64)(0))


def test_swin_layers_with_hooks_inside_are_left(version):
    model = make_swin(version, 16 if version == "2sr" else 64).eval()
    path, layer = next(
        (path, module)
        for path, module in model.named_modules()
        if path.endswith("s.0.blocks.1") or path.endswith("s.0.layers.1")
    )
    seen = []
    layer.attention.register_forward_hook(lambda *_: seen.append(0))
    report = vlmfast.patch(model)
    left = [entry for entry in report.skipped if entry.path == path]
    assert [entry.why for entry in left] == [
        "a hook on its attention would not see what it sees now"
    ]
    # Swin's attention by itself goes through AttentionInterface, and is replaced there.
    inner = [f"{path}.attention"] if version == "v1" else []
    others = [entry.path for entry in report.replaced if entry.path not in inner]
    assert len(others) == 3 and len(report.replaced) == 3 + len(inner)
    model(**pictures(*((16, 16) if version == "2sr" else (64, 64)))(0))
    assert seen == [0]


def test_swin_layers_of_another_version_of_transformers_are_left(monkeypatch):
    from vlmfast.integrations.transformers import swin

    def forward(
        self, hidden_states, input_dimensions, output_attentions=False, always_partition=False
    ):
        raise NotImplementedError

    original = swin.modeling_swinv2.Swinv2Layer
    monkeypatch.setattr(original, "forward", forward)
    rule = swin.swap_layer(swin.FAMILY, original, swin.Swinv2Layer, covers={})
    layer = make_swin("v2").encoder.layers[0].blocks[0]
    assert rule.recognises(layer)
    assert rule.refusal(layer) == "its arguments are not those that it has in transformers 5.23"


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_swin_compiles_into_one_graph(version):
    torch._dynamo.reset()
    model = make_swin(version).eval()
    vlmfast.patch(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = pictures(60, 52)(0)
    with torch.no_grad():
        torch.testing.assert_close(last_state(compiled, inputs), last_state(model, inputs))


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
    if hasattr(model, "logit_bias"):
        torch.nn.init.constant_(model.logit_bias, -0.3)
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
        out = with_loss(patched, inputs)
    assert out.logits_per_text.is_inference()


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


# --- What patch must not change: layers that notice another name, or hand over something else ---


def left(report):
    return {entry.what.rpartition(".")[2]: entry.why for entry in report.skipped}


def test_layers_that_ask_for_the_name_of_the_implementation_are_left():
    """DeepSeek-V3.2 puts its indexer's choice into the mask for sdpa and eager alone."""
    config = small_config(DeepseekV32Config, num_key_value_heads=4)
    assert config.index_topk < TOKENS
    for implementation in ("sdpa", "eager"):
        config._attn_implementation = implementation
        model = make(DeepseekV32Model, config).eval()
        patched = copy.deepcopy(model)
        why = left(vlmfast.patch(patched))["DeepseekV32Attention"]
        assert why == (
            "its code asks for the implementation: "
            "self.config._attn_implementation in ('eager', 'sdpa')"
        )
        words = inputs_of("clip")(0)["input_ids"]
        expected, out = (m(words).last_hidden_state for m in (model, patched))
        torch.testing.assert_close(out, expected)


def test_questions_that_come_out_the_same_are_no_obstacle():
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50)
    assert vlmfast.patch(GPT2Model(config)).replaced
    config._attn_implementation = "eager"
    assert "== 'eager'" in left(vlmfast.patch(GPT2Model(config)))["GPT2Attention"]


def test_layers_that_look_their_function_up_in_another_way_are_left():
    config = small_config(Kosmos2_5VisionConfig)
    report = vlmfast.patch(Kosmos2_5VisionModel(config))
    assert not report.replaced
    assert "getattr(ALL_ATTENTION_FUNCTIONS" in left(report)["Kosmos2_5VisionAttention"]


def test_layers_whose_config_is_handed_on_are_left():
    class HandsOn(LlamaAttention):
        def forward(self, *args, **kwargs):
            self.rotary = LlamaRotaryEmbedding(self.config)
            interface = ALL_ATTENTION_FUNCTIONS.get_interface(
                self.config._attn_implementation, eager_attention_forward
            )
            return interface(self, *args, **kwargs)

    class AsksByHelper(LlamaAttention):
        def forward(self, *args, **kwargs):
            helper(self)
            return super().forward(*args, **kwargs)

    config = LlamaConfig(**SIZES, **WORDS)
    for cls, why in ((HandsOn, "hands its config on"), (AsksByHelper, "helper, which it calls")):
        layer = cls(config, 0)
        config._attn_implementation = "sdpa"
        assert why in inspection._notices_name(cls, "sdpa"), layer


def helper(layer):
    return layer.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_keywords_that_are_not_known_are_for_the_original_function(implementation, monkeypatch):
    name, module = ("eager_attention_forward", modeling_llama)
    if implementation == "sdpa":
        name, module = ("sdpa_attention_forward", attention)
    original, seen = getattr(module, name), []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return original(*args, **kwargs)

    config = LlamaConfig(**SIZES, **WORDS, attn_implementation=implementation)
    model = make(LlamaModel, config).eval()
    words = inputs_of("clip")(0)["input_ids"]
    expected = model(words).last_hidden_state
    vlmfast.patch(model)
    monkeypatch.setattr(module, name, spy)
    calls = spy_on_attention(monkeypatch)
    indices = torch.zeros(1)
    out = model(words, indices=indices, attention_mask=padding("none")).last_hidden_state
    torch.testing.assert_close(out, expected)
    assert not calls and len(seen) == 2 and all(kwargs["indices"] is indices for kwargs in seen)
    model(words, indices=None)
    assert len(calls) == 2 and len(seen) == 2
    vlmfast.patch(model, backend="cpu")
    with pytest.raises(NotImplementedError, match="no backend computes indices, and 'cpu'"):
        model(words, indices=indices)


def test_boolean_masks_are_added_where_the_original_adds_them():
    """Eager attention adds 0 and 1, as GroundingDINO's text model has it."""
    config = BertConfig(
        **SIZES, vocab_size=50, max_position_embeddings=16, attn_implementation="eager"
    )
    model = make(BertModel, config).eval()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    words = inputs_of("clip")(0)["input_ids"]
    mask = torch.rand(BATCH, 1, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0)) > 0.5
    for arguments in ({}, {"output_attentions": True}):
        expected, out = (
            m(words, attention_mask=mask, **arguments).last_hidden_state for m in (model, patched)
        )
        torch.testing.assert_close(out, expected)
    assert not torch.allclose(model(words).last_hidden_state, expected, atol=1e-2)


def eager_function(score=lambda scores: scores, mask=lambda scores, mask: scores + mask, sink=0):
    def eager(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
        scores = score(query @ key.mT * scaling)
        if attention_mask is not None:
            scores = mask(scores, attention_mask)
        weights = torch.exp(scores) / (torch.exp(scores).sum(-1, keepdim=True) + sink)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    return eager


def test_eager_functions_are_judged_by_what_they_compute():
    judge = inspection._unlike_softmax
    assert judge(eager_function()) is None
    assert judge(modeling_llama.eager_attention_forward) is None
    assert judge(modeling_t5.eager_attention_forward) is None
    planted = (
        eager_function(score=lambda scores: 50 * torch.tanh(scores / 50)),
        eager_function(score=lambda scores: scores.clamp(max=20)),
        eager_function(mask=lambda scores, mask: scores.masked_fill(mask == 0, -1e9)),
        eager_function(mask=lambda scores, mask: scores),
        eager_function(sink=1.0),
    )
    for eager in planted:
        assert "not softmax" in judge(eager)
    assert "sinks" in judge(modeling_gpt_oss.eager_attention_forward)
    assert judge(modeling_gemma2.eager_attention_forward) == "its eager attention takes softcap"


def test_position_bias_of_eager_attention(monkeypatch):
    config = T5Config(
        vocab_size=50, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        attn_implementation="eager",
    )  # fmt: skip
    model = make(T5Model, config).eval()

    def call(model, inputs):
        tokens = inputs["input_ids"]
        outputs = model(tokens, attention_mask=padding("right"), decoder_input_ids=tokens.flip(0))
        return outputs.last_hidden_state

    patched = copy.deepcopy(model)
    assert len(vlmfast.patch(patched).replaced) == 6
    assert_same_in_float64(patched, model, {**inputs_of("clip")(0)}, call)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_weights_that_an_encoder_does_not_ask_its_layers_for(implementation, monkeypatch):
    """Pix2Struct's encoder keeps `output_attentions` to itself: eager layers always return them."""
    config = small_config(Pix2StructVisionConfig)
    eager, model = (
        make(Pix2StructVisionModel, config_of(config, kind)).eval()
        for kind in ("eager", implementation)
    )
    patches = torch.rand(BATCH, 12, 770, generator=torch.Generator().manual_seed(0))
    patches[..., :2] = (4 * patches[..., :2]).floor()
    mask = torch.tensor([[1] * 12, [1] * 9 + [0] * 3])
    vlmfast.patch(model)
    calls = spy_on_attention(monkeypatch)
    expected, out = (m(patches, mask, output_attentions=True) for m in (eager, model))
    for mine, original in zip(out.attentions, expected.attentions, strict=True):
        torch.testing.assert_close(mine, original)
    assert not calls
    assert model(patches, mask).attentions is None and len(calls) == 2
    torch.testing.assert_close(out.last_hidden_state, expected.last_hidden_state)
    vlmfast.unpatch(model)
    attention = model.encoder.layer[0].attention
    assert not [name for name in vars(attention) if "vlmfast" in name]
    assert not model.encoder._forward_pre_hooks


def config_of(config, implementation):
    config = copy.deepcopy(config)
    config._attn_implementation = implementation
    return config


@pytest.mark.parametrize(
    ("projection", "config"),
    [
        (Kosmos2ImageToTextProjection, Kosmos2Config),
        (Kosmos2_5ImageToTextProjection, Kosmos2_5Config),
    ],
    ids=["Kosmos-2", "Kosmos-2.5"],
)
def test_weights_that_are_returned_unasked_stay(projection, config):
    config = small_config(config)
    features = torch.randn(BATCH, 9, config.vision_config.hidden_size)
    for implementation, replaced in (("sdpa", 1), ("eager", 0)):
        config.text_config._attn_implementation = implementation
        model = make(projection, config).eval()
        ours = copy.deepcopy(model)
        report = vlmfast.patch(ours)
        assert len(report.replaced) == replaced
        assert [e.why.endswith("asked for or not") for e in report.skipped] == [True] * (
            1 - replaced
        )
        (out, weights), (expected, theirs) = ours(features), model(features)
        torch.testing.assert_close(out, expected)
        assert (weights is None) is (theirs is None) is bool(replaced)
