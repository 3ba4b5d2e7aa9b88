"""The command ``evaluate fuse``: scores of files, fused by sample name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ikem_fast.atomic import write_json
from ikem_fast.evaluation.accuracy import top_k_accuracy
from ikem_fast.evaluation.scores import Scores, ScoresError, fuse_scores, load_scores, save_scores
from ikem_fast.evaluation.tables import Table, write_csv


@dataclass(frozen=True)
class Part:
    """One of the scores that are fused."""

    path: Path
    entry: str
    weight: float
    scores: Scores


def read_part(text: str) -> Part:
    """The scores that ``FILE[:ENTRY][=WEIGHT]`` means.

    Raises:
        ScoresError: the file cannot be read, has no such entry, or more than one where none is named; or the weight is
            no number above or equal to 0.
    """
    name, entry, weight = text, "", 1.0
    if not Path(name).exists() and "=" in name:
        name, _, number = name.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            raise ScoresError(f"{text}: the weight must be a number, got {number!r}") from None
        if not 0 <= weight < float("inf"):
            raise ScoresError(f"{text}: the weight must be a number, at least 0, got {number}")
    if not Path(name).exists() and ":" in name:
        name, _, entry = name.rpartition(":")
    scores = load_scores(name)
    entries = list(scores.logits)
    if not entry and len(entries) == 1:
        entry = entries[0]
    if entry not in entries:
        problem = f"has no scores '{entry}'" if entry else "has several scores, give one as FILE:ENTRY"
        raise ScoresError(f"{name} {problem}; it has {', '.join(entries)}")
    return Part(Path(name), entry, weight, scores)


def fuse_files(texts: Sequence[str], out: str | Path | None = None) -> Table:
    """Accuracy of scores alone and of their weighted sum, clip by clip by their names.

    Args:
        texts: ``FILE[:ENTRY][=WEIGHT]``; without a weight it is 1. Weights are taken as they are, not normalised.
        out: folder for fused.json, fused.csv and fused_scores.npz; None writes nothing.

    Returns:
        a table with a line for each part and one for the sum.

    Raises:
        ScoresError: see ``read_part`` and ``fuse_scores``.
    """
    parts = [read_part(text) for text in texts]
    weights = [part.weight for part in parts]
    if not any(weights):
        raise ScoresError("weights must not all be 0")
    fused, _ = fuse_scores([(part.scores, part.entry) for part in parts], weights)
    lines = [(str(part.path), part.entry, f"{part.weight:g}", *_accuracies(part.scores, part.entry)) for part in parts]
    lines.append(("fused", "", "", *_accuracies(fused, "fused")))
    table = Table(("scores", "entry", "weight", "top-1 %", "top-5 %"), tuple(lines), "scores fused by sample name")
    if out is not None:
        out = Path(out)
        out.mkdir(parents=True, exist_ok=True)
        rows = [dict(zip(("scores", "entry", "weight", "top1", "top5"), line, strict=True)) for line in lines]
        parts_of_sum = [{**row, "weight": part.weight} for row, part in zip(rows, parts, strict=False)]
        figures = {"top1": rows[-1]["top1"], "top5": rows[-1]["top5"]}
        write_json(out / "fused.json", {"num_test": len(fused.labels), "parts": parts_of_sum, "fused": figures})
        write_csv(out / "fused.csv", table)
        save_scores(out / "fused_scores.npz", fused)
    return table


def _accuracies(scores: Scores, entry: str) -> tuple[float, float]:
    logits, labels = torch.from_numpy(scores.logits[entry]), torch.from_numpy(scores.labels)
    return tuple(top_k_accuracy(logits, labels, k).item() for k in (1, 5))
