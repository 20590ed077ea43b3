"""Results as tables, and in words: what they hold for and what they rest on."""

from collections.abc import Sequence

from bench.contestant import OURS
from bench.families import FAMILIES
from bench.measure import Ceilings, Timing
from bench.results import Results, Row, by_family
from vlmfast.tables import markdown_table, milliseconds

HOW_TO_READ = (
    "Medians of interleaved runs. ± is how far the ratio was off when our call raced itself. "
    "The limit is the nearest of this machine's ceilings: matrix products, memory, exp."
)
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
    cells += [milliseconds(ours.median), best or ""]
    cells += [milliseconds(row.timings[best].median) if best else ""]
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
    median, p20, p80 = map(milliseconds, (timing.median, timing.p20, timing.p80))
    return f"{median} ({p20} to {p80})"


def facts(results: Results) -> str:
    """What the figures hold for: the machine, and the versions of what ran on it."""
    here = results.machine.items()
    return ", ".join(f"{name} {value}" for name, value in here if value is not None)


def notes(results: Results) -> list[str]:
    """What the tables rest on: who or what is missing and why, and the machine's ceilings."""
    rows, ceilings = results.rows, results.ceilings
    missing: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        for name, reason in row.refusals.items():
            where = missing.setdefault((row.family, name, reason), [])
            where.append(f"{row.case} {row.dtype} {row.mode}")
    raced = {family: len(members) for family, members in by_family(rows).items()}
    remarks = {name: family.remark for name, family in FAMILIES.items()}
    lines = [f"{name}: {remarks[name]}" for name in raced if remarks.get(name)]
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
    lines = [facts(results), "", HOW_TO_READ, ""]
    for suffix, some in (("", by_family(results.contests)), (", sweep", results.sweeps)):
        for family, members in some.items():
            found = summary(members, results.ceilings), details(members, results.ceilings)
            lines += [f"## {family}{suffix}", "", markdown_table(*found[0])]
            lines += ["", "Every contestant, p20 to p80 in brackets:", ""]
            lines += [markdown_table(*found[1]), ""]
    lines += [f"- {note}" for note in notes(results)]
    return "\n".join(lines)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"
