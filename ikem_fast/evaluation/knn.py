"""Nearest-neighbour evaluation: no training at all, so it says what the features themselves hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ikem_fast.evaluation.features import Features, extract_both
from ikem_fast.evaluation.outcomes import Column, Judgement, Outcome
from ikem_fast.evaluation.views import views_of

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.engine.config import Config
    from ikem_fast.evaluation.subjects import Subject

# Similarities that are held at one time, in numbers: 64 MiB of float32 whatever the size of the two sets.
_SIMILARITIES_AT_ONCE = 2**24


@dataclass(frozen=True)
class KnnRow:
    """Accuracy of one view: a modality, or several whose normalised features are put side by side.

    Attributes:
        name: the modality, "joint+motion+bone", or "all".
        modalities: the modalities that are put side by side.
        accuracy: top-1 accuracy in [0, 1] for each number of neighbours.
    """

    name: str
    modalities: tuple[str, ...]
    accuracy: dict[int, float]


def _check(train_features: Tensor, train_labels: Tensor, test_features: Tensor, k: int) -> None:
    if train_features.dim() != 2 or test_features.dim() != 2 or train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            "train_features and test_features must be (n, d) and (m, d), got "
            f"{tuple(train_features.shape)} and {tuple(test_features.shape)}"
        )
    if train_labels.shape != train_features.shape[:1]:
        raise ValueError(
            f"train_labels must be ({train_features.shape[0]},), one for each train feature, "
            f"got {tuple(train_labels.shape)}"
        )
    if not 1 <= k <= train_features.shape[0]:
        raise ValueError(f"k must be between 1 and the {train_features.shape[0]} train features, got {k}")


def knn_predict(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, *, ks: Sequence[int] = (1,)
) -> dict[int, Tensor]:
    """The labels that the k nearest train features vote for, by cosine similarity.

    Every neighbour has one vote; of classes with equally many votes the one with the greatest sum of similarities wins.

    Args:
        train_features: (n, d) float32; need not be normalised. A feature of zeros is equally far from everything.
        train_labels: (n,) int64, from 0.
        test_features: (m, d) float32.
        ks: numbers of neighbours, each between 1 and n; the similarities are computed once for all of them.

    Returns:
        for each k the (m,) int64 predictions.
    """
    largest = max(ks)
    for k in (min(ks), largest):
        _check(train_features, train_labels, test_features, k)
    num_classes = int(train_labels.max()) + 1
    train = F.normalize(train_features, dim=1)
    test = F.normalize(test_features, dim=1)
    rows_at_once = max(1, _SIMILARITIES_AT_ONCE // train.shape[0])
    predictions: dict[int, list[Tensor]] = {k: [] for k in ks}
    for rows in test.split(rows_at_once):
        similarities, neighbours = (rows @ train.T).topk(largest, dim=1)
        neighbour_labels = train_labels[neighbours]
        for k in ks:
            # A similarity s counts (s + 1.5) / (3 k) < 1 / k, so that k of them together never outweigh one vote.
            votes = 1.0 + (similarities[:, :k] + 1.5) / (3.0 * k)
            scores = votes.new_zeros(len(rows), num_classes).scatter_add_(1, neighbour_labels[:, :k], votes)
            predictions[k].append(scores.argmax(dim=1))
    return {k: torch.cat(parts) for k, parts in predictions.items()}


def knn_accuracy(
    train_features: Tensor, train_labels: Tensor, test_features: Tensor, test_labels: Tensor, k: int = 1
) -> float:
    """Fraction of the test features whose k nearest train features vote for the right label (see ``knn_predict``).

    Args:
        train_features: (n, d) float32.
        train_labels: (n,) int64.
        test_features: (m, d) float32.
        test_labels: (m,) int64.
        k: number of neighbours, between 1 and n.
    """
    predictions = knn_predict(train_features, train_labels, test_features, ks=(k,))[k]
    return (predictions == test_labels).double().mean().item()


def fused_features(features: Tensor) -> Tensor:
    """(S, N, d) to (N, S*d): each modality normalised, then side by side, so that cosines are means over modalities."""
    return F.normalize(features, dim=2).permute(1, 0, 2).flatten(1)


def evaluate_knn(train: Features, test: Features, *, ks: Sequence[int] = (1, 5)) -> list[KnnRow]:
    """Accuracy of every view: each modality, joint with motion and bone where there are more, and "all" together.

    Numbers of neighbours above the number of train clips are left out, unless none would remain.
    """
    usable = [k for k in ks if k <= len(train.labels)] or [1]
    rows = []
    for name, members in views_of(train.names).items():
        chosen = [train.names.index(member) for member in members]
        train_features, test_features = fused_features(train.features[chosen]), fused_features(test.features[chosen])
        predictions = knn_predict(train_features, train.labels, test_features, ks=usable)
        accuracy = {k: (predictions[k] == test.labels).double().mean().item() for k in usable}
        rows.append(KnnRow(name=name, modalities=members, accuracy=accuracy))
    return rows


def judge(
    subject: Subject,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: Config,
    seeds: Sequence[int],
    device: torch.device,
    progress: bool,
) -> Judgement:
    """The command ``evaluate knn`` for one set of encoders; nothing in it is random."""
    features = extract_both(subject, (train_set, test_set), settings.knn.feature_batch_size, device)
    rows = evaluate_knn(*features, ks=settings.knn.k)
    outcome = Outcome(
        tuple(
            {
                "name": row.name,
                "modalities": list(row.modalities),
                "accuracy": {str(k): value for k, value in row.accuracy.items()},
            }
            for row in rows
        ),
        result=rows,
    )
    columns = tuple(Column(f"k={k} %", ("accuracy", str(k))) for k in rows[0].accuracy)
    return Judgement("nearest neighbours, top-1", columns, (outcome,))
