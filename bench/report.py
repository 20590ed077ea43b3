"""Rows of a benchmark as a Markdown table and as JSON."""

import json
import os
import platform
from collections.abc import Sequence
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
    """

    case: str
    shape: str
    source: str
    dtype: str
    mode: str
    backend: str
    work: Work
    verdicts: dict[str, Verdict] = field(default_factory=dict)
    timings: dict[str, Timing] = field(default_factory=dict)
    refusals: dict[str, str] = field(default_factory=dict)
    noise: float | None = None

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


def markdown(rows: Sequence[Row], peers: Sequence[str], ceilings: Ceilings) -> str:
    """The table, and below it what its columns rest on."""
    header = ["case", "shape", "dtype", "mode", "backend", f"{OURS} ms", "p20 to p80"]
    for peer in peers:
        header += [f"{peer} ms", f"x {peer}"]
    header += [
        "best peer",
        "x best",
        "noise",
        "GFLOP",
        "least MB",
        "GFLOP/s",
        "of ceiling",
        "error",
        "budget",
    ]

    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line(_cells(row, peers, ceilings)) for row in rows]
    lines.append("")
    for row in rows:
        for name, reason in row.refusals.items():
            lines.append(f"- {row.case} {row.dtype} {row.mode}, {name}: {reason}")
    for dtype, rate in ceilings.flops.items():
        source = ceilings.flops_source[dtype]
        lines.append(f"- ceiling {dtype}: {rate / 1e9:.0f} GFLOP/s ({source})")
    lines.append(f"- ceiling memory: {ceilings.bandwidth / 1e9:.1f} GB/s (copy of 256 MiB)")
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row, peers: Sequence[str], ceilings: Ceilings) -> list[str]:
    ours = row.timings.get(OURS)
    verdict = row.verdicts[OURS]
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
    cells += [f"{row.work.flops / 1e9:.3g}", f"{row.work.least_bytes / 1e6:.3g}"]
    if ours is None:
        cells += ["", ""]
    else:
        fraction = ceilings.least_seconds(row.work, row.dtype) / ours.median
        cells += [f"{row.work.flops / ours.median / 1e9:.0f}", f"{fraction:.0%}"]
    return [*cells, f"{verdict.error:.1e}", f"{verdict.budget:.1e}"]


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def write_json(path: Path, rows: Sequence[Row], ceilings: Ceilings) -> None:
    """Writes everything that was measured, in seconds, bytes and operations."""
    document = {
        "machine": machine(),
        "ceilings": asdict(ceilings),
        "rows": [asdict(row) for row in rows],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def machine() -> dict[str, object]:
    """What the figures hold for."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vlmfast": vlmfast.__version__,
        "cpu_isa": torch.ops.vlmfast.cpu_isa(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
