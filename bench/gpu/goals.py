"""The goal table: python -m bench.gpu.goals FOLDER.

Every goal in bfloat16, forward, and forward with backward, each call checked against float64 and
timed as a CUDA graph: ours, torch's attention by each of its backends, and other peers. Then ours
with other launches than those that ship, and last what must compile first. FOLDER/goals.jsonl gets
a record of each, FOLDER/goals.md is the table of them so far, beside what predict.py expected if it
has run, and FOLDER/ceilings.json has the rates of matrix products and of memory that the table's
limits are taken from.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from bench.contestant import OURS, Contestant
from bench.gpu import launches, predict, records, trials
from bench.gpu.cases import GOALS, MODES, Goal
from bench.gpu.launches import Noted
from bench.gpu.records import Record
from bench.gpu.trials import Timer
from bench.measure import Ceilings, Work, clock_rate, measure_ceilings
from vlmfast.kernels import launch
from vlmfast.tables import markdown_table

CEILING_DTYPE = "bfloat16"
CEILING_SIZE = 8192

Key = tuple[str, str, str]  # goal, mode, contestant


def key_of(record: Record) -> Key:
    return record["goal"], record["mode"], record["contestant"]


def contests(goals: Sequence[Goal], compiles: bool) -> Iterator[tuple[Goal, str, Contestant]]:
    """Goal after goal, those that compile first or all others."""
    for goal in goals:
        for mode in MODES:
            for contestant in goal.family.contestants:
                if contestant.compiles == compiles:
                    yield goal, mode, contestant


class Table:
    """Trials of goals, recorded one by one; what is recorded already is not tried again.

    Args:
        folder: for goals.jsonl and goals.md, and where ahead.jsonl is.
        device: that computes.
        timer: of a call.
        resumes: keep what the file has.
    """

    def __init__(
        self,
        folder: Path,
        device: str = "cuda",
        timer: Timer = trials.graph_timer,
        resumes: bool = False,
    ):
        self.folder = folder
        self.device = device
        self.timer = timer
        self.ceilings: Ceilings | None = None
        self.file = folder / "goals.jsonl"
        self.records = trials.begun(self.file, resumes)

    def contest(self, goal: Goal, mode: str, contestant: Contestant, name: str = "") -> None:
        """One trial; `name` is what it is called instead of the contestant's."""
        key = (goal.name, mode, name or contestant.name)
        if key in map(key_of, self.records):
            return
        try:
            record = trials.tried(goal, mode, contestant, self.device, self.timer)
        except trials.ContextLost as error:
            refused = {"refused": f"out of bounds: {error}"[:300]}
            self._add({**dict(zip(("goal", "mode", "contestant"), key, strict=True)), **refused})
            raise
        self._add({**record, "contestant": key[2]})

    def alternatives(self, goal: Goal, skipped: set[tuple[str, str, launch.Launch]]) -> None:
        """Our call as it trains with other launches of its kernels, one at a time."""
        mode = MODES[-1]
        timed = {key_of(record) for record in self.records if "median_us" in record}
        if (goal.name, mode, OURS) not in timed:
            return
        for shape, shipped in launched(goal, mode, self.device).items():
            if launches.is_minor(shape.kernel):
                continue
            for other in launches.alternatives(shipped):
                if (goal.name, shape.kernel, other) not in skipped:
                    with launch.override(**{shape.kernel: other}):
                        name = f"{OURS}, {shape.kernel} {tuple(other)} for {tuple(shipped)}"
                        self.contest(goal, mode, goal.ours, name)

    def _add(self, record: Record) -> None:
        print(record, flush=True)
        self.records.append(record)
        records.append(self.file, record)
        predicted = predict.read(self.folder)
        records.rewrite(self.folder / "goals.md", summary(self.records, self.ceilings, predicted))


def launched(goal: Goal, mode: str, device: str) -> Noted:
    """The launches that our call of a goal takes as it ships."""
    with launches.noted() as found:
        try:
            inputs = trials.prepared(goal.name, mode, device).inputs[0]
            goal.family.calls.make_call(goal.ours.prepare(goal.case), inputs, mode)()
        except Exception as error:  # a trial of it has said so, or will
            print(f"{goal.name}: {error}", flush=True)
            return {}
    return found


