"""The report as one HTML page that needs nothing else: its plots are SVG within it."""

import html
import io
import statistics
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from bench.contestant import OURS
from bench.families import FAMILIES
from bench.family import Sweep
from bench.measure import Ceilings
from bench.results import Results, Row, by_family
from bench.tables import HOW_TO_READ, details, facts, notes, summary

matplotlib.rcParams["svg.hashsalt"] = "vlmfast"  # so that equal plots are equal files

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
  color: #222 }
h1, h2 { line-height: 1.2 } h2 { margin-top: 3rem }
p.note, ul.note, summary { color: #555; font-size: 13px }
summary { cursor: pointer; margin: .5rem 0 }
table { border-collapse: collapse; font-size: 13px; display: block; overflow-x: auto }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
td { white-space: nowrap }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff }
svg { max-width: 100%; height: auto }
"""


def page(results: Results) -> str:
    """The whole report."""
    rows, ceilings = results.contests, results.ceilings
    parts = ["<h1>vlmfast against its peers</h1>", _in_short(rows)]
    parts += [_note(facts(results)), _note(HOW_TO_READ)]
    for family, members in by_family(rows).items():
        parts.append(f"<h2>{_text(family)}</h2>")
        raced = [row for row in members if row.best_peer and row.ratio(row.best_peer)]
        if raced:
            parts.append(_speed_ups(raced))
        parts.append(_table(*summary(members, ceilings)))
        parts.append(_folded("every contestant", _table(*details(members, ceilings))))
    if results.sweeps:
        parts.append("<h2>How cost grows</h2>")
    for family, members in results.sweeps.items():
        sweep = FAMILIES[family].sweep
        parts += [f"<h3>{_text(family)}: {_text(sweep.size)}</h3>", _growth(sweep, members)]
        tables = _table(*summary(members, ceilings)) + _table(*details(members, ceilings))
        parts.append(_folded("as a table", tables))
    parts += ["<h2>How far from the limits of this machine</h2>", _roofline(rows, ceilings)]
    parts.append(
        _note(
            "Each point is one of our calls: the closer to the line of its colour, the less is "
            "left to gain. On the slope the memory is the limit, on the level the multipliers. "
            "Some calls meet another limit first, that of exponentials: the tables name it."
        )
    )
    items = "".join(f"<li>{_text(x)}</li>" for x in notes(results))
    parts.append(f'<h2>What this rests on</h2><ul class="note">{items}</ul>')
    head = f'<meta charset="utf-8"><title>vlmfast benchmark</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _in_short(rows: Sequence[Row]) -> str:
    """The whole in one sentence."""
    ratios = sorted(ratio for row in rows if (ratio := row.ratio(row.best_peer or "")))
    wrong = sum(OURS not in row.timings for row in rows)
    faster = sum(ratio > 1 for ratio in ratios)
    text = "Nothing was raced."
    if ratios:
        text = (
            f"Faster than the best peer in {faster} of {len(ratios)} contests; {ratios[0]:.2f} to "
            f"{ratios[-1]:.2f} times as fast, {statistics.median(ratios):.2f} in the middle."
        )
    return (
        f"<p>{text}{f' {wrong} results of ours were WRONG and have no time.' if wrong else ''}</p>"
    )


def _note(text: str) -> str:
    return f'<p class="note">{_text(text)}</p>'


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{_text(title)}</summary>{content}</details>"


def _text(value: object) -> str:
    return html.escape(str(value))


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'<{tag}>{_text(cell)}</{tag}>' for cell in cells)}</tr>"

    return f"<table>{line('th', header)}{''.join(line('td', cells) for cells in body)}</table>"


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


_FASTER, _SLOWER = "#2a7f62", "#b5483a"  # green is ours wherever lines are named
_PEERS = ("#1f6feb", "#e07b39", "#8250df", "#6e7781", "#c62828", "#bf8700", "#0a7ea4", "#9a3b6a")


def _speed_ups(rows: Sequence[Row]) -> str:
    """A bar for each contest, the spread of both contestants as its whisker."""
    height = 0.8 + 0.28 * len(rows)
    figure = Figure(figsize=(9, height))
    axes = figure.subplots(gridspec_kw={"top": 1 - 0.1 / height, "bottom": 0.7 / height})
    for place, row in enumerate(rows):
        ours, peer = row.timings[OURS], row.timings[row.best_peer or ""]
        ratio, low, high = (
            peer.median / ours.median,
            peer.p20 / ours.p80,
            peer.p80 / ours.p20,
        )
        colour = _FASTER if ratio >= 1 else _SLOWER
        spread = ([max(0.0, ratio - low)], [max(0.0, high - ratio)])
        axes.barh(place, ratio, xerr=spread, color=colour, ecolor="#999", height=0.7)
        label = f"{ratio:.1f} x {row.best_peer}"
        axes.text(max(ratio, high), place, f"  {label}", va="center", fontsize=8, color="#444")
    names = [f"{row.case}  {row.dtype}  {row.mode}" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("times as fast as the best peer, which stands beside the bar")
    return _svg(figure)


def _growth(sweep: Sweep, rows: Sequence[Row]) -> str:
    figure = Figure(figsize=(11, 4.2))
    time, memory = figure.subplots(1, 2)
    sizes = {case.name: size for size, case in sweep.cases}
    names = list(dict.fromkeys(name for row in rows for name in row.timings))
    colours = dict(zip((name for name in names if name != OURS), _PEERS, strict=False))
    for name in sorted(names, key=lambda name: name == OURS):  # ours lies on top
        timed = [(sizes[r.case], r.timings[name].median * 1e3) for r in rows if name in r.timings]
        # A page of memory that was there before counts as none.
        held = [(sizes[r.case], r.peak_bytes[name] / 1e6) for r in rows if r.peak_bytes.get(name)]
        look = {"linewidth": 2.5 if name == OURS else 1.2, "color": colours.get(name, _FASTER)}
        for axes, points in ((time, timed), (memory, held)):
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", label=name, **look)
    dtypes = " ".join(dict.fromkeys(f"{row.dtype} {row.mode}" for row in rows))
    _logarithmic(time, sweep.size, f"time of a call, ms ({dtypes})")
    _logarithmic(memory, sweep.size, f"memory a call adds at its peak, MB ({dtypes})")
    return _svg(figure)


def _plain(value: float, _: object) -> str:
    return f"{value:,g}"


def _label_minor_ticks(axis: Axis, limits: tuple[float, float]) -> None:
    """Where the powers of ten alone would be one or none."""
    low, high = limits
    axis.set_minor_formatter(_plain if high < 20 * low else NullFormatter())


def _logarithmic(axes: Axes, x_label: str, title: str) -> None:
    ticks = sorted({x for line in axes.lines for x in line.get_xdata()})
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, fontsize=8)
    axes.yaxis.set_major_formatter(_plain)
    _label_minor_ticks(axes.yaxis, axes.get_ylim())
    axes.set_xlabel(x_label)
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(fontsize=8)
    else:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center")


def _roofline(rows: Sequence[Row], ceilings: Ceilings) -> str:
    """Rate over FLOPs per byte, under the roofs of memory and of each dtype's products."""
    figure = Figure(figsize=(9, 5.5))
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
    markers = dict(zip(by_family(rows), "osD^vP", strict=False))
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
    axes.xaxis.set_major_formatter(_plain)
    axes.yaxis.set_major_formatter(_plain)
    _label_minor_ticks(axes.xaxis, axes.get_xlim())
    _label_minor_ticks(axes.yaxis, axes.get_ylim())
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return _svg(figure)
