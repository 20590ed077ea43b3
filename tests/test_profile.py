"""The profile command: tables that add up, traces, and what perf and ncu tell."""

import contextlib
import json
import re
import shlex
import sys

import pytest
import torch

import bench.__main__ as bench
import vlmfast.__main__ as command
from bench import profile as cases
from bench.contestant import OURS
from vlmfast import profile

NCU = """\
==PROF== Connected to process 77
"ID","Process ID","Kernel Name","gpu__time_duration.sum","dram__bytes.sum",\
"launch__registers_per_thread"
"","","","usecond","Mbyte","register/thread"
"0","77","flash_attention_fwd_kernel","41.2","38.6","168"
"1","77","flash_attention_bwd_whole_kernel","97.5","80.1","255"
==PROF== Disconnected
"""


def shares(text):
    return [int(share) for share in re.findall(r"\| (\d+)% \| \d+ \|$", text, re.MULTILINE)]


def test_a_case(tmp_path, capsys):
    """With --patched first its fastest peer, then our call."""
    arguments = ["profile", "resampler", "--steps", "1", "--patched", "--out", str(tmp_path)]
    assert bench.main(arguments) == 0
    text = capsys.readouterr().out
    table, theirs, ours = text.split("the costliest operators, ")
    peer = re.search(r"^\| (torch SDPA|eager|SDPA math) \|.*\n\| vlmfast \|", table, re.MULTILINE)[
        1
    ]
    assert ours.startswith("vlmfast ") and "vlmfast::flash_attention_cpu" in ours
    assert theirs.startswith(f"{peer} ") and "vlmfast::" not in theirs
    assert f"CPU kernels: {torch.ops.vlmfast.cpu_isa()}" in text
    if sys.platform == "linux":
        assert text.count("no counters: ") + text.count("| counter |") == 2
    for part in (theirs, ours):
        assert 90 <= sum(shares(part)) <= 110
        assert len(shares(part)) <= profile.COSTLIEST
    for name in ("resampler-vlmfast", f"resampler-{peer.replace(' ', '-')}"):
        events = json.loads((tmp_path / f"{name}.json").read_text())["traceEvents"]
        names = {event.get("name") for event in events}
        assert ("vlmfast::flash_attention_cpu" in names) == (name == "resampler-vlmfast")


def test_a_case_that_is_wrong_is_not_profiled(tmp_path, monkeypatch):
    def wrong(found):
        row, calls = checked(found)
        del calls[OURS]
        row.refusals[OURS] = "WRONG, error 1 above its budget 0"
        return row, calls

    checked = cases.checked_calls
    monkeypatch.setattr(cases, "checked_calls", wrong)
    with pytest.raises(SystemExit, match="resampler float32 fwd: our result is WRONG"):
        bench.main(["profile", "resampler", "--out", str(tmp_path)])


def test_on_a_gpu_ncu_sees_the_steps_alone(monkeypatch):
    """Ranges and the profiler's start and stop, without a GPU."""
    log = []

    @contextlib.contextmanager
    def named(name):
        log.append(name)
        yield

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: log.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: log.append("stop"))
    monkeypatch.setattr(profile.nvtx, "range", named)
    target = profile.Target("ours", lambda: log.append("run"), "float32", 1, 1)
    profile._run_alone([target], 2)
    steps = ["vlmfast ours step 0", "run", "vlmfast ours step 1", "run"]
    assert log == ["run", "start", *steps, "stop"]


def test_ncu_command_profiles_the_same_thing():
    arguments = ["clip-text", "--dtype", "bfloat16", "--mode", "fwd+bwd", "--patched"]
    line = profile._ncu_command("bench", profile._parser("bench").parse_args(arguments))
    ncu, _, again = line.partition(" python -m bench profile ")
    assert "--profile-from-start off" in ncu and "launch__registers_per_thread" in ncu
    options = profile._parser("bench").parse_args(shlex.split(again))
    assert (options.target, options.dtype, options.mode) == ("clip-text", "bfloat16", "fwd+bwd")
    assert options.patched and options.no_trace and options.steps == 1


