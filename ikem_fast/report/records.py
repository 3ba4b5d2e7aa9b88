"""What a run's folder holds, read once for all sections of the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ikem_fast.data import ClipSet, DataError
from ikem_fast.engine import checkpoints
from ikem_fast.engine.run_log import LOG_NAME, read_log
from ikem_fast.engine.runs import CONFIG_NAME
from ikem_fast.evaluation.commands import read_evaluation
from ikem_fast.report.drawing import Series

EVALUATION_FOLDER = "evaluation"
_NUMBER_OR_NONE = (int, float, type(None))
# What the table of accuracies and the headlines read of a row.
_FIGURES: dict[str, dict[str, Any]] = {
    "linear": {
        "modalities": list,
        "top1": (int, float),
        **dict.fromkeys(("top5", "best_top1", "best_epoch"), _NUMBER_OR_NONE),
    },
    "knn": {"accuracy": Mapping},
}


class ReportError(ValueError):
    """A file of a run that cannot be shown; the message names it and says what is wrong."""


@dataclass
class Curves:
    """A run's log as series.

    Attributes:
        losses: ``kind/modality`` to losses by step.
        contrast: ``kind/modality`` to the accuracy of the contrast, in [0, 1], by step.
        knn: view to kNN accuracy, in [0, 1], by epoch.
        learning_rate, throughput: by step; throughput in clips/s.
        stage_2: the first logged step of stage 2, or None.
        notes: distinct notes, in order.
    """

    losses: dict[str, Series] = field(default_factory=dict)
    contrast: dict[str, Series] = field(default_factory=dict)
    knn: dict[str, Series] = field(default_factory=dict)
    learning_rate: Series = (np.empty(0), np.empty(0))
    throughput: Series = (np.empty(0), np.empty(0))
    stage_2: int | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class RunRecord:
    """One run.

    Attributes:
        folder: where it lies.
        name: what the page calls it; distinct among the page's runs.
        kind: "pretrain" or "distill".
        config: the resolved configuration as plain values.
        config_text: ``config.yaml``, or None.
        data_folder: prepared clips it was trained on.
        teacher: of a distillation, the teacher's folder.
        step, epoch, seconds: how far it is.
        versions: of the checkpoint.
        curves: the log.
        evaluations: kind to what ``evaluate`` wrote, all that are in the folder.
    """

    folder: Path
    name: str
    kind: str
    config: dict[str, Any]
    config_text: str | None
    data_folder: str
    teacher: str | None
    step: int
    epoch: int
    epoch_done: bool
    seconds: float
    versions: dict[str, str]
    curves: Curves
    evaluations: dict[str, dict[str, Any]]

    @property
    def section(self) -> dict[str, Any]:
        """The recipe of the command that trained it."""
        return self.config[self.kind]

    def state(self) -> str:
        """How far it is, in words."""
        epochs = self.section["epochs"]
        if self.epoch >= epochs and self.epoch_done:
            return f"finished, {_count(epochs, 'epoch')}"
        if self.config.get("max_steps") == self.step:
            return f"ended at max_steps, in epoch {self.epoch} of {epochs}"
        return f"unfinished: epoch {self.epoch} of {epochs}"

    def clips_per_second(self) -> float | None:
        """Median over the log's lines."""
        values = self.curves.throughput[1]
        return float(np.median(values)) if len(values) else None


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """Reads run folders.

    Raises:
        CheckpointError: a folder holds no run, or its checkpoint is unusable.
        LogError: a log is damaged.
        ReportError: evaluations are damaged, or there is no folder, or one twice.
    """
    paths = [Path(folder) for folder in folders]
    if not paths:
        raise ReportError("runs must name at least one run folder, got none")
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(resolved):
        if path in resolved[:number]:
            raise ReportError(f"runs must be distinct folders, got {paths[number]} twice")
    return [_read_run(path, name) for path, name in zip(paths, _short_names(resolved), strict=True)]


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Of every path the last parts, as few as tell all of them apart."""
    longest = max(len(folder.parts) for folder in folders)
    for length in range(1, longest + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(folder: Path, name: str) -> RunRecord:
    path = folder / checkpoints.FOLDER / checkpoints.LAST
    checkpoint = checkpoints.load(path)
    config_path = folder / CONFIG_NAME
    try:
        config_text = config_path.read_text(encoding="utf-8") if config_path.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise ReportError(f"{config_path} cannot be read: {error}") from error
    return RunRecord(
        folder=folder,
        name=name,
        kind=checkpoint["kind"],
        config=checkpoint["config"],
        config_text=config_text,
        data_folder=str(checkpoint["data"].get("folder")),
        teacher=(checkpoint.get("teacher") or {}).get("run"),
        step=checkpoint["step"],
        epoch=checkpoint["epoch"],
        epoch_done=checkpoint["epoch_done"],
        seconds=checkpoint["seconds"],
        versions=checkpoint["versions"],
        curves=read_curves(folder),
        evaluations=_read_evaluations(folder),
    )


def read_curves(folder: Path) -> Curves:
    """The log of a run; one without a log has no curves.

    Raises:
        LogError: it cannot be read, or a line is damaged.
    """
    path = folder / LOG_NAME
    points: dict[tuple[str, str], list[tuple[float, float]]] = {}
    curves = Curves()
    if not path.is_file():
        curves.notes.append(f"{LOG_NAME} is missing, and with it the curves")
        return curves
    for line in read_log(folder):
        if line["kind"] == "note":
            curves.notes.append(str(line["text"]))
        elif line["kind"] == "train":
            values = {("losses", name): value for name, value in line["losses"].items()}
            values |= {("contrast", name): value for name, value in line.get("contrast_accuracy", {}).items()}
            values |= {(name, ""): line[name] for name in ("learning_rate", "clips_per_second")}
            for key, value in values.items():
                points.setdefault(key, []).append((float(line["step"]), float(value)))
            if line["stage"] == "cross" and curves.stage_2 is None:
                curves.stage_2 = int(line["step"])
        elif line["kind"] == "knn":
            for name, value in line["accuracy"].items():
                points.setdefault(("knn", name), []).append((float(line["epoch"]), float(value)))
    series = {key: tuple(np.array(pairs).T) for key, pairs in points.items()}
    for name in ("losses", "contrast", "knn"):
        setattr(curves, name, {view: series[key] for key in series for view in key[1:] if key[0] == name})
    curves.learning_rate = series.get(("learning_rate", ""), curves.learning_rate)
    curves.throughput = series.get(("clips_per_second", ""), curves.throughput)
    curves.notes = list(dict.fromkeys(curves.notes))
    return curves


def _read_evaluations(folder: Path) -> dict[str, dict[str, Any]]:
    """Everything in the run's folder of evaluations that lists encoders with rows of results."""
    evaluations = {}
    for path in sorted((folder / EVALUATION_FOLDER).glob("*.json")):
        try:
            evaluation = read_evaluation(folder, path.stem)
        except (ValueError, OSError) as error:
            reason = " ".join(str(error).split())
            raise ReportError(f"{path} is damaged: {reason}; run the evaluation again or delete the file") from error
        if isinstance(evaluation, Mapping) and not {"kind", "encoders"} & evaluation.keys():
            continue  # something else, such as fused scores
        problem = _find_problem(evaluation, path.stem)
        if problem:
            raise ReportError(f"{path} is damaged: {problem}; run the evaluation again or delete the file")
        evaluations[path.stem] = evaluation
    return evaluations


