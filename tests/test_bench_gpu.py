"""What is for a GPU, without one: the plan of all steps and its times, and what the steps do."""

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import vlmfast
from bench import common
from bench.contestant import OURS
from bench.gpu import __main__ as command_line
from bench.gpu import (
    ahead,
    goals,
    host,
    launches,
    memcheck,
    ncu,
    no_card,
    numbers,
    peers,
    plan,
    records,
    search,
    trials,
)
from bench.gpu import tests as gpu_tests
from bench.gpu.cases import BY_NAME, COSTLIEST, GOALS, MODES, SMALL
from bench.gpu.plan import GRACE, Plan, Step
from bench.measure import Ceilings
from tools.bench_samples import planted
from tools.compile_gate import tables_of
from vlmfast.families import FAMILIES
from vlmfast.kernels import launch
from vlmfast.kernels.launch import PLAIN, Launch, ShapeClass, rows

ROOT = Path(__file__).resolve().parent.parent
NAMES = ["build", "ahead", "peers", "predict", "numbers", "tests", "goals"]
NAMES += ["host", "search", "ncu", "memcheck"]
TINY = SMALL[0]  # of attention


# The plan, with a clock that the steps move.


class FakeSteps:
    """Starts nothing; a step takes the seconds, and ends as it is told."""

    def __init__(self, **seconds: float):
        self.now = 0.0
        self.seconds = seconds  # that each needs
        self.codes: dict[str, int] = {}
        self.events: list[tuple[str, str, float]] = []

    def start(self, step: Step, log: Path) -> "FakeProcess":
        if step.name == "missing":
            raise FileNotFoundError("no such program")
        log.write_text(f"{step.name}\n")
        self.events.append(("start", step.name, self.now))
        return FakeProcess(self, step.name)

    def when(self, event: str, name: str) -> float:
        return next(at for what, who, at in self.events if (what, who) == (event, name))


class FakeProcess:
    def __init__(self, steps: FakeSteps, name: str):
        self.steps, self.name = steps, name
        self.until = steps.now + steps.seconds.get(name, 1.0)

    def wait(self, seconds: float) -> int | None:
        limit = self.steps.now + max(0.0, seconds)
        self.steps.now = max(self.steps.now, min(self.until, limit))
        return self.steps.codes.get(self.name, 0) if self.until <= limit else None

    def interrupt(self) -> None:
        self.steps.events.append(("interrupt", self.name, self.steps.now))

    def end(self, seconds: float) -> None:
        if ("interrupt", self.name) in {(what, who) for what, who, _ in self.steps.events}:
            self.steps.now += max(0.0, seconds)  # it takes all that it may


def planned(folder: Path, steps: FakeSteps, *chosen: Step, seconds: float = 100.0) -> tuple:
    """Exit status and summary of a plan."""
    code = Plan(chosen, folder / "out", seconds, steps.start, lambda: steps.now).run()
    return code, (folder / "out" / "summary.txt").read_text()


def packed(folder: Path) -> set[str]:
    with tarfile.open(folder / "out.tar.gz") as pack:
        return {name.removeprefix("out/") for name in pack.getnames()} - {"out"}


FIRST, SECOND = Step("first", ["x"], share=1), Step("second", ["x"], share=3)
BEHIND = Step("behind", ["x"], background=True)


def test_steps_share_the_time(tmp_path: Path) -> None:
    steps = FakeSteps(first=1000, second=1000)
    code, summary = planned(tmp_path, steps, FIRST, SECOND)
    assert code == 1
    assert re.findall(r"(\w+): stopped", summary) == ["first", "second"]
    assert steps.when("interrupt", "first") == 25 - GRACE
    assert steps.when("interrupt", "second") == 100 - GRACE


def test_time_that_is_left_goes_to_the_next_step(tmp_path: Path) -> None:
    steps = FakeSteps(first=5, second=80)
    code, summary = planned(tmp_path, steps, FIRST, SECOND)
    assert code == 0
    assert "first: exit 0 after 5 s, begun at 0 s" in summary
    assert "second: exit 0 after 80 s, begun at 5 s" in summary