def test_a_model_before_and_after(tmp_path, capsys):
    target = "vit_tiny_patch16_224"
    arguments = ["profile", target, "--patched", "--steps", "1", "--batch", "1"]
    assert command.main([*arguments, "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    before, after = text.split("the costliest operators, ")[1:]
    assert "vlmfast::flash_attention_cpu" not in before
    assert "vlmfast::flash_attention_cpu" in after
    rows = re.findall(r"^\| (before|after) \| ([\d.]+) \| ([\d.]+) \|", text, re.MULTILINE)
    flops = {name: float(gflop) for name, _, gflop in rows}
    tokens, dim = 197, 192
    block = tokens * 12 * dim**2 + 2 * tokens**2 * dim
    gflop = 2e-9 * (12 * block + (tokens - 1) * 768 * dim + dim * 1000)
    assert flops["before"] == flops["after"] == pytest.approx(gflop, rel=0.01)


def test_an_unknown_target(tmp_path):
    with pytest.raises(SystemExit, match="expected a row of the demo, a model of timm, or one of"):
        bench.main(["profile", "no-such-thing", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stop:
        command.main(["profile"])
    assert stop.value.code == 2


def test_the_package_profiles_models_alone(tmp_path, capsys):
    arguments = ["--steps", "1", "--batch", "1", "--out", str(tmp_path)]
    assert command.main(["profile", "vit_tiny_patch16_224", *arguments]) == 0
    text = capsys.readouterr().out
    assert text.startswith("shares of the machine's ceilings: see README")
    assert re.search(r"^\| before \| [\d.]+ \| [\d.]+ \| \d+ \|  \|", text, re.MULTILINE)
    with pytest.raises(SystemExit, match="called 'resampler'; for cases see README"):
        command.main(["profile", "resampler", *arguments])


def test_kernels_that_are_on_no_gpu_have_no_resources():
    pytest.importorskip("triton")
    from bench.gpu import no_card
    from bench.gpu.cases import BY_NAME

    before = list(profile._triton_resources())
    with no_card.compile_only(90, 132) as started:
        BY_NAME["small-clip-text"].our_call("fwd", "meta")()
    assert [one.compiled.module for one in started] == [None]
    assert list(profile._triton_resources()) == before


def test_counters_or_why_there_are_none(monkeypatch):
    ran = []
    text = profile._counters(lambda: ran.append(1), 3)
    assert text.startswith(("no counters: ", "| counter |"))
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile._counters(lambda: None, 1) == "no counters: perf is not installed"


def test_counters_are_those_of_a_step(monkeypatch, tmp_path):
    fake = tmp_path / "perf"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import signal, sys\n"
        "def report(*_):\n"
        "    print('3000,,cycles,1,100.00,,', file=sys.stderr)\n"
        "    print('<not counted>,,cache-misses,0,0,,', file=sys.stderr)\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGINT, report)\n"
        "signal.pause()\n"
    )
    fake.chmod(0o755)
    monkeypatch.setattr(profile.shutil, "which", lambda name: str(fake))
    text = profile._counters(lambda: None, 3)
    assert "| cycles | 1000 |" in text and "cache-misses" not in text


def test_ncu_table(tmp_path, capsys):
    report = tmp_path / "ncu.csv"
    report.write_text(NCU)
    assert command.main(["profile", "--ncu-report", str(report)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| kernel | time usecond | DRAM bytes Mbyte | registers register/thread |"
    assert lines[2] == "| flash_attention_fwd_kernel | 41.2 | 38.6 | 168 |"
    assert len(lines) == 4
    with pytest.raises(ValueError, match="expected what ncu"):
        profile.read_ncu(["nothing"])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--ncu-report", "none.csv"], "No such file"),
        (["--ncu-report", "empty.csv"], "expected what ncu"),
        (["resampler", "--steps", "0"], "at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments, text, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.csv").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        command.main(["profile", *arguments])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert arguments[-2] in error and text in error
