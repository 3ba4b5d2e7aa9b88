"""How the page's figures look: its colours in light and dark, and matplotlib figures as pictures inside the page."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

_PIXELS_PER_INCH = 92
# Name to (light, dark). Modalities after Okabe and Ito, series after Paul Tol's muted scheme, both colour-blind safe.
COLOURS: Mapping[str, tuple[str, str]] = {
    "paper": ("#ffffff", "#1a222b"),
    "ground": ("#f5f7fa", "#10161c"),
    "ink": ("#1f2933", "#e3e8ed"),
    "soft": ("#52606d", "#a9b5c1"),
    "faint": ("#8592a0", "#78879a"),
    "line": ("#e4e7eb", "#323d49"),
    "body": ("#b8c2cc", "#566372"),
    "accent": ("#00639c", "#5cb8f0"),
    "joint": ("#0072b2", "#3f9fe0"),
    "motion": ("#e69f00", "#efb233"),
    "bone": ("#009e73", "#25bd92"),
    "acceleration": ("#d55e00", "#ee7c2c"),
    "rotation_axis": ("#cc79a7", "#dd93bb"),
    "angular_velocity": ("#56b4e9", "#7cc7f0"),
    "joint+motion+bone": ("#7b8794", "#9fabb8"),
    "series-0": ("#332288", "#a79df2"),
    "series-1": ("#cc6677", "#e68795"),
    "series-2": ("#117733", "#4fb871"),
    "series-3": ("#b8860b", "#dcb44a"),
    "series-4": ("#882255", "#d472a6"),
    "series-5": ("#44aa99", "#63c9b9"),
}
_ALIASES = {"all": "ink"}
_NUM_SERIES = sum(name.startswith("series-") for name in COLOURS)
_DASHES = ("solid", "dashed", "dotted", "dashdot")
INK, SOFT, FAINT, GRID, BODY = (COLOURS[name][0] for name in ("ink", "soft", "faint", "line", "body"))


def colour_name(view: str, position: int = 0) -> str:
    """The entry of ``COLOURS`` of a modality or of all of them; other names take a series' by their position."""
    name = _ALIASES.get(view, view)
    return name if name in COLOURS else f"series-{position % _NUM_SERIES}"


