"""What the report and README take from a benchmark's JSON: read, checked, and with what follows from it computed.

Standard library only: neither ikem_fast nor torch is imported.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

PROJECT_ROOT = Path(__file__).resolve().parent.parent
FORMAT = "ikem_fast benchmark figures 1"
BASELINES = ("release manner", "eager", "eager compiled")
OURS = ("ours fp32", "ours bf16")
WAYS = (*BASELINES, *OURS)
# The entry of `sizes` that a sweep varies.
SWEPT_SIZE = {"batch": "clips", "queue": "queue", "modalities": "modalities", "threads": "threads"}
# The values that say which row is meant, in a results file's figures as in the benchmark's JSON.
IDENTITY = ("op", "phase", "sizes", "way", "device", "launch", "threads")


class ReportError(Exception):
    """A file that no report can be made of; the message says which and why, in one sentence."""


def load_atomic() -> ModuleType:
    """ikem_fast/atomic.py of the source tree by its path: importing the package would need torch."""
    name = "benchmarks._atomic"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, PROJECT_ROOT / "ikem_fast" / "atomic.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[name] = module
    return sys.modules[name]


@dataclass(frozen=True)
class Row:
    """One benchmark: a case, a way, a device. Times are seconds per call.

    Attributes:
        sizes: of the case, by the field's terms.
        threads: of the CPU, where they were set.
        seconds, iqr: median and interquartile range over the rounds.
        floor_seconds: what its bytes or its operations take at the machine's ceilings, the longer; 0: none is known.
        limited_by: which of the two: "bytes" or "operations".
        clips: that a call goes through; 0 where an op knows no clips.
        error, tolerance: distance from the plain-PyTorch twin as measured in the run, and the largest allowed.
        peak_bytes: memory beyond the inputs, where it was measured.
    """

    op: str
    phase: str
    sizes: Mapping[str, int]
    size_label: str
    device: str
    way: str
    launch: str
    threads: int | None
    seconds: float
    iqr: float
    rounds: int
    floor_seconds: float
    limited_by: str
    operation_kind: str
    clips: int
    error: float
    tolerance: float
    sweep: str
    peak_bytes: int | None

    @property
    def is_ours(self) -> bool:
        return self.way in OURS

    @property
    def name(self) -> str:
        """Way and launch, as tables name it."""
        return self.way if self.launch == "python" else f"{self.way}, {self.launch}"

    @property
    def group(self) -> tuple:
        """Rows with the same value did the same work, and are compared."""
        return self.op, self.phase, tuple(sorted(self.sizes.items())), self.device, self.threads

    @property
    def identity(self) -> tuple:
        return *self.group, self.way, self.launch

    @property
    def clips_per_second(self) -> float | None:
        return self.clips / self.seconds if self.clips else None

    @property
    def share_of_floor(self) -> float | None:
        """Floor over time: 1 is all that the machine's ceilings allow."""
        return self.floor_seconds / self.seconds if self.floor_seconds else None

    @property
    def ceiling(self) -> str:
        """What limits the work, in words."""
        return "copy bandwidth" if self.limited_by == "bytes" else f"{self.operation_kind} product rate"

    def __str__(self) -> str:
        threads = f", {self.threads} threads" if self.threads else ""
        return f"{self.op}, {self.phase}, {self.size_label}, {self.device}{threads}, {self.name}"


@dataclass(frozen=True)
class Run:
    """One `pytest benchmarks/ --benchmark-json FILE`.

    Attributes:
        facts: (name, value) about hardware, versions, commit and load, for the table of the report.
        ceilings: device, then ceiling, then its values at the start and at the end; per second.
    """

    file_name: str
    profile: str
    hardware: str
    date: str
    commit: str
    facts: Mapping[str, str]
    ceilings: Mapping[str, Mapping[str, Sequence[float]]]
    rows: Sequence[Row] = field(default_factory=tuple)

    def groups(self) -> dict[tuple, list[Row]]:
        """Rows that did the same work, by what that is, in the order of the file; ways in that of ``WAYS``."""
        groups = defaultdict(list)
        for row in self.rows:
            groups[row.group].append(row)
        for rows in groups.values():
            rows.sort(key=lambda row: (WAYS.index(row.way), row.launch != "python"))
        return dict(groups)


