"""Every other evaluation that a run's folder holds, as a table of whatever its rows say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ikem_fast.evaluation.tables import Table, cell_text
from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material

_SHOWN_WITH_ACCURACY = ("linear", "knn")
_NOT_SHOWN = ("name", "modalities", "spread")


def render(material: Material) -> list[Section]:
    sections = []
    for kind in dict.fromkeys(kind for run in material.runs for kind in run.evaluations):
        entries = material.entries(kind)
        # Neighbours alone, of runs that no linear evaluation was made of, have no other table.
        shown_above = kind == "linear" or (kind == "knn" and material.entries("linear"))
        if entries and not shown_above:
            heading = "Nearest neighbours" if kind == "knn" else f"Evaluation: {kind.replace('_', ' ')}"
            sections.append(Section(heading, (page.table(rows_table(entries)),)))
    return sections


def rows_table(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """The rows of entries side by side: a column for every figure that any of them has, mean ± spread over seeds."""
    flat = [
        (name, row["name"], _flatten(row), _flatten(row.get("spread") or {}))
        for name, entry in entries.items()
        for row in entry["rows"]
    ]
    columns = list(dict.fromkeys(key for _name, _view, values, _spreads in flat for key in values))
    lines = []
    for name, view, values, spreads in flat:
        cells = []
        for column in columns:
            text = _text(values.get(column))
            cells.append(text if spreads.get(column) is None else f"{text} ± {_text(spreads[column])}")
        lines.append((name, str(view).replace("_", " "), *cells))
    headings = [_heading(key, [values.get(key) for _name, _view, values, _spreads in flat]) for key in columns]
    return Table(("encoders", "view", *headings), tuple(lines))


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Figures of a row by name; those inside a mapping by both names."""
    values: dict[str, Any] = {}
    for key, value in row.items():
        if not prefix and key in _NOT_SHOWN:
            continue
        if isinstance(value, Mapping):
            values |= _flatten(value, f"{prefix}{key} ")
        elif value is None or isinstance(value, (str, int, float)):
            values[f"{prefix}{key}"] = value
    return values


def _text(value: Any) -> str:
    # A float is a share and shown in percent, as in all tables; some figures are none.
    return f"{value:.4g}" if isinstance(value, float) and not 0 <= value <= 1 else cell_text(value)


def _heading(key: str, values: list[Any]) -> str:
    shares = [value for value in values if isinstance(value, float)]
    words = key.replace("_", " ").replace("top1", "top-1").replace("top5", "top-5")
    return f"{words} %" if shares and all(0 <= value <= 1 for value in shares) else words
