"""The plots of a results file: ratios to the baselines, shares of the floor, scaling."""

from __future__ import annotations

import io
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.figures import BASELINES, OURS, SWEPT_SIZE, WAYS, Row, Run

TITLES = {
    "ratio": "How many times as fast as each baseline",
    "floor": "Share of the floor",
    "scaling": "Scaling over batch, queue length, modalities and threads",
}
# After Okabe and Ito, safe for the colour-blind.
COLOURS = dict(zip(WAYS, ("#999999", "#56b4e9", "#0072b2", "#e69f00", "#d55e00"), strict=True))
SOFT = "#52606d"
MARKERS = dict(zip(BASELINES, ("^", "o", "s"), strict=True))
LIMIT_MARKERS = {"bytes": "o", "operations": "D"}
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
    text = re.sub(r"<metadata>.*?</metadata>", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 sans-serif", text)
    # Two decimals of a point are finer than a screen.
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    return re.sub(r">\s+<", "><", text)


def _legend(figure: Figure, axes: Axes, handles: Iterable[Line2D]) -> None:
    """Above the axes, from their left end on."""
    figure.draw_without_rendering()
    left, top = axes.get_position().x0, axes.get_position().y1
    above = 0.05 / figure.get_figheight()
    figure.legend(handles=list(handles), loc="lower left", bbox_to_anchor=(left, top + above), ncols=4, frameon=False)


def _dot(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], linestyle="", color=colour, marker=marker, label=label)


def _groups(runs: Sequence[Run]) -> list[list[Row]]:
    """The sizes that no sweep varies, of an op that has sweeps alone the ones it starts from; device after device."""
    shown: dict[tuple, list[list[Row]]] = {}
    groups = [group for run in runs for group in run.groups().values()]
    for group in sorted(groups, key=lambda group: bool(group[0].sweep)):
        of_op = shown.setdefault((group[0].op, group[0].phase, group[0].device), [])
        if not group[0].sweep or not of_op:
            of_op.append(group)
    chosen = {id(group) for of_op in shown.values() for group in of_op}
    return sorted((group for group in groups if id(group) in chosen), key=lambda group: group[0].device)


Dot = tuple[float, str, str, bool]
"""Value, colour, marker, filled."""


def _dots_by_group(groups: Sequence[tuple[Row, Sequence[Dot]]], unit: str, label: str) -> tuple[Figure, Axes]:
    """A line of dots per group, the first on top, on a logarithmic axis."""
    figure = Figure(figsize=(8, 0.6 + 0.19 * len(groups)))
    axes = figure.subplots()
    axes.set_yticks(range(len(groups)), _group_labels([row for row, _dots in groups]))
    axes.set_ylim(len(groups) - 0.4, -0.6)
    series: dict[tuple, tuple[list[float], list[int]]] = defaultdict(lambda: ([], []))
    for position, (_row, dots) in enumerate(groups):
        for value, *style in dots:
            series[tuple(style)][0].append(value)
            series[tuple(style)][1].append(position)
    for (colour, marker, filled), (values, positions) in series.items():
        face = colour if filled else "white"
        axes.plot(values, positions, marker, color=colour, markerfacecolor=face, markersize=4.5)
    axes.set_xscale("log")
    low, high = (choose(value for values, _positions in series.values() for value in values) for choose in (min, max))
    steps = (1, 2, 5) if high / low < 300 else (1,)
    axes.xaxis.set_major_locator(LogLocator(10, steps))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}{unit}"))
    has_graphs = any(not filled for _colour, _marker, filled in series)
    axes.set_xlabel(label + ("; open marks: CUDA graphs" if has_graphs else ""))
    return figure, axes


def _group_labels(rows: Sequence[Row]) -> list[str]:
    has_threads = len({row.threads for row in rows if row.threads}) > 1
    return [
        f"{row.op} · {row.phase} · {row.size_label} · {row.device}"
        + (f" · {row.threads} threads" if has_threads and row.threads else "")
        for row in rows
    ]


def _draw_ratios(runs: Sequence[Run]) -> Figure | None:
    """Ours over each baseline, both started in the same way."""
    pairs = [
        [
            (ours, other)
            for ours in group
            for other in group
            if ours.is_ours and other.way in BASELINES and ours.launch == other.launch
        ]
        for group in _groups(runs)
    ]
    pairs = [of_group for of_group in pairs if of_group]
    if not pairs:
        return None
    dots = [
        (
            of_group[0][0],
            [
                (other.seconds / ours.seconds, COLOURS[ours.way], MARKERS[other.way], ours.launch == "python")
                for ours, other in of_group
            ],
        )
        for of_group in pairs
    ]
    figure, axes = _dots_by_group(dots, "×", "times as fast as the baseline")
    axes.axvline(1, color=SOFT, linewidth=1)
    ways = {row.way for of_group in pairs for pair in of_group for row in pair}
    handles = [_dot(COLOURS[way], "o", way) for way in OURS if way in ways]
    handles += [_dot(SOFT, MARKERS[way], f"over {way}") for way in BASELINES if way in ways]
    _legend(figure, axes, handles)
    return figure


