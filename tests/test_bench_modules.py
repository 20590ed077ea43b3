"""Layers and models, patched, against what they were."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command_line
from bench import contest as contest_module
from bench import contestant as contestant_module
from bench import report as report_module
from bench.contest import Contest, checked_calls, run
from bench.contestant import OURS
from bench.measure import Work
from bench.modules import calls as modules
from bench.modules import peers as module_peers
from bench.modules.cases import LAYERS, MODELS, ModuleCase
from vlmfast.verify.common import relative_error

SMALL_LAYERS = [replace(case, batch=case.yardstick_batch) for case in LAYERS]


@pytest.mark.parametrize(
    ("case", "mode"),
    [(SMALL_LAYERS[0], "fwd"), *((case, "fwd+bwd") for case in SMALL_LAYERS)],
    ids=lambda x: x if isinstance(x, str) else x.name,
)
def test_layers_are_right_after_patching(case: ModuleCase, mode: str) -> None:
    row, calls = checked_calls(Contest("layers", case, "float32", mode))
    assert calls.keys() == {OURS, "original"}, row.refusals


def test_original_is_never_further_off_than_its_yardstick() -> None:
    options = {"dim": 64, "heads": 2, "tokens": 65}
    case, dtype = replace(LAYERS[0], batch=16, options=options), torch.bfloat16
    inputs = modules.make_inputs(case, dtype, "fwd+bwd")
    results = modules.make_call(lambda module, mode: module, inputs, "fwd+bwd")()
    truths = modules.reference(case, inputs, "fwd+bwd")
    yardsticks = modules.yardsticks(case, dtype, "fwd+bwd")
    for result, truth, yardstick in zip(results, truths, yardsticks, strict=True):
        assert relative_error(result, *truth) <= yardstick


def test_a_module_that_nothing_is_replaced_in_has_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(LAYERS[0], batch=1)
    report = type("Report", (), {"replaced": []})()
    monkeypatch.setattr(module_peers.vlmfast, "patch", lambda *_, **__: report)
    with pytest.raises(RuntimeError, match="replaced nothing"):
        run(Contest("layers", case, "float32", "fwd"), 0.0)


@pytest.mark.parametrize("mode", ["fwd", "bwd", "fwd+bwd"])
def test_work_of_modules_is_that_of_their_formulas(mode: str) -> None:
    layer = LAYERS[0]
    batch, dim, tokens = layer.batch, layer.options["dim"], layer.options["tokens"]
    inputs = 2 * batch * tokens * (dim * 3 * dim)
    output, attention = inputs // 3, 2 * 2 * batch * tokens**2 * dim
    # The input has no gradient; attention's backward computes the scores again.
    backward = inputs + 2 * output + attention * 5 // 2
    forward = inputs + output + attention
    flops = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward}[mode]
    parameters = 4 * dim**2 + 4 * dim
    read = parameters + 2 * batch * tokens * dim
    elements = {"fwd": read, "bwd": read + parameters, "fwd+bwd": 2 * read + parameters}[mode]
    assert modules.work(layer, torch.bfloat16, mode) == Work(flops, 2 * elements)


def test_work_of_a_whole_model_is_that_of_its_formula() -> None:
    model = next(case for case in MODELS if case.name == "vit-b16-model")
    tokens, dim = 197, 768
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim
    whole = 12 * block + (tokens - 1) * (16 * 16 * 3) * dim + dim * 1000
    assert modules.work(model, torch.float32, "fwd").flops == 2 * model.batch * whole


def test_a_layer_whose_library_is_missing_is_named(tmp_path: Path, capsys, monkeypatch) -> None:
    """And so it is where nothing can draw."""
    installed = contestant_module.is_installed
    gone = {"timm", "open_clip", "flamingo_pytorch", "torchvision", "matplotlib"}
    for module in (command_line, contest_module, modules, report_module):
        monkeypatch.setattr(module, "is_installed", lambda x: x not in gone and installed(x))
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "bench.html", raising=False)
    modules._module.cache_clear()
    out = tmp_path / "new"
    arguments = ["layers", "models", "--dtype", "float32", "--selection", "--minutes", "0"]
    arguments += ["--seconds", "0", "--ceiling-size", "64", "--out", str(out)]
    assert command_line.main(arguments) == 0
    text = (out / "report.md").read_text()
    for line in (
        "not installed: open_clip, for layers: clip-loss-layer float32 fwd",
        "not installed: torchvision, for models: swin-t-model float32 fwd",
        "no time was left for layers: vit-b16-layer float32 fwd",
    ):
        assert f"- {line}\n" in text
    assert not (out / "report.html").exists() and "bench.html" not in sys.modules


def test_every_module_says_which_library_it_is_from() -> None:
    for case in (*LAYERS, *MODELS):
        assert all(importlib.util.find_spec(name) for name in case.libraries)
    assert set(LAYERS[0].libraries) == {"torch"}
