"""Evaluations of whole runs: which encoders are judged, with which seeds, and what is written."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ikem_fast.atomic import write_json
from ikem_fast.data import ClipSet, DataError
from ikem_fast.data.preparation import Preparation
from ikem_fast.engine import checkpoints
from ikem_fast.engine.config import Config, load_config, resolve_device
from ikem_fast.evaluation import registry, subjects
from ikem_fast.evaluation.outcomes import Judgement, Outcome, combine, make_table
from ikem_fast.evaluation.registry import FOLDER, Evaluation
from ikem_fast.evaluation.scores import Scores, save_scores
from ikem_fast.evaluation.subjects import Run, Subject, SubjectError
from ikem_fast.evaluation.tables import Table, write_csv


@dataclass(frozen=True)
class _Plan:
    """One run of those that are judged together.

    Attributes:
        folder: the run's.
        facts: what is written down of it.
        settings: the whole configuration that it is judged by.
        seeds: the evaluation seeds.
    """

    folder: Path
    facts: dict[str, Any]
    settings: Config
    seeds: list[int]


@dataclass(frozen=True)
class _Result:
    """One outcome and where it comes from."""

    run: int
    seed: int
    subject_name: str
    untrained: bool
    outcome: Outcome


def evaluate_run(
    kind: str,
    run_folder: str | Path | Sequence[str | Path],
    *,
    data: str | Path | None = None,
    config: str | Path | None = None,
    overrides: Sequence[str] = (),
    untrained: bool = False,
    part: str | None = None,
    out: str | Path | None = None,
    transfer: bool = False,
    persons: int | None = None,
    progress: bool = True,
) -> tuple[Table, Path]:
    """Evaluates one or several runs and writes ``<kind>.json``, ``<kind>.csv`` and, where there are scores,
    ``<kind>_scores.npz``.

    Every set of encoders is judged once for each run and evaluation seed (``evaluation.seeds``); several results are
    given as mean and sample standard deviation, with all single values under ``results`` in the JSON. Encoders that are
    the same in several runs (the teacher of several students) count once, and evaluations that nothing is random in
    (nearest neighbours, retrieval) are made once a run.

    Args:
        kind: name of a registered evaluation: "linear", "knn", "semi", "finetune" or "retrieval".
        run_folder: a pretraining or distillation run; or several that differ in their seed alone.
        data: prepared data set; None is the one the runs were trained on.
        config: preset or file with the settings; None is each run's own configuration.
        overrides: ``key=value`` texts, short keys being those of the evaluation's section.
        untrained: also evaluate freshly initialised encoders of the same shape, drawn anew for each seed.
        part: "student" or "teacher" to judge that part of a distillation alone.
        out: where results go; None is the run's folder ``evaluation``. Required for several runs, since the results
            belong to none of them.
        transfer: the data set may have another skeleton, which is fitted to the runs' (``ClipSet.fitted``), and clips
            of fewer persons are filled up with zeros to those of pretraining; more persons, and another number of
            frames, stay as they are, since the encoders average over both. The files are then named
            ``transfer_<kind>_<data set>``.
        persons: persons of a clip in pretraining, for ``transfer``; None is what the run remembers, or its data set.
        progress: show bars.

    Returns:
        the table and the folder that was written to.

    Raises:
        CheckpointError, ConfigError, DataError, LayoutError: a run, the settings or the data set cannot be used.
        SubjectError: the runs do not belong together, or lack the part.
        ValueError: an unknown kind, or a data set whose skeleton or classes do not fit.
    """
    evaluation = registry.get(kind)
    folders = [Path(run_folder)] if isinstance(run_folder, str | Path) else [Path(folder) for folder in run_folder]
    if not folders:
        raise SubjectError("run must name at least one run folder, got none")
    if len(folders) > 1 and out is None:
        raise SubjectError(f"out must name a folder for the results of {len(folders)} runs, got none")
    # All that can be found wrong is found before anything is computed.
    first, plans = _make_plans(folders, evaluation, config, overrides, part, data)
    settings = plans[0].settings
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    clip_set = _open_clips(first, data, transfer, persons)
    sets = clip_set.split("train"), clip_set.split("test")
    folder = folders[0] / FOLDER if out is None else Path(out)
    folder.mkdir(parents=True, exist_ok=True)

    results: list[_Result] = []
    judgement: Judgement | None = None
    judged: set[tuple[str, int | None]] = set()  # encoders by their weights, and the seed where there is one
    for number, plan in enumerate(plans):
        run = first if number == 0 else Run.load(plan.folder)  # of many runs one at a time is held
        for subject, seeds in _subjects(run, plan, evaluation, untrained, part):
            weights = subjects.digest(subject)
            keys = {seed: (weights, seed if evaluation.seeded else None) for seed in seeds}
            new = [seed for seed in seeds if keys[seed] not in judged]
            judged.update(keys.values())
            if not new:
                continue
            device = resolve_device(plan.settings)
            of_subject = evaluation.judge_function(subject, *sets, plan.settings, new, device, progress)
            judgement = of_subject if judgement is None else judgement
            for seed, outcome in zip(new, of_subject.outcomes, strict=True):
                results.append(_Result(number, seed, subject.name, subject.untrained, outcome))

    by_name: dict[str, list[Outcome]] = {}
    for result in results:
        by_name.setdefault(result.subject_name, []).append(result.outcome)
    entries = [combine(name, outcomes, judgement.labels) for name, outcomes in by_name.items()]
    if transfer:
        source = clip_set.metadata["layout"]["name"]
        of_set = f"transfer to {clip_set.metadata['kind']} ({source} to {clip_set.layout.name}): "
        judgement = replace(judgement, title=of_set + judgement.title)
    table = make_table(entries, judgement)
    name = f"transfer_{kind}_{clip_set.metadata['kind']}" if transfer else kind
    several = len(plans) > 1 or max(len(outcomes) for outcomes in by_name.values()) > 1
    write_json(
        folder / f"{name}.json",
        {
            "kind": kind,
            "title": table.title,
            "run": {key: plans[0].facts[key] for key in ("kind", "epoch", "step")},
            "runs": [{**plan.facts, "evaluation_seeds": plan.seeds} for plan in plans],
            "data": _describe_data(clip_set, sets, transfer),
            "settings": vars(getattr(settings, evaluation.section)),
            "seed": settings.seed,
            "versions": checkpoints.versions(),
            "encoders": entries,
            "results": [
                {
                    "run": str(plans[result.run].folder),
                    "seed": result.seed,
                    "encoders": result.subject_name,
                    "rows": list(result.outcome.rows),
                }
                for result in results
            ],
        },
    )
    write_csv(folder / f"{name}.csv", table)
    _write_scores(folder / f"{name}_scores.npz", results, plans, sets[1], several)
    if evaluation.keep_function is not None and len(plans) == 1 and not transfer:
        of_first_seed = {}
        for result in results:
            if not result.untrained:
                of_first_seed.setdefault(result.subject_name, result.outcome.result)
        evaluation.keep_function(
            folder,
            of_first_seed,
            recipe=vars(getattr(settings, evaluation.section)),
            seed=plans[0].seeds[0],
            step=plans[0].facts["step"],
            data={"folder": str(clip_set.folder), "preparation": Preparation.of_clips(clip_set).to_dict()},
        )
    return table, folder


def _make_plans(
    folders: Sequence[Path],
    evaluation: Evaluation,
    config: str | Path | None,
    overrides: Sequence[str],
    part: str | None,
    data: str | Path | None,
) -> tuple[Run, list[_Plan]]:
    """The first run, and settings and seeds of every run; raises SubjectError unless they can be judged together."""
    plans: list[_Plan] = []
    first: Run | None = None
    trained: dict[str, Path] = {}
    for folder in folders:
        run = Run.load(folder)
        own = subjects.digest(next(subjects.trained_subjects(run, part)))
        if own in trained and part != "teacher":
            raise SubjectError(f"{trained[own]} and {folder} hold the same encoders: their spread would say nothing")
        trained[own] = folder
        settings = load_config(run.checkpoint["config"] if config is None else config, overrides, evaluation.section)
        plan = _Plan(folder, run.facts(), settings, subjects.evaluation_seeds(settings.evaluation.seeds, settings.seed))
        if first is None:
            first = run
        else:
            subjects.check_together(first, run)
            of_first, of_this = (vars(getattr(each.settings, evaluation.section)) for each in (plans[0], plan))
            wrong = [f"{key} is {value} and {of_this[key]}" for key, value in of_first.items() if of_this[key] != value]
            if wrong:
                raise SubjectError(
                    f"{plans[0].folder} and {folder} have other settings of {evaluation.section}: {'; '.join(wrong)}; "
                    "give --config or the settings"
                )
            of_first, of_this = (each.checkpoint["data"].get("fingerprint") for each in (first, run))
            if data is None and of_first != of_this:
                raise SubjectError(f"{plans[0].folder} and {folder} were trained on other clips: give --data")
        plans.append(plan)
    return first, plans


def _open_clips(run: Run, data: str | Path | None, transfer: bool, persons: int | None) -> ClipSet:
    """The clips to judge on, with the run's skeleton."""
    clip_set = ClipSet.open(run.checkpoint["data"]["folder"] if data is None else data)
    layout = run.method.layout
    if not transfer:
        if clip_set.layout != layout:
            raise ValueError(
                f"data set {clip_set.folder} must have the run's skeleton '{layout.name}', got "
                f"'{clip_set.layout.name}'; `evaluate transfer` fits one skeleton to another"
            )
        return clip_set
    if persons is not None and persons < 1:
        raise ValueError(f"persons must be at least 1, got {persons}")
    preparation = Preparation.of_run(run.checkpoint["data"])
    if preparation is not None:
        wrong = [
            f"{name} is {getattr(preparation, name)} there and {clip_set.metadata[name]} here"
            for name in ("centring", "rotation")
            if getattr(preparation, name) != clip_set.metadata[name]
        ]
        if wrong:
            raise DataError(f"{clip_set.folder} must be prepared as the clips of pretraining: {'; '.join(wrong)}")
    elif persons is None:
        folder = run.checkpoint["data"]["folder"]
        raise DataError(
            f"{run.folder} does not say how many persons its clips had, and its data set {folder} cannot be read: give "
            "--persons"
        )
    return clip_set.fitted(layout, preparation.num_persons if persons is None else persons)


