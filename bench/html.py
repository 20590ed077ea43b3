"""The report as one HTML page that needs nothing else: its plots are SVG within it."""

import html
import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.cases import Sweep
from bench.measure import Ceilings
from bench.peers import OURS
from bench.report import Row, by_family, notes, table

matplotlib.rcParams["svg.hashsalt"] = "vlmfast"  # so that equal plots are equal files

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem }
table { border-collapse: collapse; font-size: 12px; display: block; overflow-x: auto }
th, td { padding: .2rem .5rem; text-align: right; border-bottom: 1px solid #ddd }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
svg { max-width: 100%; height: auto }
"""


def page(
    rows: Sequence[Row],
    sweeps: Mapping[str, tuple[Sweep, Sequence[Row]]],
    ceilings: Ceilings,
    machine: Mapping[str, object],
) -> str:
    """The whole report.

    Args:
        rows: of the contests.
        sweeps: by family, what was varied and the rows of its cases.
        ceilings: of this machine.
        machine: what the figures hold for.
    """
    parts = ["<h1>vlmfast against its peers</h1>", _facts(machine)]
    for family, members in by_family(rows).items():
        parts.append(f"<h2>{_text(family)}</h2>")
        raced = [row for row in members if row.best_peer and row.ratio(row.best_peer)]
        if raced:
            caption = "How many times longer the best peer takes, the spread of both as whiskers."
            parts += [_speed_ups(raced), f"<p>{caption}</p>"]
        if family in sweeps:
            sweep, swept = sweeps[family]
            parts += [_growth(sweep, swept), f"<p>Time and memory against {sweep.size}.</p>"]
        parts.append(_table(*table(members, ceilings)))
    parts += ["<h2>How far from the limits of this machine</h2>", _roofline(rows, ceilings)]
    parts.append("<p>Each point is one of our calls; the lines are what was measured here.</p>")
    parts.append(
        "".join(["<ul>", *(f"<li>{_text(x)}</li>" for x in notes(rows, ceilings)), "</ul>"])
    )
    head = f'<meta charset="utf-8"><title>vlmfast benchmark</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _text(value: object) -> str:
    return html.escape(str(value))


def _facts(machine: Mapping[str, object]) -> str:
    known = (f"{name} {value}" for name, value in machine.items() if value is not None)
    return f"<p>{_text(', '.join(known))}</p>"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', cells) for cells in body)}</table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _speed_ups(rows: Sequence[Row]) -> str:
    figure = Figure(figsize=(9, 0.8 + 0.26 * len(rows)))
    axes = figure.subplots()
    names, ratios, low, high = [], [], [], []
    for row in rows:
        ours, peer = row.timings[OURS], row.timings[row.best_peer or ""]
        ratio = peer.median / ours.median
        names.append(f"{row.case}  {row.dtype}  {row.mode}  (best: {row.best_peer})")
        ratios.append(ratio)
        low.append(ratio - peer.p20 / ours.p80)
        high.append(peer.p80 / ours.p20 - ratio)
    places = range(len(rows))
    colours = ["#2a7f62" if ratio >= 1 else "#b5483a" for ratio in ratios]
    axes.barh(places, ratios, xerr=(low, high), color=colours, ecolor="#555", height=0.7)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("times as fast as the best peer")
    return _svg(figure)


def _growth(sweep: Sweep, rows: Sequence[Row]) -> str:
    figure = Figure(figsize=(11, 4))
    time, memory = figure.subplots(1, 2)
    sizes = {case.name: size for size, case in sweep.cases}
    names = dict.fromkeys(name for row in rows for name in (*row.timings, *row.peak_bytes))
    for name in names:
        timed = [(sizes[r.case], r.timings[name].median * 1e3) for r in rows if name in r.timings]
        held = [(sizes[r.case], r.peak_bytes[name] / 1e6) for r in rows if name in r.peak_bytes]
        for axes, points in ((time, timed), (memory, held)):
            if points:
                width = 2.5 if name == OURS else 1.2
                axes.plot(*zip(*points, strict=True), marker="o", label=name, linewidth=width)
    dtypes = " ".join(dict.fromkeys(f"{row.dtype} {row.mode}" for row in rows))
    _logarithmic(time, sweep.size, f"ms ({dtypes})")
    _logarithmic(memory, sweep.size, "MB at the peak")
    return _svg(figure)


def _logarithmic(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("symlog" if y_label.startswith("MB") else "log")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(fontsize=8)


def _roofline(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Rate over FLOPs per byte, under the roofs of memory and of each dtype's products."""
    figure = Figure(figsize=(9, 5))
    axes = figure.subplots()
    points = [
        (row.work.flops / row.work.least_bytes, row.work.flops / row.timings[OURS].median, row)
        for row in rows
        if OURS in row.timings and row.work.flops
    ]
    reach = [x for x, _, _ in points] + [
        rate / ceilings.bandwidth for rate in ceilings.flops.values()
    ]
    left, right = min(reach) / 2, max(reach) * 2
    colours = dict(zip(ceilings.flops, ("C0", "C1", "C2"), strict=False))
    for dtype, rate in ceilings.flops.items():
        ridge = rate / ceilings.bandwidth
        roof = [left * ceilings.bandwidth / 1e9, rate / 1e9, rate / 1e9]
        axes.plot([left, ridge, right], roof, color=colours[dtype], label=f"limit, {dtype}")
    markers = dict(zip(by_family(rows), "osD^", strict=False))
    for family, marker in markers.items():
        for dtype, colour in colours.items():
            chosen = [(x, y / 1e9) for x, y, r in points if (r.family, r.dtype) == (family, dtype)]
            if chosen:
                axes.scatter(
                    *zip(*chosen, strict=True),
                    marker=marker,
                    color=colour,
                    label=f"{family}, {dtype}",
                    zorder=3,
                )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("floating-point operations for each byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    return _svg(figure)
