"""Rows of a benchmark as Markdown tables, as JSON, from which a report can be made, and as CSV."""

import csv
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

import vlmfast
from bench.contestant import OURS, is_installed
from bench.families import FAMILIES
from bench.measure import Ceilings, Timing, Verdict, Work
from vlmfast.ops.common import EXTENSION_ERROR

# Whose versions are told beside torch's: Triton, and where peers come from.
LIBRARIES = (
    "triton",
    "torchvision",
    "timm",
    "transformers",
    "open_clip_torch",
    "flamingo-pytorch",
    "xformers",
    "flash-attn",
    "inf-cl",
)


@dataclass
class Row:
    """One case in one dtype and mode.

    Attributes:
        backend: what our own call runs on.
        verdicts: error and budget of every contestant that ran.
        timings: of every contestant that is right; empty where ours is not.
        refusals: why the others have no time.
        noise: how far the median of our own call raced against itself is from 1.
        clock_mhz: of the fastest core, after the race.
        peak_bytes: what each contestant's call added to the memory of a fresh process.
        launch: on a GPU, seconds of the CPU that each contestant's call takes without a graph.
        swept: it is one of several that differ in one size.
    """

    family: str
    case: str
    shape: str
    source: str
    dtype: str
    mode: str
    device: str
    backend: str
    work: Work
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    noise: float | None = None
    clock_mhz: float | None = None
    peak_bytes: dict[str, int] = field(default_factory=dict)
    launch: dict[str, float] = field(default_factory=dict)
    swept: bool = False

    def ratio(self, peer: str) -> float | None:
        """How many times longer the peer took, or None where one of the two has no time."""
        if peer not in self.timings or OURS not in self.timings:
            return None
        return self.timings[peer].median / self.timings[OURS].median

    @property
    def best_peer(self) -> str | None:
        """The fastest of the others."""
        peers = [name for name in self.timings if name != OURS]
        return min(peers, key=lambda name: self.timings[name].median, default=None)


@dataclass
class Results:
    """What a run has measured, all that its report needs.

    Attributes:
        rows: of its contests.
        ceilings: of the machine.
        left_out: contests that were not run, and why.
        machine: what the figures hold for.
    """

    rows: list[Row]
    ceilings: Ceilings
    left_out: dict[str, str] = field(default_factory=dict)
    machine: dict[str, object] = field(default_factory=lambda: machine())

    @property
    def contests(self) -> list[Row]:
        """The rows that are no part of a sweep."""
        return [row for row in self.rows if not row.swept]

    @property
    def sweeps(self) -> dict[str, list[Row]]:
        """The others, by family."""
        return by_family([row for row in self.rows if row.swept])


