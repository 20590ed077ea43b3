"""patch, unpatch and the report: what holds for every library."""

import copy
import os
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import vlmfast
import vlmfast.nn as vnn
from tools.models import (
    assert_same_where_submodules_change,
    measure,
    spy_on_attention,
    spy_on_windows,
)
from tools.processes import Processes
from vlmfast._torchvision_ops import import_torchvision

import_torchvision()
from timm.models.swin_transformer import SwinTransformer as TimmSwin  # noqa: E402
from timm.models.vision_transformer import VisionTransformer  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from torchvision.models.feature_extraction import create_feature_extractor  # noqa: E402
from torchvision.models.swin_transformer import (  # noqa: E402
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import (  # noqa: E402
    VisionTransformer as TorchvisionTransformer,
)
from transformers import (  # noqa: E402
    SwinConfig,
    SwinModel,
    Swinv2Config,
    Swinv2Model,
    ViTConfig,
    ViTModel,
)


def timm_vit():
    return VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4, num_classes=5)


def torchvision_vit():
    return TorchvisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5)


def timm_swin():
    sizes = {"embed_dim": 16, "depths": (2,), "num_heads": (2,), "window_size": 4}
    return TimmSwin(32, 4, num_classes=5, drop_path_rate=0.0, **sizes)


def torchvision_swin():
    return SwinTransformer(
        patch_size=[4, 4],
        embed_dim=16,
        depths=[2],
        num_heads=[2],
        window_size=[4, 4],
        stochastic_depth_prob=0.0,
        num_classes=5,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )


class HuggingFaceSwin(nn.Module):
    """Its images in, one tensor out, as the others."""

    def __init__(self, model=Swinv2Model, config=Swinv2Config):
        super().__init__()
        sizes = {"image_size": 32, "embed_dim": 16, "depths": [2], "num_heads": [2]}
        self.model = model(config(**sizes, window_size=4, drop_path_rate=0.0))

    def forward(self, x):
        return self.model(x).last_hidden_state


class HuggingFaceVit(nn.Module):
    """Its images in, one tensor out, as the others."""

    def __init__(self):
        super().__init__()
        self.model = ViTModel(
            ViTConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=32,
                patch_size=8,
            )
        )

    def forward(self, x):
        return self.model(x).last_hidden_state


MODELS = {
    "timm": timm_vit,
    "torchvision": torchvision_vit,
    "transformers": HuggingFaceVit,
    "timm swin": timm_swin,
    "torchvision swin": torchvision_swin,
    "transformers swin": HuggingFaceSwin,
    "torch": lambda: nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True),
}
LAYERS = dict.fromkeys(MODELS, 2)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.fixture
def model(name):
    torch.manual_seed(0)
    return MODELS[name]()


@pytest.fixture
def x(name):
    generator = torch.Generator().manual_seed(1)
    shape = (2, 7, 32) if name == "torch" else (2, 3, 32, 32)
    return torch.randn(shape, generator=generator)


def state_of(model):
    """Everything that unpatch must bring back: the modules' classes and attributes."""
    return {
        path: (type(module), {key: value for key, value in vars(module).items()})
        for path, module in model.named_modules()
    }


def test_unpatch_restores_exactly(model, name):
    before = state_of(model)
    report = vlmfast.patch(model)
    assert len(report.replaced) == LAYERS[name] and not report.skipped
    vlmfast.unpatch(model)
    after = state_of(model)
    assert after.keys() == before.keys()
    for path in before:
        assert after[path][0] is before[path][0]
        assert after[path][1].keys() == before[path][1].keys()
        for key in before[path][1]:
            assert after[path][1][key] is before[path][1][key], (path, key)


def test_unpatch_of_an_unpatched_model_is_nothing(model, x):
    before = state_of(model)
    vlmfast.unpatch(model)
    assert state_of(model) == before


def test_tensors_and_state_dict_stay(model):
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    state = copy.deepcopy(model.state_dict())
    model.eval()
    vlmfast.patch(model)
    for kept, now in (
        (parameters, dict(model.named_parameters())),
        (buffers, dict(model.named_buffers())),
    ):
        assert kept.keys() == now.keys() and all(kept[key] is now[key] for key in kept)
    assert list(model.state_dict()) == list(state)
    assert not any(module.training for module in model.modules())
    model.load_state_dict(state, strict=True)


