"""patch on timm's models."""

import copy

import pytest
import torch
from torch import nn

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
import timm  # noqa: E402
from timm.layers import Attention  # noqa: E402
from timm.models import swin_transformer, swin_transformer_v2, swin_transformer_v2_cr  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.models.swin_transformer import (  # noqa: E402
    SwinTransformer as TorchvisionSwin,
)

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


images = pictures(32, 32)


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

    assert_subclass_is_left(Own(WIDTH, HEADS))


def test_gradient_checkpointing():
    def call(model, inputs):
        model.set_grad_checkpointing()
        return model(**inputs)

    assert_patched_model_right(make_vit(), images, call)


SWINS = {
    "v1": swin_transformer.SwinTransformer,
    "v2": swin_transformer_v2.SwinTransformerV2,
    "cr": swin_transformer_v2_cr.SwinTransformerV2Cr,
}
BLOCKS = {
    version: [f"{stages}.{stage}.blocks.{block}" for stage in (0, 1) for block in (0, 1)]
    for version, stages in (("v1", "layers"), ("v2", "layers"), ("cr", "stages"))
}
ANY_SIZE = {"strict_img_size": False}


def make_swin(version, img_size=64, window=4, **arguments):
    torch.manual_seed(0)
    if version == "cr":
        # It starts its norms, through which all attention goes, at zero.
        arguments = {"init_values": 1.0, **arguments}
    model = SWINS[version](
        img_size=img_size,
        patch_size=4,
        window_size=window,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=5,
        drop_path_rate=0.0,
        **arguments,
    )
    return stir(model)


def map_and_logits(model, inputs):
    tokens = model.forward_features(inputs["x"])
    return tokens, model.forward_head(tokens)


def blocks(model):
    return BLOCKS["cr" if isinstance(model, SWINS["cr"]) else "v1"]


def patched_copy(model, **arguments):
    ours = copy.deepcopy(model)
    report = vlmfast.patch(ours, strict=True, **arguments)
    assert [entry.path for entry in report.replaced] == blocks(model) and not report.skipped
    return ours


def assert_same(model, size, call=map_and_logits):
    # In evaluation: the bias network of the cr model drops out in training.
    model.eval()
    assert_same_in_float64(patched_copy(model), model, pictures(*size, batch=1)(0), call)


@pytest.fixture(params=SWINS)
def version(request):
    return request.param


@pytest.mark.parametrize(
    ("img_size", "window", "arguments"),
    [
        (224, 7, {}),
        (256, 8, {}),
        (384, 12, {}),
        (60, 4, {}),
        (64, 16, {}),
        ((56, 44), (4, 3), {}),
        (40, 7, {"always_partition": True}),
        (32, 8, {"always_partition": True}),
    ],
    ids=str,
)
def test_swin_in_float64(version, img_size, window, arguments):
    model = make_swin(version, img_size, window, **arguments)
    assert_same(model, img_size if isinstance(img_size, tuple) else (img_size, img_size))


