"""The report of a run, and `python -m bench report`, which makes it again from what is kept."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench.contestant import is_installed
from bench.results import Results, read_json, write_json
from bench.tables import markdown


def write_report(folder: Path, results: Results) -> Path:
    """Writes results.json, report.md and, where matplotlib is, report.html; returns the best."""
    write_json(folder / "results.json", results)
    report = folder / "report.md"
    report.write_text(markdown(results) + "\n")
    if is_installed("matplotlib"):
        from bench.html import page

        report = folder / "report.html"
        report.write_text(page(results))
    return report


def main(arguments: Sequence[str]) -> int:
    """Makes the report of kept results; returns 0."""
    parser = argparse.ArgumentParser(
        prog="python -m bench report",
        description="Makes the report of a run afresh, or of one that did not end.",
    )
    parser.add_argument("results", type=Path, help="the results.json of python -m bench --out")
    parser.add_argument("--out", type=Path, help="folder for it (default: where RESULTS lies)")
    options = parser.parse_args(arguments)
    try:
        results = read_json(options.results)
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.error(f"{options.results}: not the results of a run: {error!r}")
    folder = options.out or options.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    print(f"report: {write_report(folder, results)}")
    return 0
