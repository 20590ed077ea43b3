"""patch on timm's models."""

import pytest
import torch

import vlmfast
from tools.models import assert_patched_model_right, spy_on_attention
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
import timm  # noqa: E402
from timm.layers import Attention  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402

WIDTH, HEADS, BATCH, TOKENS = 32, 4, 2, 9


def make_vit(**arguments):
    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=2,
        num_heads=HEADS,
        num_classes=5,
        **arguments,
    )


def images(seed):
    return {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize(
    "arguments", [{}, {"qk_norm": True}, {"class_token": False, "global_pool": "avg"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vit(arguments, dtype):
    assert_patched_model_right(make_vit(**arguments).to(dtype), images)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"qkv_bias": True, "qk_norm": True, "norm_layer": torch.nn.LayerNorm},
        {"scale_norm": True, "norm_layer": torch.nn.LayerNorm},
        {"gated": True},
        {"attn_head_dim": 24, "dim_out": 20, "proj_bias": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
@pytest.mark.parametrize("fused", [False, True])
def test_attention(arguments, mask, fused):
    torch.manual_seed(0)
    attention = Attention(WIDTH, HEADS, **arguments)
    attention.fused_attn = fused

    def inputs(seed):
        generator = torch.Generator().manual_seed(seed)
        made = {"x": torch.randn(BATCH, TOKENS, WIDTH, generator=generator)}
        if mask == "bool":
            made["attn_mask"] = torch.rand(TOKENS, TOKENS, generator=generator) < 0.6
            made["attn_mask"][:, 0] = True
        elif mask == "float":
            made["attn_mask"] = torch.randn(BATCH, 1, TOKENS, TOKENS, generator=generator)
        elif mask == "causal":
            made["is_causal"] = True
        return made

    assert_patched_model_right(attention, inputs)


def test_inference_runs_our_kernels(monkeypatch):
    model = make_vit().eval()
    with torch.inference_mode():
        expected = model(**images(0))
        report = vlmfast.patch(model)
        calls = spy_on_attention(monkeypatch)
        torch.testing.assert_close(model(**images(0)), expected)
    assert [entry.path for entry in report.replaced] == ["blocks.0.attn", "blocks.1.attn"]
    assert len(calls) == 2


def test_attention_dropout_follows_training():
    model = make_vit(attn_drop_rate=0.5)
    vlmfast.patch(model)
    torch.manual_seed(0)
    first = model(**images(0))
    torch.manual_seed(0)
    assert torch.equal(model(**images(0)), first)
    assert not torch.allclose(model(**images(0)), first)
    model.eval()
    assert torch.equal(model(**images(0)), model(**images(0)))


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        ("swin_tiny_patch4_window7_224", "timm.models.swin_transformer.WindowAttention"),
        ("beit_base_patch16_224", "timm.models.beit.Attention"),
    ],
)
def test_other_attention_is_reported(name, attention):
    with torch.device("meta"):
        model = timm.create_model(name)
    report = vlmfast.patch(model)
    assert not report.replaced
    assert {entry.what for entry in report.skipped} == {attention}
    assert {entry.why for entry in report.skipped} == {"no replacement for this attention"}


def test_gates_called_attention_are_none():
    with torch.device("meta"):
        model = timm.create_model("seresnet50")
    assert not vlmfast.patch(model).skipped


def test_subclasses_are_left_and_reported():
    class Own(Attention):
        pass

    model = torch.nn.Sequential(Own(WIDTH, HEADS))
    report = vlmfast.patch(model)
    assert not report.replaced
    assert [entry.why for entry in report.skipped] == ["a subclass may compute something else"]
    with pytest.raises(RuntimeError, match=r"0: .*Own: a subclass"):
        vlmfast.patch(model, strict=True)


def test_gradient_checkpointing():
    def call(model, inputs):
        model.set_grad_checkpointing()
        return model(**inputs)

    assert_patched_model_right(make_vit(), images, call)
