"""What is for a GPU, without one: the script of all steps, the search of launches, ncu."""

import importlib.util
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from bench import ncu, search
from tools.bench_samples import parsed

ROOT = Path(__file__).resolve().parent.parent


def gpu_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_gpu_script_dry_run(tmp_path: Path) -> None:
    result = gpu_script("--dry-run", "--out", str(tmp_path), "--minutes", "10")
    assert result.returncode == 0, result.stderr
    steps = re.findall(r"^(\w+): timeout (\d+) ", result.stdout, re.MULTILINE)
    names = ["build", "tests", "sanitizer", "search", "race", "compiled", "ncu"]
    assert [name for name, _ in steps] == names
    assert sum(int(seconds) for _, seconds in steps) <= 600
    assert (tmp_path / "summary.txt").read_text() == result.stdout
    for step in ("race", "compiled"):
        line = re.search(rf"^{step}: timeout (\d+) .* -m bench (.*)", result.stdout, re.MULTILINE)
        options = parsed(*line[2].split())
        assert 0.85 * int(line[1]) < 60 * options.minutes < 0.95 * int(line[1])
        assert options.compile == (step == "compiled")
    for module in re.findall(r"-m (bench[.\w]*)", result.stdout):
        assert importlib.util.find_spec(module) is not None


def test_gpu_script_runs_the_steps_it_is_told_and_keeps_going(tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\ncase "$*" in *bench.ncu*) exit 3;; esac\n')
    fake.chmod(0o755)
    out = tmp_path / "out"
    result = gpu_script("--out", str(out), "--python", str(fake), "build", "ncu", "race")
    assert result.returncode == 1
    summary = (out / "summary.txt").read_text()
    assert re.findall(r"(\w+): exit (\d+)", summary) == [
        ("build", "0"),
        ("ncu", "3"),
        ("race", "0"),
    ]
    assert "--device cuda" in (out / "race.log").read_text()


def test_gpu_script_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    for arguments in (["--minutes", "ten"], ["--minutes", "0"], ["everything"]):
        result = gpu_script("--out", str(tmp_path / "none"), *arguments)
        assert result.returncode == 2
        assert not (tmp_path / "none").exists()


def test_searched_rows_have_the_form_of_the_tables() -> None:
    from vlmfast.kernels.launch import PLAIN, Launch, Row, ShapeClass, rows

    launch = Launch(128, 64, 8, 3)
    plain = ShapeClass("flash_attention_fwd", "half", 64, 197, plain=True)
    masked = ShapeClass("flash_attention_fwd", "half", 64, 577, plain=False)
    searched = {
        (90, plain): Row(64, 197, launch, plain_only=True),
        (90, masked): Row(64, 577, launch),
    }
    text = search.formatted(searched)
    assert text.startswith("# flash_attention_fwd, sm_90, half\nrows(\n")
    assert eval(text, {"rows": rows, "PLAIN": PLAIN}) == tuple(searched.values())


def test_ncu_reports_become_tables(tmp_path: Path) -> None:
    report = tmp_path / "ncu-flash_attention.csv"
    report.write_text(
        '"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","flash_attention_fwd","9"\n'
    )
    text = ncu.tables([report])
    assert text.splitlines()[0] == "## flash_attention"
    assert "| flash_attention_fwd | 9 |" in text
    command = ncu.command("flash_attention", report)
    assert command[0] == "ncu" and str(report) in command


def test_ncu_that_measures_nothing_does_not_end_the_rest(tmp_path, monkeypatch, capsys) -> None:
    """Where the driver forbids counters."""
    fake = tmp_path / "ncu"
    fake.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-file ]; do shift; done\n'
        'case "$2" in *flash*) echo "==WARNING== No kernels were profiled." >"$2"; exit 0;; esac\n'
        'printf "\\"Kernel Name\\"\\n\\"\\"\\n\\"a_kernel\\"\\n" >"$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ncu.main([str(tmp_path / "out")]) == 1
    assert "flash_attention: lines: expected" in capsys.readouterr().err
    text = (tmp_path / "out" / "ncu.md").read_text()
    assert "## window_attention" in text and "## flash_attention" not in text


@pytest.mark.parametrize("module", [search, ncu])
def test_gpu_programs_say_what_they_lack(module, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ncu.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([str(tmp_path / "target")]) == 1
    assert re.search("wants a GPU|is not installed", capsys.readouterr().err)
