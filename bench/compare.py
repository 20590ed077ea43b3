"""`python -m bench compare BEFORE AFTER`: what changed between two runs, beyond their noise."""

import argparse
import csv
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.contestant import OURS
from bench.results import machine
from vlmfast.tables import markdown_table, milliseconds

# Of the uncertainty of a ratio: beyond three standard deviations one in 370 is chance.
DEVIATIONS = 3.0


@dataclass(frozen=True)
class Change:
    """One contest of two runs.

    Attributes:
        contest: family, case, dtype, mode and device.
        against: the contestant whose times stand for the machine's; None: the clock does.
        before: seconds of our call, then.
        after: seconds, now.
        ratio: time after over time before, each first divided by that of `against`.
        uncertainty: how far from 1 the ratio may be by chance.
    """

    contest: tuple[str, str, str, str, str]
    against: str | None
    before: float
    after: float
    ratio: float
    uncertainty: float

    @property
    def verdict(self) -> str:
        if self.ratio > 1 + self.uncertainty:
            return "SLOWER"
        return "faster" if self.ratio < 1 / (1 + self.uncertainty) else ""


def relative_deviation(timing: Mapping[str, float]) -> float:
    """The standard deviation of a median over the median, from the spread of its samples.

    p20 to p80 of a normal distribution is 1.683 deviations wide, and a median of n samples has
    sqrt(pi / 2n) of one.
    """
    deviation = (timing["p80"] - timing["p20"]) / 1.683
    return deviation * math.sqrt(math.pi / 2 / timing["samples"]) / timing["median"]


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[Change]:
    """Every contest that our own call has a time for in both documents.

    They are held against the fastest other contestant that both runs timed: it ran interleaved with
    our call, so that a machine that is slower today slows both.
    """
    earlier = {_contest(row): row for row in before["rows"]}
    usual = [_usual_noise(document["rows"]) for document in (before, after)]
    found = []
    for row in after["rows"]:
        old = earlier.get(_contest(row))
        if old is None or OURS not in old["timings"] or OURS not in row["timings"]:
            continue
        common = [name for name in old["timings"] if name != OURS and name in row["timings"]]
        against = min(common, key=lambda name: old["timings"][name]["median"], default=None)
        names = [OURS] if against is None else [OURS, against]
        variance = sum(relative_deviation(x["timings"][n]) ** 2 for x in (old, row) for n in names)
        then, now = (
            x["timings"][OURS]["median"] / (x["timings"][against]["median"] if against else 1.0)
            for x in (old, row)
        )
        noise = sum(max(x["noise"] or 0.0, u) for x, u in zip((old, row), usual, strict=True))
        found.append(
            Change(
                _contest(row),
                against,
                old["timings"][OURS]["median"],
                row["timings"][OURS]["median"],
                now / then,
                DEVIATIONS * math.sqrt(variance) + noise,
            )
        )
    return found


def _usual_noise(rows: Sequence[Mapping[str, Any]]) -> float:
    """That of a run's middle contest: in a single race a call may equal itself by luck."""
    return statistics.median([row["noise"] or 0.0 for row in rows] or [0.0])


def contests_lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Contests that our call had a time for before, and that both runs held, but has none now."""
    later = {_contest(row): row for row in after["rows"]}
    return [
        " ".join(_contest(row)[:-1])
        for row in before["rows"]
        if OURS in row["timings"]
        and _contest(row) in later
        and OURS not in later[_contest(row)]["timings"]
    ]


def _contest(row: Mapping[str, Any]) -> tuple[str, str, str, str, str]:
    return row["family"], row["case"], row["dtype"], row["mode"], row["device"]


def _read(path: Path) -> dict[str, Any]:
    """Machine and rows of a results.json, or of the latest runs that a CSV of results keeps."""
    if path.suffix != ".csv":
        document = json.loads(path.read_text())
        for row in document["rows"]:
            _contest(row), row["timings"], row["noise"]  # KeyError where they are missing
        return {"machine": document["machine"], "rows": document["rows"]}
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    told: dict[str, str] = {}  # of the machine
    names = list(machine())
    with path.open(newline="") as file:
        for line in csv.DictReader(file):
            contest = {name: line[name] for name in ("family", "case", "dtype", "mode", "device")}
            if line["contestant"] == OURS:  # the first of every race
                noise = float(line["noise"] or 0.0)
                rows[tuple(contest.values())] = {**contest, "timings": {}, "noise": noise}
            timing = {name: float(line[name]) for name in ("median", "p20", "p80", "samples")}
            rows[tuple(contest.values())]["timings"][line["contestant"]] = timing
            told = {name: line[name] for name in names}
    return {"machine": told, "rows": list(rows.values())}


def _table(found: Sequence[Change]) -> str:
    titles = ("case", "dtype", "mode", "before ms", "after ms", "against", "time ratio", "chance")
    body = []
    for change in found:
        cells = [*change.contest[1:4], milliseconds(change.before), milliseconds(change.after)]
        cells += [change.against or "the clock", f"{change.ratio:.3f}"]
        body.append([*cells, f"± {change.uncertainty:.1%}", change.verdict])
    return markdown_table([*titles, ""], body)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table; returns 1 if anything became slower beyond chance, or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench compare", description=__doc__)
    parser.add_argument(
        "before", type=Path, help="a results.json of python -m bench, or a CSV of bench/results"
    )
    parser.add_argument("after", type=Path, help="of a later run, in either form")
    options = parser.parse_args(arguments)
    documents = []
    for path in (options.before, options.after):
        try:
            documents.append(_read(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            parser.error(f"{path}: not the results of a run: {error!r}")
    before, after = documents
    for name in sorted(before["machine"].keys() | after["machine"].keys()):
        then, now = (str(x["machine"].get(name) or "none") for x in documents)
        if then != now:
            print(f"{name}: {then} before, {now} after")
    found, lost = changes(before, after), contests_lost(before, after)
    if not found and not lost:
        parser.error("the two runs have no contest in common")
    print(_table(sorted(found, key=lambda change: change.ratio, reverse=True)))
    later = {_contest(row) for row in after["rows"]}
    gone = sum(_contest(row) not in later for row in before["rows"])
    if gone:
        print(f"- {gone} contests of the first run are not in the second")
    for contest in lost:
        print(f"- {contest}: no right result any more")
    slower = [change for change in found if change.verdict == "SLOWER"]
    print(f"{len(slower)} of {len(found)} contests are slower than chance explains")
    return int(bool(slower or lost))
