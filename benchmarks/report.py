"""Turns the JSON of `pytest benchmarks/` into a results file with tables and plots.

    pytest benchmarks/ --profile full --benchmark-json cpu.json
    python -m benchmarks.report cpu.json --out benchmarks/results [--against OLD.json]

Writes ``DATE_HARDWARE_PROFILE.md`` with plots and ``DATE_HARDWARE_PROFILE.json`` beside it, which holds the figures and
which ``scripts/readme_figures.py`` reads. Several files are put together: of one hardware and profile into one results
file, of others each into one of its own. ``--against`` takes such a JSON, old or new, and adds what became faster or
slower since. ``--remarks`` takes a Markdown file with what a reader must know of these runs and no figure tells.
Neither ikem_fast nor torch is needed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import plots
from benchmarks.figures import (
    BASELINES,
    OURS,
    PROJECT_ROOT,
    ReportError,
    Row,
    Run,
    bytes_text,
    description,
    error_text,
    figures_text,
    identity,
    load_atomic,
    percent_text,
    ratio_text,
    ratios,
    read_figures,
    read_run,
    seconds_text,
    slug,
    three_digits,
    to_figures,
)

NOISY = 0.2  # IQR over median
FURTHEST = 10  # ops listed as furthest from their floor
# Rows of bench_training.py, and the published recipe: epochs of either stage, and the cross-subject training clips.
NTU60_TRAINING, NTU60_PHASES = "training, NTU-60 size", ("step, stage 1", "step, stage 2")
NTU60_EPOCHS, NTU60_CLIPS = 150, 40091
HOW_TO_READ = """\
Medians of the rounds of one run and their interquartile range (IQR); every result was compared with its plain-PyTorch
definition in the same run before it was timed ("error", relative to the largest magnitude, and the largest allowed).
Allocator settings, threads and inputs, drawn anew for every round, are the same for all ways. "× eager": how many times
as fast as that way, same work, same run; only `ours bf16` computes in bfloat16. "Of the floor": the least time that the
bytes that must move, or the operations, take at the ceilings below, over the time taken. `ours bf16` has a floor of its
own, of fewer bytes. More than 100 % means that the data lay in a cache, that a product is faster than the library's
that the ceiling was measured with, or that a convolution took fewer operations than its direct products, which the
floor counts: in the frequency domain it does. The plots leave out what sweeps vary, but for the sizes that they start
from."""


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a Markdown table; None is an empty cell."""

    def line(cells: Iterable[Any]) -> str:
        texts = ("" if cell is None else str(cell).replace("|", "/") for cell in cells)
        return f"| {' | '.join(texts)} |"

    return [line(columns), line(["---"] * len(columns)), *map(line, rows)]


def floor_text(row: Row) -> str | None:
    """Such as "62 % of copy bandwidth"."""
    return None if row.share_of_floor is None else f"{percent_text(row.share_of_floor)} of {row.ceiling}"


def machine_lines(runs: Sequence[Run]) -> list[str]:
    """Hardware, versions, commit and load of every run."""
    names = [""] if len(runs) == 1 else [f"run {position}" for position in range(1, len(runs) + 1)]
    return table(["", *names], [[name, *(run.facts[name] for run in runs)] for name in runs[0].facts])


def ceiling_lines(runs: Sequence[Run]) -> list[str]:
    """The ceilings that floors are taken from, at the start and at the end, and by how much they moved."""
    rows, moved = [], 0.0
    for position, run in enumerate(runs, 1):
        for device, ceilings in run.ceilings.items():
            for name, (start, end) in ceilings.items():
                unit, size = ("GB/s", 1e9) if "bytes" in name else ("GFLOP/s", 1e9)
                what = name.replace("_bytes_per_second", "").replace("_operations_per_second", " product")
                run_cell = [position] if len(runs) > 1 else []
                rows.append(
                    [*run_cell, device, what, *(f"{three_digits(value / size)} {unit}" for value in (start, end))]
                )
                moved = max(moved, abs(end / start - 1))
    lines = table([*(["run"] if len(runs) > 1 else []), "device", "ceiling", "at the start", "at the end"], rows)
    warning = "; other work may have disturbed the figures" if moved > 0.1 else ""
    return [*lines, "", f"Between start and end a ceiling moved by {percent_text(moved)} at most{warning}."]


def noise_line(rows: Sequence[Row]) -> str:
    """How many rows say little because their rounds differ."""
    noisy = sum(row.iqr > NOISY * row.seconds for row in rows)
    return f"Of {noisy} of the {len(rows)} rows the IQR is above {percent_text(NOISY)} of the median."