def test_patching_twice_changes_nothing(model, name, x):
    first = vlmfast.patch(model)
    before, out = state_of(model), model(x)
    second = vlmfast.patch(model, strict=True)
    assert state_of(model) == before and torch.equal(model(x), out)
    assert not second.replaced
    assert [entry.path for entry in second.skipped] == [entry.path for entry in first.replaced]
    assert {entry.why for entry in second.skipped} == {"already replaced"}
    vlmfast.unpatch(model)
    assert len(vlmfast.patch(model).replaced) == LAYERS[name]


def test_optimiser_made_before_trains_the_patched_model(model, x):
    original, start = copy.deepcopy(model), copy.deepcopy(model)
    # Not Adam: it takes full steps along gradients that are zero but for rounding (key biases).
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, original)]
    vlmfast.patch(model)
    target = torch.randn(model(x).shape, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        for m, optimiser in zip((model, original), optimisers, strict=True):
            optimiser.zero_grad()
            (m(x) - target).square().mean().backward()
            optimiser.step()
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(model(x), start(x), atol=1e-3)


def test_hooks_stay(model, x):
    report = vlmfast.patch(copy.deepcopy(model))
    path = report.replaced[-1].path
    seen = []
    layer = model.get_submodule(path)
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    vlmfast.patch(model)
    model(x).sum().backward()
    assert seen == ["before", "after", "backward"]


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies(model, name, x, copied, monkeypatch):
    vlmfast.patch(model, backend="reference")
    model.eval()
    again = copied(model)
    calls = spy_on_windows(monkeypatch) if "swin" in name else spy_on_attention(monkeypatch)
    with torch.inference_mode():
        assert torch.equal(again(x), model(x))
    assert {c.backend for c in calls} == {"reference"}
    classes = [type(module) for module in MODELS[name]().modules()]
    vlmfast.unpatch(again)
    assert [type(module) for module in again.modules()] == classes
    assert [type(module) for module in model.modules()] != classes or name == "transformers"
    assert len(vlmfast.patch(again).replaced) == LAYERS[name]


def test_saved_whole(model, x, tmp_path):
    vlmfast.patch(model)
    model.eval()
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(x), model(x))


