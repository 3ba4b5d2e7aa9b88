"""Evaluations of frozen encoders as researchers write them: linear heads view by view, nearest neighbours at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Head(NamedTuple):
    """Linear heads of one view before they are trained."""

    rows: Sequence[int]  # H rows of the features
    weight: Tensor  # (H, classes, d)
    bias: Tensor  # (H, classes)


class Recipe(NamedTuple):
    """SGD without weight decay (docs/method.md section 8)."""

    rates: Sequence[float]  # one an epoch
    momentum: float
    batch_size: int


@torch.no_grad()
def extract(features: Callable[[Tensor, Tensor], Tensor], batches: Iterable) -> Tensor:
    """Features (S, N, d) of batches that have ``clips`` and ``num_frames``; the encoders must be in eval mode."""
    return torch.cat([features(batch.clips, batch.num_frames) for batch in batches], dim=1)


def rescaled(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both (S, N, d) with each row divided by the root mean square of its training features."""
    size = train.double().square().mean(dim=(1, 2), keepdim=True).sqrt()
    return (train / size).to(train.dtype), (test / size).to(test.dtype)


def train_heads(
    derive: Callable[[], tuple[Tensor, Tensor]],
    labels: Tensor,
    heads: Mapping[str, Head],
    orders: Sequence[Tensor],
    recipe: Recipe,
    *,
    every_epoch: bool = False,
) -> dict[str, Tensor]:
    """Logits (N_test, classes) of every view after the last epoch; every view's mean of logits is trained by itself.

    Args:
        derive: makes the features (S, N, d) of the training and of the test clips.
        labels: (N,) of the training clips.
        heads: of every view, left as they are.
        orders: of the training clips, one an epoch.
        recipe: how they are trained.
        every_epoch: derive anew before every epoch (quirk Q5), and not once.
    """
    layers = {
        view: [head.weight.clone().requires_grad_(), head.bias.clone().requires_grad_()] for view, head in heads.items()
    }
    optimizers = {view: torch.optim.SGD(head, lr=0.0, momentum=recipe.momentum) for view, head in layers.items()}
    train, test = derive()
    logits = {}
    for number, (order, rate) in enumerate(zip(orders, recipe.rates, strict=True)):
        if every_epoch and number:
            train, test = derive()
        for view, (weight, bias) in layers.items():
            optimizer = optimizers[view]
            optimizer.param_groups[0]["lr"] = rate
            rows = list(heads[view].rows)
            for start in range(0, len(order) - recipe.batch_size + 1, recipe.batch_size):
                clips = order[start : start + recipe.batch_size]
                loss = functional.cross_entropy(_logits(train[rows][:, clips], weight, bias), labels[clips])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
            with torch.no_grad():  # accuracy is followed from epoch to epoch
                logits[view] = _logits(test[rows], weight, bias)
    return logits


def _logits(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The mean over heads, one after another."""
    each = [functional.linear(*arguments) for arguments in zip(features, weight, bias, strict=True)]
    return torch.stack(each).mean(dim=0)


def knn_predict(train: Tensor, labels: Tensor, test: Tensor, ks: Sequence[int]) -> dict[int, Tensor]:
    """The labels that the k nearest training features vote for; of equally many votes the larger sum of similarities.

    Args:
        train: (n, d) features.
        labels: (n,).
        test: (m, d).
        ks: numbers of neighbours.
    """
    similarity = functional.normalize(test, dim=1) @ functional.normalize(train, dim=1).T
    values, neighbours = similarity.topk(max(ks), dim=1)
    voters = functional.one_hot(labels[neighbours]).to(values.dtype)  # (m, k, classes)
    predictions = {}
    for k in ks:
        votes = voters[:, :k].sum(dim=1)
        sums = (voters[:, :k] * values[:, :k, None]).sum(dim=1)
        tied = votes == votes.amax(dim=1, keepdim=True)
        predictions[k] = sums.masked_fill(~tied, -torch.inf).argmax(dim=1)
    return predictions