@pytest.mark.parametrize("size", [(64, 64), (52, 36), (20, 24), (8, 8), (4, 100)], ids=str)
@pytest.mark.parametrize("window", [4, 7])
def test_swin_of_any_input_size(version, size, window):
    assert_same(make_swin(version, 64, window, **ANY_SIZE), size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swin(version, dtype):
    model = make_swin(version, **ANY_SIZE).eval().to(dtype)
    assert_patched_model_right(model, pictures(44, 32), map_and_logits)


@pytest.mark.parametrize(
    ("version", "arguments"),
    [
        ("v1", {"qkv_bias": False}),
        ("v1", {"head_dim": 4}),
        ("v1", {"fused_attn": True}),
        ("v2", {"qkv_bias": False}),
        ("v2", {"qkv_bias_separate": True}),
        ("v2", {"pretrained_window_sizes": (8, 8)}),
        ("cr", {"extra_norm_period": 1}),
    ],
    ids=str,
)
def test_swin_variants(version, arguments):
    # These two are attributes of the attention that no model's constructor passes on.
    attributes = {
        key: arguments[key] for key in ("fused_attn", "qkv_bias_separate") if key in arguments
    }
    others = {key: value for key, value in arguments.items() if key not in attributes}
    model = make_swin(version, **ANY_SIZE, **others)
    for block in blocks(model):
        for name, value in attributes.items():
            assert hasattr(model.get_submodule(block).attn, name)
            setattr(model.get_submodule(block).attn, name, value)
    assert_same(model, (52, 36))


def test_swin_runs_one_kernel_for_each_block(version, monkeypatch):
    model = make_swin(version, **ANY_SIZE).eval()
    report = vlmfast.patch(model, backend="reference")
    assert [entry.path for entry in report.replaced] == BLOCKS[version]
    assert {entry.what.rpartition(".")[0] for entry in report.replaced} == {
        "vlmfast.integrations.timm"
    }
    calls = spy_on_windows(monkeypatch)
    model(**pictures(60, 44)(0))
    assert [call.map_size for call in calls] == [(15, 11)] * 2 + [(8, 6)] * 2
    assert [call.arguments["shift_size"] for call in calls] == [(0, 0), (2, 2)] * 2
    assert all(call.arguments["wrap"] == "unpadded" for call in calls)
    assert {call.backend for call in calls} == {"reference"}


def test_swin_after_set_input_size(version):
    theirs = make_swin(version).eval()
    ours = patched_copy(theirs)
    for model in (ours, theirs):
        model.set_input_size(img_size=(96, 60), window_size=(6, 5))
    assert_same_in_float64(ours, theirs, pictures(96, 60, batch=1)(0), map_and_logits)
    for model in (ours, theirs):
        model.set_input_size(img_size=(64, 64), window_size=(8, 8), always_partition=True)
    assert_same_in_float64(ours, theirs, pictures(64, 64, batch=1)(0), map_and_logits)


def test_swin_intermediate_features(version):
    def call(model, inputs):
        return model.forward_intermediates(inputs["x"], indices=[0, 1])[1]

    assert_same(make_swin(version, **ANY_SIZE), (52, 36), call)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256"])
def test_swin_as_a_feature_pyramid(name, monkeypatch):
    sizes = {"embed_dim": 8, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4), "img_size": 64}
    model = timm.create_model(name, features_only=True, pretrained=False, **sizes)
    ours = copy.deepcopy(stir(model).eval())
    assert len(vlmfast.patch(ours, strict=True).replaced) == 5
    calls = spy_on_windows(monkeypatch)
    inputs = pictures(64, 64, batch=1)(0)
    assert_same_in_float64(ours, model, inputs, lambda model, inputs: model(inputs["x"]))
    assert len(calls) == 5


def test_swin_gradient_checkpointing(version):
    def call(model, inputs):
        model.set_grad_checkpointing()
        return map_and_logits(model, inputs)

    assert_same(make_swin(version, **ANY_SIZE), (52, 36), call)


def test_swin_dropout_follows_training(version, monkeypatch):
    model = make_swin(version, attn_drop_rate=0.25, proj_drop_rate=0.1)
    vlmfast.patch(model)
    calls = spy_on_windows(monkeypatch)
    assert_drops_at_random(lambda: model(**pictures(64, 64)(0)))
    assert {call.arguments["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    model.eval()(**pictures(64, 64)(0))
    assert {call.arguments["dropout_p"] for call in calls} == {0.0}


def test_swin_drops_projections(version):
    model = make_swin(version, proj_drop_rate=1.0)  # nothing random about it
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    inputs = pictures(64, 64)(0)
    torch.testing.assert_close(patched(**inputs), model(**inputs))


@pytest.mark.parametrize("change", ["subclass", "hook"])
def test_padding_goes_through_a_projection_that_does_more(change):
    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = make_swin("v1", **ANY_SIZE).eval()
    patched = copy.deepcopy(model)
    vlmfast.patch(patched)
    for either in (model, patched):
        for module in either.modules():
            if hasattr(module, "qkv"):
                nn.init.normal_(module.qkv.bias, generator=torch.Generator().manual_seed(0))
                if change == "subclass":
                    module.qkv.__class__ = Doubled
                else:
                    module.qkv.register_forward_hook(lambda module, args, out: 2 * out)
    with torch.no_grad():
        inputs = pictures(52, 36)(0)
        torch.testing.assert_close(patched(**inputs), model(**inputs))


def test_swin_drop_path_is_as_before(version):
    theirs = make_swin(version)
    for block in BLOCKS[version]:
        theirs.get_submodule(block).drop_path1 = timm.layers.DropPath(0.5)
    ours = patched_copy(theirs)

    def call(model, inputs):
        torch.manual_seed(5)
        return map_and_logits(model, inputs)

    # The cr model's bias network drops out per pair of tokens, and draws the same numbers, too.
    assert_same_in_float64(ours, theirs, pictures(64, 64, batch=4)(0), call)


@torch.no_grad()
def test_bias_network_of_cr_runs_for_each_offset(monkeypatch):
    rows = []
    original = torch.nn.ReLU.forward

    def counted(relu, x):
        rows.append(x.shape[:-1].numel())
        return original(relu, x)

    monkeypatch.setattr(torch.nn.ReLU, "forward", counted)
    model = make_swin("cr", 64, (4, 3)).double()
    ours = patched_copy(model).eval()
    x = pictures(64, 64)(0)["x"].double()
    first = ours(x)
    assert torch.equal(ours(x), first)
    assert rows == [7 * 5] * 4
    ours.stages[0].blocks[0].attn.meta_mlp.fc1.weight.data.mul_(1.5)
    model.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), model.eval()(x))
    assert not torch.equal(ours(x), first)
    rows.clear()
    ours.train()(x)
    assert rows == [12 * 12] * 4


