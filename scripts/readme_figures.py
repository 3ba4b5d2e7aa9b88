"""Keeps the speeds that README.md and docs/ quote those of the results files.

    python scripts/readme_figures.py            # writes them
    python scripts/readme_figures.py --check    # names each that disagrees, and fails

A document marks what it quotes, a number or a table, with a name:

    A step is <!-- figures: step-ratio -->6.9<!-- /figures --> times as fast as eager PyTorch.

``benchmarks/results/quoted.yaml`` says, in one place, what that is:

    results:                          # which results files are meant: benchmarks/results/NAME.json
      cpu: 2026-11-23_amd-epyc-2-cores_full
    figures:
      measured-on: {results: cpu, show: source}
      step-ratio: {results: cpu, op: "step, stage 2", way: ours bf16, show: ratio to eager}
      speed:                          # a table: a row's and a column's words together choose the figure of a cell
        results: cpu
        heading: on two cores
        rows:
          step, stage 1: {op: "step, stage 1"}
          step, stage 2: {op: "step, stage 2", clips: 16}
        columns:
          eager: {way: eager, show: seconds}
          as the release: {way: release manner, show: seconds, optional: true}    # empty where there is none
          ours, bfloat16: {way: ours bf16, show: seconds}
          times as fast: {way: ours bf16, show: ratio to eager}

A figure is that of the one row with this op, phase, way, device, launch and number of threads, and these sizes, each by
its name or all by ``sizes: N=16 K=32768``; words that choose no row or several are an error. ``show`` is one of
seconds, clips/s, share of floor, peak memory, error, ratio to WAY; or, of the results file itself, source (a link to
it, with hardware and date), date, hardware or profile.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

PROJECT_ROOT = Path(__file__).resolve().parent.parent
# In this process alone: nothing of the package is imported.
sys.path.insert(0, str(PROJECT_ROOT))

from benchmarks.figures import (  # noqa: E402
    IDENTITY,
    ReportError,
    bytes_text,
    description,
    error_text,
    load_atomic,
    percent_text,
    ratio_text,
    read_figures,
    seconds_text,
    three_digits,
)

RESULTS = PROJECT_ROOT / "benchmarks" / "results"
QUOTED = RESULTS / "quoted.yaml"
MARKED = re.compile(r"(<!-- figures: ([^>]*?) -->)(.*?)(<!-- /figures -->)", re.DOTALL)
MARK = re.compile(r"<!-- /?figures\b")
SHOWN = {
    "seconds": ("seconds", seconds_text),
    "clips/s": ("clips_per_second", three_digits),
    "share of floor": ("share_of_floor", percent_text),
    "peak memory": ("peak_bytes", bytes_text),
    "error": ("error", error_text),
}
OF_RESULTS = ("source", "date", "hardware", "profile")
RATIO = "ratio to "


@dataclass
class Quotations:
    """What quoted.yaml says, and the results files that it names.

    Attributes:
        names: results file by the short name.
        figures: description of a number or table by its name.
    """

    names: Mapping[str, str]
    figures: Mapping[str, Mapping[str, Any]]

    def __post_init__(self) -> None:
        self._results: dict[str, dict] = {}

    @classmethod
    def read(cls) -> Quotations:
        if not QUOTED.is_file():
            return cls({}, {})
        where = QUOTED.relative_to(PROJECT_ROOT)
        try:
            content = yaml.safe_load(QUOTED.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError) as error:
            raise ReportError(f"{where} is no YAML file: {' '.join(str(error).split())}") from None
        if not isinstance(content, dict) or set(content) != {"results", "figures"}:
            raise ReportError(f"{where} must have the entries 'results' and 'figures'")
        for entry in content.values():
            if not isinstance(entry, dict):
                raise ReportError(f"{where}: 'results' and 'figures' must be entries by name, got {entry!r}")
        return cls(content["results"], content["figures"])

    def text(self, name: str, document: Path) -> str:
        """What must stand between the marks of a name in a document."""
        if name not in self.figures:
            raise ReportError(f"{QUOTED.name} has no figure {name!r}")
        quoted = self.figures[name]
        if not isinstance(quoted, dict):
            raise ReportError(f"{QUOTED.name}: {name!r} must say what it is by entries, got {quoted!r}")
        if "rows" not in quoted:
            return self._number(name, quoted, document)
        rest = {key: value for key, value in quoted.items() if key not in ("rows", "columns", "heading")}
        rows, columns = (quoted.get(part) for part in ("rows", "columns"))
        if not all(
            isinstance(part, dict) and all(isinstance(cell, dict) for cell in part.values()) for part in (rows, columns)
        ):
            raise ReportError(f"{QUOTED.name}: the rows and columns of {name!r} must be entries by their titles")
        lines = [[quoted.get("heading", ""), *columns], ["---"] * (1 + len(columns))]
        for title, row in rows.items():
            cells = [
                self._number(f"{name}, {title!r}, {column!r}", {**rest, **row, **words}, document)
                for column, words in columns.items()
            ]
            lines.append([title, *cells])
        table = "\n".join(f"| {' | '.join(map(str, line))} |".replace("|  |", "| |") for line in lines)
        return f"\n\n{table}\n\n"  # without empty lines some renderers take the mark for a row

    def _number(self, name: str, choice: Mapping[str, Any], document: Path) -> str:
        words = dict(choice)
        short, show, optional = words.pop("results", None), words.pop("show", None), words.pop("optional", False)
        results = self._read_results(short, name)
        if show == "source":
            link = os.path.relpath(RESULTS / f"{self.names[short]}.md", document.parent)
            return f"[{results['hardware']}, {results['date']}]({link})"
        if show in OF_RESULTS:
            return results[show]
        rows = [row for row in results["rows"] if _fits(row, words)]
        if not rows and optional:
            return ""
        if len(rows) != 1:
            found = "; ".join(description(row) for row in rows[:4])
            raise ReportError(
                f"{QUOTED.name}: {name} must choose one row of {self.names[short]}, "
                f"{words} fits {f'{len(rows)}: {found}' if rows else 'none'}"
            )
        return self._shown(rows[0], show, name, optional)

    def _shown(self, row: Mapping[str, Any], show: Any, name: str, optional: bool) -> str:
        if isinstance(show, str) and show.startswith(RATIO):
            value, form = row["ratios"].get(show.removeprefix(RATIO)), ratio_text
        elif show in SHOWN:
            key, form = SHOWN[show]
            value = row.get(key)
        else:
            known = ", ".join((*SHOWN, f"{RATIO}WAY", *OF_RESULTS))
            raise ReportError(f"{QUOTED.name}: 'show' of {name} must be one of {known}, got {show!r}")
        if value is None and optional:
            return ""
        if value is None:
            raise ReportError(f"{QUOTED.name}: {name}: the row {description(row)} has no {show}")
        return form(value)

    def _read_results(self, short: Any, name: str) -> dict:
        if short not in self.names:
            known = ", ".join(map(repr, self.names)) or "none"
            raise ReportError(f"{QUOTED.name}: 'results' of {name} must be one of {known}, got {short!r}")
        if short not in self._results:
            self._results[short] = read_figures(RESULTS / f"{self.names[short]}.json")
        return self._results[short]


def _fits(row: Mapping[str, Any], words: Mapping[str, Any]) -> bool:
    identity = {**row["sizes"], **{name: row[name] for name in IDENTITY}, "sizes": row["size_label"]}
    return all(key in identity and identity[key] == value for key, value in words.items())


def documents() -> Iterator[Path]:
    yield PROJECT_ROOT / "README.md"
    yield from sorted((PROJECT_ROOT / "docs").rglob("*.md"))


def rewrite(document: Path, text: str, quotations: Quotations) -> tuple[str, list[str]]:
    """The document with its figures as the results have them, and a sentence about each that disagreed."""
    where = document.relative_to(PROJECT_ROOT)
    disagreements: list[str] = []

    def put(match: re.Match) -> str:
        opening, name, quoted, closing = match.groups()
        line = text.count("\n", 0, match.start()) + 1
        if len(MARK.findall(match.group())) != 2:
            raise ReportError(f"{where}:{line}: the mark of {name!r} is not closed by <!-- /figures -->")
        try:
            right = quotations.text(name, document)
        except ReportError as error:
            raise ReportError(f"{where}:{line}: {error}") from None
        disagreements.extend(f"{where}:{line}: {difference}" for difference in differences(name, quoted, right))
        return opening + right + closing

    marked = list(MARKED.finditer(text))
    if len(MARK.findall(text)) != sum(len(MARK.findall(match.group())) for match in marked):
        raise ReportError(f"{where}: every <!-- figures: NAME --> needs its <!-- /figures -->, and the other way round")
    return MARKED.sub(put, text), disagreements


def differences(name: str, quoted: str, right: str) -> Iterator[str]:
    """What of a quoted number or table is not as it must be; of tables of the same layout cell by cell."""
    if quoted == right:
        return
    old, new = (
        [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.strip().splitlines()]
        for text in (quoted, right)
    )
    if "|" in right and [len(line) for line in old] == [len(line) for line in new] and old[0] == new[0]:
        for before, after in zip(old, new, strict=True):
            for column, was, is_now in zip(new[0], before, after, strict=True):
                if was != is_now:
                    yield f"{name}, {after[0]!r}, {column!r} is quoted as {was!r}, the results say {is_now!r}"
        if old == new:
            yield f"{name} is laid out differently"
    elif "|" in right:
        yield f"{name}: the table has other rows or columns than {QUOTED.name} says"
    else:
        yield f"{name} is quoted as {quoted!r}, the results say {right!r}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a figure disagrees")
    options = parser.parse_args()
    try:
        quotations = Quotations.read()
        count, disagreements = 0, []
        rewritten = {}
        for document in documents():
            before = document.read_text(encoding="utf-8")
            after, found = rewrite(document, before, quotations)
            count += len(MARKED.findall(before))
            disagreements += found
            if after != before:
                rewritten[document] = after
        if not options.check:
            for document, text in rewritten.items():
                with load_atomic().atomic_open(document) as file:
                    file.write(text)
    except (ReportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for disagreement in disagreements:
        print(disagreement)
    print(
        f"{count} marked places, {len(disagreements)} figures {'disagree' if options.check else 'brought up to date'}"
    )
    return 1 if options.check and disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
