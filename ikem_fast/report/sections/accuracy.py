"""Linear and nearest-neighbour accuracy of all encoders and views."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ikem_fast.evaluation.commands import accuracy_table
from ikem_fast.evaluation.tables import Table
from ikem_fast.report import page
from ikem_fast.report.drawing import COLOURS, FAINT, INK, SOFT, draw_svg, plain, series_style
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material
from ikem_fast.report.sections.evaluations import figure_text

_MARKERS = "osD^vPX"
Groups = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Encoders to their rows by view, each with "top1" in [0, 1] and perhaps its "spread"."""


def render(material: Material) -> list[Section]:
    linear, knn = material.entries("linear"), material.entries("knn")
    if not linear:
        return []
    groups = {name: {row["name"]: row for row in entry["rows"]} for name, entry in linear.items()}
    chance = material.chance()
    notes = (
        f"Linear classifiers on frozen features, test clips; reported is the {_reported(linear)}. The best epoch as "
        "judged on the test set is no result and only shown beside it. “all” is the mean over all modalities that the "
        "encoders have."
    )
    if chance is not None:
        notes += " The dashed line is always guessing the commonest action."
    if any("untrained" in name for name in linear):
        notes += (
            " Features of untrained encoders are tiny, since there are no batch statistics yet; for the linear "
            "classifier they are multiplied by one number a modality, or it would learn nothing at the published rate."
        )
    table = page.table(accuracy_table(linear.values(), knn.values()))
    if sum("linear" in run.evaluations for run in material.runs) > 1:
        table = page.table(side_by_side(groups), grouped=False) + page.folded("all figures", table)
    blocks = (
        page.paragraph(notes),
        page.wide_picture(
            draw_svg(accuracy_dots(groups, chance)), "linear accuracy of every view; figures in the table"
        ),
        table,
    )
    return [Section("Accuracy", blocks)]


def _reported(linear: Mapping[str, Mapping]) -> str:
    return " or the ".join(dict.fromkeys(entry.get("reported", "last epoch") for entry in linear.values()))


def _views(groups: Groups) -> list[str]:
    """All views, single modalities first and all of them last."""
    views = dict.fromkeys(view for rows in groups.values() for view in rows)
    return sorted(views, key=lambda view: (view == "all", "+" in view or "all" in view))


def side_by_side(groups: Groups) -> Table:
    """Top-1 accuracy with a column for each set of encoders."""
    rows = []
    for view in _views(groups):
        cells = (of.get(view, {}) for of in groups.values())
        texts = (figure_text(cell.get("top1"), cell.get("spread", {}).get("top1")) for cell in cells)
        rows.append((view.replace("_", " "), *texts))
    return Table(("linear top-1 %", *groups), tuple(rows))


def accuracy_dots(groups: Groups, chance: float | None = None) -> Figure:
    """A row per view, a marker per encoders, with its spread over seeds if there is one; a line at ``chance``."""
    views = _views(groups)
    names = list(groups)
    legend_rows = -(-len(names) // 4)
    figure = Figure(figsize=(7.4, 0.36 * len(views) + 0.6 + 0.22 * legend_rows), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    for position, name in enumerate(names):
        # Markers of equal accuracy lie side by side, not on top of each other.
        shift = 0.34 * ((position + 0.5) / len(names) - 0.5)
        places = [number + shift for number, view in enumerate(views) if view in groups[name]]
        rows = [groups[name][view] for view in views if view in groups[name]]
        values = [100 * row["top1"] for row in rows]
        spreads = [100 * row.get("spread", {}).get("top1", 0.0) for row in rows]
        axes.errorbar(
            values,
            places,
            xerr=spreads if any(spreads) else None,
            elinewidth=1,
            linestyle="none",
            marker=_MARKERS[position % len(_MARKERS)],
            markersize=6.5,
            color=COLOURS[series_style(position)[0]][0],
            label=name,
            clip_on=False,
            zorder=3,
        )
    if chance is not None:
        axes.axvline(100 * chance, color=FAINT, linestyle=(0, (4, 3)), linewidth=1)
    axes.set_yticks(range(len(views)), [view.replace("_", " ") for view in views], fontsize=8.5, color=INK)
    axes.set_ylim(len(views) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    axes.set_xlabel("linear accuracy, top-1 (%)", fontsize=8.5, color=SOFT)
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="outside upper left",
        ncols=min(4, len(names)),
        fontsize=8.5,
        frameon=False,
        labelcolor=INK,
        handletextpad=0.2,
        columnspacing=1.4,
    )
    return figure
