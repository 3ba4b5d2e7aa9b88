"""A profile as a table: of each phase its time, its share of the step, and its work against the floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ikem_fast.profiling.phases import BACKWARD, FORWARD, STEP_PHASES, Phase
from ikem_fast.profiling.running import Profile
from ikem_fast.profiling.traces import BETWEEN, IDLE, REST_OF_STEP, UNATTRIBUTED

FORMAT = "ikem_fast profile"
_LONGEST, _LONGEST_NAME = 12, 70  # operations that are shown, and characters of a name
_ORDER = [
    *((name, which) for name in STEP_PHASES if name != BACKWARD for which in (FORWARD, BACKWARD)),
    *(UNATTRIBUTED, REST_OF_STEP, BETWEEN, IDLE),
]


def as_values(profile: Profile) -> dict[str, Any]:
    """The profile as plain values, for a JSON file. Times are in seconds, of a step unless they are ``occasional``.

    ``phases`` has a row for each phase and pass; shares are of the step and add up to 1, ``share_of_floor`` is the
    floor's time over the phase's own, and what is not known is None.
    """
    times = profile.times
    seconds = times.host if times.device is None else times.device
    rows = []
    for phase in _ORDER:
        if phase not in seconds and phase not in times.host and phase not in profile.work:
            continue
        taken = seconds.get(phase, 0.0)
        row = {
            "phase": phase[0],
            "pass": phase[1],
            "seconds": taken,
            "share": taken / times.step_seconds,
            "host_seconds": times.host.get(phase, 0.0),
        }
        rows.append(row | _against_floor(profile, phase, taken))
    return {
        "format": FORMAT,
        "about": profile.about,
        "ceilings": asdict(profile.ceilings),
        "plain_step_seconds": profile.plain_step_seconds,
        "step_seconds": times.step_seconds,
        "phases": rows,
        "operations": [
            {"name": name, "calls": calls, "seconds": taken} for name, (calls, taken) in times.operations.items()
        ],
        "occasional": [
            {"phase": name, "seconds": of_each, "every": profile.about["occasions"][name]}
            for name, of_each in times.occasional.items()
            if of_each
        ],
    }


def _against_floor(profile: Profile, phase: Phase, taken: float) -> dict[str, Any]:
    names = ("bytes", "operations", "operation_kind", "floor_seconds", "limited_by", "share_of_floor")
    work = profile.work.get(phase)
    if work is None or not (work.bytes or work.operations):
        return dict.fromkeys(names)
    ceilings = profile.ceilings
    floor, limit = work.seconds(ceilings.copy_bytes_per_second, ceilings.operations_per_second(work.kind))
    values = (work.bytes, work.operations, work.kind, floor, limit, floor / taken if taken else None)
    return dict(zip(names, values, strict=True))


def as_markdown(values: Mapping[str, Any]) -> str:
    """What ``as_values`` gave, as a page of text."""
    about, ceilings, rows = values["about"], values["ceilings"], values["phases"]
    on_gpu = about["device"] != "cpu"
    stage = "" if about["stage"] == about["command"] else f", stage '{about['stage']}'"
    graph = ", as a CUDA graph" if about["captured"] else ""
    shape = "x".join(map(str, about["clip_shape"]))
    lines = [
        f"# Profile of {about['command']}{stage}{graph}",
        "",
        f"{about['clips']} clips of {shape} ({about['data']}), {len(about['modalities'])} modalities, "
        f"h = {about['hidden_channels']}, d = {about['feature_size']}, D = {about['embedding_size']}, "
        f"K = {about['queue_size']}, {about['precision']}, on {about['hardware']} ({about['device']}, "
        f"{about['threads']} threads), torch {about['torch']}, ikem_fast {about['ikem_fast']}.",
        "",
        f"A step takes {_milli(values['plain_step_seconds'])} ms, and {_milli(values['step_seconds'])} ms while it is "
        f"recorded: means of {about['steps']} steps. Ceilings measured before: "
        f"{ceilings['copy_bytes_per_second'] / 1e9:.1f} GB/s copied, "
        f"{ceilings['fp32_operations_per_second'] / 1e9:.0f} GFLOP/s in fp32, "
        f"{ceilings['bf16_operations_per_second'] / 1e9:.0f} GFLOP/s in bf16.",
        "",
    ]
    columns = ["phase", "ms", *(["host ms"] if on_gpu else []), "share %", "MB", "GFLOP", "floor ms", "of floor %"]
    cells = []
    for row in rows:
        known = row["floor_seconds"] is not None
        cells.append(
            [
                _label(row["phase"], row["pass"]),
                _milli(row["seconds"]),
                *([_milli(row["host_seconds"])] if on_gpu else []),
                f"{100 * row['share']:.1f}",
                f"{row['bytes'] / 1e6:.1f}" if known else "",
                f"{row['operations'] / 1e9:.2f}" if known else "",
                _milli(row["floor_seconds"]) if known else "",
                f"{100 * row['share_of_floor']:.1f}" if known and row["share_of_floor"] is not None else "",
            ]
        )
    floor = sum(row["floor_seconds"] or 0.0 for row in rows)
    cells.append(
        [
            "a step",
            _milli(values["step_seconds"]),
            *([_milli(sum(row["host_seconds"] for row in rows))] if on_gpu else []),
            f"{100 * sum(row['share'] for row in rows):.1f}",
            f"{sum(row['bytes'] or 0 for row in rows) / 1e6:.1f}",
            f"{sum(row['operations'] or 0 for row in rows) / 1e9:.2f}",
            _milli(floor),
            f"{100 * floor / values['step_seconds']:.1f}",
        ]
    )
    lines += _table(columns, cells)
    if values["occasional"]:
        lines += ["", f"Not in every step (kNN of {about['knn_clips']} training and at most as many test clips):", ""]
        cells = [
            [row["phase"], str(len(row["seconds"])), _milli(sum(row["seconds"]) / len(row["seconds"])), row["every"]]
            for row in values["occasional"]
        ]
        lines += _table(["phase", "times", "ms each", "in training, once in"], cells)
    what = "Kernels" if on_gpu else "Operators, without those that they call,"
    lines += ["", f"{what} that took longest in a step:", ""]
    longest = values["operations"][:_LONGEST]
    lines += _table(
        ["name", "calls", "ms", "share %"],
        [
            [
                _shortened(row["name"]),
                f"{row['calls']:.3g}",
                _milli(row["seconds"]),
                f"{100 * row['seconds'] / values['step_seconds']:.1f}",
            ]
            for row in longest
        ],
    )
    return "\n".join(lines) + "\n"


def _label(name: str, which: str) -> str:
    return {UNATTRIBUTED: "backward of no phase", REST_OF_STEP: "rest of the training step"}.get(
        (name, which), f"{name}, backward" if which == BACKWARD else name
    )


def _shortened(name: str) -> str:
    """Names of kernels can go on for hundreds of characters."""
    name = name.replace("|", "\\|")
    return name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."


def _milli(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}" if seconds < 0.1 else f"{1e3 * seconds:.0f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown that reads well as it is: the first column to the left, numbers to the right."""
    widths = [max(len(line[number]) for line in [columns, *rows]) for number in range(len(columns))]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return f"| {first[0].ljust(first[1])} | " + " | ".join(cell.rjust(width) for cell, width in others) + " |"

    rule = f"| {'-' * widths[0]} | " + " | ".join(f"{'-' * (width - 1)}:" for width in widths[1:]) + " |"
    return [line(columns), rule, *(line(row) for row in rows)]
