"""A report page of one or more runs: one HTML file with its pictures inside, which opens anywhere without a network."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ikem_fast.atomic import atomic_open
from ikem_fast.data import ClipSet
from ikem_fast.engine import checkpoints
from ikem_fast.engine.run_log import read_log
from ikem_fast.engine.runs import CONFIG_NAME
from ikem_fast.evaluation.commands import accuracy_table, read_evaluation
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops import derive_modalities
from ikem_fast.report import figures, page

_RUN_TITLES = {"pretrain": "Pretraining", "distill": "Distillation"}


def write_report(
    runs: Sequence[str | Path],
    out: str | Path,
    *,
    data: str | Path | None = None,
    title: str = "Report",
    phases: Iterable[tuple[str, float]] = (),
    sample: str | None = None,
) -> Path:
    """Writes a page on runs: accuracies, the modalities of one clip, curves, confusion, and what was run on what.

    Shown is what the run folders hold: curves from their logs, accuracies where ``evaluate`` was run.

    Args:
        runs: folders of pretraining and distillation runs, in the order they are shown.
        out: the HTML file.
        data: prepared data set; None is the first run's.
        title: heading of the page.
        phases: names and seconds of what was done to get here, for the facts at the end.
        sample: name of the clip that is drawn; None is a lively one of the test clips.

    Returns:
        the path of the page.

    Raises:
        CheckpointError, DataError: a run or the data set cannot be read.
        ValueError: there is no run, or no clip of that name.
    """
    if not runs:
        raise ValueError("runs must name at least one run folder, got none")
    runs = [Path(run) for run in runs]
    records = [checkpoints.load(run / checkpoints.FOLDER / checkpoints.LAST) for run in runs]
    clip_set = ClipSet.open(records[0]["data"]["folder"] if data is None else data)
    num_train, num_test = (int((clip_set.splits == split).sum()) for split in ("train", "test"))
    chance = _commonest_share(clip_set)
    logs = [list(read_log(run)) for run in runs]
    linear = _merged(read_evaluation(run, "linear") for run in runs)
    knn = _merged(read_evaluation(run, "knn") for run in runs)
    lead = (
        f"{clip_set.metadata['kind']}, protocol {clip_set.metadata['protocol']}: {num_train} training and {num_test} "
        f"test clips of {clip_set.num_classes} actions, {clip_set.layout.num_joints} joints."
    )
    blocks = []
    if linear:
        blocks.append(page.cards(_headlines(linear, chance)))
        blocks.append(_accuracy_section(linear, knn, chance))
    blocks.append(_modality_section(clip_set, sample))
    for record, log in zip(records, logs, strict=True):
        blocks.append(_training_section(record, log, chance))
    blocks += _confusion_sections(linear)
    blocks.append(_facts_section(runs, records, logs, clip_set, num_train, num_test, phases))
    out = Path(out)
    with atomic_open(out, "w") as file:
        file.write(page.page(title, lead, blocks))
    return out


def _merged(evaluations: Iterable[dict[str, Any] | None]) -> dict[str, dict[str, Any]]:
    """Encoders' names to their entries, of all runs that were evaluated; of equal names the last run's counts."""
    entries: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        for entry in evaluation["encoders"] if evaluation else ():
            entries[entry["encoders"]] = {**entry, "class_names": evaluation["data"]["class_names"]}
    return entries


def _commonest_share(clip_set: ClipSet) -> float:
    """Accuracy of always guessing the commonest class of the test clips."""
    labels = clip_set.labels[clip_set.splits == "test"]
    return float(np.bincount(labels).max() / len(labels)) if len(labels) else 0.0


def _headlines(linear: dict[str, dict[str, Any]], chance: float) -> list[tuple[str, str]]:
    values = []
    for name, entry in linear.items():
        row = entry["rows"][-1]
        what = row["name"] if len(row["modalities"]) == 1 else f"{len(row['modalities'])} modalities"
        values.append((f"{100 * row['top1']:.1f} %", f"{name}, {what}: linear top-1, {entry['reported']}"))
    return [*values, (f"{100 * chance:.1f} %", "always guessing the commonest action")]


def _accuracy_section(linear: dict[str, Any], knn: dict[str, Any], chance: float) -> str:
    groups = {name: {row["name"]: row["top1"] for row in entry["rows"]} for name, entry in linear.items()}
    bars = page.picture(figures.draw(figures.accuracy_bars(groups, chance)), "linear accuracy of every view")
    reported = next(iter(linear.values()))["reported"]
    notes = (
        f"Linear classifiers on frozen features; reported is the {reported}. The best epoch as judged on the test set "
        "is no result and only shown beside it. “all” is the mean over all modalities that the encoders have. The "
        "dotted line is always guessing the commonest action."
    )
    if any(name.startswith("untrained") for name in linear):
        notes += (
            " Features of untrained encoders are tiny, since there are no batch statistics yet; for the linear "
            "classifier they are multiplied by one number a modality, or it would learn nothing at the published rate."
        )
    return page.section(
        "Accuracy",
        page.paragraph(notes),
        bars,
        page.table(accuracy_table(linear.values(), knn.values())),
    )


def _modality_section(clip_set: ClipSet, sample: str | None) -> str:
    candidates = np.flatnonzero(clip_set.splits == "test")
    if len(candidates) == 0:
        candidates = np.arange(len(clip_set))
    if sample is not None:
        if sample not in clip_set.names:
            raise ValueError(f"sample must be the name of a clip in {clip_set.folder}, got '{sample}'")
        chosen = clip_set.names.index(sample)
    else:
        # Of up to 200 clips, undamaged ones where there are any, one that moves more than most but is no outlier.
        whole = candidates[clip_set.valid_frames[candidates] == clip_set.num_frames[candidates]]
        candidates = whole if len(whole) else candidates
        some = candidates[np.unique(np.linspace(0, len(candidates) - 1, 200).round().astype(int))]
        clips = clip_set.batch(some).clips
        speed = (clips[:, :, 1:] - clips[:, :, :-1]).norm(dim=1).mean(dim=(1, 2, 3))
        chosen = int(some[int(speed.argsort()[int(0.8 * (len(some) - 1))])])
    batch = clip_set.batch([chosen])
    modalities = derive_modalities(batch.clips, batch.num_frames, clip_set.layout, MODALITIES)[:, 0]
    figure = figures.modality_picture(modalities.numpy(), MODALITIES, clip_set.layout)
    action = clip_set.class_names[int(clip_set.labels[chosen])]
    return page.section(
        "The six modalities of one clip",
        page.paragraph(
            f"Clip {clip_set.names[chosen]}, action “{action}”. Arrows are the vectors that the encoders see, scaled "
            "per row and coloured by their length; on the right the length of every joint's vector in every frame."
        ),
        page.picture(figures.draw(figure, 110), f"six modalities of {clip_set.names[chosen]}"),
    )


def _training_section(record: dict[str, Any], log: list[dict[str, Any]], chance: float) -> str:
    losses: dict[str, tuple[list[int], list[float]]] = {}
    curves: dict[str, tuple[list[int], list[float]]] = {}
    notes: dict[str, None] = {}
    for line in log:
        if line["kind"] == "note":
            notes[line["text"]] = None
            continue
        kind, position = ("losses", line["step"]) if line["kind"] == "train" else ("accuracy", line["epoch"])
        series = losses if line["kind"] == "train" else curves
        for name, value in line[kind].items():
            positions, values = series.setdefault(name, ([], []))
            positions.append(position)
            values.append(value)
    title = _RUN_TITLES[record["kind"]]
    blocks = [page.paragraph(f"{record['step']} steps, {_clock(record['seconds'])} of training.")]
    blocks += [page.paragraph(f"{text[0].upper()}{text[1:]}.") for text in notes]
    if losses:
        blocks.append(page.picture(figures.draw(figures.loss_curves(losses)), f"{title}: losses by step"))
    if curves:
        curve_picture = figures.draw(figures.accuracy_curves(curves, chance))
        blocks.append(page.heading("kNN accuracy along the way"))
        blocks.append(page.picture(curve_picture, f"{title}: kNN accuracy by epoch"))
    return page.section(title, *blocks)


def _confusion_sections(linear: dict[str, dict[str, Any]]) -> list[str]:
    sections = []
    for name, entry in linear.items():
        if name.startswith("untrained"):
            continue
        figure = figures.confusion(np.array(entry["confusion"]["counts"]), entry["class_names"])
        view = entry["confusion"]["view"]
        sections.append(
            page.section(
                f"Confusion of the {name} encoders",
                page.paragraph(f"Linear evaluation, view “{view}”; in percent of the true class."),
                page.picture(figures.draw(figure), f"confusion matrix of the {name} encoders"),
            )
        )
    return sections


def _facts_section(
    runs: Sequence[Path],
    records: Sequence[dict[str, Any]],
    logs: Sequence[list[dict[str, Any]]],
    clip_set: ClipSet,
    num_train: int,
    num_test: int,
    phases: Iterable[tuple[str, float]],
) -> str:
    metadata = clip_set.metadata
    model = records[0]["config"]["model"]
    prepared = [text for text, on in (("centred", metadata["centring"]), ("rotated", metadata["rotation"])) if on]
    values = [
        ("data set", f"{metadata['kind']}, {metadata['protocol']}, {num_train} training and {num_test} test clips"),
        (
            "clips",
            f"{clip_set.clip_length} frames, {clip_set.layout.num_joints} joints ({clip_set.layout.name}), up to "
            f"{clip_set.num_persons} persons, {' and '.join(prepared) or 'neither centred nor rotated'}",
        ),
        (
            "encoders",
            f"ST-GCN, {model['hidden_channels']} hidden channels, features of {model['feature_size']}, embeddings of "
            f"{model['embedding_size']}, queues of {model['queue_size']}",
        ),
    ]
    for record, log in zip(records, logs, strict=True):
        speeds = [line["clips_per_second"] for line in log if line["kind"] == "train"]
        speed = f", {np.median(speeds):.0f} clips/s" if speeds else ""
        section = record["config"][record["kind"]]
        values.append(
            (
                _RUN_TITLES[record["kind"]].lower(),
                f"{record['step']} steps of {section['batch_size']} clips, learning rate {section['learning_rate']:g}, "
                f"{_clock(record['seconds'])}{speed}",
            )
        )
    values += [(name, _clock(seconds)) for name, seconds in phases]
    versions = ", ".join(f"{name} {version}" for name, version in records[0]["versions"].items())
    values += [("hardware", hardware()), ("versions", versions)]
    configs = []
    for run in runs:
        path = run / CONFIG_NAME
        if path.is_file():
            configs.append(page.folded(f"resolved configuration of {run.name}", path.read_text(encoding="utf-8")))
    return page.section("What was run", page.facts(values), *configs)


def hardware() -> str:
    """The machine in words: processor, cores this process may use, memory, and the GPU if torch sees one."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        memory_words = f", {memory:.0f} GiB memory"
    except (OSError, ValueError):
        memory_words = ""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    words = f"{name}, {cores} {'core' if cores == 1 else 'cores'}, {torch.get_num_threads()} threads{memory_words}"
    if torch.cuda.is_available():
        words += f"; {torch.cuda.get_device_name()}"
    return words


def _clock(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
