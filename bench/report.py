"""Rows of a benchmark as Markdown tables, as JSON and as CSV."""

import csv
import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import vlmfast
from bench.measure import Ceilings, Timing, Verdict, Work
from bench.peers import OURS


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


def by_family(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each family, in the order in which they came."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        families.setdefault(row.family, []).append(row)
    return families


def table(rows: Sequence[Row], ceilings: Ceilings) -> tuple[list[str], list[list[str]]]:
    """Header and body of the table of one family's rows."""
    peers = list(dict.fromkeys(name for row in rows for name in row.timings if name != OURS))
    header = ["case", "shape", "dtype", "mode", "backend", f"{OURS} ms", "p20 to p80"]
    for peer in peers:
        header += [f"{peer} ms", f"x {peer}"]
    header += ["best peer", "x best", "noise", "GFLOP", "least MB", "GFLOP/s", "GB/s"]
    header += ["of limit", "limit", "peak MB", "best peer's", "error", "budget"]
    return header, [_cells(row, peers, ceilings) for row in rows]


def notes(rows: Sequence[Row], ceilings: Ceilings) -> list[str]:
    """What the tables rest on: who is missing and why, and the machine's ceilings."""
    lines = [
        f"{row.case} {row.dtype} {row.mode}, {name}: {reason}"
        for row in rows
        for name, reason in row.refusals.items()
    ]
    for dtype, rate in ceilings.flops.items():
        source = ceilings.flops_source[dtype]
        lines.append(f"ceiling matrix, {dtype}: {rate / 1e9:.0f} GFLOP/s ({source})")
    lines.append(f"ceiling memory: {ceilings.bandwidth / 1e9:.1f} GB/s (copy of 256 MiB)")
    lines.append(f"ceiling exp: {ceilings.exps / 1e9:.2f} G/s (torch.exp, float32, in cache)")
    return lines


def markdown(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """A table for each family, and below them what they rest on."""
    lines = []
    for family, members in by_family(rows).items():
        header, body = table(members, ceilings)
        lines += [f"## {family}", "", _line(header), _line(["---"] * len(header))]
        lines += [*map(_line, body), ""]
    lines += [f"- {note}" for note in notes(rows, ceilings)]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, peers: Sequence[str], ceilings: Ceilings) -> list[str]:
    ours, work = row.timings.get(OURS), row.work
    cells = [row.case, row.shape, row.dtype, row.mode, row.backend]
    if ours is None:
        cells += ["WRONG", ""]
    else:
        cells += [_ms(ours.median), f"{_ms(ours.p20)} to {_ms(ours.p80)}"]
    for peer in peers:
        timing = row.timings.get(peer)
        cells += [_ms(timing.median) if timing else "", _times(row.ratio(peer))]
    best = row.best_peer
    cells += [best or "", _times(row.ratio(best) if best else None)]
    cells += ["" if row.noise is None else f"{row.noise:.1%}"]
    cells += [f"{work.flops / 1e9:.3g}", f"{work.least_bytes / 1e6:.3g}"]
    if ours is None:
        cells += ["", "", ""]
    else:
        fraction = ceilings.least_seconds(work, row.dtype) / ours.median
        cells += [f"{work.flops / ours.median / 1e9:.0f}"]
        cells += [f"{work.least_bytes / ours.median / 1e9:.1f}", f"{fraction:.0%}"]
    cells += [ceilings.binding(work, row.dtype)]
    cells += [_megabytes(row.peak_bytes.get(name)) for name in (OURS, best or "")]
    verdict = row.verdicts[OURS]
    return [*cells, f"{verdict.error:.1e}", f"{verdict.budget:.1e}"]


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def write_json(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Writes everything that was measured, in seconds, bytes and operations."""
    document = {
        "machine": machine(),
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")


def append_csv(path: Path, rows: Sequence[Row]) -> None:
    """Adds a line for each contestant of each row; the header, too, to a new file."""
    if rows:
        here = {"date": datetime.date.today().isoformat(), **machine()}
        lines = [{**here, **line} for row in rows for line in _flat(row)]
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerows(lines)


def _flat(row: Row) -> Iterator[dict[str, object]]:
    names = ("family", "case", "shape", "dtype", "mode", "device", "backend", "clock_mhz", "noise")
    for contestant, timing in row.timings.items():
        yield {
            **{name: getattr(row, name) for name in names},
            "contestant": contestant,
            **asdict(timing),
            **asdict(row.verdicts[contestant]),
            **asdict(row.work),
            "peak_bytes": row.peak_bytes.get(contestant),
            "launch": row.launch.get(contestant),
        }


def machine() -> dict[str, object]:
    """What the figures hold for."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vlmfast": vlmfast.__version__,
        "commit": _commit(),
        "cpu_isa": torch.ops.vlmfast.cpu_isa(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _commit() -> str | None:
    """Of this checkout, with a + where something in it is not committed; None without git."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
