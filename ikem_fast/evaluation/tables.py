"""Plain tables of results: one value in memory, printed aligned, written as CSV, shown in the report page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ikem_fast.atomic import atomic_open


@dataclass(frozen=True)
class Spread:
    """A mean with the sample standard deviation of what it was taken over."""

    mean: float
    deviation: float


Cell = str | float | int | Spread | None


@dataclass(frozen=True)
class Table:
    """A heading per column and rows of cells; None is an empty cell.

    Attributes:
        columns: headings.
        rows: one cell per column: text, a number, a number with its spread, or None. Floats are accuracies in [0, 1]
            and are shown in percent.
        title: a line above the table.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"every row must have the table's {len(self.columns)} columns, got {row}")

    def texts(self) -> list[list[str]]:
        """The cells as they are shown."""
        return [[cell_text(cell) for cell in row] for row in self.rows]


def cell_text(cell: Cell) -> str:
    """A cell as it is shown: floats in percent with one decimal, None as a dash."""
    if cell is None:
        return "-"
    if isinstance(cell, Spread):
        return f"{cell_text(cell.mean)} ± {cell_text(cell.deviation)}"
    if isinstance(cell, float):
        return f"{100 * cell:.1f}"
    return str(cell)


def format_table(table: Table) -> str:
    """The table as text with a rule under the headings; text to the left, numbers to the right."""
    texts = table.texts()
    widths = [max(len(line[column]) for line in [table.columns, *texts]) for column in range(len(table.columns))]
    numeric = [
        all(not isinstance(row[column], str) for row in table.rows) and bool(table.rows)
        for column in range(len(table.columns))
    ]

    def line(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        )
        return "  ".join(padded).rstrip()

    lines = [table.title] if table.title else []
    lines += [line(table.columns), "  ".join("-" * width for width in widths)]
    lines += [line(cells) for cells in texts]
    return "\n".join(lines)


def write_csv(path: Path, table: Table) -> None:
    """The table as CSV, written atomically; accuracies in full, as fractions; spreads in a column of their own."""
    spread = [any(isinstance(row[column], Spread) for row in table.rows) for column in range(len(table.columns))]

    def line(cells: Sequence[Cell], heading: bool = False) -> list[Cell]:
        values: list[Cell] = []
        for cell, has_spread in zip(cells, spread, strict=True):
            is_spread = isinstance(cell, Spread)
            values.append(cell.mean if is_spread else "" if cell is None else cell)
            if has_spread:
                values.append(f"{cell} (standard deviation)" if heading else cell.deviation if is_spread else "")
        return values

    with atomic_open(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(line(table.columns, heading=True))
        writer.writerows(line(row) for row in table.rows)
