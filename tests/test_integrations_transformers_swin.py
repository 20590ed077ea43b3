"""patch on the Swin and Swin V2 of transformers."""

import copy

import pytest
import torch

import vlmfast
from tools import models
from tools.models import (
    assert_drops_at_random,
    assert_patched_model_right,
    assert_same_in_float64,
    cast,
    spy_on_attention,
    spy_on_windows,
    stir,
)
from tools.samples import last_hidden_state
from vlmfast._torchvision_ops import import_torchvision
from vlmfast.verify.common import SEEDS

import_torchvision()
from transformers import (  # noqa: E402
    Swin2SRConfig,
    Swin2SRModel,
    SwinBackbone,
    SwinConfig,
    SwinForMaskedImageModeling,
    SwinModel,
    Swinv2Backbone,
    Swinv2Config,
    Swinv2Model,
)

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
    assert_same_in_float64(ours, model, pictures(*size)(0), last_hidden_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [False, True])
def test_swin(version, dtype, training):
    size = (16, 12) if version == "2sr" else (44, 32)
    model = make_swin(version, size[0]).train(training).to(dtype)
    assert_patched_model_right(model, pictures(*size, batch=2), last_hidden_state)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_swin_of_both_implementations(implementation):
    model, exact = (make_swin("v1", implementation=name) for name in (implementation, "sdpa"))
    assert_patched_model_right(model, pictures(60, 52), last_hidden_state, exact)


def test_swin_without_biases(version):
    model = make_swin(version, 16 if version == "2sr" else 64, qkv_bias=False)
    ours = copy.deepcopy(model)
    vlmfast.patch(ours, strict=True)
    size = (16, 12) if version == "2sr" else (60, 52)
    assert_same_in_float64(ours, model, pictures(*size)(0), last_hidden_state)


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
        assert_same_in_float64(ours, model, inputs, last_hidden_state)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(
                vlmfast.functional,
                "shifted_window_attention",
                lambda *args, **kwargs: attend(*args, **{**kwargs, "mask_value": -100.0}),
            )
            once = last_hidden_state(ours, inputs)
            once_differs.append(
                not torch.allclose(once, last_hidden_state(model, inputs), atol=1e-4)
            )
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
    last_hidden_state(model, inputs)
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
    last_hidden_state(ours, inputs)
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
    torch.testing.assert_close(
        last_hidden_state(model, inputs), last_hidden_state(original, inputs)
    )
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
        torch.testing.assert_close(
            last_hidden_state(ours, inputs), last_hidden_state(model, inputs)
        )
    shifts = [call.arguments["shift_size"][0] for call in calls]
    assert shifts == [0, 2, 0, 2, 0, 2, 0, 0, 0, 2, 0, 0]
    says = "input_dimensions: expected a map of at least one window of 4 x 4 tokens, got 3 x 3"
    for m, error, message in ((model, RuntimeError, "."), (ours, ValueError, says)):
        with pytest.raises(error, match=message):
            last_hidden_state(m, cast(pictures(24, 24)(0), torch.float64))
    # What the refused map would have changed for good it has left alone.
    assert {layer.window_size for stage in ours.encoder.layers for layer in stage.blocks} == {4}


def test_swin_dropout_follows_training(version, monkeypatch):
    arguments = {"attention_probs_dropout_prob": 0.25, "hidden_dropout_prob": 0.1}
    model = make_swin(version, 16 if version == "2sr" else 64, **arguments).train()
    vlmfast.patch(model)
    calls = spy_on_windows(monkeypatch)
    inputs = pictures(*((16, 16) if version == "2sr" else (64, 64)))(0)
    assert_drops_at_random(lambda: last_hidden_state(model, inputs))
    assert {call.arguments["dropout_p"] for call in calls} == {0.25}
    calls.clear()
    last_hidden_state(model.eval(), inputs)
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
        return last_hidden_state(model, inputs)

    size = (16, 16) if version == "2sr" else (64, 64)
    assert_same_in_float64(ours, model, pictures(*size, batch=4)(0), call)


def test_swin_gradient_checkpointing(version):
    def call(model, inputs):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return last_hidden_state(model, inputs)

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
        torch.testing.assert_close(
            last_hidden_state(compiled, inputs), last_hidden_state(model, inputs)
        )
