"""What both trainers share: the modalities they derive and the queues they fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

from ikem_fast import modalities as modality_registry
from ikem_fast import ops
from ikem_fast.layouts import Layout
from ikem_fast.layouts import from_dict as layout_from_dict
from ikem_fast.layouts import get as get_layout
from ikem_fast.nn import EncoderInput, MultiStreamSTGCN
from ikem_fast.nn.precision import activation_dtype, check_precision
from ikem_fast.ops import ClipViews, ViewParameters
from ikem_fast.ops._collectives import gather_rows
from ikem_fast.quirks import Quirks
from ikem_fast.ranges import phase

THREE_MODALITIES = ("joint", "motion", "bone")


def check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")


def leaves_chest_normal_out(quirks: Quirks, modalities: Iterable[str]) -> bool:
    """Whether the three-modality variant of the release applies (quirk Q4)."""
    return quirks.early_fusion_student and set(modalities) == set(THREE_MODALITIES)


def random_queue(*shape: int) -> Tensor:
    """Random keys, unit columns: (..., D, K)."""
    return functional.normalize(torch.randn(*shape), dim=-2)


@dataclass(frozen=True)
class Groups:
    """Processes that share a training step, each with as many clips of its batch; ``None`` = this one alone.

    Attributes:
        keys: whose keys are enqueued, in the order of the ranks, so that every process has the same queues.
        statistics: over whose clips batch statistics are taken.
        queue: over which the queues' columns are spread, equally many on each in the order of the ranks
            (``Trainer.shard_queues``).
    """

    keys: ProcessGroup | None = None
    statistics: ProcessGroup | None = None
    queue: ProcessGroup | None = None


ALONE = Groups()


@dataclass(frozen=True)
class StepLosses:
    """What a training step, or a part of its batch, comes to.

    Attributes:
        total: the step's loss, a scalar; ``total.backward()`` gives the gradient of the weights.
        losses: its terms by name, scalars without a gradient.
        accuracies: by name, the share of clips whose positive is more similar than every key of the queue; scalars
            without a gradient.
        keys: (S, N, D) what the clips will be to later steps, for the queues.
    """

    total: Tensor
    losses: dict[str, Tensor]
    accuracies: dict[str, Tensor]
    keys: Tensor | None = None


Losses = tuple[dict[str, Tensor], dict[str, Tensor]]  # terms and accuracies by name


def settle(measure: Callable[..., Losses], *embeddings: Tensor) -> StepLosses:
    """The losses that ``measure`` makes of some embeddings, with their gradient taken at once.

    So ``measure`` can read the queues, which new keys overwrite before the step's backward pass, and nothing of their
    size is kept until then.
    """
    if not (torch.is_grad_enabled() and any(embedding.requires_grad for embedding in embeddings)):
        losses, accuracies = measure(*embeddings)
        return StepLosses(_sum(losses), losses, accuracies)
    leaves = [embedding.detach().requires_grad_() for embedding in embeddings]
    losses, accuracies = measure(*leaves)
    total = _sum(losses)
    with phase("backward"):
        gradients = torch.autograd.grad(total, leaves, allow_unused=True)
    # What has no part in the loss gets no gradient, not one of zeros, by which weight decay would move its weights.
    used = [number for number, gradient in enumerate(gradients) if gradient is not None]
    settled = _Settled.apply(total.detach(), *(gradients[i] for i in used), *(embeddings[i] for i in used))
    return StepLosses(settled, {name: loss.detach() for name, loss in losses.items()}, accuracies)


def _sum(losses: Mapping[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


class _Settled(torch.autograd.Function):
    """A scalar whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, total: Tensor, *gradients_and_embeddings: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients_and_embeddings[: len(gradients_and_embeddings) // 2])
        return total.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        return None, *[None] * len(gradients), *[upstream * gradient for gradient in gradients]


class ModalityModule(nn.Module):
    """A module that turns clips into modalities and encodes them.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the modalities, in the order of the streams.
        quirks: which behaviours of the release apply.
        precision: numbers that encoders and similarities are computed in, ``"fp32"``, ``"bf16"`` or ``"auto"``
            (:class:`ikem_fast.nn.MultiStreamSTGCN`).
    """

    hidden_channels: int
    feature_size: int
    dropout: float

    def __init__(
        self, layout: str | Layout, modalities: Iterable[str], quirks: Quirks, precision: str = "fp32"
    ) -> None:
        super().__init__()
        self.layout = get_layout(layout)
        self.modalities = modality_registry.check(modalities)
        self.quirks = quirks
        self.precision = check_precision(precision)
        self.chest_normal = not leaves_chest_normal_out(quirks, self.modalities)

    def encoder(self, num_streams: int, *head_sizes: int, in_channels: int = 3) -> MultiStreamSTGCN:
        """Freshly initialised encoders of the module's sizes with a head each."""
        return MultiStreamSTGCN(
            self.layout.adjacency(distance_limit=1 if self.quirks.one_hop_graph else None),
            num_streams,
            in_channels=in_channels,
            hidden_channels=self.hidden_channels,
            feature_size=self.feature_size,
            head_sizes=head_sizes,
            dropout=self.dropout,
            precision=self.precision,
        )

    def derive(
        self,
        clips: Tensor,
        num_frames: Tensor,
        modalities: Iterable[str] | None = None,
        *,
        indices: Tensor | None = None,
        parameters: ViewParameters | None = None,
    ) -> ClipViews:
        """Views of clips in some modalities, by default the module's own, in order.

        Args:
            clips: (N, 3, T, V, M); the gradient goes through them if they require one and are not augmented.
            num_frames: (N,) frames of each recording.
            modalities: names of the modalities.
            indices: which clips, (B,) int64; ``None`` for all.
            parameters: of the augmented views (``ikem_fast.ops.draw_views``); ``None`` for the clips as they are.
        """
        names = self.modalities if modalities is None else tuple(modalities)
        if indices is None and parameters is None and clips.requires_grad and torch.is_grad_enabled():
            derived = ops.derive_modalities(clips, num_frames, self.layout, names, chest_normal=self.chest_normal)
            return ClipViews(derived.permute(0, 1, 5, 3, 4, 2).flatten(1, 2).unsqueeze(0), None, clips.shape[-1])
        if len(clips) and not clips[0].is_contiguous():
            clips = clips.contiguous()
        # Only batch norm in training mode asks for the statistics.
        return ops.clip_views(
            clips, num_frames, indices, parameters, self.layout, names,
            chest_normal=self.chest_normal, statistics=self.training,
        )  # fmt: skip


class Trainer(ModalityModule, ABC):
    """A module with queues that is trained by ``training_losses`` and rebuilt from ``config()``.

    Subclasses name themselves in ``method`` and their constructor's arguments, other than layout and quirks, in
    ``config_fields``; each is kept as the attribute of its name. Their queues, the clips in the last dimension, are the
    buffers of the names in ``queue_names``.
    """

    method: str
    config_fields: tuple[str, ...]
    queue_names: tuple[str, ...] = ("queue",)
    embedding_size: int
    queue_size: int
    temperature: float
    topk: int
    queue: Tensor
    queue_pointer: Tensor

    def make_queues(self) -> None:
        """The modalities' queues of random keys (S, D, K) and their common pointer; checks the sizes."""
        check_sizes(embedding_size=self.embedding_size, queue_size=self.queue_size)
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not 1 <= self.topk <= self.queue_size:
            raise ValueError(f"topk must be in 1 ... queue_size = {self.queue_size}, got {self.topk}")
        self.register_buffer("queue", random_queue(len(self.modalities), self.embedding_size, self.queue_size))
        self.register_buffer("queue_pointer", torch.zeros(1, dtype=torch.int64))

    @property
    def view_modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Modalities that the first and the second view of a step are derived in."""
        return self.modalities, self.modalities

    def views(
        self,
        clips: Tensor,
        num_frames: Tensor,
        indices: Tensor | None = None,
        parameters: ViewParameters | None = None,
    ) -> tuple[ClipViews, ClipViews]:
        """The two augmented views of a training step, each in the modalities it is needed in.

        Args:
            clips: stored clips (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
            indices: which clips, (B,) int64; ``None`` for all.
            parameters: of two views (``ikem_fast.ops.draw_views``); ``None`` for the clips as they are, twice.
        """
        first, second = self.view_modalities
        if first == second:
            both = self.derive(clips, num_frames, first, indices=indices, parameters=parameters)
            return both.view(0), both.view(-1)
        of_view = (None, None) if parameters is None else (parameters.only(0), parameters.only(-1))
        return (
            self.derive(clips, num_frames, first, indices=indices, parameters=of_view[0]),
            self.derive(clips, num_frames, second, indices=indices, parameters=of_view[1]),
        )

    def losses(self, view_q: ClipViews, view_k: ClipViews, stage: str | None = None) -> StepLosses:
        """Losses of one training step on two views, as ``views`` gives them. Fills the queues after.

        A step in several parts calls ``begin_step`` once, ``contrast`` for each part, and ``end_step`` with the keys of
        all of them.
        """
        self.begin_step(stage)
        step = self.contrast(view_q, view_k, stage)
        self.end_step(step.keys)
        return step

    def begin_step(self, stage: str | None = None) -> None:
        """Moves what a step moves before its first clip."""

    @abstractmethod
    def contrast(
        self, view_q: ClipViews, view_k: ClipViews, stage: str | None = None, groups: Groups = ALONE
    ) -> StepLosses:
        """Losses of some clips' two views against the queues, which stay as they are.

        Args:
            view_q: one view of N clips, as ``views`` gives it.
            view_k: the other view.
            stage: of the training, for methods that have several.
            groups: processes that call this at the same time, each with N clips of its own. Losses and their gradient
                are those of this process's clips.
        """

    @torch.no_grad()
    def end_step(self, keys: Tensor, groups: Groups = ALONE) -> None:
        """Fills the queues with the keys (S, N, D) of a step's clips, those of all processes in ``groups.keys``."""
        with phase("gather of keys"):
            keys = gather_rows(keys, groups.keys)
        with phase("enqueue"):
            self._enqueue(keys, groups.queue)

    def _enqueue(self, keys: Tensor, group: ProcessGroup | None) -> None:
        ops.enqueue_(self.queue, keys, self.queue_pointer, **self._columns(group))

    def stage_parameters(self, stage: str | None = None) -> list[nn.Parameter]:
        """The parameters that have a part in a stage's losses, in the order of ``parameters()``."""
        idle = {id(parameter) for module in self._idle_modules(stage) for parameter in module.parameters()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in idle]

    def _idle_modules(self, stage: str | None) -> list[nn.Module]:
        """Trained modules whose outputs have no part in a stage's losses."""
        return []

    def shard_queues(self, group: ProcessGroup) -> None:
        """Leaves of every queue the columns that this process keeps where they are spread over several.

        Raises:
            ValueError: the columns cannot be shared equally.
        """
        for name in self.queue_names:
            setattr(self, name, ops.own_columns(getattr(self, name), group))

    def _columns(self, group: ProcessGroup | None) -> dict[str, int]:
        """Which columns the queues hold, for ``ops.enqueue_``."""
        return {"first_column": ops.queue_columns(self.queue_size, group).start, "queue_size": self.queue_size}

    def training_losses(
        self, view_q: Tensor, view_k: Tensor, num_frames: Tensor, stage: str | None = None
    ) -> StepLosses:
        """``losses`` of two views that the caller augmented.

        Args:
            view_q: (N, 3, T, V, M) clips for the first view.
            view_k: (N, 3, T, V, M) the same clips augmented differently, for the second.
            num_frames: (N,) frames of each recording.
            stage: see ``losses``.
        """
        first, second = self.view_modalities
        return self.losses(self.derive(view_q, num_frames, first), self.derive(view_k, num_frames, second), stage)

    def config(self) -> dict[str, Any]:
        """Everything but the weights, as plain values; ``from_config`` builds the same module again."""
        values = {name: getattr(self, name) for name in self.config_fields}
        return {
            "method": self.method,
            "layout": self.layout.to_dict(),
            **{name: list(value) if isinstance(value, tuple) else value for name, value in values.items()},
            "quirks": self.quirks.to_dict(),
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Trainer:
        """A freshly initialised module of the sizes in ``config`` (see ``config()``)."""
        if config.get("method") != cls.method:
            raise ValueError(f"config['method'] must be '{cls.method}', got {config.get('method')!r}")
        arguments = {key: value for key, value in config.items() if key not in ("method", "layout", "quirks")}
        return cls(layout_from_dict(config["layout"]), **arguments, quirks=Quirks(**config["quirks"]))

    def as_compared(self, embeddings: Tensor) -> Tensor:
        """Embeddings in the numbers that products with the queues are made of."""
        return embeddings.to(activation_dtype(self.precision, embeddings))


def encode(encoders: MultiStreamSTGCN, view: ClipViews, group: ProcessGroup | None = None) -> Tensor:
    """Features (S, N, d) of one view, a stream for each of its modalities; ``group`` as for the encoders."""
    return encoders.features(encoder_input(view), group)


def encoder_input(view: ClipViews) -> EncoderInput:
    """What the encoders of the modalities read of a single view."""
    (values,) = view.views
    if view.statistics is None:
        return EncoderInput(values, view.num_persons)
    (mean,), (variance,) = view.mean_and_variance()
    return EncoderInput(values, view.num_persons, mean, variance)


def fuse_early(x: EncoderInput) -> EncoderInput:
    """A single stream with the channels of all."""

    def fused(values: Tensor) -> Tensor:
        return values.movedim(0, -2).flatten(-2).unsqueeze(0)

    known = x.mean is not None and x.variance is not None
    mean, variance = (fused(x.mean), fused(x.variance)) if known else (None, None)
    return EncoderInput(fused(x.values), x.num_persons, mean, variance)


def project(heads: nn.Module, features: Tensor) -> Tensor:
    """Unit outputs (S, N, D) of stacked heads for features (S, N, d)."""
    return functional.normalize(heads(features), dim=2)
