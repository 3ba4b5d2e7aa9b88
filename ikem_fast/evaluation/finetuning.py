"""Finetuning: pretrained encoders and a linear head each, trained together on labelled clips.

The encoders of all modalities are trained at once as one multi-stream module, each on the cross-entropy of its own
logits; they share no weight, so each learns what it would alone. Scores of several modalities are fused afterwards.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ikem_fast.data import open_source
from ikem_fast.engine.config import Config, FinetuneConfig, augmentation_settings
from ikem_fast.engine.randomness import epoch_order, generator
from ikem_fast.evaluation.accuracy import AccuracyRow, accuracy_columns, confusion_matrix, top_k_accuracy
from ikem_fast.evaluation.features import evaluation_mode
from ikem_fast.evaluation.outcomes import Judgement, Outcome
from ikem_fast.evaluation.views import fusion_weights, views_of
from ikem_fast.methods.common import THREE_MODALITIES, ModalityModule, encoder_input, fuse_early
from ikem_fast.methods.distillation import EARLY_FUSION
from ikem_fast.ops import AugmentationConfig, ClipViews, draw_views

if TYPE_CHECKING:
    from ikem_fast.data import ClipSet
    from ikem_fast.evaluation.subjects import Subject

_FINETUNING = 3  # keeps initial heads and dropout apart from other random numbers of the same seed


class FinetunedEncoders(ModalityModule):
    """A subject's encoders with a fresh linear head each; the subject stays as it is.

    Args:
        subject: whose encoders are copied.
        num_classes: outputs of each head.
        dropout: of the encoders; None is the method's.
    """

    def __init__(self, subject: Subject, num_classes: int, *, dropout: float | None = None) -> None:
        method, names = subject.method, subject.modalities
        self.early_fusion = names == (EARLY_FUSION,)
        modalities = THREE_MODALITIES if self.early_fusion else names
        super().__init__(method.layout, modalities, method.quirks, method.precision)
        self.chest_normal = method.chest_normal
        self.hidden_channels = method.hidden_channels
        self.feature_size = method.feature_size
        self.dropout = method.dropout if dropout is None else dropout
        self.names = names
        pretrained = subject.encoders
        self.encoders = self.encoder(len(names), num_classes, in_channels=pretrained.in_channels)
        state = {name: tensor for name, tensor in pretrained.state_dict().items() if not name.startswith("head.")}
        heads = {name: tensor for name, tensor in self.encoders.state_dict().items() if name.startswith("head.")}
        self.encoders.load_state_dict({**state, **heads})

    def forward(self, view: ClipViews) -> Tensor:
        """Logits (S, N, classes) of one view, a row for each of ``names``."""
        x = encoder_input(view)
        return self.encoders(fuse_early(x) if self.early_fusion else x)


@dataclass(frozen=True)
class FinetuneResult:
    """Result of ``finetune``, after the last epoch.

    Attributes:
        rows: one for each view, the fullest last.
        scores: view to (N_test, classes) float32 logits.
        confusion: (classes, classes) int64 of the last row: true class down, predicted class across.
        num_clips: clips that were trained on.
        batch_size: clips a step.
        epochs: epochs trained.
        tested_epochs: those after which the test clips were looked at; the last one always.
        history: view to test top-1 after each of them.
        losses: mean loss of each modality in the last epoch.
        module: the trained encoders and heads, in eval mode on the CPU.
    """

    rows: tuple[AccuracyRow, ...]
    scores: dict[str, Tensor]
    confusion: Tensor
    num_clips: int
    batch_size: int
    epochs: int
    tested_epochs: tuple[int, ...]
    history: dict[str, list[float]]
    losses: dict[str, float]
    module: FinetunedEncoders = field(repr=False)


def finetune(
    subject: Subject,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: FinetuneConfig | None = None,
    *,
    augmentation: AugmentationConfig | None = None,
    storage_place: str = "auto",
    storage_dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = False,
    description: str = "finetune",
) -> FinetuneResult:
    """Trains a copy of a subject's encoders, with a linear head each, on labelled clips.

    Batch norms and dropout are in training mode. SGD, a constant rate that falls at ``milestones``; every clip once an
    epoch in random order, the last incomplete batch dropped.

    Args:
        subject: the encoders to start from; they stay as they are.
        train_set: labelled clips. With fewer than a batch every step takes them all.
        test_set: clips that are judged.
        settings: the recipe, section ``finetune`` or ``semi`` of a configuration; None is the default one.
        augmentation: what makes a view of a clip where ``settings.augment`` is on; None is the published one.
        storage_place: where the training clips lie, see ``ikem_fast.data.open_source``.
        storage_dtype: what they are stored as.
        seed: of initial heads, orders, augmentation and dropout. On the CPU results depend on nothing else.
        device: where it runs.
        progress: show a bar of epochs.
        description: its text.

    Raises:
        ValueError: no clips, or labels of the two sets that are no classes of theirs.
    """
    settings = settings or FinetuneConfig()
    if len(train_set) == 0 or len(test_set) == 0:
        raise ValueError(f"train_set and test_set must hold clips, got {len(train_set)} and {len(test_set)}")
    device = torch.device(device)
    augmentation = (augmentation or AugmentationConfig()) if settings.augment else None
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator(seed, _FINETUNING).initial_seed())
        module = FinetunedEncoders(subject, train_set.num_classes, dropout=settings.dropout).to(device)
        source = open_source(
            train_set,
            device=device,
            dtype=storage_dtype,
            place=storage_place,
            file_frame_count=module.quirks.file_frame_count,
        )
        optimizer = torch.optim.SGD(
            module.parameters(),
            lr=settings.learning_rate,
            momentum=settings.sgd_momentum,
            weight_decay=settings.weight_decay,
        )
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(settings.milestones), settings.gamma)
        labels = torch.from_numpy(train_set.labels)
        batch_size = min(settings.batch_size, len(train_set))
        views = views_of(module.names)
        weights = {
            view: fusion_weights(members, settings.fusion_weights)
            for view, members in views.items()
            if len(members) > 1
        }
        history: dict[str, list[float]] = {view: [] for view in views}
        tested: list[int] = []
        scores: dict[str, Tensor] = {}
        test_labels = torch.from_numpy(test_set.labels)
        for epoch in tqdm(
            range(1, settings.epochs + 1), desc=description, unit="epoch", leave=False, disable=not progress
        ):
            module.train()
            order = epoch_order(len(train_set), seed, epoch)
            chosen = order[: len(order) // batch_size * batch_size].split(batch_size)
            losses = []
            for positions, batch in zip(chosen, source.batches(chosen), strict=True):
                parameters = None
                if augmentation is not None:
                    parameters = draw_views(seed, epoch, batch.samples, source.clip_length, augmentation, num_views=1)
                view = module.derive(batch.clips, batch.num_frames, indices=batch.indices, parameters=parameters)
                targets = labels[positions].to(device, non_blocking=True)
                logits = module(view)
                each = F.cross_entropy(logits.flatten(0, 1), targets.repeat(len(logits)), reduction="none").view(
                    len(logits), -1
                )
                # Streams share no parameter, so the gradient of the sum is each one's own gradient.
                loss = each.mean(dim=1)
                optimizer.zero_grad(set_to_none=True)
                loss.sum().backward()
                optimizer.step()
                losses.append(loss.detach())
            schedule.step()
            last = epoch == settings.epochs
            if last or (settings.test_every_epochs and epoch % settings.test_every_epochs == 0):
                logits = predict(module, test_set, batch_size=settings.feature_batch_size, device=device)
                scores = fuse_views(logits, module.names, views, weights)
                tested.append(epoch)
                for view, of_view in scores.items():
                    history[view].append(top_k_accuracy(of_view, test_labels, 1).item())
        mean_losses = torch.stack(losses).mean(dim=0).tolist()
    for name, loss in zip(module.names, mean_losses, strict=True):
        if not math.isfinite(loss):
            warnings.warn(
                f"finetuning '{name}' diverged: its loss is not finite, its accuracy says nothing; lower "
                f"learning_rate, which is {settings.learning_rate:g}",
                stacklevel=2,
            )
    rows = []
    for view, members in views.items():
        rows.append(
            AccuracyRow.of_scores(
                view, members, scores[view], test_labels, history[view], tested, weights=weights.get(view)
            )
        )
    fullest = scores[rows[-1].name]
    return FinetuneResult(
        rows=tuple(rows),
        scores=scores,
        confusion=confusion_matrix(test_labels, fullest.argmax(dim=1), train_set.num_classes),
        num_clips=len(train_set),
        batch_size=batch_size,
        epochs=settings.epochs,
        tested_epochs=tuple(tested),
        history=history,
        losses=dict(zip(module.names, mean_losses, strict=True)),
        module=module.cpu().eval(),
    )


@torch.no_grad()
def predict(
    module: FinetunedEncoders, clip_set: ClipSet, *, batch_size: int = 256, device: str | torch.device = "cpu"
) -> Tensor:
    """Logits (S, N, classes) float32 on the CPU of every clip of a set, in eval mode and without augmentation."""
    pieces = []
    with evaluation_mode(module):
        file_frame_count = module.quirks.file_frame_count
        for _, batch in clip_set.in_batches(batch_size, device=device, file_frame_count=file_frame_count):
            pieces.append(module(module.derive(batch.clips, batch.num_frames)).float().cpu())
    return torch.cat(pieces, dim=1)


def fuse_views(
    logits: Tensor,
    names: Sequence[str],
    views: dict[str, tuple[str, ...]],
    weights: dict[str, tuple[float, ...]],
) -> dict[str, Tensor]:
    """Scores (N, classes) of every view: a modality's logits, or the sum of several by the view's weights.

    Args:
        logits: (S, N, classes), a row for each of ``names``.
        names: the modalities.
        views: each view's modalities.
        weights: each view's weights, where it has several modalities.
    """
    scores = {}
    for view, members in views.items():
        chosen = logits[[list(names).index(member) for member in members]]
        of_view = torch.tensor(weights.get(view, (1.0,)), dtype=logits.dtype)
        scores[view] = torch.tensordot(of_view, chosen, dims=1)
    return scores


def judge(
    subject: Subject,
    train_set: ClipSet,
    test_set: ClipSet,
    settings: Config,
    seeds: Sequence[int],
    device: torch.device,
    progress: bool,
) -> Judgement:
    """The command ``evaluate finetune`` for one set of encoders."""
    section = settings.finetune
    outcomes = []
    for seed in seeds:
        result = finetune(
            subject,
            train_set,
            test_set,
            section,
            **source_settings(settings),
            seed=seed,
            device=device,
            progress=progress,
            description=f"finetune {subject.name}",
        )
        facts = {
            "epochs": result.epochs,
            "batch_size": result.batch_size,
            "reported": "last epoch",
            "tested_epochs": list(result.tested_epochs),
        }
        confusion = (result.rows[-1].name, result.confusion)
        rows = tuple(row.as_json() for row in result.rows)
        outcomes.append(Outcome(rows, facts, confusion, result.history, result.scores, result))
    title = f"finetuned on all {len(train_set)} labels, last epoch of {section.epochs}"
    return Judgement(title, accuracy_columns("last epoch"), tuple(outcomes))


def source_settings(settings: Config) -> dict[str, Any]:
    """What ``finetune`` takes of the sections that are not its own."""
    return {
        "augmentation": augmentation_settings(settings),
        "storage_place": settings.storage.place,
        "storage_dtype": getattr(torch, settings.storage.dtype),
    }
