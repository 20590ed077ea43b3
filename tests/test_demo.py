"""The demo on small models: it runs, checks, and writes what it promises."""

import json
import re

import pytest
import torch
from PIL import Image

from vlmfast import demo


def test_rows_in_bf16(tmp_path, capsys):
    assert demo.main(["--quick", "--only", "bf16", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = (tmp_path / "demo.md").read_text()
    assert table in printed
    assert "vlmfast.patch: 5 replaced, 0 left" in printed
    lines = table.splitlines()
    assert len({line.count("|") for line in lines}) == 1

    rows = json.loads((tmp_path / "demo.json").read_text())["rows"]
    assert [row["model"] for row in rows] == [
        subject.name for subject in demo.SUBJECTS if "bf16" in subject.name
    ]
    for row, line in zip(rows, lines[2:], strict=True):
        assert row["passed"] and row["model"] in line
        assert 0 < row["error_ours"] <= row["error_limit"]
        assert min(row["time_before"], row["time_after"]) > 0
        # The process alone, with its imports, takes 100 MiB at least.
        assert min(row["memory_before"], row["memory_after"]) > 100
    with Image.open(tmp_path / "demo.png") as plot:
        assert plot.width > 1000 and plot.height > 400


def test_row_of_a_model_that_is_only_read(tmp_path, capsys):
    assert demo.main(["--quick", "--only", "inference=True", "--out", str(tmp_path)]) == 0
    assert "vlmfast.integrations.torch.Linear" in capsys.readouterr().out


def test_a_wrong_number_fails(tmp_path, capsys, monkeypatch):
    def wrong_patch(model, _patch=demo.vlmfast.patch, **options):
        report = _patch(model, **options)
        with torch.no_grad():
            model.blocks[0].attn.proj.weight.mul_(1.01)
        return report

    monkeypatch.setattr(demo.vlmfast, "patch", wrong_patch)
    assert demo.main(["--quick", "--only", "16 (timm), fp32", "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert re.search(r"WRONG: ViT-B/16 \(timm\), fp32", captured.err)
    assert "WRONG" in (tmp_path / "demo.md").read_text()


def test_unknown_row(capsys):
    with pytest.raises(SystemExit):
        demo.main(["--only", "resnet"])
    assert "--only: no row contains 'resnet'" in capsys.readouterr().err


def test_photograph_and_captions():
    views = demo._image_views(64)
    assert views.shape == (demo.VIEWS, 3, 64, 64)
    assert torch.equal(views[:4].flip(-1), views[4:])
    inputs = demo._clip_inputs(quick=False)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (demo.VIEWS, 77)
    assert (inputs["input_ids"] == 49407).sum(1).eq(1).all()
    last = inputs["attention_mask"].sum(1) - 1
    assert inputs["input_ids"].gather(1, last[:, None]).eq(49407).all()
