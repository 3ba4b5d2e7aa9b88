"""Linear evaluation: linear heads trained on features of frozen encoders (docs/method.md section 8).

Features of frozen encoders never change, so they are computed once and the heads are trained on the numbers; all heads,
those of single modalities and those of their means, are trained side by side in one stack of small matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ikem_fast.engine.config import LinearConfig
from ikem_fast.engine.randomness import epoch_order, generator
from ikem_fast.evaluation.features import Features, extract
from ikem_fast.evaluation.linear_classifier import LinearClassifier
from ikem_fast.evaluation.views import views_of
from ikem_fast.methods import IKEM, RelationalDistillation, evaluated_encoders
from ikem_fast.methods.distillation import EARLY_FUSION

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet

_INITIAL_DEVIATION = 0.02
_HEADS = 2  # keeps the heads' random numbers apart from a run's orders and augmentations of the same seed


@dataclass(frozen=True)
class LinearRow:
    """Test accuracies in [0, 1] of one view: a modality, or several whose heads were trained on their mean logits.

    Attributes:
        name: the modality, "joint+motion+bone", or "all".
        modalities: the modalities that are averaged.
        top1: headline accuracy: of the last epoch, or of the best one with the quirk ``best_epoch_on_test``.
        top5: the true class among the five highest logits, at the same epoch as ``top1``.
        best_top1: best of all epochs as judged on the test set; no result, since the test set chose it.
        best_epoch: the first epoch, from 1, that reached it.
    """

    name: str
    modalities: tuple[str, ...]
    top1: float
    top5: float
    best_top1: float
    best_epoch: int


@dataclass(frozen=True)
class LinearEvaluation:
    """Result of ``train_heads``; rows, scores and heads are those of the epoch that ``selected_epoch`` names.

    Attributes:
        rows: one per view, the fullest last.
        scores: view to (N_test, classes) float32 logits.
        weights: view to (S_view, classes, d) weights of its heads, in the order of the row's modalities.
        biases: view to (S_view, classes).
        labels: (N_test,) int64.
        sample_names: the N_test names the scores belong to.
        confusion: (classes, classes) int64 of the last row: true class down, predicted class across.
        class_names: names of the classes.
        epochs: number of epochs trained.
        best_epoch_on_test: whether rows hold each view's best epoch (quirk Q8) and not the last.
        history: view to test top-1 after each epoch.
    """

    rows: tuple[LinearRow, ...]
    scores: dict[str, Tensor]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    labels: Tensor
    sample_names: tuple[str, ...]
    confusion: Tensor
    class_names: tuple[str, ...]
    epochs: int
    best_epoch_on_test: bool
    history: dict[str, list[float]] = field(repr=False)


class _HeadStack(nn.Module):
    """All heads of all views: H = sum of the views' modalities, each d to classes; a view's logits are their mean."""

    def __init__(
        self,
        views: dict[str, tuple[str, ...]],
        modalities: Sequence[str],
        feature_size: int,
        num_classes: int,
        seed: int,
    ) -> None:
        super().__init__()
        rows = [(view, modalities.index(name)) for view, names in enumerate(views.values()) for name in names]
        self.views = views
        self.weight = nn.Parameter(torch.empty(len(rows), feature_size, num_classes))
        self.bias = nn.Parameter(torch.zeros(len(rows), 1, num_classes))
        nn.init.normal_(self.weight, std=_INITIAL_DEVIATION, generator=generator(seed, _HEADS))
        self.register_buffer("modality", torch.tensor([row for _, row in rows]))
        mean = torch.zeros(len(views), len(rows))
        for head, (view, _) in enumerate(rows):
            mean[view, head] = 1.0
        self.register_buffer("mean", mean / mean.sum(dim=1, keepdim=True))

    def heads_of(self, view: str) -> slice:
        start = 0
        for name, members in self.views.items():
            if name == view:
                return slice(start, start + len(members))
            start += len(members)
        raise KeyError(view)

    def forward(self, features: Tensor, clips: Tensor | slice) -> Tensor:
        """(S, N, d) features and a choice of B clips to (views, B, classes) logits."""
        chosen = features[:, clips]
        logits = torch.baddbmm(self.bias, chosen[self.modality], self.weight)
        return (self.mean @ logits.flatten(1)).unflatten(1, logits.shape[1:])

    @torch.no_grad()
    def logits(self, features: Tensor, rows_at_once: int = 2048) -> Tensor:
        """All logits, in pieces, so that no copy of the features for every head is ever held."""
        starts = range(0, features.shape[1], rows_at_once)
        return torch.cat([self(features, slice(start, start + rows_at_once)) for start in starts], dim=1)


def _correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """(views, N, classes) to the fraction of clips, per view, whose label is among the k highest logits."""
    best = logits.topk(min(k, logits.shape[2]), dim=2).indices
    return (best == labels[None, :, None]).any(dim=2).double().mean(dim=1)


def confusion_matrix(labels: Tensor, predictions: Tensor, num_classes: int) -> Tensor:
    """(N,), (N,) to (classes, classes) int64 counts: true class down, predicted class across."""
    return torch.bincount(labels * num_classes + predictions, minlength=num_classes**2).reshape(num_classes, -1)


def train_heads(
    train: Features,
    test: Features,
    class_names: Sequence[str],
    settings: LinearConfig | None = None,
    *,
    seed: int = 0,
    best_epoch_on_test: bool = False,
    rederive: Callable[[], tuple[Features, Features]] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    description: str = "linear",
) -> LinearEvaluation:
    """Train a linear head per modality and view on frozen features, and judge it on the test features.

    Heads start as N(0, 0.02) weights and zero biases and are trained by SGD on the cross-entropy of each view's mean
    logits. Views do not share heads: those of "all" are trained on the mean of all modalities' logits, and those of a
    single modality on its own.

    Args:
        train: features the heads learn from.
        test: features they are judged on, with the same rows.
        class_names: names of the classes; labels are numbers into it.
        settings: the recipe, section ``linear`` of a configuration; None is the published one. The last incomplete
            batch of an epoch is dropped; with fewer clips than a batch every step takes them all.
        seed: decides the initial heads and the order of the clips.
        best_epoch_on_test: quirk Q8, the headline is each view's best epoch on the test set.
        rederive: quirk Q5, called before every epoch for the same features again.
        device: where the heads are trained.
        progress: show a bar of epochs.
        description: its text.

    Raises:
        ValueError: rows of train and test differ, or a label is no class.
    """
    settings = settings or LinearConfig()
    if train.names != test.names:
        raise ValueError(f"train and test must have the same modalities, got {train.names} and {test.names}")
    num_classes = len(class_names)
    for name, part in (("train", train), ("test", test)):
        low, high = int(part.labels.min()), int(part.labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels of {name} must lie in 0 to {num_classes - 1}, got {low} to {high}")

    views = views_of(train.names)
    stack = _HeadStack(views, train.names, train.features.shape[2], num_classes, seed).to(device)
    optimizer = torch.optim.SGD(
        stack.parameters(),
        lr=settings.learning_rate,
        momentum=settings.sgd_momentum,
        weight_decay=settings.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), settings.gamma)
    train_features, train_labels = train.features.to(device), train.labels.to(device)
    test_features, test_labels = test.features.to(device), test.labels.to(device)
    num_clips = len(train_labels)
    batch_size = min(settings.batch_size, num_clips)
    history: dict[str, list[float]] = {view: [] for view in views}
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    for epoch in tqdm(range(settings.epochs), desc=description, unit="epoch", leave=False, disable=not progress):
        if rederive is not None:
            again_train, again_test = rederive()
            train_features, test_features = again_train.features.to(device), again_test.features.to(device)
        order = epoch_order(num_clips, seed, epoch).to(device)
        for start in range(0, num_clips - batch_size + 1, batch_size):
            clips = order[start : start + batch_size]
            logits = stack(train_features, clips)
            targets = train_labels[clips].repeat(len(views))
            # Views share no parameter, so the gradient of the sum is each view's own gradient.
            loss = F.cross_entropy(logits.flatten(0, 1), targets, reduction="sum") / batch_size
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        test_logits = stack.logits(test_features)
        accuracies = _correct(test_logits, test_labels, 1).tolist()
        for number, (view, accuracy) in enumerate(zip(views, accuracies, strict=True)):
            better = not history[view] or accuracy > max(history[view])
            history[view].append(accuracy)
            if better if best_epoch_on_test else epoch == settings.epochs - 1:
                heads = stack.heads_of(view)
                weight = stack.weight.detach()[heads].transpose(1, 2).cpu().clone()
                bias = stack.bias.detach()[heads, 0].cpu().clone()
                kept[view] = (test_logits[number].cpu(), weight, bias)

    scores = {view: parts[0] for view, parts in kept.items()}
    rows = []
    for view, members in views.items():
        if not scores[view].isfinite().all():
            warnings.warn(
                f"the linear head of '{view}' diverged: its logits are not finite, its accuracy says nothing; "
                f"lower linear.learning_rate, which is {settings.learning_rate:g}",
                stacklevel=2,
            )
        best = max(history[view])
        rows.append(
            LinearRow(
                name=view,
                modalities=members,
                top1=_correct(scores[view][None], test.labels, 1).item(),
                top5=_correct(scores[view][None], test.labels, 5).item(),
                best_top1=best,
                best_epoch=history[view].index(best) + 1,
            )
        )
    fullest = scores[rows[-1].name]
    return LinearEvaluation(
        rows=tuple(rows),
        scores=scores,
        weights={view: parts[1] for view, parts in kept.items()},
        biases={view: parts[2] for view, parts in kept.items()},
        labels=test.labels,
        sample_names=test.sample_names,
        confusion=confusion_matrix(test.labels, fullest.argmax(dim=1), num_classes),
        class_names=tuple(class_names),
        epochs=settings.epochs,
        best_epoch_on_test=best_epoch_on_test,
        history=history,
    )


def evaluate_linear(
    method: IKEM | RelationalDistillation,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: LinearConfig | None = None,
    *,
    part: str | None = None,
    rescale: bool = False,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> LinearEvaluation:
    """Linear evaluation of a module's frozen encoders: features once, then ``train_heads``.

    The module's quirks decide whether features are derived again before every epoch (Q5, which changes no number) and
    whether the headline is the last epoch or the best one on the test set (Q8).

    Args:
        method: the module; it is moved to ``device``.
        train_set: clips the heads learn from.
        test_set: clips they are judged on.
        settings: the recipe; None is the published one.
        part: of a distillation "student" (the default) or "teacher".
        rescale: multiply each modality's features by the one number that makes their values 1 in root mean square
            over the training clips. For untrained encoders, whose features are so small (1e-7) that heads of the
            published learning rate would stay at chance whatever is in them.
        seed: decides the initial heads and the order of the clips.
        device: where encoders and heads run.
        progress: show a bar of epochs.
    """
    settings = settings or LinearConfig()
    method.to(device)

    def features() -> tuple[Features, Features]:
        batch_size = settings.feature_batch_size
        both = [extract(method, clips, part=part, batch_size=batch_size, device=device) for clips in sets]
        if rescale:
            size = both[0].features.double().square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-30)
            both = [replace(part_of, features=(part_of.features / size).float()) for part_of in both]
        return both[0], both[1]

    sets = (train_set, test_set)
    return train_heads(
        *features(),
        train_set.class_names,
        settings,
        seed=seed,
        best_epoch_on_test=method.quirks.best_epoch_on_test,
        rederive=features if method.quirks.rederive_evaluation_features else None,
        device=device,
        progress=progress,
        description=f"linear {part}" if part else "linear",
    )


def build_classifier(
    method: IKEM | RelationalDistillation, evaluation: LinearEvaluation, *, view: str = "all", part: str | None = None
) -> LinearClassifier:
    """Encoders and trained heads of one view as a module that maps clips to logits.

    Args:
        method: the module whose features the heads were trained on.
        evaluation: the trained heads.
        view: one of the evaluation's views.
        part: of a distillation "student" (the default) or "teacher".

    Returns:
        a classifier over the view's modalities, in eval mode on the CPU; ``classifier(clips, num_frames)`` gives the
        same logits as ``evaluation.scores[view]``.

    Raises:
        ValueError: an unknown view, or an early-fusion student, whose one encoder is fed all modalities at once.
    """
    rows = {row.name: row for row in evaluation.rows}
    if view not in rows:
        raise ValueError(f"view must be one of {', '.join(rows)}, got {view!r}")
    encoders, names = evaluated_encoders(method, part)
    if names == (EARLY_FUSION,):
        raise ValueError("method must have an encoder per modality, got an early-fusion student")
    modalities = rows[view].modalities
    classifier = LinearClassifier(
        method.layout,
        modalities,
        num_classes=len(evaluation.class_names),
        hidden_channels=method.hidden_channels,
        feature_size=method.feature_size,
        dropout=method.dropout,
        precision=method.precision,
        quirks=method.quirks,
    )
    for position, name in enumerate(modalities):
        encoder = encoders.stream_tensors(names.index(name))
        state = {key: value for key, value in encoder.items() if not key.startswith("head.")}
        state["head.0.weight"] = evaluation.weights[view][position]
        state["head.0.bias"] = evaluation.biases[view][position]
        classifier.encoders.load_stream(position, state)
    return classifier