def ratios(row: Row, rows: Iterable[Row]) -> dict[str, float]:
    """How many times as fast as each baseline among ``rows`` a row is, by the baseline's name."""
    return {other.name: other.seconds / row.seconds for other in rows if other.way in BASELINES and other is not row}


# ---- reading ---------------------------------------------------------------------------------------------------------


def _entry(mapping: Any, key: str, kind: type | tuple[type, ...], where: str) -> Any:
    """``mapping[key]`` if it is of that kind; an error that says where it should have been otherwise."""
    if not isinstance(mapping, dict) or key not in mapping:
        raise ReportError(f"{where} has no {key!r}; it must come from `pytest benchmarks/ --benchmark-json FILE`")
    value = mapping[key]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ReportError(f"{where}: {key!r} is of the wrong kind, got {value!r}")
    return value


def _number(mapping: Any, key: str, where: str, *, above: float | None = None) -> float:
    value = _entry(mapping, key, (int, float), where)
    if not math.isfinite(value) or value < 0 or (above is not None and value <= above):
        least = "of at least 0" if above is None else f"above {above}"
        raise ReportError(f"{where}: {key!r} must be a finite number {least}, got {value!r}")
    return value


def _one_of(mapping: Any, key: str, allowed: Iterable[str], where: str) -> str:
    value = _entry(mapping, key, str, where)
    if value not in allowed:
        raise ReportError(f"{where}: {key!r} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
    return value


def _read_row(benchmark: Any, where: str) -> Row:
    where = f"{where}, {_entry(benchmark, 'name', str, where)}"
    extra = _entry(benchmark, "extra_info", dict, where)
    stats = _entry(benchmark, "stats", dict, where)
    calls = _number(extra, "calls", where, above=0)
    sizes = _entry(extra, "sizes", dict, where)
    row = Row(
        **{name: _entry(extra, name, str, where) for name in ("op", "phase", "size_label", "device")},
        sizes={name: _number(sizes, name, f"{where}, sizes") for name in sizes},
        way=_one_of(extra, "way", WAYS, where),
        launch=_one_of(extra, "launch", ("python", "graph"), where),
        threads=_entry(extra, "threads", (int, type(None)), where),
        seconds=_number(stats, "median", where, above=0) / calls,
        iqr=_number(stats, "iqr", where) / calls,
        rounds=_number(stats, "rounds", where, above=0),
        floor_seconds=_number(extra, "floor_seconds", where),
        limited_by=_one_of(extra, "limited_by", ("bytes", "operations"), where),
        operation_kind=_entry(extra, "operation_kind", str, where),
        clips=_number(extra, "clips", where),
        error=_number(extra, "error", where),
        tolerance=_number(extra, "tolerance", where),
        sweep=_one_of(extra, "sweep", ("", *SWEPT_SIZE), where),
        peak_bytes=None if _entry(extra, "peak_bytes", object, where) is None else _number(extra, "peak_bytes", where),
    )
    if row.error > row.tolerance:
        raise ReportError(f"{where}: its error {row.error:.3g} is above the allowed {row.tolerance:.3g}")
    if row.sweep and SWEPT_SIZE[row.sweep] not in row.sizes:
        raise ReportError(
            f"{where}: a sweep over {row.sweep} must have {SWEPT_SIZE[row.sweep]!r} in its sizes, got {sizes!r}"
        )
    return row


def read_json(path: Path) -> dict:
    """A file's JSON object.

    Raises:
        ReportError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ReportError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f"{path} is no whole JSON file: {error}") from None
    if not isinstance(value, dict):
        raise ReportError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def read_run(path: Path) -> Run:
    """What `pytest benchmarks/ --benchmark-json FILE` wrote.

    Raises:
        ReportError: the file is damaged, empty or of something else, a row lacks something, or a number is none.
    """
    content = read_json(path)
    where = str(path)
    machine = _entry(content, "machine_info", dict, where)
    commit = _entry(content, "commit_info", dict, where)
    benchmarks = _entry(content, "benchmarks", list, where)
    if not benchmarks:
        raise ReportError(f"{path} holds no benchmarks: none was run, or none came to its end")
    rows = tuple(_read_row(benchmark, where) for benchmark in benchmarks)
    seen: set[tuple] = set()
    for row in rows:
        if row.identity in seen:
            raise ReportError(f"{path} has two rows for {row}")
        seen.add(row.identity)
    revision = _entry(commit, "id", str, f"{where}, commit_info")[:12]
    revision += " and changes that were not committed" if commit.get("dirty") else ""
    date = _entry(content, "datetime", str, where)[:10]
    profile = _one_of(content, "profile", ("small", "full"), where)
    return Run(
        file_name=path.name,
        profile=profile,
        hardware=_entry(machine, "hardware", str, f"{where}, machine_info"),
        date=date,
        commit=revision,
        facts=_facts(content, machine, revision, date, where),
        ceilings=_ceilings(content, where),
        rows=rows,
    )


def _facts(content: dict, machine: dict, revision: str, date: str, where: str) -> dict[str, str]:
    inside = f"{where}, machine_info"

    def text(key: str) -> str:
        value = _entry(machine, key, (str, int, type(None)), inside)
        return "none" if value is None else str(value)

    def load(mapping: dict, key: str, where: str) -> str:
        values = _entry(mapping, key, (int, float, list), where)
        return " ".join(f"{value:.2f}" for value in (values if isinstance(values, list) else [values]))

    return {
        "date": date,
        "commit": revision,
        "CPU": text("cpu"),
        "GPU": text("gpu"),
        "memory": f"{_number(machine, 'memory_bytes', inside) / 2**30:.0f} GiB",
        "torch, CUDA": f"{text('torch')}, {text('cuda')}",
        "ikem_fast, CPU kernels": f"{text('ikem_fast')}, {text('cpu_capability')}",
        "Python": str(machine.get("python_version", "unknown")),
        "threads": text("threads"),
        "allocator": text("allocator"),
        "load average before": load(machine, "load_average_before", inside),
        "load average after": load(content, "load_average_after", where),
    }


def _ceilings(content: dict, where: str) -> dict[str, dict[str, list[float]]]:
    ceilings: dict[str, dict[str, list[float]]] = {}
    for device, moments in _entry(content, "ceilings", dict, where).items():
        place = f"{where}, ceilings of {device}"
        start, end = (_entry(moments, moment, dict, place) for moment in ("start", "end"))
        ceilings[device] = {name: [_number(values, name, place, above=0) for values in (start, end)] for name in start}
    return ceilings


# ---- figures of a results file ---------------------------------------------------------------------------------------


def slug(hardware: str) -> str:
    """The hardware as part of a file's name; a driver's version belongs into the file."""
    words = "".join(
        letter if letter.isascii() and letter.isalnum() else " " for letter in hardware.split(", driver")[0]
    )
    return "-".join(words.lower().split())[:60].strip("-") or "unknown"


def to_figures(runs: Sequence[Run]) -> dict[str, Any]:
    """The compact JSON beside a results file: what README and later comparisons take figures from."""
    date = max(run.date for run in runs)
    rows = []
    for run in runs:
        for group in run.groups().values():
            rows += [
                {
                    **{name: getattr(row, name) for name in IDENTITY},
                    "size_label": row.size_label,
                    "seconds": row.seconds,
                    "iqr": row.iqr,
                    "rounds": row.rounds,
                    "clips_per_second": row.clips_per_second,
                    "share_of_floor": row.share_of_floor,
                    "limited_by": row.limited_by,
                    "ratios": ratios(row, group),
                    "error": row.error,
                    "peak_bytes": row.peak_bytes,
                    "run": runs.index(run),
                }
                for row in group
            ]
    return {
        "format": FORMAT,
        "date": date,
        "hardware": runs[0].hardware,
        "profile": runs[0].profile,
        "runs": [dict(run.facts) for run in runs],
        "rows": _rounded(rows),
    }


def figures_text(figures: Mapping[str, Any]) -> str:
    """The JSON text, a line per row."""
    rows = ",\n".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in figures["rows"])
    rest = {name: value for name, value in figures.items() if name != "rows"}
    head = json.dumps(rest, indent=1, ensure_ascii=False, allow_nan=False).removesuffix("\n}")
    return f'{head},\n "rows": [\n{rows}\n]}}\n'


def _rounded(value: Any) -> Any:
    """Six digits of every number, which is more than any measurement has."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, list) else value


def read_figures(path: Path) -> dict[str, Any]:
    """The figures of a results file, or of the JSON that one can be made of.

    Raises:
        ReportError: the file is neither, or damaged.
    """
    content = read_json(path)
    if "format" not in content:
        return to_figures([read_run(path)])
    if content["format"] != FORMAT:
        raise ReportError(f"{path} must be of format {FORMAT!r}, got {content['format']!r}")
    for name in ("date", "hardware", "profile"):
        _entry(content, name, str, str(path))
    for position, row in enumerate(_entry(content, "rows", list, str(path))):
        where = f"{path}, row {position}"
        _number(row, "seconds", where, above=0)
        for name in IDENTITY:
            _entry(row, name, dict if name == "sizes" else object, where)
        _entry(row, "size_label", str, where)
        for name in ("iqr", "clips_per_second", "share_of_floor", "error", "peak_bytes"):
            if _entry(row, name, object, where) is not None:
                _number(row, name, where)
        for name in _entry(row, "ratios", dict, where):
            _number(row["ratios"], name, f"{where}, ratios", above=0)
    return content


def identity(row: Mapping[str, Any]) -> tuple:
    """Which row of a results file's figures this is."""
    return tuple(tuple(sorted(row[name].items())) if name == "sizes" else row[name] for name in IDENTITY)


def description(row: Mapping[str, Any]) -> str:
    """A row of a results file's figures in words."""
    sizes = [f"{name} {size}" for name, size in row["sizes"].items()]
    threads = [f"{row['threads']} threads"] if row["threads"] else []
    launch = ["graph"] if row["launch"] == "graph" else []
    return ", ".join([row["op"], row["phase"], *sizes, row["device"], *threads, row["way"], *launch])


# ---- numbers as they are shown ---------------------------------------------------------------------------------------


def three_digits(value: float) -> str:
    """1234.5 as 1230, 87.65 as 87.7, 0.1234 as 0.123."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:.{max(0, 2 - math.floor(math.log10(abs(rounded))))}f}" if rounded else "0"


def seconds_text(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{three_digits(seconds / size)} {unit}"
    return f"{three_digits(seconds * 1e9)} ns"


def bytes_text(count: float) -> str:
    return f"{three_digits(count / 1e9)} GB" if count >= 1e9 else f"{three_digits(count / 1e6)} MB"


def error_text(error: float) -> str:
    return f"{error:.1e}" if error else "0"


def ratio_text(ratio: float) -> str:
    """Two digits below ten: a ratio is no better than its two medians."""
    return f"{ratio:.0f}" if ratio >= 99.5 else f"{ratio:.1f}" if ratio >= 0.95 else f"{ratio:.2f}"


def percent_text(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.0995 else f"{100 * share:.2g} %"
