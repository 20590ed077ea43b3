"""Models of transformers against themselves, patched: one for each way through the layers.

`make compatibility` takes every model that can be built small.
"""

import importlib

import pytest
import torch

from tools.compatibility import attention, compare

# (file, class, what it stands for)
MODELS = [
    ("mistral", "MistralModel", "a sliding window"),
    ("gemma3", "Gemma3TextModel", "local and global layers, a cap that is None"),
    ("llama4", "Llama4TextModel", "attention by chunks"),
    ("modernbert", "ModernBertModel", "local attention without a cache"),
    ("deepseek_v32", "DeepseekV32Model", "the sparse choice of an indexer"),
    ("gpt_oss", "GptOssModel", "sinks"),
    ("gpt2", "GPT2Model", "a question that changes nothing"),
    ("t5", "T5Model", "a position bias, an encoder and a decoder"),
    ("bart", "BartModel", "cross-attention, an encoder and a decoder"),
    ("bert", "BertModel", "a padding mask"),
    ("grounding_dino", "GroundingDinoModel", "a boolean mask that is added"),
    ("clip", "CLIPModel", "two towers"),
    ("siglip", "SiglipModel", "two towers, the image's with a pooler"),
    ("dinov2", "Dinov2Model", "an image"),
    ("swin", "SwinModel", "windows"),
    ("swinv2", "Swinv2Model", "windows, cosine logits"),
    ("blip_2", "Blip2QFormerModel", "queries to an image"),
    ("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", "images packed in one row"),
    ("kosmos2", "Kosmos2Model", "weights returned unasked"),
    ("kosmos2_5", "Kosmos2_5VisionModel", "a lookup of its own"),
    ("pix2struct", "Pix2StructForConditionalGeneration", "weights asked of an encoder alone"),
    ("vjepa2", "VJEPA2Model", "an eager function that ignores masks"),
]
# transformers does not run these on sdpa.
EAGER_ALONE = ("gpt_oss", "grounding_dino", "swinv2")
CASES = [
    pytest.param(file, name, implementation, id=f"{name}-{implementation}")
    for file, name, _ in MODELS
    for implementation in ("sdpa", "eager")
    if implementation == "eager" or file not in EAGER_ALONE
]


@pytest.fixture(autouse=True)
def one_thread():
    """The models are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("file", "name", "implementation"), CASES)
def test_patched_model_is_its_original(file, name, implementation):
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    result = compare(getattr(module, name), implementation)
    assert not result.faults, "\n".join(result.faults)


@pytest.mark.parametrize(
    ("planted", "says"),
    [
        (lambda run, module, q, k, v, mask, **a: run(module, q, k, v, None, **a), "budget"),
        (lambda run, module, q, k, v, mask, **a: (q.transpose(1, 2).clone(), q), "budget"),
        (
            lambda run, *args, output_attentions=None, **a: run(*args, **a),
            "attentions.0 with output_attentions: None",
        ),
    ],
    ids=["lost mask", "nothing attended to", "lost weights"],
)
def test_comparison_sees_what_is_planted(planted, says, monkeypatch):
    original = attention.attention_forward
    monkeypatch.setattr(attention, "weights_are_recorded", lambda: False)
    monkeypatch.setattr(
        attention, "attention_forward", lambda *args, **kwargs: planted(original, *args, **kwargs)
    )
    module = importlib.import_module("transformers.models.mistral.modeling_mistral")
    assert any(says in fault for fault in compare(module.MistralModel, "sdpa").faults)
