"""Which actions are taken for which, from the linear evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import numpy as np

from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material

_MOST_NUMBERED = 30
_MOST_PAIRS = 5
_STRONG = 80
"""Percent beyond which a cell is so dark that its figure must be light."""


def render(material: Material) -> list[Section]:
    blocks = []
    for name, entry in material.entries("linear").items():
        confusion = entry.get("confusion")
        if not confusion or "untrained" in name:
            continue
        counts = np.array(confusion["counts"], dtype=float)
        class_names = entry["class_names"]
        if not isinstance(class_names, list) or len(class_names) != len(counts):
            class_names = [f"action {number}" for number in range(len(counts))]
        class_names = [str(class_name) for class_name in class_names]
        parts = [page.paragraph(_words(counts, class_names)), confusion_table(counts, class_names)]
        title = f"{name}, view “{confusion['view']}”"
        # The first one stands open, the others are a click away.
        blocks.append(page.folded(title, *parts) if blocks else page.heading(title) + "".join(parts))
    if not blocks:
        return []
    return [
        Section("Confusion", (page.paragraph("Linear evaluation, test clips; in percent of the true action."), *blocks))
    ]


def _words(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """The pairs that are mistaken most often, by share of the true class."""
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    np.fill_diagonal(share, 0)
    worst = np.argsort(-share, axis=None, kind="stable")[:_MOST_PAIRS]
    pairs = [
        (row, column) for row, column in zip(*np.unravel_index(worst, share.shape), strict=True) if share[row, column]
    ]
    if not pairs:
        return "No clip was taken for another action."
    texts = (
        f"{class_names[row]} for {class_names[column]} ({counts[row, column]:.0f} of {totals[row]:.0f})"
        for row, column in pairs
    )
    return f"Most often mistaken: {'; '.join(texts)}."


def confusion_table(counts: np.ndarray, class_names: Sequence[str]) -> str:
    """The matrix as a table of shaded cells, the true class down: (classes, classes) counts.

    Up to 30 classes every share of half a percent or more is written out; beyond that cells are small and say what they
    are when pointed at.
    """
    size = len(class_names)
    share = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    dense = size > _MOST_NUMBERED
    names = [escape(name) for name in class_names]
    head = "".join(f'<th scope="col">{name}</th>' for name in names)
    rows = []
    for row in range(size):
        cells = []
        for column in range(size):
            value = share[row, column]
            if value < 0.5:
                cells.append("<td></td>")
                continue
            strong = ' class="strong"' if value > _STRONG else ""
            title = f' title="{names[row]} taken for {names[column]}: {value:.0f} %"' if dense else ""
            cells.append(f'<td{strong}{title} style="--share:{value:.0f}">{"" if dense else f"{value:.0f}"}</td>')
        rows.append(f'<tr><th scope="row">{names[row]}</th>{"".join(cells)}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table class="confusion{" dense" if dense else ""}">'
        "<caption>true action down, predicted action across</caption>"
        f"<thead><tr><td></td>{head}</tr></thead>\n<tbody>" + "\n".join(rows) + "</tbody></table></div>"
    )
