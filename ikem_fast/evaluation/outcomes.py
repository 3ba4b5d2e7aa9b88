"""What evaluations come to: figures by view, seed by seed, and their mean and spread over seeds and runs."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ikem_fast.evaluation.tables import Cell, Spread, Table


@dataclass(frozen=True)
class Column:
    """A column of an evaluation's table.

    Attributes:
        heading: as it is shown.
        path: where it stands in a row, such as ``("accuracy", "5")``.
    """

    heading: str
    path: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What an evaluation of one set of encoders came to, with one seed.

    Attributes:
        rows: one for each view (and number of labels …), plain values for JSON: ``name`` of the view, its
            ``modalities``, and figures. A float is a figure, averaged over seeds and runs; what else a row holds says
            which row it is, or is left out of an average if it differs.
        facts: what is true of all rows, plain values: epochs, batch size.
        confusion: a row's name, and counts by true class (down) and predicted class (across).
        history: by row, a figure's way through the epochs.
        scores: by row, logits (N_test, classes).
        result: the evaluation's own result in full, for those who call it from Python.
    """

    rows: tuple[dict[str, Any], ...]
    facts: dict[str, Any] = field(default_factory=dict)
    confusion: tuple[str, Tensor] | None = None
    history: dict[str, list[float]] | None = None
    scores: dict[str, Tensor] = field(default_factory=dict)
    result: Any = None

    def entry(self, encoders: str) -> dict[str, Any]:
        """The outcome as it is written to JSON."""
        entry = {"encoders": encoders, **self.facts, "rows": list(self.rows)}
        if self.confusion is not None:
            view, counts = self.confusion
            entry["confusion"] = {"view": view, "counts": counts.tolist()}
        if self.history is not None:
            entry["history"] = self.history
        return entry


@dataclass(frozen=True)
class Judgement:
    """Outcomes of one set of encoders.

    Attributes:
        title: of the table: what the figures are.
        labels: columns after encoders and view that say which row it is.
        columns: columns with figures.
        outcomes: one for each seed.
    """

    title: str
    columns: tuple[Column, ...]
    outcomes: tuple[Outcome, ...]
    labels: tuple[Column, ...] = ()


def combine(encoders: str, outcomes: Sequence[Outcome], labels: Sequence[Column] = ()) -> dict[str, Any]:
    """The JSON entry of one or several outcomes of the same encoders, with other seeds or of other runs.

    A single one is as it is. Of several, figures are means, beside them in each row ``spread``, their sample standard
    deviations, and ``count``, how many there are; counts of the confusion matrix are summed and histories averaged.

    Args:
        encoders: their name.
        outcomes: at least one.
        labels: the judgement's, which say which row is which.

    Raises:
        ValueError: their rows are not the same ones.
    """
    if len(outcomes) == 1:
        return outcomes[0].entry(encoders)
    first = outcomes[0]
    of_labels = [("name",), *(label.path for label in labels)]
    names = [[[_look_up(row, path) for path in of_labels] for row in outcome.rows] for outcome in outcomes]
    if any(other != names[0] for other in names):
        raise ValueError(f"outcomes of {encoders} must have the same rows, got {names}")
    rows = []
    for same in zip(*(outcome.rows for outcome in outcomes), strict=True):
        figures = [{key: value for key, value in row.items() if (key,) not in of_labels} for row in same]
        rows.append({**_mean(same), "spread": _spread(figures), "count": len(same)})
    facts = {key: _mean([outcome.facts[key] for outcome in outcomes]) for key in first.facts}
    confusion = history = None
    if first.confusion is not None:
        confusion = first.confusion[0], sum(outcome.confusion[1] for outcome in outcomes)
    if first.history is not None:
        history = _mean([outcome.history for outcome in outcomes])
    return Outcome(tuple(rows), facts, confusion, history).entry(encoders)


def _mean(values: Sequence[Any]) -> Any:
    """The mean of floats, also inside mappings and lists; of anything else what they have in common, or None."""
    first = values[0]
    if all(value == first for value in values):
        return first
    if all(isinstance(value, float) for value in values):
        return statistics.fmean(values)
    if all(isinstance(value, Mapping) for value in values):
        return {key: _mean([value[key] for value in values]) for key in first}
    if all(isinstance(value, list) and len(value) == len(first) for value in values):
        return [_mean(each) for each in zip(*values, strict=True)]
    return None


def _spread(values: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Sample standard deviations of the floats of several mappings, under the same keys."""
    spreads: dict[str, Any] = {}
    for key, first in values[0].items():
        of_key = [value[key] for value in values]
        if isinstance(first, Mapping):
            spreads[key] = _spread(of_key)
        elif all(isinstance(value, float) for value in of_key):
            spreads[key] = statistics.stdev(of_key)
    return spreads


def make_table(entries: Sequence[Mapping[str, Any]], judgement: Judgement) -> Table:
    """One row for each of the entries' rows; figures of several seeds or runs with their spread."""
    several = max((row.get("count", 1) for entry in entries for row in entry["rows"]), default=1) > 1
    lines = []
    for entry in entries:
        for row in entry["rows"]:
            labels = [_look_up(row, column.path) for column in judgement.labels]
            # What is true of all rows stands in the entry.
            cells = [figure(row if column.path[0] in row else entry, column.path) for column in judgement.columns]
            lines.append((entry["encoders"], row["name"], *labels, *cells, *([row.get("count", 1)] if several else [])))
    title = judgement.title
    if several:
        title += "; mean ± standard deviation over n runs and seeds"
    headings = [column.heading for column in (*judgement.labels, *judgement.columns)]
    return Table(("encoders", "view", *headings, *(["n"] if several else [])), tuple(lines), title)


def figure(row: Mapping[str, Any], path: Sequence[str]) -> Cell:
    """A figure of a row as a table's cell, with its spread where the row has one; None where it is not there."""
    value, spread = _look_up(row, path), _look_up(row.get("spread", {}), path)
    return value if spread is None or value is None else Spread(value, spread)


def _look_up(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(values, Mapping) or key not in values:
            return None
        values = values[key]
    return values