def furthest_lines(rows: Iterable[Row]) -> list[str]:
    """Of every op on every device our row that is furthest from its floor, the furthest of them first."""
    furthest: dict[tuple[str, str], Row] = {}
    ours = [row for row in rows if row.is_ours and row.share_of_floor is not None]
    for row in sorted(ours, key=lambda row: row.share_of_floor):
        furthest.setdefault((row.op, row.device), row)
    cells = [
        [row.op, row.phase, row.size_label, row.device, row.name, seconds_text(row.seconds), floor_text(row)]
        for row in list(furthest.values())[:FURTHEST]
    ]
    return table(["op", "pass", "sizes", "device", "way", "median", "of the floor"], cells)


def estimate_lines(rows: Sequence[Row]) -> list[str]:
    """What the published recipe takes on NTU-60, from steps of training that were timed at its size."""
    steps: dict[tuple[str, str], dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if row.op == NTU60_TRAINING:
            steps[row.device, row.name][row.phase] = row
    cells = []
    for (device, name), by_phase in steps.items():
        if by_phase.keys() >= set(NTU60_PHASES):
            first, second = (by_phase[phase] for phase in NTU60_PHASES)
            count = NTU60_EPOCHS * (NTU60_CLIPS // first.clips)
            hours = count * (first.seconds + second.seconds) / 3600
            product = f"{count} × ({seconds_text(first.seconds)} + {seconds_text(second.seconds)})"
            cells.append([device, name, first.clips, product, f"{three_digits(hours)} h"])
    if not cells:
        return []
    return [
        "## An estimate: 300 epochs of NTU-60",
        "",
        f"{NTU60_EPOCHS} epochs of either stage, each of {NTU60_CLIPS} clips in batches, the last incomplete one left",
        "out, at the medians of whole training steps, data path included. kNN checks and checkpoints are not in it.",
        "",
        *table(["device", "way", "batch", "steps of each stage × (stage 1 + stage 2)", "300 epochs"], cells),
        "",
    ]


def symbols_line(rows: Iterable[Row]) -> str:
    """What the letters in the rows' labels of sizes stand for."""
    symbols: dict[str, str] = {}
    for row in rows:
        for part, (name, size) in zip(row.size_label.split(), row.sizes.items(), strict=False):
            symbol, _, value = part.partition("=")
            if symbol != name and value == str(size):
                symbols[symbol] = name
    return f"Sizes: {', '.join(f'{symbol} {name}' for symbol, name in symbols.items())}." if symbols else ""


def op_lines(groups: Mapping[tuple, Sequence[Row]]) -> list[str]:
    """The table of an op on a device: its groups below one another, in each the ways."""
    rows = [row for group in groups.values() for row in group]
    of_group: dict[str, Callable[[Row], Any]] = {"pass": lambda row: row.phase, "sizes": lambda row: row.size_label}
    if len({row.threads for row in rows}) > 1:
        of_group["threads"] = lambda row: row.threads
    of_row: dict[str, Callable[[Row], Any]] = {
        "way": lambda row: row.name,
        "median": lambda row: seconds_text(row.seconds),
        "IQR": lambda row: seconds_text(row.iqr),
        "rounds": lambda row: row.rounds,
    }
    if any(row.clips for row in rows):
        of_row["clips/s"] = lambda row: three_digits(row.clips_per_second) if row.clips else None
    baselines = list(dict.fromkeys(row.name for row in rows if row.way in BASELINES))
    at_the_end: dict[str, Callable[[Row], Any]] = {
        "of the floor": floor_text,
        "error": lambda row: error_text(row.error),
        "allowed": lambda row: error_text(row.tolerance),
    }
    if any(row.peak_bytes is not None for row in rows):
        at_the_end["peak memory"] = lambda row: None if row.peak_bytes is None else bytes_text(row.peak_bytes)
    lines = []
    for group in groups.values():
        for position, row in enumerate(group):
            to_baseline = ratios(row, group)
            lines.append(
                [
                    *(show(row) if position == 0 else None for show in of_group.values()),
                    *(show(row) for show in of_row.values()),
                    *(ratio_text(to_baseline[name]) if name in to_baseline else None for name in baselines),
                    *(show(row) for show in at_the_end.values()),
                ]
            )
    return table([*of_group, *of_row, *(f"× {name}" for name in baselines), *at_the_end], lines)


def all_op_lines(runs: Sequence[Run]) -> list[str]:
    """Every op's table under a heading, the runs put together."""
    ops: dict[tuple[str, str], dict[tuple, list[Row]]] = defaultdict(dict)
    for position, run in enumerate(runs):
        for key, group in run.groups().items():
            ops[group[0].op, group[0].device][position, key] = group
    lines = []
    for (op, device), groups in ops.items():
        lines += ["", f"### {op}, {device}", "", *op_lines(groups)]
    return lines


def against_lines(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """What became faster or slower since an older results file."""
    then = {identity(row): row for row in old["rows"]}
    now = {identity(row): row for row in new["rows"]}
    both = [(then[key], row) for key, row in now.items() if key in then]
    cells = []
    for before, after in sorted(both, key=lambda pair: pair[0]["seconds"] / pair[1]["seconds"]):
        old_seconds, seconds = before["seconds"], after["seconds"]
        is_within = abs(old_seconds - seconds) <= max(before["iqr"], after["iqr"])
        verdict = "within the spread" if is_within else "faster" if seconds < old_seconds else "slower"
        times = f"{old_seconds / seconds:.2f}"
        cells.append([description(after), seconds_text(old_seconds), seconds_text(seconds), times, verdict])
    lines = [f"## Against {old['date']}, {old['hardware']}, profile {old['profile']}", ""]
    lines += [f"{len(both)} rows are in both. Slowest first; the spread is the larger of both interquartile ranges."]
    lines += ["", *table(["row", "then", "now", "times as fast", ""], cells)] if both else []
    for only, left, right in (("then", then, now), ("now", now, then)):
        ops = Counter(f"{row['op']}, {row['device']}" for key, row in left.items() if key not in right)
        rows = [f"{op} ({count} rows)" for op, count in ops.items()]
        lines += ["", f"Only {only}: {'; '.join(rows)}."] if rows else []
    return lines


def results_text(
    runs: Sequence[Run], figures: Mapping[str, Any], pictures: Iterable[str], old: Mapping | None, remarks: str
) -> str:
    """The whole results file as Markdown."""
    rows = [row for run in runs for row in run.rows]
    lines = [
        f"# Benchmarks, {figures['date']}: {figures['hardware']}, profile {figures['profile']}",
        "",
        f"`pytest benchmarks/ --profile {figures['profile']} --benchmark-json FILE` and then "
        "`python -m benchmarks.report FILE`.",
        "",
        HOW_TO_READ,
        "",
        *machine_lines(runs),
        "",
        *ceiling_lines(runs),
        noise_line(rows),
        *(["", remarks.strip()] if remarks.strip() else []),
        "",
        "## Furthest from their floor",
        "",
        f"Of {' and '.join(OURS)}, each op's furthest row.",
        "",
        *furthest_lines(rows),
    ]
    for picture in pictures:
        lines += ["", f"![{plots.TITLES[picture.removesuffix('.svg').rpartition('_')[2]]}]({picture})"]
    lines += ["", *estimate_lines(rows), "## Every row", "", symbols_line(rows), *all_op_lines(runs)]
    if old is not None:
        lines += ["", *against_lines(figures, old)]
    return "\n".join(lines) + "\n"


def put_together(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs by hardware and profile.

    Raises:
        ReportError: a row is in two runs: which of them would count?
    """
    together: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        together[run.hardware, run.profile].append(run)
    for same in together.values():
        seen: dict[tuple, Run] = {}
        for run in same:
            for row in run.rows:
                if (other := seen.setdefault(row.identity, run)) is not run:
                    raise ReportError(
                        f"{other.file_name} and {run.file_name} both have the row {row}: give one of them, "
                        "or the older one as --against"
                    )
    return list(together.values())


def write_report(runs: Sequence[Run], out: Path, old: Mapping[str, Any] | None = None, remarks: str = "") -> Path:
    """Writes the results file of runs on one hardware, its plots and its figures.

    Args:
        out: folder, made if it is not there.
        old: figures to compare with.
        remarks: Markdown, put before the tables.

    Returns:
        The path of the results file.
    """
    atomic = load_atomic()
    figures = to_figures(runs)
    name = f"{figures['date']}_{slug(figures['hardware'])}_{figures['profile']}"
    out.mkdir(parents=True, exist_ok=True)
    pictures = []
    for kind, svg in plots.draw_all(runs).items():
        pictures.append(f"{name}_{kind}.svg")
        with atomic.atomic_open(out / pictures[-1]) as file:
            file.write(svg)
    with atomic.atomic_open(out / f"{name}.json") as file:
        file.write(figures_text(figures))
    with atomic.atomic_open(out / f"{name}.md") as file:
        file.write(results_text(runs, figures, pictures, old, remarks))
    return out / f"{name}.md"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.json", help="of pytest --benchmark-json")
    parser.add_argument("--out", type=Path, metavar="DIR", default=PROJECT_ROOT / "benchmarks" / "results")
    parser.add_argument("--against", type=Path, metavar="OLD.json", help="older figures, or an older FILE.json")
    parser.add_argument("--remarks", type=Path, metavar="FILE.md", help="what to say of these runs before the tables")
    options = parser.parse_args(arguments)
    try:
        remarks = "" if options.remarks is None else options.remarks.read_text(encoding="utf-8")
        together = put_together([read_run(path) for path in options.files])
        old = None if options.against is None else read_figures(options.against)
        for runs in together:
            print(write_report(runs, options.out, old, remarks))
    except (ReportError, OSError, UnicodeDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
