"""Semi-supervised evaluation: encoders pretrained on all clips, and the labels of a few.

Two forms are published. By default encoders are finetuned with a linear head on the labelled clips, as in
``finetune``; with ``frozen`` they stay as they are and only the head is trained, as in ``linear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch

from ikem_fast.engine.randomness import generator
from ikem_fast.evaluation.features import Features, extract_both
from ikem_fast.evaluation.finetuning import finetune, source_settings
from ikem_fast.evaluation.linear import rescaled, train_heads
from ikem_fast.evaluation.outcomes import Column, Judgement, Outcome

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.engine.config import Config
    from ikem_fast.evaluation.subjects import Subject

_LABELLED = 4  # keeps the choice of clips apart from other random numbers of the same seed


def choose_labelled(labels: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """Positions of the clips whose labels are used: a fraction of each class, at least one clip of it.

    Of a class with n clips max(1, round(fraction · n)) are chosen (halves to even), the first of an order that depends
    on the seed and the class alone, so that the clips of a smaller fraction are among those of a larger one.

    Args:
        labels: (N,) whole numbers.
        fraction: above 0, at most 1.
        seed: at least 0.

    Returns:
        positions in ``labels``, increasing, int64.
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be above 0 and at most 1, got {fraction}")
    labels = np.asarray(labels)
    chosen = []
    for label in np.unique(labels):
        clips = np.flatnonzero(labels == label)
        order = torch.randperm(len(clips), generator=generator(seed, _LABELLED, int(label))).numpy()
        chosen.append(clips[order[: max(1, round(fraction * len(clips)))]])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def check_classes(train_set: ClipSet, test_set: ClipSet) -> None:
    """Raises ValueError for classes of test clips that no training clip is of, which nothing could learn."""
    unseen = sorted(set(test_set.labels.tolist()) - set(train_set.labels.tolist()))
    if unseen:
        names = ", ".join(train_set.class_names[label] for label in unseen[:5])
        more = ", …" if len(unseen) > 5 else ""
        raise ValueError(
            f"{train_set.folder} must have a training clip of every class that it has test clips of, got none of "
            f"{names}{more}"
        )


def judge(
    subject: Subject,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: Config,
    seeds: Sequence[int],
    device: torch.device,
    progress: bool,
) -> Judgement:
    """The command ``evaluate semi`` for one set of encoders: for each seed other labelled clips, and all fractions."""
    check_classes(train_set, test_set)
    section = settings.semi
    features = None
    if section.frozen:
        features = extract_both(subject, (train_set, test_set), section.feature_batch_size, device)
    outcomes = []
    for seed in seeds:
        rows, scores, history = [], {}, {}
        for fraction in section.fractions:
            positions = choose_labelled(train_set.labels, fraction, seed)
            description = f"semi {subject.name}, {fraction:.0%} of the labels"
            if features is None:
                result = finetune(
                    subject,
                    train_set.subset(positions),
                    test_set,
                    section,
                    **source_settings(settings),
                    seed=seed,
                    device=device,
                    progress=progress,
                    description=description,
                )
                of_fraction = result.rows
            else:
                train, test = _labelled(features[0], positions), features[1]
                train, test = rescaled(train, test) if subject.untrained else (train, test)
                recipe = replace(settings.linear, fusion_weights=section.fusion_weights)
                result = train_heads(
                    train,
                    test,
                    train_set.class_names,
                    recipe,
                    seed=seed,
                    device=device,
                    progress=progress,
                    description=description,
                )
                of_fraction = result.all_rows
            of_labels = {"fraction": fraction, "num_clips": len(positions), "batch_size": result.batch_size}
            rows += [{**row.as_json(), **of_labels} for row in of_fraction]
            for name, logits in result.scores.items():
                scores[f"{name}@{fraction:g}"] = logits
            for name, values in result.history.items():
                history[f"{name}@{fraction:g}"] = values
        facts = {
            "epochs": settings.linear.epochs if section.frozen else section.epochs,
            "reported": "last epoch",
            "protocol": "frozen encoders" if section.frozen else "finetuned encoders",
        }
        outcomes.append(Outcome(tuple(rows), facts, history=history, scores=scores))
    how = "linear heads on frozen encoders" if section.frozen else "finetuned encoders"
    title = f"semi-supervised, {how}, last epoch of {outcomes[0].facts['epochs']}"
    labels = Column("labels %", ("fraction",)), Column("clips", ("num_clips",))
    columns = (
        Column("top-1 % (last epoch)", ("top1",)),
        Column("top-5 %", ("top5",)),
        Column("best epoch on test %", ("best_top1",)),
        Column("batch size", ("batch_size",)),
    )
    return Judgement(title, columns, tuple(outcomes), labels)


def _labelled(features: Features, positions: np.ndarray) -> Features:
    chosen = torch.from_numpy(positions)
    names = tuple(features.sample_names[position] for position in positions)
    return replace(features, features=features.features[:, chosen], labels=features.labels[chosen], sample_names=names)
