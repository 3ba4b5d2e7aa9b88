"""Linear evaluation: linear heads trained on features of frozen encoders (docs/method.md section 8).

Features of frozen encoders never change, so they are computed once and the heads are trained on the numbers; all heads,
those of single modalities and those of their means, are trained side by side in one stack of small matrix products.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ikem_fast.engine.config import Config, LinearConfig
from ikem_fast.engine.randomness import epoch_order, generator
from ikem_fast.evaluation.accuracy import AccuracyRow, accuracy_columns, confusion_matrix, top_k_accuracy
from ikem_fast.evaluation.features import Features, extract
from ikem_fast.evaluation.heads import HEADS_FILE, save_heads
from ikem_fast.evaluation.linear_classifier import LinearClassifier
from ikem_fast.evaluation.outcomes import Judgement, Outcome
from ikem_fast.evaluation.views import fusion_weights, views_of
from ikem_fast.methods import IKEM, RelationalDistillation, evaluated_encoders
from ikem_fast.methods.distillation import EARLY_FUSION

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.evaluation.subjects import Subject

_INITIAL_DEVIATION = 0.02
_HEADS = 2  # keeps the heads' random numbers apart from a run's orders and augmentations of the same seed


@dataclass(frozen=True)
class LinearEvaluation:
    """Result of ``train_heads``; rows, scores and heads are those of the epoch that ``selected_epoch`` names.

    Attributes:
        rows: one per view, the fullest last.
        late_rows: one for each view of several modalities, whose logits are the weighted sum of those of the single
            modalities' heads; named ``late_`` and the view.
        scores: view, or name of a late row, to (N_test, classes) float32 logits.
        weights: view to (S_view, classes, d) weights of its heads, in the order of the row's modalities.
        biases: view to (S_view, classes).
        labels: (N_test,) int64.
        sample_names: the N_test names the scores belong to.
        confusion: (classes, classes) int64 of the last row: true class down, predicted class across.
        class_names: names of the classes.
        epochs: number of epochs trained.
        batch_size: clips a step, fewer than the settings' where there are no more.
        best_epoch_on_test: whether rows hold each view's best epoch (quirk Q8) and not the last.
        history: view, or name of a late row, to test top-1 after each epoch.
    """

    rows: tuple[AccuracyRow, ...]
    late_rows: tuple[AccuracyRow, ...]
    scores: dict[str, Tensor]
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]
    labels: Tensor
    sample_names: tuple[str, ...]
    confusion: Tensor
    class_names: tuple[str, ...]
    epochs: int
    batch_size: int
    best_epoch_on_test: bool
    history: dict[str, list[float]] = field(repr=False)

    @property
    def all_rows(self) -> tuple[AccuracyRow, ...]:
        """Single modalities, late rows, views that were trained together."""
        single = [row for row in self.rows if len(row.modalities) == 1]
        return (*single, *self.late_rows, *self.rows[len(single) :])


class _HeadStack(nn.Module):
    """All heads of all views and seeds, each d to classes; a view's logits are the mean over its H_view heads.

    Seeds share nothing; they are here together because that takes no more launches than one.
    """

    def __init__(
        self,
        views: dict[str, tuple[str, ...]],
        modalities: Sequence[str],
        feature_size: int,
        num_classes: int,
        seeds: Sequence[int],
    ) -> None:
        super().__init__()
        rows = [(view, modalities.index(name)) for view, names in enumerate(views.values()) for name in names]
        self.views = views
        self.weight = nn.Parameter(torch.empty(len(seeds), len(rows), feature_size, num_classes))
        self.bias = nn.Parameter(torch.zeros(len(seeds), len(rows), 1, num_classes))
        for weight, seed in zip(self.weight.data, seeds, strict=True):
            weight.normal_(std=_INITIAL_DEVIATION, generator=generator(seed, _HEADS))
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

    def forward(self, features: Tensor, clips: Tensor) -> Tensor:
        """(S, N, d) features and a choice (seeds, B) of clips for each seed to (seeds, views, B, classes) logits."""
        rows = self.modality.view(1, -1, 1) * features.shape[1] + clips.unsqueeze(1)
        chosen = features.flatten(0, 1).index_select(0, rows.flatten()).view(-1, clips.shape[1], features.shape[2])
        logits = torch.baddbmm(self.bias.flatten(0, 1), chosen, self.weight.flatten(0, 1))
        logits = logits.view(len(clips), len(self.modality), -1)
        return (self.mean @ logits).unflatten(2, (clips.shape[1], -1))

    @torch.no_grad()
    def logits(self, features: Tensor, rows_at_once: int = 2048) -> Tensor:
        """All logits (seeds, views, N, classes), in pieces, so that no copy of the features for every head is held."""
        pieces = torch.arange(features.shape[1], device=features.device).split(rows_at_once)
        return torch.cat([self(features, piece.expand(len(self.weight), -1)) for piece in pieces], dim=2)


def late_name(view: str) -> str:
    """Name of the row in which a view's modalities are fused from heads that were trained apart."""
    return f"late_{view}"


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
    """``train_heads_of_seeds`` with a single seed."""
    return train_heads_of_seeds(
        train,
        test,
        class_names,
        settings,
        seeds=[seed],
        best_epoch_on_test=best_epoch_on_test,
        rederive=rederive,
        device=device,
        progress=progress,
        description=description,
    )[0]