def series_style(position: int) -> tuple[str, str]:
    """Entry of ``COLOURS`` and dashes of the n-th of several runs; beyond the colours the dashes change."""
    return f"series-{position % _NUM_SERIES}", _DASHES[position // _NUM_SERIES % len(_DASHES)]


def _variable(name: str) -> str:
    return f"--{name.replace('+', '-').replace('_', '-')}"


def css_colour(name: str) -> str:
    """How a style says a colour of ``COLOURS``."""
    return f"var({_variable(name)})"


def style_of_colours(names: Sequence[str] = tuple(COLOURS)) -> str:
    """The colours as CSS variables, light and dark."""
    light, dark = (";".join(f"{_variable(name)}:{COLOURS[name][theme]}" for name in names) for theme in (0, 1))
    return f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


@dataclass(frozen=True)
class Picture:
    """A drawn figure: its ``data:`` address, and the width and height in pixels it is meant for."""

    address: str
    width: int
    height: int


def draw_svg(figure: Figure) -> Picture:
    """A figure as SVG: sharp at every size, letters in the reader's font, colours of ``COLOURS`` light or dark."""
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    # Without a salt the names of clip paths, and so the page, would differ from time to time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"(font: [^;\"]*?[\d.]+px) [^;\"]*", r"\1 system-ui, sans-serif", text)
    # Six decimals are a thousandth of what a screen can show.
    text = re.sub(r"(\d\.\d\d)\d+", r"\1", text)
    text = re.sub(r">\s+<", "><", text)
    used = [name for name, (light, _dark) in COLOURS.items() if light in text]
    for name in used:
        text = text.replace(COLOURS[name][0], css_colour(name))
    text = text.replace("<defs>", f"<style>{style_of_colours(used)}</style><defs>", 1)
    width, height = (round(_PIXELS_PER_INCH * size) for size in figure.get_size_inches())
    return Picture(f"data:image/svg+xml;base64,{base64.b64encode(text.encode()).decode('ascii')}", width, height)


def plain(axes: Axes) -> None:
    """Axes with a faint grid, without a box."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=SOFT, labelsize=8, length=3)


# ---- lines -----------------------------------------------------------------------------------------------------------

_MOST_POINTS = 300
Series = tuple[np.ndarray, np.ndarray]
"""Positions (steps or epochs), rising, and values; both (n,) float64."""


@dataclass(frozen=True)
class Line:
    """One line of a panel.

    Attributes:
        series: what is drawn.
        colour: entry of ``COLOURS``.
        dashes: of matplotlib.
        smoothed: draw the running mean, and the values faintly behind it.
        steps: level between the points.
    """

    series: Series
    colour: str
    dashes: str = "solid"
    smoothed: bool = False
    steps: bool = False


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over an odd number of values; at both ends over those there are."""
    kernel = np.ones(window)
    # "same" would be as long as the kernel where that is longer.
    half = window // 2
    sums, counts = (np.convolve(each, kernel)[half : half + len(values)] for each in (values, np.ones_like(values)))
    return sums / counts


def thinned(series: Series, at_most: int = _MOST_POINTS) -> Series:
    """The series, or the means of so many stretches of it: a longer line is no sharper, only a larger page."""
    positions, values = series
    if len(values) <= at_most:
        return series
    edges = np.linspace(0, len(values), at_most + 1).round().astype(int)[:-1]
    counts = np.diff([*edges, len(values)])
    return np.add.reduceat(positions, edges) / counts, np.add.reduceat(values, edges) / counts


def line_panel(
    lines: Sequence[Line],
    *,
    x_label: str,
    y_label: str = "",
    marks: Mapping[float, str] | None = None,
    level: tuple[float, str] | None = None,
    from_zero: bool = False,
) -> Figure:
    """One small panel of lines, to stand beside others under a legend in the page's own letters.

    Args:
        lines: what is drawn, in order.
        x_label, y_label: what the axes are.
        marks: positions of dashed upright lines and the words at them.
        level: height of a dashed level line and the word at it.
        from_zero: the upright axis begins at 0.
    """
    figure = Figure(figsize=(3.9, 2.6), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    for line in lines:
        positions, values = thinned(line.series)
        colour = COLOURS[line.colour][0]
        style = {"color": colour, "linestyle": line.dashes, "solid_capstyle": "round"}
        style["drawstyle"] = "steps-post" if line.steps else "default"
        few = {"marker": "o", "markersize": 3} if len(values) <= 25 and not line.smoothed else {}
        if line.smoothed and len(values) > 25:
            axes.plot(positions, values, **{**style, "linestyle": "solid"}, alpha=0.22, linewidth=0.8)
            axes.plot(positions, running_mean(values, 2 * (len(values) // 50) + 1), **style, linewidth=1.6)
        else:
            axes.plot(positions, values, **style, **few, linewidth=1.5)
    faint = {"color": FAINT, "linestyle": (0, (4, 3)), "linewidth": 0.9}
    words = {"fontsize": 7.5, "color": SOFT, "va": "bottom"}
    for position, word in (marks or {}).items():
        axes.axvline(position, **faint)
        axes.annotate(
            f" {word}", (position, 1.0), xycoords=("data", "axes fraction"), ha="left", **{**words, "va": "top"}
        )
    if level is not None:
        axes.axhline(level[0], **faint)
        axes.annotate(level[1], (1, level[0]), xycoords=("axes fraction", "data"), ha="right", **words)
    if from_zero:
        axes.set_ylim(0, 1.08 * axes.get_ylim()[1])
    axes.set_xlabel(x_label, fontsize=8.5, color=SOFT)
    axes.set_ylabel(y_label, fontsize=8.5, color=SOFT)
    return figure
