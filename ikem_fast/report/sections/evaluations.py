"""Every other evaluation that a run's folder holds, as a table of whatever its rows say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ikem_fast.evaluation.tables import Table, cell_text
from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material

_TITLES = {"knn": "Nearest neighbours", "semi": "Few labels", "finetune": "Finetuning", "retrieval": "Retrieval"}
_WORDS = {"map": "mAP", "count": "n", "num clips": "clips", "fraction": "labels"}
_FIRST = ("fraction", "num_clips")
"""Of a row's figures those that say which row it is."""
_NOT_SHOWN = ("name", "modalities", "spread")


def render(material: Material) -> list[Section]:
    in_table_of_accuracies = material.entries("linear")
    sections = []
    for kind in dict.fromkeys(kind for run in material.runs for kind in run.evaluations):
        entries = material.entries(kind)
        if kind in ("linear", "knn"):
            entries = {name: entry for name, entry in entries.items() if name not in in_table_of_accuracies}
        if any(entry["rows"] for entry in entries.values()):
            words = _words(material, kind, entries)
            heading = _TITLES.get(kind, kind.replace("_", " ").capitalize())
            sections.append(Section(heading, (page.paragraph(words), page.table(rows_table(entries)))))
    return sections


def _words(material: Material, kind: str, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """Titles of the evaluations, the clips they were made on, and what they note of all their encoders alike."""
    parts: dict[str, None] = {}
    for run in material.runs:
        evaluation = run.evaluations.get(kind, {})
        data = evaluation.get("data") or {}
        if evaluation.get("title"):
            parts[str(evaluation["title"])] = None
        if "num_test" in data:
            parts[f"{data['num_test']} test clips of {data.get('folder', 'the data set')}"] = None
    first = next(iter(entries.values()))
    for key, value in first.items():
        alike = all(entry.get(key) == value for entry in entries.values())
        if key != "encoders" and isinstance(value, (str, int, float)) and alike:
            parts[f"{key.replace('_', ' ')}: {value}"] = None
    words = "; ".join(parts)
    return f"{words[:1].upper()}{words[1:]}." if words else ""


def rows_table(entries: Mapping[str, Mapping[str, Any]]) -> Table:
    """The rows of entries side by side: a column for every figure that any of them has, mean ± spread over seeds."""
    flat = [
        (name, row["name"], _flatten(row), _flatten(row.get("spread") or {}))
        for name, entry in entries.items()
        for row in entry["rows"]
    ]
    keys = dict.fromkeys(key for _name, _view, values, _spreads in flat for key in values)
    columns = sorted(keys, key=lambda key: key not in _FIRST)
    lines = [
        (name, str(view).replace("_", " "), *(figure_text(values.get(key), spreads.get(key)) for key in columns))
        for name, view, values, spreads in flat
    ]
    headings = [_heading(key, [values.get(key) for _name, _view, values, _spreads in flat]) for key in columns]
    return Table(("encoders", "view", *headings), tuple(lines))


def figure_text(value: Any, spread: float | None = None) -> str:
    """A figure of a row, with its spread if there is one; shares in percent as in all tables."""
    # Some floats are no shares.
    text = f"{value:.4g}" if isinstance(value, float) and not 0 <= value <= 1 else cell_text(value)
    return text if spread is None else f"{text} ± {figure_text(float(spread))}"


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


def _heading(key: str, values: list[Any]) -> str:
    words = key.replace("_", " ")
    words = _WORDS.get(words, words).replace("top1", "top-1").replace("top5", "top-5")
    for prefix in ("recall", "accuracy"):
        words = words.replace(f"{prefix} ", f"{prefix} at ")
    shares = [value for value in values if isinstance(value, float)]
    return f"{words} %" if shares and all(0 <= value <= 1 for value in shares) else words
