"""patch on torchvision's models."""

import pytest
import torch

import vlmfast
from tools.models import assert_patched_model_right, spy_on_attention
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from torchvision.models.swin_transformer import SwinTransformer  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402


def make_vit():
    torch.manual_seed(0)
    model = VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=4,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=5,
    )
    # The original starts its head at zero, which would hide every error before it.
    torch.nn.init.normal_(model.heads.head.weight, std=0.1)
    return model


def images(seed):
    return {"x": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_vit(training, dtype):
    assert_patched_model_right(make_vit().train(training).to(dtype), images)


def test_vit_in_inference_runs_our_kernels(monkeypatch):
    model = make_vit().eval()
    with torch.inference_mode():
        expected = model(**images(0))
        report = vlmfast.patch(model)
        calls = spy_on_attention(monkeypatch)
        out = model(**images(0))
    torch.testing.assert_close(out, expected)
    assert len(calls) == len(report.replaced) == 2


def test_swin_is_reported():
    model = SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=3)
    report = vlmfast.patch(model)
    assert not report.replaced
    assert [entry.what for entry in report.skipped] == [
        "torchvision.models.swin_transformer.ShiftedWindowAttention"
    ] * 2
    with pytest.raises(RuntimeError, match="ShiftedWindowAttention"):
        vlmfast.patch(model, strict=True)
