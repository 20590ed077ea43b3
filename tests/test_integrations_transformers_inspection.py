"""What patch must leave as it is in transformers: layers that notice another name, and weights.

And what else layers hand to their attention function than it takes.
"""

import copy

import pytest
import torch

import vlmfast
from tools.compatibility import small_config
from tools.models import spy_on_attention
from tools.samples import BATCH, SIZES, TOKENS, WORDS, inputs_of, make, padding
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from transformers import (  # noqa: E402
    BertConfig,
    BertModel,
    DeepseekV32Config,
    DeepseekV32Model,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.models.gemma2 import modeling_gemma2  # noqa: E402
from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: E402
from transformers.models.kosmos2.configuration_kosmos2 import Kosmos2Config  # noqa: E402
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection  # noqa: E402
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
