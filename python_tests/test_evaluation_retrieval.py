"""Retrieval against a count by hand, and against the definition written out clip by clip."""

from __future__ import annotations

import pytest
import torch

from ikem_fast.evaluation import Features, evaluate_retrieval, retrieval, retrieve


def direct(queries, query_labels, gallery, gallery_labels, ks, leave_one_out=False):
    """Mean average precision and recall as their definition says it."""
    precisions, hits = [], {k: [] for k in ks}
    for number, query in enumerate(queries):
        similarities = torch.nn.functional.cosine_similarity(gallery, query[None], dim=1).tolist()
        order = sorted(range(len(gallery)), key=lambda clip: (-similarities[clip], clip))
        if leave_one_out:
            order.remove(number)
        relevant = [bool(gallery_labels[clip] == query_labels[number]) for clip in order]
        if not any(relevant):
            continue
        ranks = [rank for rank, is_relevant in enumerate(relevant, start=1) if is_relevant]
        precisions.append(sum(found / rank for found, rank in enumerate(ranks, start=1)) / len(ranks))
        for k in ks:
            hits[k].append(any(relevant[:k]))
    return (
        sum(precisions) / len(precisions),
        {k: sum(values) / len(values) for k, values in hits.items()},
        len(precisions),
    )


def test_by_hand():
    angles = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    gallery = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([1, 0, 1, 1, 0])
    query = torch.tensor([[5.0, 0.0]])
    # Classes in the order of nearness: 1 0 1 1 0; of class 0 ranks 2 and 5, of class 1 ranks 1, 3 and 4.
    assert retrieve(query, torch.tensor([0]), gallery, labels, recall_at=(1, 2)) == (
        pytest.approx((1 / 2 + 2 / 5) / 2),
        {1: 0.0, 2: 1.0},
        1,
    )
    assert retrieve(query, torch.tensor([1]), gallery, labels, recall_at=(1,)) == (
        pytest.approx((1 + 2 / 3 + 3 / 4) / 3),
        {1: 1.0},
        1,
    )


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("at_once", [2**22, 100])
def test_agrees_with_the_definition(leave_one_out, at_once, monkeypatch):
    monkeypatch.setattr(retrieval, "_SIMILARITIES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(1)
    queries, gallery = torch.randn(30, 5, generator=generator), torch.randn(41, 5, generator=generator)
    query_labels = torch.randint(0, 6, (30,), generator=generator)
    gallery_labels = torch.randint(0, 5, (41,), generator=generator)
    query_labels[0] = 7  # nothing of its class is anywhere
    ks = (1, 3, 100)
    if leave_one_out:
        expected = direct(queries, query_labels, queries, query_labels, ks, leave_one_out=True)
        found = retrieve(queries, query_labels, None, None, recall_at=ks)
    else:
        expected = direct(queries, query_labels, gallery, gallery_labels, ks)
        found = retrieve(queries, query_labels, gallery, gallery_labels, recall_at=ks)
    assert found[0] == pytest.approx(expected[0])
    assert found[1] == pytest.approx(expected[1])
    assert found[2] == expected[2] < 30


def test_equally_similar_clips_come_in_the_order_of_the_gallery():
    gallery = torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    found = retrieve(torch.tensor([[1.0, 0.0]]), torch.tensor([1]), gallery, torch.tensor([0, 1, 0]), recall_at=(1, 2))
    assert found == (0.5, {1: 0.0, 2: 1.0}, 1)


def test_views_and_errors():
    labels = torch.tensor([0, 1, 2, 3] * 2)
    # The first modality tells the first bit of the label, the second the other bit; both together tell all.
    first = torch.nn.functional.one_hot(labels // 2, 2).float()
    second = torch.nn.functional.one_hot(labels % 2, 2).float()
    features = Features(torch.stack([first, 5 * second]), ("first", "second"), labels, tuple("abcdefgh"))
    rows = {row.name: row for row in evaluate_retrieval(features, recall_at=(1,))}
    assert list(rows) == ["first", "second", "all"]
    assert rows["all"].mean_average_precision == 1.0
    assert rows["first"].mean_average_precision < 1.0
    assert rows["all"].num_queries == 8
    assert evaluate_retrieval(features, features)[-1].recall == {1: 1.0, 5: 1.0, 10: 1.0}
    with pytest.raises(ValueError, match="no query has a clip of its class"):
        retrieve(first, labels, first[:1], torch.tensor([9]))
    with pytest.raises(ValueError, match=r"must be \(m, d\) and \(n, d\), got \(8, 2\) and \(8, 1\)"):
        retrieve(first, labels, first[:, :1], labels)
    with pytest.raises(ValueError, match=r"gallery_labels must be \(8,\).* got \(3,\)"):
        retrieve(first, labels, first, labels[:3])
    with pytest.raises(ValueError, match=r"recall_at must hold numbers of at least 1, got \[0\]"):
        retrieve(first, labels, first, labels, recall_at=[0])
