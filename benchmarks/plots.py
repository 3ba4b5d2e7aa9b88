"""The plots of a results file: ratios to the baselines, shares of the floor, scaling."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.figures import BASELINES, OURS, SWEPT_SIZE, WAYS, Row, Run, ratio_text

TITLES = {
    "ratio": "How many times as fast as each baseline",
    "floor": "Share of the floor",
    "scaling": "Scaling over batch, queue length, modalities and threads",
}
# After Okabe and Ito, safe for the colour-blind.
COLOURS = dict(zip(WAYS, ("#999999", "#56b4e9", "#0072b2", "#e69f00", "#d55e00"), strict=True))
MARKERS = dict(zip(BASELINES, ("^", "o", "s"), strict=True))
STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "svg.fonttype": "none",
    # Without a salt the names of clip paths would differ from time to time.
    "svg.hashsalt": "benchmarks",
}


def draw_all(runs: Sequence[Run]) -> dict[str, str]:
    """SVG texts by the kind of plot, of those that there are rows for; the same bytes for the same rows."""
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, "backend": matplotlib.get_backend(), **STYLE}):
        figures = {"ratio": _draw_ratios(runs), "floor": _draw_floors(runs), "scaling": _draw_scaling(runs)}
        return {kind: _to_svg(figure) for kind, figure in figures.items() if figure is not None}


def _to_svg(figure: Figure) -> str:
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", bbox_inches="tight", metadata=nothing)
    # Two decimals of a point are finer than a screen.
    return re.sub(r"(\d\.\d\d)\d+", r"\1", buffer.getvalue())


def _legend(figure: Figure, handles: Iterable[Line2D]) -> None:
    figure.legend(handles=list(handles), loc="lower left", bbox_to_anchor=(0, 1), ncols=5, frameon=False)


def _dot(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", color=colour, marker=marker, label=label)


def _group_axes(labels: Sequence[str]) -> tuple[Figure, Axes]:
    """A line per group, the first on top."""
    figure = Figure(figsize=(8, 0.6 + 0.19 * len(labels)))
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    return figure, axes


def _group_label(row: Row) -> str:
    threads = f" · {row.threads} threads" if row.threads else ""
    return f"{row.op} · {row.phase} · {row.size_label} · {row.device}{threads}"


def _draw_ratios(runs: Sequence[Run]) -> Figure | None:
    """Ours over each baseline, both started in the same way."""
    labels: list[str] = []
    dots: list[tuple[int, float, Row, Row]] = []
    for group in (group for run in runs for group in run.groups().values()):
        pairs = [
            (ours, other)
            for ours in group
            for other in group
            if ours.is_ours and other.way in BASELINES and ours.launch == other.launch
        ]
        dots += [(len(labels), other.seconds / ours.seconds, ours, other) for ours, other in pairs]
        labels += [_group_label(group[0])] if pairs else []
    if not dots:
        return None
    figure, axes = _group_axes(labels)
    for position, ratio, ours, other in dots:
        filling = COLOURS[ours.way] if ours.launch == "python" else "white"
        axes.plot(ratio, position, MARKERS[other.way], color=COLOURS[ours.way], markerfacecolor=filling, markersize=5)
    axes.axvline(1, color="#52606d", linewidth=1)
    axes.set_xscale("log")
    low, high = min(dot[1] for dot in dots), max(dot[1] for dot in dots)
    axes.set_xlim(min(0.8, low / 1.2), max(1.25, high * 1.2))
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}×"))
    axes.set_xlabel("times as fast as the baseline" + _open_marks(runs))
    used_ways = {ours.way for _position, _ratio, ours, _other in dots}
    used_baselines = {other.way for _position, _ratio, _ours, other in dots}
    handles = [_dot(COLOURS[way], "o", way) for way in OURS if way in used_ways]
    handles += [_dot("#52606d", MARKERS[way], f"over {way}") for way in BASELINES if way in used_baselines]
    _legend(figure, handles)
    return figure


def _open_marks(runs: Sequence[Run]) -> str:
    has_graphs = any(row.launch == "graph" for run in runs for row in run.rows)
    return "; open marks: CUDA graphs" if has_graphs else ""


def _draw_floors(runs: Sequence[Run]) -> Figure | None:
    groups = [group for run in runs for group in run.groups().values() if group[0].share_of_floor is not None]
    if not groups:
        return None
    figure, axes = _group_axes([_group_label(group[0]) for group in groups])
    for position, group in enumerate(groups):
        for row in group:
            if row.share_of_floor is not None:
                filling = COLOURS[row.way] if row.launch == "python" else "white"
                marker = "o" if row.limited_by == "bytes" else "D"
                style = {"color": COLOURS[row.way], "markerfacecolor": filling, "markersize": 4.5}
                axes.plot(100 * row.share_of_floor, position, marker, **style)
    axes.axvline(100, color="#52606d", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 3)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g} %"))
    axes.set_xlabel("of the floor" + _open_marks(runs))
    used = {row.way for group in groups for row in group}
    limits = {row.limited_by for group in groups for row in group}
    handles = [_dot(COLOURS[way], "o", way) for way in WAYS if way in used]
    handles += [_dot("#52606d", "o", "limited by bytes")] if "bytes" in limits else []
    handles += [_dot("#52606d", "D", "limited by operations")] if "operations" in limits else []
    _legend(figure, handles)
    return figure


def _sweeps(runs: Sequence[Run]) -> dict[tuple, dict[str, dict[int, float]]]:
    """Title and axis of every panel, then seconds by way and by the size that varies; at least two sizes each."""
    panels: dict[tuple, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in (row for run in runs for row in run.rows):
        for sweep in dict.fromkeys(("threads", row.sweep)):
            value = row.threads if sweep == "threads" else row.sizes.get(SWEPT_SIZE.get(sweep))
            if value is None:
                continue
            fixed = tuple(sorted((name, size) for name, size in row.sizes.items() if name != SWEPT_SIZE[sweep]))
            threads = None if sweep == "threads" else row.threads
            panels[row.op, row.phase, row.device, sweep, fixed, threads][row.name][value] = row.seconds
    return {
        key: ways for key, ways in panels.items() if len({value for points in ways.values() for value in points}) > 1
    }


def _draw_scaling(runs: Sequence[Run]) -> Figure | None:
    panels = _sweeps(runs)
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    used = set()
    for axes, ((op, phase, device, sweep, _fixed, _threads), ways) in zip(grid.flat, panels.items(), strict=False):
        for name, points in ways.items():
            way, _, graph = name.partition(", ")
            used.add(way)
            dashes = "dashed" if graph else "solid"
            sizes = sorted(points)
            seconds = [1e3 * points[size] for size in sizes]
            axes.plot(sizes, seconds, linestyle=dashes, color=COLOURS[way], marker="o", markersize=3, linewidth=1.2)
        sizes = sorted({size for points in ways.values() for size in points})
        axes.set(xscale="log", yscale="log", title=f"{op}\n{phase}, {device}", xlabel=sweep, ylabel="ms a call")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: ratio_text(value)))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    _legend(figure, [_dot(COLOURS[way], "o", way) for way in WAYS if way in used])
    figure.tight_layout()
    return figure
