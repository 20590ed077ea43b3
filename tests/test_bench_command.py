"""python -m bench, and pytest bench."""

import csv
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import __main__ as command_line
from bench import measure
from bench.contest import contests
from bench.contestant import OURS
from bench.families import FAMILIES
from bench.flash_attention import calls as family
from tools.bench_samples import CEILINGS, ON_CPU, SDPA, parsed, planted

ROOT = Path(__file__).resolve().parent.parent


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, history = tmp_path / "new", tmp_path / "history.csv"
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    arguments += ["--ceiling-size", "64", "--memory", "--out", str(out), "--append", str(history)]
    for repetition in (1, 2):
        assert command_line.main([*arguments, "--backend", "reference"]) == 0
        with history.open() as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == 4 * repetition
    assert {line["contestant"] for line in lines} == ON_CPU
    for line in lines:
        assert int(line["peak_bytes"]) > 0 and float(line["median"]) > 0
        assert line["limit"] in ("matrix", "memory", "exp") and float(line["of_limit"]) > 0
        assert line["torch"] == torch.__version__ and line["commit"]
        assert line["threads"] == str(torch.get_num_threads())
        assert line["cpu_isa"] == torch.ops.vlmfast.cpu_isa()
    text = capsys.readouterr().out
    assert "| vit-h14 | B1 H16 L257 S257 d80 | float32 | fwd |" in text
    assert "| vit-h14 | float32 | fwd | reference |" in text
    assert (out / "report.md").read_text().strip() in text
    document = json.loads((out / "results.json").read_text())
    assert set(document) == {"machine", "ceilings", "rows", "left_out"}
    (row,) = document["rows"]
    assert set(row["timings"]) == set(row["peak_bytes"]) == ON_CPU
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 2 and "vit-h14" in page  # speed-ups and roofline
    assert not re.search(r"""(src|href)=["']http""", page)


def test_what_there_is_no_time_for_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--minutes", "0"]
    assert command_line.main([*arguments, "--seconds", "0", "--ceiling-size", "64"]) == 0
    assert "no time was left for flash_attention: vit-h14 float32 fwd" in capsys.readouterr().out


def test_a_type_without_fast_products_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_line, "unhurried_rate", lambda dtype: 1e9)
    contest = next(contests("flash_attention", ["bfloat16"], ("fwd",), "vit-b16"))
    fast = replace(CEILINGS, flops={"bfloat16": 1e12}, bandwidth=1e12, exps=1e12)
    tournament = command_line._Tournament(parsed("--minutes", "1", "--seconds", "0"), fast)
    work = family.work(contest.case, torch.bfloat16, "fwd")
    expected = command_line.FIXED + command_line.UNHURRIED_CALLS * work.flops / 1e9
    assert tournament._expected_seconds(contest) == pytest.approx(expected)
    assert measure.unhurried_rate("float32", 64) > 0


def test_command_line_fails_on_a_wrong_kernel(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = replace(FAMILIES["flash_attention"], contestants=(planted(OURS, 1e-3), SDPA))
    monkeypatch.setitem(FAMILIES, "flash_attention", wrong)
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    assert command_line.main([*arguments, "--ceiling-size", "64"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_command_line_says_that_nothing_matches(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["flash_attention", "--filter", "no-such-case"]) == 2
    assert "no-such-case" in capsys.readouterr().err


def test_command_line_says_why_a_forced_backend_cannot_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["flash_attention", "--dtype", "float32", "--filter", "vit-h14", "--seconds", "0"]
    arguments += ["--ceiling-size", "64"]
    assert command_line.main([*arguments, "--backend", "cuda"]) == 2
    assert "no CUDA C++ kernel of this family exists" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command_line.main([*arguments, "--backend", "gpu"])


def test_pytest_benchmark_runs_the_same_calls() -> None:
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-k", "vit-h14 and float32 and fwd"]
    result = subprocess.run(
        [*command, "--benchmark-disable", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "8 passed, 4 skipped" in result.stdout  # six contestants, forward and with backward