def test_swin_for_inference_alone(version):
    """Packed projections, also those of the attention that is not called."""

    @torch.no_grad()
    def call(model, inputs):
        return model(**inputs)

    model = make_swin(version, **ANY_SIZE).eval()
    ours = copy.deepcopy(model)
    report = vlmfast.patch(ours, inference=True, strict=True)
    paths = [entry.path for entry in report.replaced]
    assert set(BLOCKS[version]) | {f"{path}.attn.qkv" for path in BLOCKS[version]} < set(paths)
    assert not any(path.endswith(".attn") for path in paths)
    assert_as_right_as(ours, model, pictures(52, 36), call)


@pytest.mark.parametrize("path", ["attn", "attn.softmax", "attn.qkv", "attn.attn_drop"])
def test_blocks_with_hooks_inside_are_left(path):
    first, second, *rest = BLOCKS["v1"]
    model = make_swin("v1").eval()
    seen = []
    inner = model.layers[0].blocks[1].get_submodule(path)
    inner.register_forward_hook(lambda module, arguments, out: seen.append(out.shape))
    report = vlmfast.patch(model)
    assert [entry.path for entry in report.replaced] == [first, *rest]
    block, attention = report.skipped
    assert (block.path, block.why) == (
        second,
        f"a hook on its {path} would not see what it sees now",
    )
    assert attention.path == f"{second}.attn" and "together with" in attention.why
    model(**pictures(64, 64)(0))
    assert len(seen) == 1
    with pytest.raises(RuntimeError, match=rf"{second}: .*a hook on its {path}"):
        vlmfast.patch(make_hooked(path), strict=True)


def make_hooked(path):
    model = make_swin("v1")
    inner = model.layers[0].blocks[1].get_submodule(path)
    inner.register_full_backward_hook(lambda *_: None)
    return model


def test_blocks_with_another_attention_are_left(version):
    model = make_swin(version)
    path = BLOCKS[version][0]
    attention = model.get_submodule(path).attn
    attention.__class__ = type("Own", (type(attention),), {})
    report = vlmfast.patch(model)
    assert len(report.replaced) == 3
    assert [entry.path for entry in report.skipped] == [path, f"{path}.attn"]
    assert report.skipped[0].why.startswith("its attn is a ") and "Own" in report.skipped[0].why


def test_attention_without_its_block_is_left(version):
    model = torch.nn.Sequential(make_swin(version).get_submodule(BLOCKS[version][0]).attn)
    report = vlmfast.patch(model)
    assert not report.replaced and [entry.path for entry in report.skipped] == ["0"]
    assert "together with timm's block" in report.skipped[0].why


def test_filter_is_asked_for_blocks_and_for_attention_that_stays(version):
    first, *rest = BLOCKS[version]
    seen = []

    def keep(path, module):
        seen.append(path)
        return path != first

    report = vlmfast.patch(make_swin(version), filter=keep)
    assert [entry.path for entry in report.replaced] == rest
    assert seen == [first, f"{first}.attn", *rest]


def test_patching_swin_again(version):
    model = make_swin(version)
    assert len(vlmfast.patch(model).replaced) == 4
    again = vlmfast.patch(model, strict=True)
    assert not again.replaced and [entry.path for entry in again.skipped] == BLOCKS[version]
    assert len(vlmfast.patch(model, strict=True, backend="reference").replaced) == 4


