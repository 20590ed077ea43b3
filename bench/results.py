"""What was measured, and its two forms in files: JSON of a run, CSV of all runs of a machine."""

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
from bench.contestant import OURS
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


def machine_file() -> Path:
    """Where the measurements of this machine are kept in the repository."""
    here = machine()
    name = here["gpu"] or f"{here['processor']} {here['cores']} cores"
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
    """Adds a line for each contestant of each row; a new file gets a header above them."""
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
    """As Linux names it, with family and model, since some names are those of many."""
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