def test_compiles_into_one_graph(model, x):
    torch._dynamo.reset()
    vlmfast.patch(model)
    model.eval()
    expected = measure(model, {"x": x}, lambda m, inputs: m(inputs["x"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    result = measure(model, {"x": x}, lambda m, inputs: compiled(inputs["x"]))
    for key in expected:
        torch.testing.assert_close(result[key], expected[key], rtol=1e-4, atol=1e-5)


def test_patch_after_compile_takes_effect(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = timm_vit().eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, backend="eager")
    with torch.inference_mode():
        expected = compiled(x)
        report = vlmfast.patch(compiled, backend="reference")
        assert [entry.path for entry in report.replaced] == [
            "_orig_mod.blocks.0.attn",
            "_orig_mod.blocks.1.attn",
        ]
        calls = spy_on_attention(monkeypatch)
        torch.testing.assert_close(compiled(x), expected)
    assert calls


def test_symbolic_tracing_of_unpatched_models_stays_possible():
    vlmfast.patch(torchvision_vit())
    model = torchvision_vit().eval()
    traced = create_feature_extractor(model, ["encoder.layers.encoder_layer_0"])
    assert len(vlmfast.patch(traced).replaced) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripting_says_why_not(model):
    vlmfast.patch(model)
    with pytest.raises(RuntimeError, match=r"vlmfast\.unpatch before, or torch\.jit\.trace"):
        torch.jit.script(model)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two processes of one group."""
    with Processes(2, str(tmp_path_factory.mktemp("group") / "rendezvous")) as processes:
        yield processes


def data_parallel_gradients(group, name, x):
    """On one of two ranks, with half of x: paths of what was replaced, and all gradients."""
    torch.manual_seed(0)
    wrapped = DistributedDataParallel(
        MODELS[name](), process_group=group, find_unused_parameters=True
    )
    report = vlmfast.patch(wrapped)
    wrapped(x.chunk(2)[group.rank()]).square().mean().backward()
    gradients = (parameter.grad for parameter in wrapped.parameters())
    sent = [None if gradient is None else gradient.numpy() for gradient in gradients]
    return [entry.path for entry in report.replaced], sent


def test_data_parallel_wrapper(pair, name, model, x):
    model(x).square().mean().backward()
    for paths, gradients in pair.run(data_parallel_gradients, name, x):
        assert len(paths) == LAYERS[name] and all(path.startswith("module") for path in paths)
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            assert (parameter.grad is None) == (gradient is None)
            if gradient is not None:
                ours = torch.from_numpy(gradient)
                torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-5)


def test_checkpointed(x, model):
    def call(m, inputs):
        return torch.utils.checkpoint.checkpoint(m, inputs["x"], use_reentrant=False)

    vlmfast.patch(model)
    plain = measure(model, {"x": x}, lambda m, inputs: m(inputs["x"]))
    again = measure(model, {"x": x}, call)
    assert plain.keys() == again.keys()
    for key in plain:
        torch.testing.assert_close(again[key], plain[key])


def test_shared_layers_are_replaced_once(monkeypatch):
    attention = nn.MultiheadAttention(32, 4)
    model = nn.ModuleDict({"a": nn.ModuleList([attention]), "b": nn.ModuleList([attention])})
    report = vlmfast.patch(model)
    assert [entry.path for entry in report.replaced] == ["a.0"]
    assert model["a"][0] is model["b"][0] is attention
    assert type(attention) is vnn.MultiheadAttention
    vlmfast.unpatch(model)
    assert type(attention) is nn.MultiheadAttention


def test_backend_is_forced_and_can_be_changed(monkeypatch):
    torch.manual_seed(0)
    model, x = timm_vit(), torch.randn(2, 3, 32, 32)
    calls = spy_on_attention(monkeypatch)
    for backend, changed in ((None, 2), ("reference", 2), ("reference", 0), (None, 2)):
        assert len(vlmfast.patch(model, backend=backend).replaced) == changed
        calls.clear()
        model(x)
        assert [c.backend for c in calls] == [backend] * 2


def test_filter_gets_path_and_module():
    model = timm_vit()
    seen = []

    def only_first(path, module):
        seen.append((path, module))
        return path == "blocks.0.attn"

    report = vlmfast.patch(model, filter=only_first)
    assert seen == [(f"blocks.{i}.attn", model.blocks[i].attn) for i in (0, 1)]
    assert [entry.path for entry in report.replaced] == ["blocks.0.attn"]
    assert report.skipped[0].path == "blocks.1.attn" and "filter" in report.skipped[0].why


def test_families():
    model = timm_vit()
    report = vlmfast.patch(model, families=[])
    assert not report.replaced and {entry.why for entry in report.skipped} == {
        "flash_attention is not asked for"
    }
    assert len(vlmfast.patch(model, families=("flash_attention",)).replaced) == 2
    swin = timm_swin()
    report = vlmfast.patch(swin, families=["flash_attention"], strict=True)
    assert not report.replaced and {entry.why for entry in report.skipped} == {
        "window_attention is not asked for"
    }
    assert len(vlmfast.patch(swin, families=["window_attention"], strict=True).replaced) == 2


class Scaled(nn.MultiheadAttention):
    pass


def test_strict_raises_before_anything_changes():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), Scaled(32, 4))
    with pytest.raises(RuntimeError, match=r"1: .*Scaled: a subclass"):
        vlmfast.patch(model, strict=True)
    assert type(model[0]) is nn.MultiheadAttention
    assert len(vlmfast.patch(model).replaced) == 1


def test_layers_with_a_forward_of_their_own_are_left():
    # As accelerate makes them. They would not run what their class says.
    model = nn.Sequential(nn.MultiheadAttention(32, 4), timm_swin())
    for layer in (model[0], model[1].layers[0].blocks[0]):
        layer.forward = layer.forward
    report = vlmfast.patch(model)
    assert [entry.path for entry in report.replaced] == ["1.layers.0.blocks.1"]
    left = [entry.path for entry in report.skipped if "a forward of its own" in entry.why]
    assert left == ["0", "1.layers.0.blocks.0"]


def test_strict_does_not_mind_what_was_left_out_on_purpose():
    vlmfast.patch(timm_vit(), strict=True, filter=lambda path, module: False)
    vlmfast.patch(timm_vit(), strict=True, families=[])
    vlmfast.patch(nn.Linear(2, 2), strict=True)


def test_filter_is_asked_before_a_layer_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), Scaled(32, 4))
    report = vlmfast.patch(model, strict=True, filter=lambda path, module: path == "0")
    assert [entry.path for entry in report.replaced] == ["0"]
    assert [(entry.path, entry.why) for entry in report.skipped] == [
        ("1", "left out by the filter")
    ]


def test_unpatch_refuses_where_the_class_has_changed_since():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), nn.MultiheadAttention(32, 4))
    x = torch.randn(3, 2, 32)
    vlmfast.patch(model)
    torch.nn.utils.parametrizations.weight_norm(model[1], "in_proj_weight")
    before = state_of(model)
    with pytest.raises(RuntimeError, match=r"1: its class was changed .* undo that first"):
        vlmfast.unpatch(model)
    assert state_of(model) == before
    assert model[1](x, x, x, need_weights=False)[0].isfinite().all()
    torch.nn.utils.parametrize.remove_parametrizations(model[1], "in_proj_weight")
    vlmfast.unpatch(model)
    assert {type(module) for module in model} == {nn.MultiheadAttention}


def test_report_reads_as_a_table():
    model = nn.Sequential(nn.MultiheadAttention(32, 4), Scaled(32, 4))
    report = vlmfast.patch(model)
    path, what, why = report.replaced[0]
    assert (path, what) == ("0", "vlmfast.nn.MultiheadAttention")
    assert why == "flash_attention for torch.nn.MultiheadAttention"
    lines = str(report).splitlines()
    assert lines[0] == "vlmfast.patch: 1 replaced, 1 left"
    assert len(lines) == 5
    assert all(part in lines[2] for part in report.replaced[0])
    assert all(part in lines[4] for part in report.skipped[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "vit"}, TypeError, "model: expected a torch.nn.Module, got str"),
        ({"families": "flash_attention"}, TypeError, "families: expected a list of names"),
        ({"families": 3}, TypeError, "families: expected a list of names, got 3"),
        ({"families": [1, "x"]}, TypeError, "families: expected a list of names, got 1 in it"),
        ({"families": ["gemm"]}, ValueError, r"families: expected names of .*gemm"),
        ({"backend": "abacus"}, ValueError, "backend: expected one of .* got 'abacus'"),
        ({"backend": 3}, TypeError, "backend: expected a string, got int"),
        ({"filter": "blocks.0"}, TypeError, "filter: expected a callable, got str"),
    ],
)
def test_bad_arguments(arguments, error, message):
    model = arguments.pop("model", timm_vit())
    with pytest.raises(error, match=message):
        vlmfast.patch(model, **arguments)
    if isinstance(model, nn.Module):
        assert not any(isinstance(m, vnn.MultiheadAttention) for m in model.modules())


def test_unpatch_wants_a_module():
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got int"):
        vlmfast.unpatch(3)


@pytest.mark.parametrize(
    "library", ["timm", "transformers", "torchvision", "open_clip", "flamingo_pytorch"]
)
def test_no_library_is_imported_unless_the_model_comes_from_it(library):
    program = (
        "import sys, torch, vlmfast, vlmfast.nn\n"
        "model = torch.nn.TransformerEncoderLayer(8, 2)\n"
        "assert vlmfast.patch(model).replaced\n"
        f"assert {library!r} not in sys.modules\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


@pytest.mark.parametrize(
    "classes", [(SwinModel, SwinConfig), (Swinv2Model, Swinv2Config)], ids=["v1", "v2"]
)
def test_changed_submodules_of_transformers_swin(classes):
    torch.manual_seed(0)
    model = HuggingFaceSwin(*classes)
    # What a padded token is comes of the biases, which are zero at the start.
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    images = torch.randn(2, 3, 24, 28, generator=torch.Generator().manual_seed(1))
    assert_same_where_submodules_change(model, "subclass", {"x": images})
