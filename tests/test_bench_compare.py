"""python -m bench compare: what changed beyond chance."""

import json
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench import __main__ as command_line
from bench.compare import changes, contests_lost
from bench.contestant import OURS, Contestant
from bench.flash_attention.cases import AttentionCase
from bench.measure import Timing, Verdict
from bench.results import Results, Row, append_csv, machine, write_json
from tools.bench_samples import CEILINGS, SDPA, SELF, WORK, raced


def recorded(ours: float, peer: float, spread: float = 0.01) -> dict:
    """A run of two contests, as results.json holds it; times in seconds."""
    rows = [
        row_of("steady", 1e-3, 2e-3, spread),
        row_of("changing", ours, peer, spread),
    ]
    return {"machine": machine(), "ceilings": {}, "rows": rows}


def row_of(name: str, ours: float, peer: float, spread: float) -> dict:
    def timing(median: float) -> dict:
        half = spread * median
        return {"median": median, "p20": median - half, "p80": median + half, "samples": 50}

    timings = {OURS: timing(ours), "torch SDPA": timing(peer)}
    keys = {"family": "flash_attention", "case": name, "dtype": "float32", "mode": "fwd"}
    return {**keys, "device": "cpu", "timings": timings, "noise": 0.005}


@pytest.mark.parametrize(
    ("ours", "peer", "spread", "verdict"),
    [
        (1e-3, 2e-3, 0.01, ""),
        (1.2e-3, 2e-3, 0.01, "SLOWER"),
        (0.8e-3, 2e-3, 0.01, "faster"),
        (1.2e-3, 2.4e-3, 0.01, ""),  # so is the peer: the machine is slower today
        (1e-3, 1.6e-3, 0.01, "SLOWER"),  # the machine is faster today, our call is not
        (1.2e-3, 2e-3, 0.9, ""),  # lost in the spread of the samples
    ],
)
def test_compare(tmp_path, capsys, ours: float, peer: float, spread: float, verdict: str) -> None:
    before, after = recorded(1e-3, 2e-3), recorded(ours, peer, spread)
    steady, changing = changes(before, after)
    assert (steady.verdict, changing.verdict) == ("", verdict)
    paths = []
    for name, document in (("before", before), ("after", after)):
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(document))
    assert command_line.main(["compare", *map(str, paths)]) == int(verdict == "SLOWER")
    assert verdict in capsys.readouterr().out


def slowed(name: str, milliseconds: float) -> Contestant:
    """Right attention that waits first."""

    def prepare(case: AttentionCase):
        attention = SDPA.prepare(case)

        def slow(*tensors: torch.Tensor) -> torch.Tensor:
            time.sleep(milliseconds * 1e-3)
            return attention(*tensors)

        return slow

    return Contestant(name, lambda case, dtype: None, prepare)


def test_compare_finds_a_planted_slow_down() -> None:
    documents = []
    for milliseconds in (2.0, 200.0):
        contestants = (slowed(OURS, milliseconds), slowed("peer", 20.0))
        row = raced(SELF, "float32", "fwd", contestants)
        documents.append({"machine": {}, "rows": [asdict(row)]})
    first, slower = documents
    assert changes(first, slower)[0].verdict == "SLOWER"
    assert changes(slower, first)[0].verdict == "faster"
    lost = {"machine": {}, "rows": [{**slower["rows"][0], "timings": {}}]}
    assert contests_lost(first, lost) == ["flash_attention tiny float32 fwd"]


def test_compare_knows_that_a_race_may_be_quiet_by_luck() -> None:
    """All of a run was noisy, and one contest happened to equal itself."""
    first, second = recorded(1e-3, 2e-3), recorded(1.1e-3, 2e-3)
    assert changes(first, second)[1].verdict == "SLOWER"
    for document in (first, second):
        steady, changing = document["rows"]
        document["rows"] = [{**steady, "case": f"{n}", "noise": 0.06} for n in range(3)]
        document["rows"].append(changing)
    assert changes(first, second)[-1].verdict == ""


def test_compare_holds_a_device_against_itself() -> None:
    first, second = recorded(1e-3, 2e-3), recorded(1e-3, 2e-3)
    for row in second["rows"]:
        row["device"] = "cuda"
    assert not changes(first, second)


def test_compare_names_what_went_wrong_and_counts_what_is_gone(tmp_path: Path, capsys) -> None:
    first, second = recorded(1e-3, 2e-3), recorded(1e-3, 2e-3)
    second["rows"] = [{**second["rows"][0], "timings": {}, "noise": None}]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, document in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(document))
    assert command_line.main(["compare", *map(str, paths)]) == 1
    text = capsys.readouterr().out
    assert "flash_attention steady float32 fwd: no right result any more" in text
    assert "1 contests of the first run are not in the second" in text


@pytest.mark.parametrize("text", ["[1]", '{"machine": {}, "rows": [{}]}', "{"])
def test_compare_refuses_what_is_no_result(tmp_path: Path, capsys, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as stop:
        command_line.main(["compare", str(path), str(path)])
    assert stop.value.code == 2
    assert "results.json: not the results of a run" in capsys.readouterr().err


def timed_row(name: str, milliseconds: float) -> Row:
    row = Row("flash_attention", name, "", "", "float32", "fwd", "cpu", "cpu", WORK)
    for contestant, seconds in ((OURS, milliseconds * 1e-3), ("torch SDPA", 3e-3)):
        row.timings[contestant] = Timing(seconds, 0.99 * seconds, 1.01 * seconds, 50)
        row.verdicts[contestant] = Verdict(1e-7, 2e-7)
    row.noise = 0.005
    return row


def test_compare_takes_the_latest_runs_of_kept_results(tmp_path: Path, capsys) -> None:
    kept, now = tmp_path / "machine.csv", tmp_path / "results.json"
    for milliseconds in (9.0, 1.0):  # the latter is what counts
        append_csv(kept, [timed_row("steady", 1.0), timed_row("changing", milliseconds)], CEILINGS)
    rows = [timed_row("steady", 1.0), timed_row("changing", 2.0)]
    write_json(now, Results(rows, CEILINGS))
    assert command_line.main(["compare", str(kept), str(now)]) == 1
    text = capsys.readouterr().out
    assert "| changing | float32 | fwd | 1 | 2 | torch SDPA | 2.000 |" in text
    assert "1 of 2 contests are slower" in text
    assert "before" not in text.partition("| case |")[0]  # the machine is the same
    append_csv(kept, rows, CEILINGS)
    assert command_line.main(["compare", str(kept), str(now)]) == 0


def test_compare_wants_two_runs_of_the_same_contests(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    path.write_text(json.dumps(recorded(1e-3, 2e-3)))
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({"machine": {}, "rows": []}))
    for arguments in (
        [str(path), str(empty)],
        [str(path), str(tmp_path / "none.json")],
        [str(path)],
    ):
        with pytest.raises(SystemExit) as stop:
            command_line.main(["compare", *map(str, arguments)])
        assert stop.value.code == 2
