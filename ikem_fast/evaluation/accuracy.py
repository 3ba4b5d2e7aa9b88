"""How often logits name the right class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ikem_fast.evaluation.outcomes import Column


@dataclass(frozen=True)
class AccuracyRow:
    """Test accuracies in [0, 1] of one view: a modality, or several.

    Attributes:
        name: the modality, "joint+motion+bone", or "all"; with ``late_`` before it in a linear evaluation's rows of
            heads that were trained apart.
        modalities: the modalities whose logits are averaged, or summed with weights.
        top1: headline accuracy: of the last epoch, or of a linear evaluation's best one with the quirk
            ``best_epoch_on_test``.
        top5: the true class among the five highest logits, at the same epoch as ``top1``.
        best_top1: best of all epochs that were tested; no result, since the test set chose it.
        best_epoch: the first epoch, from 1, that reached it.
        weights: of the modalities' logits where they were trained apart; None for a single modality, and where they
            were trained on their mean.
    """

    name: str
    modalities: tuple[str, ...]
    top1: float
    top5: float
    best_top1: float
    best_epoch: int
    weights: tuple[float, ...] | None = None

    @classmethod
    def of_scores(
        cls,
        name: str,
        modalities: tuple[str, ...],
        scores: Tensor,
        labels: Tensor,
        history: Sequence[float],
        epochs: Sequence[int],
        *,
        weights: tuple[float, ...] | None = None,
    ) -> AccuracyRow:
        """The row of a view whose test clips have these scores.

        Args:
            name, modalities, weights: the attributes.
            scores: (N, classes), those of the headline.
            labels: (N,) int64.
            history: top-1 accuracy after each of the tested epochs.
            epochs: which those were.
        """
        best = max(history)
        top1, top5 = (top_k_accuracy(scores, labels, k).item() for k in (1, 5))
        return cls(name, modalities, top1, top5, best, epochs[history.index(best)], weights)

    def as_json(self) -> dict[str, Any]:
        """The row as plain values; ``weights`` only where there are any."""
        values = {**vars(self), "modalities": list(self.modalities)}
        weights = values.pop("weights")
        return values if weights is None else {**values, "weights": list(weights)}


def top_k_accuracy(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Fraction of clips whose label is among the k highest logits (all of them where there are fewer classes).

    Args:
        logits: (..., N, classes).
        labels: (N,) int64.
        k: at least 1.

    Returns:
        (...) float64.
    """
    best = logits.topk(min(k, logits.shape[-1]), dim=-1).indices
    return (best == labels[:, None]).any(dim=-1).double().mean(dim=-1)


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(N,), (N,) to (classes, classes) int64 counts: true class down, predicted class across."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, -1)


def accuracy_columns(headline: str) -> tuple[Column, ...]:
    """Columns for rows of ``AccuracyRow``.

    Args:
        headline: of which epoch ``top1`` is, in words.
    """
    return (
        Column(f"top-1 % ({headline})", ("top1",)),
        Column("top-5 %", ("top5",)),
        Column("best epoch on test %", ("best_top1",)),
        Column("at epoch", ("best_epoch",)),
        Column("batch size", ("batch_size",)),
    )