def _find_problem(evaluation: Any, kind: str) -> str | None:
    """What is wrong with an evaluation's JSON; the sections rely on all that is looked at here."""
    if not isinstance(evaluation, Mapping) or not isinstance(evaluation.get("encoders"), list):
        return "it must be an object with a list of 'encoders'"
    for entry in evaluation["encoders"]:
        if not isinstance(entry, Mapping) or not isinstance(entry.get("encoders"), str):
            return "every entry of 'encoders' must be an object with its name as 'encoders'"
        rows = entry.get("rows")
        if not isinstance(rows, list) or not all(isinstance(row, Mapping) and "name" in row for row in rows):
            return f"'rows' of {entry['encoders']} must be a list of objects with a 'name'"
        for row in rows:
            for key, kinds in _FIGURES.get(kind, {}).items():
                if not isinstance(row.get(key), kinds):
                    return f"'{key}' of {entry['encoders']}, {row['name']}, is missing or no figure"
            if not isinstance(row.get("spread", {}), Mapping):
                return f"'spread' of {entry['encoders']}, {row['name']}, must be an object"
        if kind == "linear" and not _is_confusion(entry.get("confusion")):
            return f"'confusion' of {entry['encoders']} must hold a 'view' and a square of 'counts'"
    if not isinstance(evaluation.get("data", {}), Mapping):
        return "'data' must be an object"
    return None