def _draw_floors(runs: Sequence[Run]) -> Figure | None:
    """Every way's share of its floor."""
    groups = [[row for row in group if row.share_of_floor is not None] for group in _groups(runs)]
    groups = [group for group in groups if group]
    if not groups:
        return None
    dots = [
        (
            group[0],
            [
                (100 * row.share_of_floor, COLOURS[row.way], LIMIT_MARKERS[row.limited_by], row.launch == "python")
                for row in group
            ],
        )
        for group in groups
    ]
    figure, axes = _dots_by_group(dots, " %", "of the floor")
    axes.axvline(100, color=SOFT, linewidth=1)
    rows = [row for group in groups for row in group]
    handles = [_dot(COLOURS[way], "o", way) for way in WAYS if any(row.way == way for row in rows)]
    handles += [
        _dot(SOFT, marker, f"limited by {limit}")
        for limit, marker in LIMIT_MARKERS.items()
        if any(row.limited_by == limit for row in rows)
    ]
    _legend(figure, axes, handles)
    return figure


@dataclass(frozen=True)
class Panel:
    """What a panel shows: a computation over one of its sizes, or over threads, the others fixed."""

    op: str
    phase: str
    device: str
    sweep: str
    fixed_sizes: str
    threads: int | None


def _panels(runs: Sequence[Run]) -> dict[Panel, dict[str, dict[int, float]]]:
    """Seconds by way and size. The row that a sweep starts from may be marked as another's, or as none's."""
    panels: dict[Panel, dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    swept = set()
    for row in (row for run in runs for row in run.rows):
        for sweep, size in SWEPT_SIZE.items():
            value = row.threads if sweep == "threads" else row.sizes.get(size)
            if value is None:
                continue
            labels = zip(row.size_label.split(), row.sizes, strict=False)
            fixed = " ".join(label for label, name in labels if name != size)
            threads = None if sweep == "threads" else row.threads
            panel = Panel(row.op, row.phase, row.device, sweep, fixed, threads)
            panels[panel][row.name][value] = row.seconds
            if sweep in ("threads", row.sweep):
                swept.add(panel)

    def number_of_values(panel: Panel) -> int:
        return len({value for points in panels[panel].values() for value in points})

    return {panel: ways for panel, ways in panels.items() if panel in swept and number_of_values(panel) > 1}


def _milliseconds_shown(ways: dict[str, dict[int, float]]) -> tuple[float, float]:
    """A little more than the range of the values, and a factor of three at least, for the axis to have a number."""
    milliseconds = [1e3 * seconds for points in ways.values() for seconds in points.values()]
    middle = math.sqrt(min(milliseconds) * max(milliseconds))
    half = max(1.75, 1.2 * max(milliseconds) / middle)
    return middle / half, middle * half


def _draw_scaling(runs: Sequence[Run]) -> Figure | None:
    panels = _panels(runs)
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.5 * lines))
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes, (panel, ways) in zip(grid.flat, panels.items(), strict=False):
        for name, points in ways.items():
            way, _, graph = name.partition(", ")
            sizes = sorted(points)
            milliseconds = [1e3 * points[size] for size in sizes]
            style = "o--" if graph else "o-"
            axes.plot(sizes, milliseconds, style, color=COLOURS[way], markersize=3, linewidth=1.2)
        title = f"{panel.op}, {panel.phase}\n{panel.fixed_sizes} {panel.device}".replace("\n ", "\n")
        axes.set(xscale="log", yscale="log", xlabel=panel.sweep, ylabel="ms a call")
        axes.set_ylim(*_milliseconds_shown(ways))
        axes.set_title(title, fontsize=8)
        for axis, locator in (
            (axes.xaxis, FixedLocator(sorted({size for points in ways.values() for size in points}))),
            (axes.yaxis, LogLocator(10, (1, 2, 5))),
        ):
            axis.set_major_locator(locator)
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    figure.tight_layout()
    used = {name.partition(", ")[0] for ways in panels.values() for name in ways}
    figure.legend(
        handles=[_dot(COLOURS[way], "o", way) for way in WAYS if way in used],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=len(WAYS),
        frameon=False,
    )
    return figure