def test_a_step_that_fails_does_not_end_the_rest_unless_it_is_essential(tmp_path: Path) -> None:
    steps = FakeSteps()
    steps.codes["first"] = 3
    code, summary = planned(tmp_path, steps, FIRST, SECOND)
    assert code == 1 and "first: exit 3" in summary and "second: exit 0" in summary
    essential = Step("first", ["x"], share=1, essential=True)
    code, summary = planned(tmp_path, steps, BEHIND, essential, SECOND)
    assert code == 1 and "first failed" in summary and "second" not in summary
    assert "behind:" in summary  # what ran behind was stopped


def test_an_essential_step_without_an_answer_ends_nothing(tmp_path: Path) -> None:
    essential = Step("first", ["x"], share=1, essential=True)
    _, summary = planned(tmp_path, FakeSteps(first=1000), essential, SECOND)
    assert "first: stopped" in summary and "second: exit 0" in summary


def test_a_program_that_is_missing_is_told_of(tmp_path: Path) -> None:
    missing = Step("missing", ["x"], share=1)
    code, summary = planned(tmp_path, FakeSteps(), missing, SECOND)
    assert code == 1
    assert "missing: exit 127: no such program" in summary and "second: exit 0" in summary


def test_steps_in_the_background_run_beside_all_but_those_they_would_disturb(tmp_path) -> None:
    steps = FakeSteps(behind=1000, other=1000, first=10, second=10)
    until_second = replace(BEHIND, name="other", until=("none", "second"))
    planned(tmp_path, steps, BEHIND, until_second, FIRST, SECOND)
    assert steps.when("start", "other") == steps.when("start", "first") == 0
    assert steps.when("interrupt", "other") == 10 < steps.when("start", "second")
    assert steps.when("interrupt", "behind") > steps.when("start", "second")


def test_eight_minutes_are_enough_for_something_of_every_step(tmp_path: Path) -> None:
    steps = FakeSteps(**dict.fromkeys(NAMES, 1000.0))
    every = command_line.steps("python", tmp_path, 14)
    _, summary = planned(tmp_path, steps, *every, seconds=470.0)
    assert re.findall(r"^(\w+): stopped", summary, re.MULTILINE)[0] == "numbers"
    assert {who for what, who, _ in steps.events if what == "start"} == set(NAMES)
    assert steps.now <= 470
    begun = [steps.when("start", name) for name in NAMES]
    first = NAMES.index("numbers")  # behind it run those before it
    assert begun[: first + 1] == [0.0] * (first + 1)
    assert 40 < begun[first + 1] - begun[first] < 180
    in_turn = [*begun[first:], steps.now]
    assert all(y - x > GRACE + 5 for x, y in itertools.pairwise(in_turn))


def test_steps_in_the_background_alone_have_all_the_time(tmp_path: Path) -> None:
    code, summary = planned(tmp_path, FakeSteps(behind=70), BEHIND)
    assert code == 0 and "behind: exit 0" in summary


def test_the_archive_is_renewed_after_each_step(tmp_path: Path) -> None:
    seen = []

    class Looking(FakeSteps):
        def start(self, step: Step, log: Path) -> FakeProcess:
            if step.name == "second":
                seen.append(packed(tmp_path))
            return super().start(step, log)

    steps = Looking()
    planned(tmp_path, steps, FIRST, SECOND)
    assert seen == [{"first.log", "summary.txt"}]
    assert packed(tmp_path) == {"first.log", "second.log", "summary.txt"}


def test_the_archive_leaves_out_what_is_large(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "LARGEST_FILE", 10)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "large").write_text("x" * 11)
    (tmp_path / "out" / "small").write_text("x")
    plan.archive(tmp_path / "out")
    assert packed(tmp_path) == {"small"}


# The plan, with processes.


def python(name: str, program: str, share: float = 1.0, **options) -> Step:
    return Step(name, [sys.executable, "-c", program], share, **options)


def test_a_step_that_is_stopped_leaves_what_it_has(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(plan, "GRACE", 1.0)
    result = tmp_path / "out" / "result"
    patient = python(
        "patient",
        f"import time\nopen({str(result)!r}, 'w').write('something')\n"
        "try: time.sleep(60)\nexcept KeyboardInterrupt: print('interrupted')",
    )
    deaf = python(
        "deaf",
        "import signal, time\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\ntime.sleep(60)",
    )
    begin = time.monotonic()
    assert Plan([patient, deaf, python("last", "print('done')")], tmp_path / "out", 9.0).run() == 1
    assert time.monotonic() - begin < 30
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"(\w+): (stopped|exit \d+)", summary) == [
        ("patient", "stopped"),
        ("deaf", "stopped"),
        ("last", "exit 0"),
    ]
    assert "interrupted" in (tmp_path / "out" / "patient.log").read_text()
    assert {"result", "patient.log", "deaf.log", "last.log"} <= packed(tmp_path)