def _subjects(
    run: Run, plan: _Plan, evaluation: Evaluation, untrained: bool, part: str | None
) -> Iterator[tuple[Subject, list[int]]]:
    """The sets of encoders that are judged of a run, and the seeds they are judged with."""
    for subject in subjects.trained_subjects(run, part):
        yield subject, plan.seeds if evaluation.seeded else plan.seeds[:1]
    if untrained:
        for seed in plan.seeds:
            for subject in subjects.untrained_subjects(run, seed, part):
                yield subject, [seed]


def _describe_data(clip_set: ClipSet, sets: tuple[ClipSet, ClipSet], transfer: bool) -> dict[str, Any]:
    description = {
        "folder": str(clip_set.folder),
        "num_train": len(sets[0]),
        "num_test": len(sets[1]),
        "class_names": list(clip_set.class_names),
    }
    if not transfer:
        return description
    stored = clip_set.metadata["layout"]
    numbers = clip_set.fitting.joints.tolist()
    joints = {
        joint: stored["joints"][number] for joint, number in zip(clip_set.layout.joint_names, numbers, strict=True)
    }
    return {**description, "layout": stored["name"], "joints": joints, "persons": clip_set.num_persons}


def _write_scores(
    path: Path, results: Sequence[_Result], plans: Sequence[_Plan], test_set: ClipSet, several: bool
) -> None:
    """All scores by ``encoders/view``; of several runs or seeds with the run's name and the seed before it."""
    logits: dict[str, Any] = {}
    names = [plan.folder.name for plan in plans]
    for result in results:
        before = ""
        if several:
            run = names[result.run] if names.count(names[result.run]) == 1 else f"run{result.run}"
            before = f"{run}/seed{result.seed}/" if len(plans) > 1 else f"seed{result.seed}/"
        for view, scores in result.outcome.scores.items():
            logits[f"{before}{result.subject_name}/{view}"] = scores.numpy()
    if logits:
        save_scores(path, Scores(tuple(test_set.names), test_set.labels, logits))
