"""Several runs side by side: how far they are, how fast they were, and the settings in which they differ."""

from __future__ import annotations

from typing import Any

from ikem_fast.engine.config import differences
from ikem_fast.evaluation.tables import Table
from ikem_fast.report import page
from ikem_fast.report.page import Section
from ikem_fast.report.records import Material, RunRecord, clock

KIND_TITLES = {"pretrain": "Pretraining", "distill": "Distillation"}


def render(material: Material) -> list[Section]:
    if len(material.runs) < 2:
        return []
    blocks = [page.table(_side_by_side(material.runs), grouped=False)]
    for kind, title in KIND_TITLES.items():
        runs = material.runs_of(kind)
        if len(runs) < 2:
            continue
        blocks.append(page.heading(f"{title}: settings that differ"))
        rows = differing_settings(runs)
        if rows:
            blocks.append(
                page.table(Table(("setting", *(run.name for run in runs)), tuple(rows)), grouped=False, wrapped=True)
            )
        else:
            blocks.append(page.paragraph("None: the runs have the same settings, data and versions."))
    return [Section("Runs side by side", tuple(blocks))]


def _side_by_side(runs: list[RunRecord]) -> Table:
    def speed(run: RunRecord) -> str:
        value = run.clips_per_second()
        return "-" if value is None else f"{value:.0f} clips/s"

    def knn(run: RunRecord) -> str:
        if not run.curves.knn:
            return "-"
        view, (epochs, values) = list(run.curves.knn.items())[-1]
        return f"{100 * values[-1]:.1f} % ({view}, epoch {epochs[-1]:.0f})"

    lines = {
        "training": lambda run: KIND_TITLES[run.kind].lower(),
        "state": RunRecord.state,
        "steps": lambda run: str(run.step),
        "clips a step": lambda run: str(run.section["batch_size"]),
        "training time": lambda run: clock(run.seconds),
        "throughput, median": speed,
        "kNN accuracy at the end": knn,
    }
    rows = [(name, *(text(run) for run in runs)) for name, text in lines.items()]
    return Table(("", *(run.name for run in runs)), tuple(rows))


def differing_settings(runs: list[RunRecord]) -> list[tuple[str, ...]]:
    """A row (setting, value of each run) for whatever differs between runs of one kind.

    Those are values of their configurations, without the recipe of the other kind of training, the clips they were
    trained on, their teachers and the versions they ran with.
    """
    other = "distill." if runs[0].kind == "pretrain" else "pretrain."
    keys = dict.fromkeys(key for run in runs[1:] for key in differences(runs[0].config, run.config))
    rows = [(key, [_setting(run.config, key) for run in runs]) for key in keys if not key.startswith(other)]
    rows += [("data", [run.data_folder for run in runs]), ("teacher", [run.teacher or "-" for run in runs])]
    for name in dict.fromkeys(name for run in runs for name in run.versions):
        rows.append((f"version of {name}", [run.versions.get(name, "-") for run in runs]))
    return [(name, *texts) for name, texts in rows if len(set(texts)) > 1]


def _setting(config: dict[str, Any], key: str) -> str:
    value: Any = config
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, list):
        return ", ".join(str(item) for item in value) or "none"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