def gpu_script(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(ROOT / "bench" / "gpu.sh"), "--python", sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_gpu_script_dry_run(tmp_path: Path) -> None:
    result = gpu_script("--dry-run", "--out", "results", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = dict(line.split(": ", 1) for line in result.stdout.splitlines())
    assert list(lines) == NAMES
    until = [int(x) for x in re.findall(r"to (\d+) s", result.stdout)]
    assert until == sorted(until) and until[-1] <= 8 * 60 - 10
    assert str(tmp_path / "results") in lines["goals"]
    assert not (tmp_path / "results").exists()
    for module in re.findall(r"-m (bench[.\w]*)", result.stdout):
        assert importlib.util.find_spec(module) is not None


def test_gpu_script_runs_the_steps_it_is_told(tmp_path: Path) -> None:
    result = gpu_script("--out", str(tmp_path / "out"), "ncu", "memcheck")
    assert result.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert re.findall(r"(\w+): exit (\d+)", summary) == [("ncu", "1"), ("memcheck", "1")]
    assert "is not installed" in (tmp_path / "out" / "ncu.log").read_text()
    assert "ncu.log" in packed(tmp_path)


@pytest.mark.parametrize("arguments", [["--minutes", "ten"], ["--minutes", "0"], ["everything"]])
def test_gpu_script_refuses_what_it_does_not_know(tmp_path: Path, arguments) -> None:
    result = gpu_script("--out", str(tmp_path / "none"), *arguments)
    assert result.returncode == 2
    assert not (tmp_path / "none").exists()


def test_numbers_come_first_and_end_the_run_if_they_are_wrong() -> None:
    every = command_line.steps("python", Path("out"), 14)
    in_turn = [step for step in every if not step.background]
    assert in_turn[0].name == "numbers" and in_turn[0].essential
    assert {step.name for step in every if step.background} == {
        "build",
        "ahead",
        "peers",
        "predict",
    }
    until = {step.name: step.until for step in every if step.background}
    assert "goals" in until["peers"] and "search" in until["peers"]  # it takes the GPU
    assert all("host" in names for names in until.values())
    assert sum(step.share for step in in_turn) == 100
    assert not any(step.essential for step in in_turn[1:])


# Records.


def test_a_record_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    records.append(tmp_path / "r", {"a": 1})
    with (tmp_path / "r").open("a") as target:
        target.write('{"a": ')
    assert list(records.read(tmp_path / "r")) == [{"a": 1}]


# Cases and launches.


def test_goals_have_a_name_of_their_own_and_fill_a_gpu() -> None:
    assert len(BY_NAME) == len(GOALS) + len(SMALL)
    tables = {kernel for family in FAMILIES for kernel in tables_of(family)}
    assert {kernel for _, kernel in COSTLIEST} <= tables
    assert {name for name, _ in COSTLIEST} <= {goal.name for goal in GOALS}
    assert set(ncu.MEASURED) <= {goal.name for goal in GOALS}


def launched_by(name: str) -> set[str]:
    """The kernels that a call launches on a GPU with 132 multiprocessors."""
    with (
        no_card.compile_only(90, 132),
        mock.patch.object(no_card.JITFunction, "run", lambda *_, **__: None),
        launches.noted() as found,
    ):
        BY_NAME[name].our_call(MODES[-1], "meta")()
    return {shape.kernel for shape in found}


@pytest.mark.parametrize(("name", "kernel"), COSTLIEST)
def test_the_costliest_kernels_are_those_that_their_goals_launch(name, kernel) -> None:
    assert kernel in launched_by(name)
    assert not launches.is_minor(kernel)


def test_what_is_compiled_ahead_depends_on_how_much_of_the_gpu_a_call_fills() -> None:
    assert "flash_attention_bwd_whole" in launched_by("vit-b16")
    assert "flash_attention_bwd_whole" not in launched_by("small-vit-b16")


@pytest.mark.parametrize("goal", SMALL, ids=lambda goal: goal.name)
def test_our_numbers_keep_their_budget(goal) -> None:
    assert numbers.judged(goal, "cpu")["passed"]


@pytest.mark.parametrize("goal", [SMALL[0], SMALL[2], SMALL[5]], ids=lambda goal: goal.name)
def test_the_truth_by_batch_elements_is_that_by_heads(goal, monkeypatch) -> None:
    """As it is computed on a GPU, and on a CPU."""
    case = replace(goal.case, batch=2, heads=2)
    calls = goal.family.calls
    inputs = calls.make_inputs(case, torch.float32, "fwd+bwd")
    by_heads = calls.reference(case, inputs, "fwd+bwd")
    monkeypatch.setattr(calls, "by_heads", common.by_elements)
    for x, y in zip(calls.reference(case, inputs, "fwd+bwd"), by_heads, strict=True):
        torch.testing.assert_close(x.value, y.value, rtol=1e-12, atol=1e-12)


def test_numbers_without_a_kernel_fail() -> None:
    with vlmfast.use_backend("reference"):
        record = numbers.judged(TINY, "cpu")
    assert record["backend"] == "reference" and not record["passed"]


def test_numbers_that_are_wrong_fail(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(numbers.Goal, "ours", planted(OURS, 0.2))
    file = tmp_path / "numbers.jsonl"
    assert numbers.main([str(file), "--device", "cpu", "--case", TINY.name]) == 1
    assert [x["passed"] for x in records.read(file)] == [False]


def test_alternatives_are_others_and_candidates_are_none_of_them() -> None:
    shipped = Launch(64, 64, 4, 2)
    near = launches.alternatives(shipped)
    assert shipped._replace(num_warps=8) in near
    assert Launch(128, 64, 8, 2) in near and Launch(64, 32, 4, 2) in near
    further = launches.candidates(shipped)
    assert len(further) == launches.MOST_CANDIDATES
    assert not {shipped, *near} & set(further)
    assert further[0] in {shipped._replace(num_stages=x) for x in (1, 3)}
    unblocked = launches.alternatives(Launch(0, 64, 8, 1))
    assert all(x.block_m == 0 for x in unblocked) and len(unblocked) == 3


def test_searched_rows_have_the_form_of_the_tables() -> None:
    plain = ShapeClass("flash_attention_fwd", "half", 64, 197, plain=True)
    masked = ShapeClass("flash_attention_fwd", "half", 64, 577, plain=False)
    taken = Launch(128, 64, 8, 3)
    text = launches.formatted([(90, plain, taken), (90, masked, taken)])
    assert text.startswith("# flash_attention_fwd, sm_90, half\nrows(\n")
    found = eval(text, {"rows": rows, "PLAIN": PLAIN})
    assert [(row.rows, row.launch, row.plain_only) for row in found] == [
        (197, taken, True),
        (577, taken, False),
    ]


# Trials, with a timer that times nothing.


def fake_timer(call) -> dict:
    call()
    return {"graph": True, "median_us": 10.0, "p20_us": 9.0, "p80_us": 11.0, "samples": 5}


def contestants(*names: str):
    return [x for x in TINY.family.contestants if x.name in names]


def test_a_trial_is_checked_and_timed_or_says_why_not() -> None:
    ours, eager = contestants(OURS, "eager")
    assert trials.tried(TINY, "fwd", ours, "cpu", fake_timer)["median_us"] == 10.0
    wrong = planted("wrong", 0.2)
    assert trials.tried(TINY, "fwd", wrong, "cpu", fake_timer)["refused"] == "WRONG"
    unable = replace(eager, refusal=lambda case, dtype: "cannot")
    assert trials.tried(TINY, "fwd", unable, "cpu", fake_timer)["refused"] == "cannot"

    def failing(call) -> dict:
        raise OSError("the compiler fell over\nand more")

    assert trials.tried(TINY, "fwd", eager, "cpu", failing)["refused"] == "the compiler fell over"


def test_an_error_that_leaves_the_gpu_unusable_is_another_matter(monkeypatch) -> None:
    def gone() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    with pytest.raises(trials.ContextLost):
        trials._check_context(RuntimeError("anything"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    trials._check_context(RuntimeError("anything"))


def test_a_call_that_cannot_be_a_graph_is_timed_as_it_is_launched(monkeypatch) -> None:
    def refuses(call) -> None:
        raise RuntimeError("not while capturing")

    monkeypatch.setattr(trials, "cuda_seconds", lambda call, repeats: 2e-3)
    monkeypatch.setattr(trials, "captured", lambda call: call)
    record = trials.graph_timer(lambda: ())
    assert record["graph"] and record["median_us"] == record["p20_us"] == 2000.0
    monkeypatch.setattr(trials, "captured", refuses)
    assert not trials.graph_timer(lambda: ())["graph"]


@pytest.mark.parametrize("module", [goals, search])
def test_a_process_whose_gpu_is_unusable_is_followed_by_another(module, tmp_path, monkeypatch):
    class Ended(Exception):
        pass

    def out_of_bounds(*arguments) -> None:
        raise trials.ContextLost("illegal memory access")

    def replace_process(program: str, line: list[str]) -> None:
        assert line == [program, "-m", module.__name__, str(tmp_path), "--resume"]
        raise Ended

    shape = ShapeClass(COSTLIEST[0][1], "half", 64, 197, plain=True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(goals, "ceilings_of", lambda folder: None)
    monkeypatch.setattr(goals, "launched", lambda *_: {shape: Launch(64, 64, 4, 2)})
    monkeypatch.setattr(trials, "tried", out_of_bounds)
    monkeypatch.setattr(trials.os, "execv", replace_process)
    file = tmp_path / f"{module.__name__.rpartition('.')[2]}.jsonl"
    records.append(file, {"from": "another run"})
    for arguments in ([str(tmp_path)], [str(tmp_path), "--resume"]):
        with pytest.raises(Ended):
            module.main(arguments)
    first, second = records.read(file)  # none is tried twice, and an older file is gone
    assert "out of bounds" in first["refused"] and "out of bounds" in second["refused"]
    assert first != second


def test_goals_are_recorded_one_by_one_and_not_twice(tmp_path: Path, monkeypatch) -> None:
    shape = ShapeClass("flash_attention_fwd", "half", 64, 197, plain=True)
    shipped, bad = Launch(64, 64, 4, 2), Launch(128, 64, 8, 2)
    monkeypatch.setattr(goals, "launched", lambda *_: {shape: shipped})
    records.append(
        tmp_path / "ahead.jsonl",
        {"goal": TINY.name, "kernel": shape.kernel, "launch": bad, "error": "crash"},
    )
    few = TINY._replace(family=replace(TINY.family, contestants=contestants(OURS, "eager")))
    goals.fill(goals.Table(tmp_path, "cpu", fake_timer), [few])
    found = list(records.read(tmp_path / "goals.jsonl"))
    names = [x["contestant"] for x in found if x["mode"] == "fwd+bwd"]
    assert names[:2] == [OURS, "eager"]
    tried = [name for name in names if "flash_attention_fwd" in name]
    assert len(tried) == len(launches.alternatives(shipped)) - 1
    assert not any(str(tuple(bad)) in name.partition(" for ")[0] for name in tried)
    assert "| 10.0 | eager | 10.0 | 1.00 |" in (tmp_path / "goals.md").read_text()
    goals.fill(goals.Table(tmp_path, "cpu", fake_timer, resumes=True), [few])
    assert list(records.read(tmp_path / "goals.jsonl")) == found


def test_a_goal_that_we_fail_is_not_tried_with_other_launches(tmp_path: Path) -> None:
    few = TINY._replace(family=replace(TINY.family, contestants=[planted(OURS, 0.2)]))
    table = goals.Table(tmp_path, "cpu", fake_timer)
    goals.fill(table, [few])
    assert [x["refused"] for x in table.records] == ["WRONG"] * len(MODES)
    broken = replace(few.family, contestants=[replace(few.ours, prepare=lambda case: 1 / 0)])
    assert goals.launched(TINY._replace(family=broken), "fwd", "cpu") == {}


def test_the_limit_of_a_goal_is_that_of_the_ceiling_it_meets_first() -> None:
    ceilings = Ceilings({"bfloat16": 1e12}, {"bfloat16": ""}, 1e9, 1.0)
    record = {"goal": "g", "mode": "fwd", "shape": "s", "flops": 10**6, "bytes": 10**6}
    times = [{**record, "contestant": who, "median_us": 2000.0} for who in (OURS, "peer")]
    assert goals.goal_row(times, ceilings, {("g", "fwd"): 1500.0})[3:5] == ["1000.0", "1500.0"]
    assert goals.goal_row(times, None, {})[3:5] == ["", ""]


def test_what_was_never_measured_is_in_no_goal_row() -> None:
    place = {"goal": "g", "mode": "fwd", "shape": "s"}
    ours = {**place, "contestant": OURS, "refused": "WRONG"}
    peer = {**place, "contestant": "peer", "median_us": 3.0}
    text = goals.summary([ours, peer])
    assert text.count("| g |") == 2  # both among the trials alone
    assert "WRONG" in text


def test_the_search_writes_after_each_kernel(tmp_path: Path, monkeypatch) -> None:
    shape = ShapeClass("flash_attention_fwd", "half", 64, 197, plain=True)
    shipped, faster = Launch(64, 64, 4, 2), Launch(64, 64, 4, 3)
    monkeypatch.setattr(goals, "launched", lambda *_: {shape: shipped})

    def timer(call) -> dict:
        taken = launch._overrides["flash_attention_fwd"]
        if taken.num_warps == 8:
            raise RuntimeError("out of resource")
        return {"median_us": 5.0 if taken == faster else 10.0}

    found = search.Search(tmp_path, "cpu", timer)
    found.kernel(TINY.name, shape.kernel)
    text = (tmp_path / "searched.py").read_text()
    assert [row.launch for row in eval(text, {"rows": rows, "PLAIN": PLAIN})] == [faster]
    kept = list(records.read(tmp_path / "search.jsonl"))
    assert kept[0]["launch"] == list(shipped)
    assert any(x.get("refused") == "out of resource" for x in kept)
    again = search.Search(tmp_path, "cpu", timer, resumes=True)
    again.kernel(TINY.name, shape.kernel)
    assert list(records.read(tmp_path / "search.jsonl")) == kept


def test_nothing_is_found_that_is_not_faster() -> None:
    shipped, other = Launch(64, 64, 4, 2), Launch(64, 64, 8, 2)
    place = {"goal": "g", "kernel": "k"}
    found = [
        {**place, "launch": shipped, "median_us": 10.0},
        {**place, "launch": other, "median_us": 9.9},
    ]
    assert search.best(found, "g", "k", shipped) is None
    assert search.best(found[1:], "g", "k", shipped) is None


# Compilation ahead.


def crashing(job: ahead.Job, target: ahead.Target) -> dict:
    if job.goal == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    return {**job._asdict()}


def test_a_compiler_that_crashes_does_not_end_the_others() -> None:
    jobs = [ahead.Job(name, "fwd") for name in ("a", "crash", "b", "c")]
    found = {x["goal"]: x for x in ahead.run_all(jobs, ahead.Target(90, 132), 2, crashing)}
    assert found.keys() == {"a", "crash", "b", "c"}
    assert "crashed" in found["crash"]["error"] and "error" not in found["a"]


def test_jobs_ahead_are_in_the_order_of_the_steps() -> None:
    assert {job.goal for job in ahead.as_shipped()} == set(BY_NAME)
    name, kernel = COSTLIEST[0]
    shipped = Launch(64, 64, 4, 2)
    found = [{"goal": name, "mode": MODES[-1], "shipped": {kernel: list(shipped)}}]
    jobs = list(ahead.others(found))
    assert [job.launch for job in jobs] == [
        *launches.alternatives(shipped),
        *launches.candidates(shipped),
    ]


def test_compiling_ahead_fills_the_cache_that_launches_look_in(tmp_path, monkeypatch) -> None:
    """What one process compiled, another finds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "ahead.jsonl"
    command = [sys.executable, "-m", "bench.gpu.ahead", str(file), "--arch", "90"]
    ran = subprocess.run([*command, "--only", "small-swin"], cwd=ROOT, capture_output=True)
    assert ran.returncode == 0, ran.stderr
    found = list(records.read(file))
    assert {x["mode"] for x in found} == set(MODES)
    kernels = {"window_attention_fwd_kernel", "window_attention_bwd_kernel"}
    assert set(found[0]["kernels"]) == kernels
    compiled = sorted((tmp_path / "cache").rglob("*.cubin"))
    assert {x.stem for x in compiled} == kernels
    again = ahead.compiled(ahead.Job("small-swin-t-s1", MODES[-1]), ahead.Target(90, 132))
    assert set(again["kernels"]) == kernels
    assert sorted((tmp_path / "cache").rglob("*.cubin")) == compiled


def test_ahead_wants_a_gpu_or_an_architecture(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        ahead.main([str(tmp_path / "file")])
    assert "torch finds no GPU" in capsys.readouterr().err


def test_peers_are_called_once_or_say_why_not() -> None:
    (eager,) = contestants("eager")
    assert "refused" not in peers.called(TINY, "fwd", eager, "cpu")
    broken = replace(eager, prepare=lambda case: 1 / 0)
    assert "ZeroDivisionError" in peers.called(TINY, "fwd", broken, "cpu")["refused"]


# The GPU tests by several processes.


def test_tests_are_shared_and_recorded(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('n', range(5))\n"
        "def test_it(n):\n    assert n != 3\n"
    )
    monkeypatch.setattr(gpu_tests, "has_xdist", lambda: False)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert gpu_tests.main([str(tmp_path / "out"), "--workers", "2", str(file)]) == 1
    found = list(records.read(tmp_path / "out" / "tests.jsonl"))
    assert sorted(x["test"][-2] for x in found) == list("01234")
    assert [x["test"][-2] for x in found if x["outcome"] == "failed"] == ["3"]
    assert "1 failed" in (tmp_path / "out" / "tests-1.log").read_text()


def test_xdist_shares_them_where_it_is_installed() -> None:
    (line,) = gpu_tests.commands(["a.py"], 14, xdist=True)
    assert line[line.index("-n") + 1] == "14"
    assert len(gpu_tests.commands(["a.py"], 14, xdist=False)) == 14


# ncu and compute-sanitizer.


def test_ncu_reports_become_tables(tmp_path: Path) -> None:
    report = tmp_path / "ncu-phi.csv"
    report.write_text(
        '"ID","Kernel Name","gpu__time_duration.sum"\n"","","us"\n"0","flash_attention_fwd","9"\n'
    )
    text = ncu.tables([report])
    assert text.splitlines()[0] == "## phi"
    assert "| flash_attention_fwd | 9 |" in text
    command = ncu.command("phi", report)
    assert command[0] == "ncu" and str(report) in command


def test_ncu_that_measures_nothing_does_not_end_the_rest(tmp_path, monkeypatch, capsys) -> None:
    """Where the driver forbids counters."""
    fake = tmp_path / "ncu"
    fake.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-file ]; do shift; done\n'
        'case "$2" in *swin*) echo "==WARNING== No kernels were profiled." >"$2"; exit 0;; esac\n'
        'printf "\\"Kernel Name\\"\\n\\"\\"\\n\\"a_kernel\\"\\n" >"$2"\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert ncu.main([str(tmp_path / "out")]) == 1
    assert "swin-t-s1: lines: expected" in capsys.readouterr().err
    text = (tmp_path / "out" / "ncu.md").read_text()
    assert "## phi" in text and "## swin-t-s1" not in text


def test_memcheck_runs_the_small_cases(tmp_path: Path, monkeypatch) -> None:
    fake = tmp_path / "compute-sanitizer"
    ran = tmp_path / "ran"
    fake.write_text(f'#!/bin/sh\necho "$@" >>{ran}\ntouch {tmp_path / "out.jsonl"}\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert memcheck.main([str(tmp_path / "out.jsonl")]) == 0
    lines = ran.read_text().splitlines()
    assert len(lines) == memcheck.CASES and all("kns=attention" in line for line in lines)


@pytest.mark.parametrize("module", [search, ncu, memcheck, host, peers])
def test_gpu_programs_say_what_they_lack(module, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ncu.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert module.main([str(tmp_path / "target")]) == 1
    assert re.search("wants a GPU|finds no GPU|is not installed", capsys.readouterr().err)


def test_records_are_json(tmp_path: Path) -> None:
    records.append(tmp_path / "r", {"launch": Launch(1, 2, 3, 4)})
    assert json.loads((tmp_path / "r").read_text()) == {"launch": [1, 2, 3, 4]}
