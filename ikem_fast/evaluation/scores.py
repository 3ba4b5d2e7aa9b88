"""Scores of test clips in files, and their fusion: clips are matched by name, never by position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ikem_fast.archives import check_archive
from ikem_fast.atomic import atomic_open

_NAMES, _LABELS = "sample_names", "labels"


class ScoresError(ValueError):
    """A score file that cannot be read, or scores that do not belong together."""


@dataclass(frozen=True)
class Scores:
    """Logits of N test clips.

    Attributes:
        sample_names: N names.
        labels: (N,) int64.
        logits: ``encoder/view`` to (N, classes) float32.
    """

    sample_names: tuple[str, ...]
    labels: np.ndarray
    logits: dict[str, np.ndarray]


def save_scores(path: str | Path, scores: Scores) -> None:
    """Writes scores as one ``.npz`` file, atomically: arrays ``sample_names``, ``labels`` and one per encoder/view."""
    arrays = {_NAMES: np.array(scores.sample_names, dtype=np.str_), _LABELS: scores.labels, **scores.logits}
    with atomic_open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def load_scores(path: str | Path) -> Scores:
    """Reads a file of ``save_scores``.

    Raises:
        ScoresError: it is missing, damaged or no score file.
    """
    try:
        check_archive(path, compressed=True)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        names, labels = arrays.pop(_NAMES), arrays.pop(_LABELS)
    except Exception as error:  # bytes that are no archive fail in as many ways as there are bytes
        raise ScoresError(f"{path} is no readable file of scores: {error}") from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ScoresError(f"{path}: {_NAMES} must be (N,) names, got {names.shape} {names.dtype}")
    number = len(names)
    if len(set(names.tolist())) != number:
        raise ScoresError(f"{path}: {_NAMES} must be distinct, got one twice")
    if labels.shape != (number,) or labels.dtype != np.int64:
        raise ScoresError(
            f"{path}: {_LABELS} must be int64, one for each of the {number} names, got {labels.shape} {labels.dtype}"
        )
    for name, logits in arrays.items():
        if logits.ndim != 2 or len(logits) != number or logits.dtype.kind != "f" or not np.isfinite(logits).all():
            raise ScoresError(
                f"{path}: {name} must be finite numbers with a row for each of the {number} names, got {logits.shape} "
                f"{logits.dtype}"
            )
        if number and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            raise ScoresError(
                f"{path}: {_LABELS} must be classes of {name}, 0 to {logits.shape[1] - 1}, got {labels.min()} to "
                f"{labels.max()}"
            )
    return Scores(sample_names=tuple(names.tolist()), labels=labels, logits=arrays)


def fuse_scores(parts: Sequence[tuple[Scores, str]], weights: Sequence[float] | None = None) -> tuple[Scores, float]:
    """The weighted sum of logits of several runs or views, clip by clip by their names.

    Args:
        parts: scores and the ``encoder/view`` to take of each.
        weights: one per part; None is 1 for each.

    Returns:
        scores with the one entry "fused", in the first part's order, and their top-1 accuracy in [0, 1].

    Raises:
        ScoresError: no parts, an unknown entry, or parts that hold different clips, labels or numbers of classes; the
            message names the first clips that differ.
    """
    if not parts:
        raise ScoresError("parts must name at least one set of scores, got none")
    weights = [1.0] * len(parts) if weights is None else list(weights)
    if len(weights) != len(parts):
        raise ScoresError(f"weights must have one number for each of the {len(parts)} parts, got {len(weights)}")
    first = parts[0][0]
    fused: np.ndarray | None = None
    for number, ((scores, entry), weight) in enumerate(zip(parts, weights, strict=True), start=1):
        if entry not in scores.logits:
            raise ScoresError(f"part {number} has no scores '{entry}'; it has {', '.join(scores.logits)}")
        rows = _rows_by_name(scores)
        alone = sorted(rows.keys() ^ set(first.sample_names))
        if alone:
            raise ScoresError(
                f"part {number} must hold the same clips as part 1; {len(alone)} are in only one: {alone[:3]}"
            )
        order = [rows[name] for name in first.sample_names]
        if not np.array_equal(scores.labels[order], first.labels):
            raise ScoresError(f"part {number} must have the same labels as part 1, but some clips' labels differ")
        logits = weight * scores.logits[entry][order].astype(np.float64)
        if fused is not None and fused.shape != logits.shape:
            raise ScoresError(f"part {number} must have {fused.shape[1]} classes as part 1, got {logits.shape[1]}")
        fused = logits if fused is None else fused + logits
    accuracy = float((fused.argmax(axis=1) == first.labels).mean())
    return Scores(first.sample_names, first.labels, {"fused": fused.astype(np.float32)}), accuracy


def _rows_by_name(scores: Scores) -> Mapping[str, int]:
    rows = {name: row for row, name in enumerate(scores.sample_names)}
    if len(rows) != len(scores.sample_names):
        raise ScoresError(f"sample names must be distinct, got {len(scores.sample_names)} clips with {len(rows)} names")
    return rows
