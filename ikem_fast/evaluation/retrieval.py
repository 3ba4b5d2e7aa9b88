"""Retrieval: clips of the query's class among the clips that lie nearest to it, by cosine similarity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ikem_fast.evaluation.features import Features, extract_both
from ikem_fast.evaluation.knn import fused_features
from ikem_fast.evaluation.outcomes import Column, Judgement, Outcome
from ikem_fast.evaluation.views import views_of

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.engine.config import Config
    from ikem_fast.evaluation.subjects import Subject

# Similarities that are sorted at one time, in numbers: with their order 48 MiB, whatever the size of the two sets.
_SIMILARITIES_AT_ONCE = 2**22


@dataclass(frozen=True)
class RetrievalRow:
    """Figures of one view, in [0, 1]: a modality, or several whose normalised features are put side by side.

    Attributes:
        name: the modality, "joint+motion+bone", or "all".
        modalities: the modalities that are put side by side.
        mean_average_precision: see ``retrieve``.
        recall: for each number of clips that are looked at.
        num_queries: queries that it is the mean of, those with a clip of their class in the gallery.
    """

    name: str
    modalities: tuple[str, ...]
    mean_average_precision: float
    recall: dict[int, float]
    num_queries: int


def retrieve(
    queries: Tensor,
    query_labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    *,
    recall_at: Sequence[int] = (1, 5, 10),
) -> tuple[float, dict[int, float], int]:
    """Mean average precision, and recall at some ranks, of exact search by cosine similarity.

    For each query the gallery is put in order of falling cosine similarity, equally similar clips in the gallery's own
    order. Relevant are the clips of the query's class; R is their number, and r_1 < r_2 < … < r_R are their ranks from
    1. Average precision is (1 / R) Σ_i i / r_i, over the whole gallery and without interpolation; the mean over the
    queries is mAP. Recall at k is the share of queries with a relevant clip among the first k (r_1 ≤ k), as usual in
    retrieval; it is not the share of relevant clips that were found. Queries without a relevant clip are left out.

    Args:
        queries: (m, d) float32; need not be normalised. A feature of zeros is equally far from everything.
        query_labels: (m,) int64.
        gallery: (n, d) float32; None = the queries themselves, each without the query (leave one out).
        gallery_labels: (n,) int64, or None with the gallery.
        recall_at: numbers of clips k; those beyond the gallery see all of it.

    Returns:
        mAP, recall for each k, and how many queries they are means of.

    Raises:
        ValueError: shapes that do not fit, or no query has a clip of its class in the gallery.
    """
    leave_one_out = gallery is None
    if leave_one_out:
        gallery, gallery_labels = queries, query_labels
    if queries.dim() != 2 or gallery.dim() != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"queries and gallery must be (m, d) and (n, d), got {tuple(queries.shape)} and {tuple(gallery.shape)}"
        )
    for name, labels, clips in (
        ("query_labels", query_labels, queries),
        ("gallery_labels", gallery_labels, gallery),
    ):
        if labels is None or labels.shape != clips.shape[:1]:
            found = None if labels is None else tuple(labels.shape)
            raise ValueError(f"{name} must be ({len(clips)},), one for each clip, got {found}")
    if min(recall_at) < 1:
        raise ValueError(f"recall_at must hold numbers of at least 1, got {list(recall_at)}")
    queries, gallery = F.normalize(queries, dim=1), F.normalize(gallery, dim=1)
    ranks = torch.arange(1, len(gallery) + 1, dtype=torch.float64, device=gallery.device)
    precisions, first_ranks = [], []
    positions = torch.arange(len(queries), device=queries.device)
    for rows in positions.split(max(1, _SIMILARITIES_AT_ONCE // len(gallery))):
        similarities = queries[rows] @ gallery.T
        if leave_one_out:
            # The query itself comes last, where it is not relevant.
            similarities[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        order = similarities.argsort(dim=1, descending=True, stable=True)
        relevant = gallery_labels[order] == query_labels[rows, None]
        if leave_one_out:
            relevant[:, -1] = False
        count = relevant.sum(dim=1)
        found = relevant.cumsum(dim=1)
        answered = count > 0
        precision = torch.where(relevant, found / ranks, 0.0).sum(dim=1)
        precisions.append(precision[answered] / count[answered])
        first_ranks.append(relevant[answered].double().argmax(dim=1) + 1)
    precision, first_rank = torch.cat(precisions), torch.cat(first_ranks)
    if len(precision) == 0:
        raise ValueError("no query has a clip of its class in the gallery")
    recall = {k: (first_rank <= k).double().mean().item() for k in recall_at}
    return precision.mean().item(), recall, len(precision)


def evaluate_retrieval(
    queries: Features, gallery: Features | None = None, *, recall_at: Sequence[int] = (1, 5, 10)
) -> list[RetrievalRow]:
    """``retrieve`` for every view: each modality, joint with motion and bone where there are more, and "all" together.

    Args:
        queries: features of the clips to find the like of.
        gallery: features of those that are searched, with the same rows; None = the queries, leaving one out.
        recall_at: see ``retrieve``.
    """
    rows = []
    for name, members in views_of(queries.names).items():
        chosen = [queries.names.index(member) for member in members]
        searched = (None, None)
        if gallery is not None:
            searched = fused_features(gallery.features[chosen]), gallery.labels
        figures = retrieve(fused_features(queries.features[chosen]), queries.labels, *searched, recall_at=recall_at)
        rows.append(RetrievalRow(name, members, *figures))
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
    """The command ``evaluate retrieval`` for one set of encoders: test clips are the queries; nothing is random."""
    section = settings.retrieval
    from_train = section.gallery == "train"
    sets = (test_set, train_set) if from_train else (test_set,)
    features = extract_both(subject, sets, section.feature_batch_size, device)
    rows = evaluate_retrieval(*features, recall_at=section.recall_at)
    outcome = Outcome(
        tuple(
            {
                "name": row.name,
                "modalities": list(row.modalities),
                "map": row.mean_average_precision,
                "recall": {str(k): value for k, value in row.recall.items()},
            }
            for row in rows
        ),
        facts={"gallery": section.gallery, "queries": rows[0].num_queries},
        result=rows,
    )
    columns = Column("mAP %", ("map",)), *(Column(f"recall@{k} %", ("recall", str(k))) for k in section.recall_at)
    gallery = "training clips" if from_train else "the other test clips"
    return Judgement(f"retrieval, {rows[0].num_queries} test clips among {gallery}", columns, (outcome,))