def train_heads_of_seeds(
    train: Features,
    test: Features,
    class_names: Sequence[str],
    settings: LinearConfig | None = None,
    *,
    seeds: Sequence[int] = (0,),
    best_epoch_on_test: bool = False,
    rederive: Callable[[], tuple[Features, Features]] | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    description: str = "linear",
) -> list[LinearEvaluation]:
    """Train a linear head per modality and view on frozen features, and judge it on the test features.

    Heads start as N(0, 0.02) weights and zero biases and are trained by SGD on the cross-entropy of each view's mean
    logits. Views do not share heads: those of "all" are trained on the mean of all modalities' logits, and those of a
    single modality on its own. Beside them, logits of the single modalities' heads are fused by weights without
    training (``late_rows``), as three-stream methods do.

    Args:
        train: features the heads learn from.
        test: features they are judged on, with the same rows.
        class_names: names of the classes; labels are numbers into it.
        settings: the recipe, section ``linear`` of a configuration; None is the published one. The last incomplete
            batch of an epoch is dropped; with fewer clips than a batch every step takes them all.
        seeds: each decides the initial heads and the order of the clips of one result. All are trained side by side.
        best_epoch_on_test: quirk Q8, the headline is each view's best epoch on the test set.
        rederive: quirk Q5, called before every epoch for the same features again.
        device: where the heads are trained.
        progress: show a bar of epochs.
        description: its text.

    Returns:
        a result for each seed.

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
    fused = {view: members for view, members in views.items() if len(members) > 1}
    weights_of = {view: fusion_weights(members, settings.fusion_weights) for view, members in fused.items()}
    late = torch.zeros(len(fused), len(views), device=device)
    for number, (view, members) in enumerate(fused.items()):
        for name, weight in zip(members, weights_of[view], strict=True):
            late[number, list(views).index(name)] = weight
    names = [*views, *(late_name(view) for view in fused)]
    stack = _HeadStack(views, train.names, train.features.shape[2], num_classes, seeds).to(device)
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
    histories: list[dict[str, list[float]]] = [{name: [] for name in names} for _ in seeds]
    kept: list[dict[str, Tensor]] = [{} for _ in seeds]
    kept_heads: list[dict[str, tuple[Tensor, Tensor]]] = [{} for _ in seeds]

    for epoch in tqdm(range(settings.epochs), desc=description, unit="epoch", leave=False, disable=not progress):
        if rederive is not None:
            again_train, again_test = rederive()
            train_features, test_features = again_train.features.to(device), again_test.features.to(device)
        order = torch.stack([epoch_order(num_clips, seed, epoch) for seed in seeds]).to(device)
        for start in range(0, num_clips - batch_size + 1, batch_size):
            clips = order[:, start : start + batch_size]
            logits = stack(train_features, clips)
            targets = train_labels[clips].unsqueeze(1).expand(logits.shape[:3])
            # Views and seeds share no parameter, so the gradient of the sum is each one's own gradient.
            loss = F.cross_entropy(logits.flatten(0, 2), targets.flatten(), reduction="sum") / batch_size
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
        schedule.step()
        test_logits = stack.logits(test_features)
        test_logits = torch.cat([test_logits, (late @ test_logits.flatten(2)).unflatten(2, test_logits.shape[2:])], 1)
        accuracies = top_k_accuracy(test_logits, test_labels, 1).tolist()
        for number, history in enumerate(histories):
            for row, name in enumerate(names):
                accuracy = accuracies[number][row]
                better = not history[name] or accuracy > max(history[name])
                history[name].append(accuracy)
                if better if best_epoch_on_test else epoch == settings.epochs - 1:
                    kept[number][name] = test_logits[number, row].cpu()
                    if name in views:
                        heads = stack.heads_of(name)
                        weight = stack.weight.detach()[number, heads].transpose(1, 2).cpu().clone()
                        kept_heads[number][name] = weight, stack.bias.detach()[number, heads, 0].cpu().clone()

    results = []
    for scores, heads, history in zip(kept, kept_heads, histories, strict=True):
        rows = []
        for name in names:
            view = name if name in views else name.removeprefix(late_name(""))
            if name in views and not scores[name].isfinite().all():
                warnings.warn(
                    f"the linear head of '{name}' diverged: its logits are not finite, its accuracy says nothing; "
                    f"lower linear.learning_rate, which is {settings.learning_rate:g}",
                    stacklevel=2,
                )
            weights = None if name in views else weights_of[view]
            epochs = range(1, settings.epochs + 1)
            rows.append(
                AccuracyRow.of_scores(
                    name, views[view], scores[name], test.labels, history[name], epochs, weights=weights
                )
            )
        fullest = scores[list(views)[-1]]
        results.append(
            LinearEvaluation(
                rows=tuple(rows[: len(views)]),
                late_rows=tuple(rows[len(views) :]),
                scores=scores,
                weights={view: parts[0] for view, parts in heads.items()},
                biases={view: parts[1] for view, parts in heads.items()},
                labels=test.labels,
                sample_names=test.sample_names,
                confusion=confusion_matrix(test.labels, fullest.argmax(dim=1), num_classes),
                class_names=tuple(class_names),
                epochs=settings.epochs,
                batch_size=batch_size,
                best_epoch_on_test=best_epoch_on_test,
                history=history,
            )
        )
    return results


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
    """``evaluate_linear_of_seeds`` with a single seed."""
    options = {"part": part, "rescale": rescale, "seeds": [seed], "device": device, "progress": progress}
    return evaluate_linear_of_seeds(method, train_set, test_set, settings, **options)[0]


def evaluate_linear_of_seeds(
    method: IKEM | RelationalDistillation,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: LinearConfig | None = None,
    *,
    part: str | None = None,
    rescale: bool = False,
    seeds: Sequence[int] = (0,),
    device: str | torch.device = "cpu",
    progress: bool = False,
) -> list[LinearEvaluation]:
    """Linear evaluation of a module's frozen encoders: features once, then ``train_heads_of_seeds``.

    The module's quirks decide whether features are derived again before every epoch (Q5, which changes no number) and
    whether the headline is the last epoch or the best one on the test set (Q8).

    Args:
        method: the module; it is moved to ``device``.
        train_set: clips the heads learn from.
        test_set: clips they are judged on.
        settings: the recipe; None is the published one.
        part: of a distillation "student" (the default) or "teacher".
        rescale: see ``rescaled``; for untrained encoders.
        seeds: each decides the initial heads and the order of the clips of one result.
        device: where encoders and heads run.
        progress: show a bar of epochs.
    """
    settings = settings or LinearConfig()
    method.to(device)

    def features() -> tuple[Features, Features]:
        batch_size = settings.feature_batch_size
        both = [extract(method, clips, part=part, batch_size=batch_size, device=device) for clips in sets]
        return rescaled(*both) if rescale else tuple(both)

    sets = (train_set, test_set)
    return train_heads_of_seeds(
        *features(),
        train_set.class_names,
        settings,
        seeds=seeds,
        best_epoch_on_test=method.quirks.best_epoch_on_test,
        rederive=features if method.quirks.rederive_evaluation_features else None,
        device=device,
        progress=progress,
        description=f"linear {part}" if part else "linear",
    )


def rescaled(train: Features, test: Features) -> tuple[Features, Features]:
    """Both with each modality's features times the one number that makes their values 1 in root mean square over the
    training clips.

    For untrained encoders, whose features are so small (1e-7) that heads of the published learning rate would stay at
    chance whatever is in them.
    """
    size = train.features.double().square().mean(dim=(1, 2), keepdim=True).sqrt().clamp_min(1e-30)
    return tuple(replace(part, features=(part.features / size).float()) for part in (train, test))


def judge(
    subject: Subject,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: Config,
    seeds: Sequence[int],
    device: torch.device,
    progress: bool,
) -> Judgement:
    """The command ``evaluate linear`` for one set of encoders."""
    results = evaluate_linear_of_seeds(
        subject.method,
        train_set,
        test_set,
        settings.linear,
        part=subject.part,
        rescale=subject.untrained,
        seeds=seeds,
        device=device,
        progress=progress,
    )
    best = results[0].best_epoch_on_test
    reported = "best epoch on the test set" if best else "last epoch"
    columns = accuracy_columns("best on test" if best else "last epoch")
    title = f"linear evaluation, {reported} of {results[0].epochs}"
    return Judgement(title, columns, tuple(_outcome(result, reported) for result in results))


def _outcome(result: LinearEvaluation, reported: str) -> Outcome:
    return Outcome(
        rows=tuple(row.as_json() for row in result.all_rows),
        facts={"epochs": result.epochs, "batch_size": result.batch_size, "reported": reported},
        confusion=(result.rows[-1].name, result.confusion),
        history=result.history,
        scores=result.scores,
        result=result,
    )


def keep(folder: Path, results: Mapping[str, LinearEvaluation], **training: Any) -> None:
    """Keeps the heads of a single run's encoders in its evaluation folder, where ``ikem_fast.load`` finds them."""
    save_heads(folder / HEADS_FILE, results, **training)


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
    classifier.chest_normal = method.chest_normal  # which depends on all of the method's modalities
    for position, name in enumerate(modalities):
        encoder = encoders.stream_tensors(names.index(name))
        state = {key: value for key, value in encoder.items() if not key.startswith("head.")}
        state["head.0.weight"] = evaluation.weights[view][position]
        state["head.0.bias"] = evaluation.biases[view][position]
        classifier.encoders.load_stream(position, state)
    return classifier