def summary(
    found: Sequence[Record],
    ceilings: Ceilings | None = None,
    predicted: Mapping[tuple[str, str], float] | None = None,
) -> str:
    """Tables in Markdown: goals against their best peer, then every trial."""
    timed: dict[tuple[str, str], list[Record]] = {}
    for record in found:
        if "median_us" in record:
            timed.setdefault((record["goal"], record["mode"]), []).append(record)
    rows = (goal_row(place, ceilings, predicted or {}) for place in timed.values())
    header = ["goal", "shape", "mode", "limit, us", "predicted, us", "ours, us"]
    header += ["best peer", "its us", "ratio"]
    tables = [
        markdown_table([*header, "other launches"], [row for row in rows if row]),
        markdown_table(["goal", "mode", "who", "us, or why not", ""], list(map(trial_row, found))),
    ]
    return "\n\n".join(["# Goals", *tables, ""])


def trial_row(record: Record) -> list[str]:
    result = f"{record['median_us']:.1f}" if "median_us" in record else record["refused"]
    graph = "" if record.get("graph", True) else "not as a graph"
    return [*key_of(record), result, graph]


def goal_row(
    found: Sequence[Record],
    ceilings: Ceilings | None,
    predicted: Mapping[tuple[str, str], float],
) -> list[str] | None:
    """What the table says of the times of one goal and mode; None without ours or a peer's."""
    times = {record["contestant"]: record["median_us"] for record in found}
    peers = {name: x for name, x in times.items() if not name.startswith(OURS)}
    if OURS not in times or not peers:
        return None
    record = found[0]
    limit = ""
    if ceilings is not None:
        work = Work(record["flops"], record["bytes"])
        limit = f"{1e6 * ceilings.least_seconds(work, CEILING_DTYPE):.1f}"
    best = min(peers, key=lambda name: peers[name])
    ours, ratio = f"{times[OURS]:.1f}", f"{peers[best] / times[OURS]:.2f}"
    expected = predicted.get((record["goal"], record["mode"]))
    place = [record["goal"], record["shape"], record["mode"], limit]
    place.append("" if expected is None else f"{expected:.1f}")
    return [*place, ours, best, f"{peers[best]:.1f}", ratio, _best_of_ours(times)]


def _best_of_ours(times: dict[str, float]) -> str:
    """The launch that beats the shipped one by most, if one does by more than chance."""
    others = {name: x for name, x in times.items() if name.startswith(f"{OURS}, ")}
    best = min(others, key=lambda name: others[name], default=OURS)
    if times[best] >= launches.GAIN * times[OURS]:
        return ""
    return f"{best.removeprefix(f'{OURS}, ')}: {times[best]:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 if a call of ours as it ships has no time."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.goals", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(trials.RESUME, action="store_true", help="go on where a process ended")
    options = parser.parse_args(arguments)
    table = Table(options.folder, resumes=options.resume)
    try:
        table.ceilings = ceilings_of(options.folder)
        fill(table, GOALS)
    except trials.ContextLost:
        trials.start_again("bench.gpu.goals", arguments)
    return int(any("refused" in x for x in table.records if x["contestant"] == OURS))


def ceilings_of(folder: Path) -> Ceilings:
    """Rates of large matrix products and of memory; those of exponentials are not looked at."""
    ceilings = measure_ceilings([CEILING_DTYPE], CEILING_SIZE, trials.SECONDS, "cuda")
    found = {"device": torch.cuda.get_device_name(), "mhz": clock_rate("cuda"), **asdict(ceilings)}
    records.rewrite(folder / "ceilings.json", json.dumps(found, indent=1))
    return ceilings


def fill(table: Table, goals: Sequence[Goal]) -> None:
    """Every trial, the most telling ones first."""
    for contest in contests(goals, compiles=False):
        table.contest(*contest)
    skipped = launches.did_not_compile(table.folder / "ahead.jsonl")
    for goal in goals:
        table.alternatives(goal, skipped)
    for contest in contests(goals, compiles=True):
        table.contest(*contest)


if __name__ == "__main__":
    sys.exit(main())
