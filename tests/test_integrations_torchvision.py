"""patch on torchvision's models."""

import copy

import pytest
import torch

import vlmfast
import vlmfast.nn as vnn
from tools.models import (
    CHANGES,
    assert_as_right_as,
    assert_drops_at_random,
    assert_patched_model_right,
    assert_same_in_float64,
    assert_same_where_submodules_change,
    assert_subclass_is_left,
    pictures,
    spy_on_attention,
    spy_on_windows,
    stir,
)
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from torchvision.models import swin_s, swin_t, swin_v2_t  # noqa: E402
from torchvision.models import swin_transformer as torchvision_swin  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.models.swin_transformer import (  # noqa: E402
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.video import swin3d_t  # noqa: E402
from torchvision.models.vision_transformer import VisionTransformer  # noqa: E402

from vlmfast.integrations.torch import Linear  # noqa: E402
from vlmfast.integrations.torchvision import ShiftedWindowAttention  # noqa: E402


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


images = pictures(32, 32)


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


def make_swin(version, window=7, seed=0, **arguments):
    torch.manual_seed(seed)
    v2 = {"block": SwinTransformerBlockV2, "downsample_layer": PatchMergingV2}
    model = SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=[window, window],
        num_classes=5,
        **{"stochastic_depth_prob": 0.0, **arguments},
        **(v2 if version == "v2" else {}),
    )
    return stir(model)


def features(model, inputs):
    """The last map as well: alone, the mean over all tokens would hide much."""
    tokens = model.norm(model.features(inputs["x"]))
    return tokens, model.head(tokens.mean((1, 2)))


@torch.no_grad()
def without_gradients(model, inputs):
    return model(**inputs)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    ("window", "size"),
    [
        (7, (224, 224)),
        (8, (256, 256)),
        (12, (384, 384)),
        (7, (230, 198)),
        (16, (96, 60)),
        (4, (4, 12)),
    ],
    ids=str,
)
def test_swin_in_float64(version, window, size):
    theirs = make_swin(version, window)
    ours = copy.deepcopy(theirs)
    report = vlmfast.patch(ours, strict=True)
    assert len(report.replaced) == 4 and not report.skipped
    assert_same_in_float64(ours, theirs, pictures(*size, batch=1)(0), features)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swin(version, training, dtype):
    model = make_swin(version, window=4).train(training).to(dtype)
    assert_patched_model_right(model, pictures(44, 32), features)


def test_swin_runs_one_kernel_for_each_block(monkeypatch):
    model = make_swin("v1").eval()
    report = vlmfast.patch(model)
    assert [entry.path for entry in report.replaced] == [
        f"features.{stage}.{block}.attn" for stage in (1, 3) for block in (0, 1)
    ]
    assert {entry.what for entry in report.replaced} == {
        "vlmfast.integrations.torchvision.ShiftedWindowAttention"
    }
    calls = spy_on_windows(monkeypatch)
    model(**pictures(60, 44)(0))
    assert [call.map_size for call in calls] == [(15, 11)] * 2 + [(8, 6)] * 2
    # The second map is 8 x 6: there, one window is as wide as the map.
    shifts = [call.arguments["shift_size"] for call in calls]
    assert shifts == [(0, 0), (3, 3), (0, 0), (3, 0)]
    assert all(call.arguments["wrap"] == "padded" for call in calls)


@pytest.mark.parametrize("cls", [vnn.ShiftedWindowAttention, ShiftedWindowAttention])
def test_replaced_layers_are_of_both_classes(cls):
    model = make_swin("v1")
    vlmfast.patch(model)
    assert sum(isinstance(module, cls) for module in model.modules()) == 4


def test_swin_dropout_follows_training(monkeypatch):
    model = make_swin("v1", attention_dropout=0.25, dropout=0.1, stochastic_depth_prob=0.2)
    vlmfast.patch(model)
    calls = spy_on_windows(monkeypatch)
    assert_drops_at_random(lambda: model(**pictures(32, 32)(0)))
    assert {call.arguments["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    model.eval()(**pictures(32, 32)(0))
    assert {call.arguments["dropout_p"] for call in calls} == {0.0}


def test_stochastic_depth_is_as_before():
    theirs = make_swin("v1", window=4, stochastic_depth_prob=0.5)
    ours = copy.deepcopy(theirs)
    vlmfast.patch(ours)

    def call(model, inputs):
        torch.manual_seed(5)
        return features(model, inputs)

    assert_same_in_float64(ours, theirs, pictures(32, 32, batch=4)(0), call)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_swin_for_inference_alone(version, monkeypatch):
    model = make_swin(version).eval()
    ours = copy.deepcopy(model)
    vlmfast.patch(ours, inference=True, strict=True)
    rows = []
    packed = Linear.forward

    def counted(linear, x):
        rows.append(x.shape[:-1])
        return packed(linear, x)

    monkeypatch.setattr(Linear, "forward", counted)
    first = without_gradients(ours, pictures(60, 44)(0))
    # In each block: qkv and proj (V2's qkv has a bias of its own making), two of the MLP, and two
    # of the network that gives V2 its bias.
    assert rows.count((2, 15, 11)) == {"v1": 8, "v2": 6}[version]
    assert sum(len(shape) == 3 and shape[0] == 1 for shape in rows) == {"v1": 0, "v2": 8}[version]
    rows.clear()
    assert torch.equal(without_gradients(ours, pictures(60, 44)(0)), first)
    assert not any(shape[0] == 1 for shape in rows)
    assert_as_right_as(ours, model, pictures(60, 44), without_gradients)


def test_swin_real_models_are_replaced_whole():
    with torch.device("meta"):
        for make, blocks in ((swin_t, 12), (swin_v2_t, 12), (swin_s, 24)):
            report = vlmfast.patch(make(), strict=True)
            assert len(report.replaced) == blocks and not report.skipped


def test_subclasses_of_swin_attention_are_left():
    class Own(torchvision_swin.ShiftedWindowAttention):
        pass

    assert_subclass_is_left(Own(16, [4, 4], [2, 2], 2))


def test_video_swin_is_reported():
    with torch.device("meta"):
        model = swin3d_t()
    report = vlmfast.patch(model)
    assert not report.replaced and len(report.skipped) == 12
    assert {entry.why for entry in report.skipped} == {
        "no replacement for windows of three dimensions"
    }
    assert vlmfast.patch(model, families=["flash_attention"]).skipped[0].why == (
        "window_attention is not asked for"
    )
    with pytest.raises(RuntimeError, match="three dimensions"):
        vlmfast.patch(model, strict=True)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_unpatched_swin_can_be_traced(version):
    vlmfast.patch(make_swin(version))
    model = make_swin(version).eval().double()
    extract = create_feature_extractor(model, ["features.1.1.attn", "features.3"])
    x = pictures(60, 44)(0)["x"].double()
    before = extract(x)
    # The graph calls torchvision's function by itself: there is no layer left to replace.
    assert not vlmfast.patch(extract).replaced
    vlmfast.patch(model)
    torch.testing.assert_close(extract(x), before)
    torch.testing.assert_close(model.features[:4](x), before["features.3"])


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("version", ["v1", "v2"])
def test_changed_submodules(version, change):
    layers = {"v1": torchvision_swin.ShiftedWindowAttention}
    layers["v2"] = torchvision_swin.ShiftedWindowAttentionV2
    layer = stir(layers[version](16, [4, 4], [2, 2], 2))
    x = torch.randn(2, 7, 9, 16, generator=torch.Generator().manual_seed(0))
    assert_same_where_submodules_change(layer, change, {"x": x})
