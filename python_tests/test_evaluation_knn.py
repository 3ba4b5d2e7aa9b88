"""Nearest neighbours against a direct count."""

from __future__ import annotations

import pytest
import torch

from ikem_fast.evaluation import Features, evaluate_knn, knn
from ikem_fast.evaluation.knn import fused_features, knn_accuracy, knn_predict


def direct_prediction(train, labels, query, k):
    similarity = torch.nn.functional.cosine_similarity(train, query[None], dim=1)
    nearest = similarity.argsort(descending=True)[:k].tolist()
    votes = {}
    for index in nearest:
        count, total = votes.get(int(labels[index]), (0, 0.0))
        votes[int(labels[index])] = (count + 1, total + float(similarity[index]))
    return max(votes, key=votes.__getitem__)


@pytest.mark.parametrize("k", [1, 3, 8, 50])
def test_agrees_with_a_direct_count(k, monkeypatch):
    generator = torch.Generator().manual_seed(k)
    train = torch.randn(50, 6, generator=generator)
    labels = torch.randint(0, 4, (50,), generator=generator)
    test = torch.randn(30, 6, generator=generator)
    expected = [direct_prediction(train, labels, query, k) for query in test]
    assert knn_predict(train, labels, test, ks=(k,))[k].tolist() == expected
    # Seven test features at a time give the same.
    monkeypatch.setattr(knn, "_SIMILARITIES_AT_ONCE", 7 * 50)
    assert knn_predict(train, labels, test, ks=(k,))[k].tolist() == expected


def test_a_tie_goes_to_the_nearer_class():
    train = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    labels = torch.tensor([0, 0, 1, 1])
    test = torch.tensor([[1.0, 0.3], [0.3, 1.0]])
    assert knn_predict(train, labels, test, ks=(4,))[4].tolist() == [0, 1]


def test_more_votes_win_over_nearness():
    train = torch.tensor([[1.0, 0.0], [-1.0, 0.1], [-1.0, -0.1]])
    labels = torch.tensor([0, 1, 1])
    assert knn_predict(train, labels, torch.tensor([[1.0, 0.0]]), ks=(3,))[3].tolist() == [1]


def test_accuracy_of_modalities_and_of_all():
    labels = torch.tensor([0, 1, 2, 3])
    # The first modality tells the first bit of the label, the second the other bit; both together tell all.
    first = torch.nn.functional.one_hot(labels // 2, 2).float()
    second = torch.nn.functional.one_hot(labels % 2, 2).float()
    rows = torch.stack([first, 5 * second])
    features = Features(rows, ("first", "second"), labels, ("a", "b", "c", "d"))
    by_name = {row.name: row.accuracy for row in evaluate_knn(features, features, ks=(1, 3, 20))}
    assert list(by_name) == ["first", "second", "all"]
    assert by_name["all"][1] == 1.0
    assert by_name["first"][1] < 1.0
    assert list(by_name["all"]) == [1, 3]
    assert knn_accuracy(fused_features(rows), labels, fused_features(rows), labels) == 1.0


def test_one_modality_has_no_fused_row():
    features = Features(torch.randn(1, 4, 3), ("joint",), torch.arange(4), tuple("abcd"))
    assert [row.name for row in evaluate_knn(features, features)] == ["joint"]


@pytest.mark.parametrize(
    ("train", "labels", "test", "k", "message"),
    [
        ((5, 3), 5, (2, 4), 1, r"must be \(n, d\) and \(m, d\), got \(5, 3\) and \(2, 4\)"),
        ((5, 3), 4, (2, 3), 1, r"train_labels must be \(5,\)"),
        ((5, 3), 5, (2, 3), 6, "k must be between 1 and the 5 train features, got 6"),
        ((5, 3), 5, (2, 3), 0, "k must be between 1 and the 5 train features, got 0"),
    ],
)
def test_wrong_arguments(train, labels, test, k, message):
    with pytest.raises(ValueError, match=message):
        knn_accuracy(torch.ones(train), torch.zeros(labels, dtype=torch.int64), torch.ones(test), torch.zeros(2), k)