def _is_confusion(value: Any) -> bool:
    if value is None:
        return True
    try:
        counts = np.array(value["counts"], dtype=float)
        return counts.ndim == 2 and counts.shape[0] == counts.shape[1] > 0 and isinstance(value["view"], str)
    except (KeyError, TypeError, ValueError):
        return False


class Material:
    """All that sections draw from.

    Attributes:
        runs: the runs, in the order they are shown.
        samples: names of clips that were asked for; empty = chosen by the section.
        embedding: "fused", "modalities" (every modality too) or None.
        phases: names and seconds of what was done to get here.
    """

    def __init__(
        self,
        runs: Sequence[RunRecord],
        *,
        data: str | Path | None = None,
        samples: Sequence[str] = (),
        embedding: str | None = "fused",
        phases: Sequence[tuple[str, float]] = (),
    ) -> None:
        self.runs = list(runs)
        self.samples = tuple(samples)
        self.embedding = embedding
        self.phases = tuple(phases)
        self._data = None if data is None else ClipSet.open(data)
        self._opened: dict[str, ClipSet | DataError] = {}
        for run in self.runs if self._data is None else ():
            if run.data_folder not in self._opened:
                try:
                    self._opened[run.data_folder] = ClipSet.open(run.data_folder)
                except DataError as error:
                    self._opened[run.data_folder] = error

    def clip_set_of(self, run: RunRecord) -> ClipSet | None:
        """The clips a run was trained on, or the set that was asked for; None where they are gone."""
        if self._data is not None:
            return self._data
        opened = self._opened[run.data_folder]
        return opened if isinstance(opened, ClipSet) else None

    def clip_sets(self) -> list[ClipSet]:
        """The different sets of clips of all runs."""
        found = (self.clip_set_of(run) for run in self.runs)
        return list({id(clip_set): clip_set for clip_set in found if clip_set is not None}.values())

    def data_problems(self) -> list[DataError]:
        """Why sets of clips cannot be read."""
        return [opened for opened in self._opened.values() if isinstance(opened, DataError)]

    def runs_of(self, kind: str) -> list[RunRecord]:
        return [run for run in self.runs if run.kind == kind]

    def entries(self, kind: str) -> dict[str, dict[str, Any]]:
        """Name to entry of all encoders that were judged by one kind of evaluation, each with its "class_names".

        Where several runs were evaluated, the names begin with the run's.
        """
        evaluated = [run for run in self.runs if run.evaluations]
        entries = {}
        for run in evaluated:
            evaluation = run.evaluations.get(kind)
            for entry in evaluation["encoders"] if evaluation else ():
                name = entry["encoders"] if len(evaluated) == 1 else f"{run.name}: {entry['encoders']}"
                class_names = (evaluation.get("data") or {}).get("class_names")
                entries[name] = {**entry, "encoders": name, "class_names": class_names}
        return entries

    def chance(self) -> float | None:
        """Accuracy of always guessing the commonest class of the test clips, where all runs have the same ones."""
        shares = set()
        for run in self.runs:
            clip_set = self.clip_set_of(run)
            if clip_set is not None:
                counts = np.bincount(clip_set.labels[clip_set.splits == "test"])
                shares.add(float(counts.max() / counts.sum()) if counts.size else None)
        for entry in () if shares else self.entries("linear").values():
            counts = np.sum(entry.get("confusion", {}).get("counts", [[0]]), axis=1)
            shares.add(float(counts.max() / counts.sum()) if counts.sum() else None)
        return shares.pop() if len(shares) == 1 else None


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def evenly_spaced(number: int, at_most: int) -> np.ndarray:
    """Positions 0 to ``number - 1``, or so many of them, evenly spaced, with the first and the last."""
    if number <= at_most:
        return np.arange(number)
    return np.linspace(0, number - 1, at_most).round().astype(np.int64)


def clock(seconds: float) -> str:
    """A time in words."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