def test_projections_of_another_kind(version):
    """Low-rank adapters stand in for a Linear; what they make of padding is asked of them."""

    class Adapted(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.linear, self.down = linear, torch.nn.Linear(linear.in_features, 2, bias=False)
            self.up = torch.nn.Linear(2, linear.out_features)

        @property
        def weight(self):
            return self.linear.weight

        def forward(self, x):
            return self.linear(x) + self.up(self.down(x))

    model = make_swin(version, **ANY_SIZE)
    for block in BLOCKS[version]:
        attention = model.get_submodule(block).attn
        attention.qkv = Adapted(attention.qkv)
        if version == "v2":
            attention.qkv_bias_separate = True
    assert_same(model, (52, 36))


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_unpatched_swin_can_be_traced(version):
    vlmfast.patch(make_swin(version))
    model = make_swin(version).eval().double()
    extract = create_feature_extractor(model, ["layers.0.blocks.1", "layers.1"])
    x = pictures(64, 64)(0)["x"].double()
    before = extract(x)
    vlmfast.patch(model)
    torch.testing.assert_close(extract(x), before)
    torch.testing.assert_close(model.layers(model.patch_embed(x)), before["layers.1"])


def test_real_swins_are_replaced_whole():
    names = {
        "swin_tiny_patch4_window7_224": 12,
        "swin_base_patch4_window12_384": 24,
        "swin_s3_tiny_224": 12,
        "swinv2_tiny_window8_256": 12,
        "swinv2_base_window12to24_192to384": 24,
        "swinv2_cr_tiny_ns_224": 12,
    }
    for name, blocks in names.items():
        with torch.device("meta"):
            model = timm.create_model(name)
        report = vlmfast.patch(model, strict=True)
        assert len(report.replaced) == blocks and not report.skipped, name


def from_torchvision(name):
    """The name in timm's Swin of what torchvision's calls `name`."""
    parts = name.split(".")
    if parts[0] != "features":
        return {"norm": "norm", "head": "head.fc"}[parts[0]] + "." + parts[-1]
    position, rest = int(parts[1]), parts[2:]
    if position == 0:
        return f"patch_embed.{'proj' if rest[0] == '0' else 'norm'}.{rest[1]}"
    stage, is_merging = divmod(position - 1, 2)
    if is_merging:
        return f"layers.{stage + 1}.downsample." + ".".join(rest)
    rest = [{"0": "fc1", "3": "fc2"}.get(part, part) for part in rest[1:]]
    return f"layers.{stage}.blocks.{parts[2]}." + ".".join(rest)


@torch.no_grad()
def test_weights_of_torchvision():
    theirs = stir(TorchvisionSwin([4, 4], 16, [2, 2], [2, 4], [4, 4], num_classes=5))
    theirs = theirs.eval().double()
    model = make_swin("v1", **ANY_SIZE).eval().double()
    state = {
        from_torchvision(name): value
        for name, value in theirs.state_dict().items()
        if not name.endswith("relative_position_index")
    }
    model.load_state_dict(state, strict=True)
    patched = {m: copy.deepcopy(m) for m in (model, theirs)}
    for m in patched.values():
        vlmfast.patch(m, strict=True)
    for size, equal in (((64, 64), True), ((52, 36), False)):
        x = pictures(*size)(0)["x"].double()
        for original, ours in patched.items():
            torch.testing.assert_close(ours(x), original(x))
        # Where windows do not divide the map, timm shifts before it pads and torchvision after.
        assert torch.allclose(patched[model](x), patched[theirs](x), atol=1e-4) == equal


@torch.no_grad()
def test_our_layer_takes_the_weights_of_timm():
    block = make_swin("v1").layers[0].blocks[1]
    layer = vnn.ShiftedWindowAttention(
        16, block.window_size, block.shift_size, block.attn.num_heads
    )
    layer.load_state_dict(block.attn.state_dict(), strict=False)
    x = torch.randn(2, 16, 16, 16, dtype=torch.float64)
    torch.testing.assert_close(layer.double()(x), block.double()._attn(x))


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("fused", [True, False])
def test_changed_submodules_of_attention(fused, change):
    torch.manual_seed(0)
    norm = {"qk_norm": True, "scale_norm": True, "norm_layer": torch.nn.LayerNorm}
    layer = Attention(32, 4, qkv_bias=True, gated=True, **norm)
    layer.fused_attn = fused
    x = torch.randn(2, 7, 32)
    assert_same_where_submodules_change(layer, change, {"x": x})


@pytest.mark.parametrize("change", CHANGES)
def test_changed_submodules_of_swin(version, change):
    for arguments in ({}, {"qkv_bias_separate": True})[: 1 + (version == "v2")]:
        block = make_swin(version, img_size=32, **ANY_SIZE).get_submodule(BLOCKS[version][1])
        vars(block.attn).update(arguments)
        x = torch.randn(2, 7, 5, block.dim, generator=torch.Generator().manual_seed(0))
        assert_same_where_submodules_change(block, change, {"x": x})


@pytest.mark.parametrize("fused", [True, False])
def test_attention_whose_dropout_is_watched_is_left(fused):
    """So are attention weights read, of timm's models: by a hook on what drops them out."""
    layer = Attention(32, 4)
    layer.fused_attn = fused
    layer.attn_drop.register_forward_hook(lambda *_: None)
    report = vlmfast.patch(layer)
    assert len(report.replaced) == fused
    if not fused:
        why = "a hook on its attn_drop would not see what it sees now"
        assert [entry.why for entry in report.skipped] == [why]
