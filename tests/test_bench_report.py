"""The report of a run, and the results that are kept."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest

from bench import __main__ as command_line
from bench.contestant import OURS
from bench.families import FAMILIES
from bench.html import page
from bench.measure import Timing, Verdict
from bench.results import Results, Row, check_csv, machine_file, write_json
from bench.tables import markdown, notes
from tools.bench_samples import CEILINGS, WORK

ROOT = Path(__file__).resolve().parent.parent


def test_the_page_draws_sweeps_and_says_who_wins(tmp_path: Path, capsys) -> None:
    sweep = FAMILIES["flash_attention"].sweep
    rows = []
    for (_, case), ratio in zip(sweep.cases, itertools.count(1), strict=False):
        row = Row(
            "flash_attention", case.name, case.shape, "", "float32", "fwd", "cpu", "cpu", WORK
        )
        times = {OURS: 1e-3 * ratio, "torch SDPA": 2e-3 * ratio}
        row.timings = {name: Timing(t, 0.9 * t, 1.1 * t, 9) for name, t in times.items()}
        row.verdicts = {OURS: Verdict(1e-7, 2e-7)}
        row.peak_bytes = {OURS: 10**6}
        row.noise, row.launch = 0.01, {OURS: 5e-6}
        row.refusals = {"flash-attn": "not installed"}
        rows += [row, replace(row, swept=True)]
    results = Results(rows, CEILINGS, {"models vit fwd": "no time was left"})
    text = page(results)
    assert text.count("<svg") == 3
    assert "Faster than the best peer in 8 of 8 contests; 2.00 to 2.00 times as fast" in text
    assert "2.00 ± 1.0%" in text and "launch of vlmfast µs" in text
    assert "all of flash_attention, flash-attn: not installed" in text
    assert "no time was left for models: vit fwd" in text

    # Of results that are kept, another machine makes the same report.
    results.machine["processor"] = "of another machine"
    write_json(tmp_path / "results.json", results)
    assert command_line.main(["report", str(tmp_path / "results.json")]) == 0
    assert (tmp_path / "report.html").read_text() == page(results)
    assert (tmp_path / "report.md").read_text() == markdown(results) + "\n"
    assert "of another machine" in page(results) and "of another machine" in markdown(results)
    (tmp_path / "broken.json").write_text('{"rows": []}')
    with pytest.raises(SystemExit):
        command_line.main(["report", str(tmp_path / "broken.json")])
    assert "broken.json: not the results of a run" in capsys.readouterr().err


def test_the_report_says_what_else_a_family_gains_from() -> None:
    sizes = ("", "", "", "float32", "fwd", "cpu", "cpu", WORK)
    rows = [Row("layers", *sizes), Row("flash_attention", *sizes)]
    told = notes(Results(rows, CEILINGS))
    assert [x for x in told if "inference=True" in x] == [f"layers: {FAMILIES['layers'].remark}"]


def test_rows_are_not_appended_to_another_table(tmp_path: Path, capsys) -> None:
    history = tmp_path / "history.csv"
    history.write_text("date,case\n")
    with pytest.raises(SystemExit) as stop:
        command_line.main(["flash_attention", "--filter", "vit-h14", "--append", str(history)])
    assert stop.value.code == 2
    assert "expected the columns" in capsys.readouterr().err
    assert history.read_text() == "date,case\n"


def test_kept_results_have_the_columns_of_today() -> None:
    folder = ROOT / "bench" / "results"
    assert machine_file().parent == folder
    for path in folder.glob("*.csv"):
        check_csv(path)