def by_family(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each family, in the order in which they came."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return families


Table = tuple[list[str], list[list[str]]]  # header and body


def summary(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    """Our call against the best peer, and against the machine."""
    header = ["case", "shape", "dtype", "mode", f"{OURS} ms", "best peer", "its ms"]
    header += ["times as fast", "of the limit", "peak MB", "its peak MB"]
    return header, [_summary_cells(row, ceilings) for row in rows]


def _summary_cells(row: Row, ceilings: Ceilings) -> list[str]:
    ours, best = row.timings.get(OURS), row.best_peer
    cells = [row.case, row.shape, row.dtype, row.mode]
    if ours is None:
        return [*cells, "WRONG", *[""] * 6]
    cells += [_ms(ours.median), best or "", _ms(row.timings[best].median) if best else ""]
    ratio = row.ratio(best) if best else None
    cells += [f"{ratio:.2f} ± {row.noise:.1%}" if ratio and row.noise is not None else ""]
    fraction = ceilings.least_seconds(row.work, row.dtype) / ours.median
    cells += [f"{fraction:.0%} {ceilings.binding(row.work, row.dtype)}"]
    return [*cells, *(_megabytes(row.peak_bytes.get(name)) for name in (OURS, best or ""))]


def details(rows: Sequence[Row], ceilings: Ceilings) -> Table:
    """Every contestant's time with p20 and p80, and what the summary rests on."""
    names = list(dict.fromkeys(name for row in rows for name in row.timings))
    header = ["case", "dtype", "mode", "backend", *(f"{name} ms" for name in names)]
    launched = any(row.launch for row in rows)
    header += [f"launch of {name} µs" for name in names if launched]
    header += ["GFLOP", "least MB", "GFLOP/s", "GB/s", "error", "budget"]
    body = []
    for row in rows:
        ours, work, verdict = row.timings.get(OURS), row.work, row.verdicts[OURS]
        cells = [row.case, row.dtype, row.mode, row.backend]
        cells += [_spread(row.timings.get(name)) for name in names]
        if launched:
            cells += [f"{row.launch[x] * 1e6:.0f}" if x in row.launch else "" for x in names]
        cells += [f"{work.flops / 1e9:.3g}", f"{work.least_bytes / 1e6:.3g}"]
        cells += [f"{work.flops / ours.median / 1e9:.0f}" if ours else ""]
        cells += [f"{work.least_bytes / ours.median / 1e9:.1f}" if ours else ""]
        body.append([*cells, f"{verdict.error:.1e}", f"{verdict.budget:.1e}"])
    return header, body


def _spread(timing: Timing | None) -> str:
    if timing is None:
        return ""
    return f"{_ms(timing.median)} ({_ms(timing.p20)} to {_ms(timing.p80)})"


def notes(results: Results) -> list[str]:
    """What the tables rest on: who or what is missing and why, and the machine's ceilings."""
    rows, ceilings = results.rows, results.ceilings
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.refusals.items():
            where = missing.setdefault((row.family, name, reason), [])
            where.append(f"{row.case} {row.dtype} {row.mode}")
    raced = {family: len(members) for family, members in by_family(rows).items()}
    lines = [f"{x}: {FAMILIES[x].remark}" for x in raced if FAMILIES[x].remark]
    for (family, name, reason), contests in missing.items():
        everywhere = len(contests) == raced[family] > 1
        lines.append(
            f"{f'all of {family}' if everywhere else ', '.join(contests)}, {name}: {reason}"
        )
    reasons: dict[tuple[str, str], list[str]] = {}
    for contest, reason in sorted(results.left_out.items()):
        family, _, name = contest.partition(" ")
        reasons.setdefault((family, reason), []).append(name)
    for (family, reason), names in reasons.items():
        lines.append(f"{reason} for {family}: {', '.join(names)}")
    for dtype, rate in ceilings.flops.items():
        source = ceilings.flops_source[dtype]
        lines.append(f"ceiling matrix, {dtype}: {rate / 1e9:.0f} GFLOP/s ({source})")
    lines.append(f"ceiling memory: {ceilings.bandwidth / 1e9:.1f} GB/s (copy of 256 MiB)")
    lines.append(f"ceiling exp: {ceilings.exps / 1e9:.2f} G/s (torch.exp, float32, in cache)")
    return lines


def markdown(results: Results) -> str:
    """A table for each family, the sweeps, and below them what they rest on."""
    lines = [*facts(results), ""]
    for suffix, some in (("", by_family(results.contests)), (", sweep", results.sweeps)):
        for family, members in some.items():
            found = summary(members, results.ceilings), details(members, results.ceilings)
            lines += [f"## {family}{suffix}", "", *_markdown_table(found[0])]
            lines += ["", "Every contestant, p20 to p80 in brackets:", ""]
            lines += [*_markdown_table(found[1]), ""]
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join(lines)


def facts(results: Results) -> list[str]:
    """What was measured and where, and how the tables are to be read."""
    here = results.machine.items()
    told = ", ".join(f"{name} {value}" for name, value in here if value is not None)
    return [
        told,
        "",
        "Medians of interleaved runs. ± is how far the ratio was off when our call raced itself. "
        "The limit is the nearest of this machine's ceilings: matrix products, memory, exp.",
    ]


def _markdown_table(table: Table) -> list[str]:
    header, body = table
    return [_line(header), _line(["---"] * len(header)), *map(_line, body)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def write_json(path: Path, results: Results) -> None:
    """Writes everything that was measured, in seconds, bytes and operations."""
    path.write_text(json.dumps(asdict(results), indent=1) + "\n")


def read_json(path: Path) -> Results:
    """What `write_json` wrote; ValueError, KeyError or TypeError where that is not what it is."""
    document = json.loads(path.read_text())
    rows = []
    for found in document.pop("rows"):
        row = {**found, "work": Work(**found["work"])}
        for name, kind in (("verdicts", Verdict), ("timings", Timing)):
            row[name] = {who: kind(**values) for who, values in found[name].items()}
        rows.append(Row(**row))
    return Results(rows, Ceilings(**document.pop("ceilings")), **document)


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


def machine_file() -> Path:
    """Where the measurements of this machine are kept in the repository."""
    facts = machine()
    name = facts["gpu"] or f"{facts['processor']} {facts['cores']} cores"
    slug = re.sub(r"[^a-z0-9]+", "-", str(name).lower()).strip("-")
    return Path(__file__).resolve().parent / "results" / f"{slug}.csv"


_OF_ROW = ("family", "case", "shape", "dtype", "mode", "device", "backend", "clock_mhz", "noise")


def columns() -> list[str]:
    """Of the CSV: a line says by itself what was measured, how, and on which machine."""
    parts = (field.name for part in (Timing, Verdict, Work) for field in fields(part))
    last = ("limit", "of_limit", "peak_bytes", "launch")
    return ["date", *machine(), *_OF_ROW, "contestant", *parts, *last]


def check_csv(path: Path) -> None:
    """Raises ValueError if there is such a file and it has other columns."""
    if path.exists():
        with path.open(newline="") as file:
            found = next(csv.reader(file), [])
        if found != columns():
            raise ValueError(f"{path}: expected the columns {columns()}, got {found}")


def append_csv(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Adds a line for each contestant of each row; the header, too, to a new file."""
    check_csv(path)
    here = {"date": datetime.date.today().isoformat(), **machine()}
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns(), lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({**here, **line} for row in rows for line in _flat(row, ceilings))


def _flat(row: Row, ceilings: Ceilings) -> Iterator[dict[str, object]]:
    least = ceilings.least_seconds(row.work, row.dtype)
    for contestant, timing in row.timings.items():
        yield {
            **{name: getattr(row, name) for name in _OF_ROW},
            "contestant": contestant,
            **asdict(timing),
            **asdict(row.verdicts[contestant]),
            **asdict(row.work),
            "limit": ceilings.binding(row.work, row.dtype),
            "of_limit": round(least / timing.median, 4),
            "peak_bytes": row.peak_bytes.get(contestant),
            "launch": row.launch.get(contestant),
        }


def machine() -> dict[str, object]:
    """What the figures hold for."""
    return {
        "processor": _processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_isa": torch.ops.vlmfast.cpu_isa() if EXTENSION_ERROR is None else None,
        "commit": _commit(),
        "vlmfast": vlmfast.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in LIBRARIES},
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Of this checkout, with a + where something in it is not committed; None without git."""
    sources = (".", ":!bench/results")  # what is measured does not depend on what has been
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--", *sources) else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    """As Linux names it; family and model as well, since some names are those of many."""
    told: dict[str, str] = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    for line in lines:
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    if "model name" not in told:
        return platform.machine()
    return f"{told['model name']} (family {told.get('cpu family')}, model {told.get('model')})"
