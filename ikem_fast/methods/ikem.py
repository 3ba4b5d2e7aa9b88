"""IKEM pretraining: momentum contrast per modality, then cross-modality context and implicit exchange."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from ikem_fast import ops
from ikem_fast.layouts import Layout
from ikem_fast.methods.common import ALONE, Groups, Losses, StepLosses, Trainer, encode, project, settle
from ikem_fast.modalities import MODALITIES
from ikem_fast.nn import initialize_weights, stacked_head
from ikem_fast.ops import ClipViews
from ikem_fast.quirks import Quirks
from ikem_fast.ranges import phase

STAGES = ("single", "cross")
# Quirk Q1: the key encoders that still move in stage 2.
_MOVING_IN_CROSS_STAGE = ("motion", "acceleration", "angular_velocity")


class IKEM(Trainer):
    """One query encoder, key encoder and queue per modality.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the S modalities.
        hidden_channels: h of the encoders.
        feature_size: d of the encoders.
        embedding_size: D of the contrasted embeddings.
        queue_size: K, keys kept per modality.
        temperature: divides all similarities.
        momentum: share of a key encoder that each step keeps.
        topk: neighbours mined in a partner's queue in stage 2.
        dropout: of the encoders.
        context: whether stage 2 has the cross-modality context loss.
        exchange: whether stage 2 has the implicit exchange loss (and its heads).
        momentum_buffers: whether running statistics of the key encoders follow the query encoders', too; otherwise they
            are those of the key encoders' own batches, as published.
        precision: ``"fp32"``; ``"bf16"`` for encoders' activations and products, and products with the queues, in
            bfloat16; ``"auto"`` for bf16 where the device computes with it. Weights, sums, statistics, losses, queues
            and optimiser are float32 in any case.
        quirks: behaviours of the authors' release.

    Source: docs/method.md sections 5 and 6.
    """

    method = "ikem"
    config_fields = (
        *("modalities", "hidden_channels", "feature_size", "embedding_size", "queue_size", "temperature", "momentum"),
        *("topk", "dropout", "context", "exchange", "momentum_buffers", "precision"),
    )

    def __init__(
        self,
        layout: str | Layout = "ntu-rgb+d",
        modalities: Iterable[str] = MODALITIES,
        *,
        hidden_channels: int = 16,
        feature_size: int = 256,
        embedding_size: int = 128,
        queue_size: int = 32768,
        temperature: float = 0.07,
        momentum: float = 0.999,
        topk: int = 1,
        dropout: float = 0.5,
        context: bool = True,
        exchange: bool = True,
        momentum_buffers: bool = False,
        precision: str = "fp32",
        quirks: Quirks = Quirks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(layout, modalities, quirks, precision)
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be in [0, 1], got {momentum}")
        if not (context or exchange):
            raise ValueError("context and exchange must not both be off: stage 2 would have no loss")
        self.hidden_channels = hidden_channels
        self.feature_size = feature_size
        self.embedding_size = embedding_size
        self.queue_size = queue_size
        self.temperature = temperature
        self.momentum = momentum
        self.topk = topk
        self.dropout = dropout
        self.context = context
        self.exchange = exchange
        self.momentum_buffers = momentum_buffers
        self.query_encoders = self.encoder(len(self.modalities), feature_size, embedding_size)
        self.key_encoders = copy.deepcopy(self.query_encoders)
        if quirks.redraw_key_weights:
            initialize_weights(self.key_encoders)
        self.key_encoders.requires_grad_(False)
        exchange_sizes = [len(self.modalities) * embedding_size] * 2 if exchange else []
        self.exchange_heads = stacked_head(len(self.modalities), feature_size, exchange_sizes)
        initialize_weights(self.exchange_heads)
        self.make_queues()

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Names of the rows of ``features``."""
        return self.modalities

    def features(self, clips: Tensor, num_frames: Tensor) -> Tensor:
        """Features (S, N, d) of the query encoders; the caller chooses train or eval mode.

        Args:
            clips: (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
        """
        return encode(self.query_encoders, self.derive(clips, num_frames))

    def begin_step(self, stage: str | None = None) -> None:
        """Moves the key encoders towards the query encoders (docs/method.md section 5)."""
        with phase("momentum update"):
            self._move_key_encoders(self._check_stage(stage))

    def contrast(
        self, view_q: ClipViews, view_k: ClipViews, stage: str | None = None, groups: Groups = ALONE
    ) -> StepLosses:
        """Losses of some clips' two views against the queues, which stay as they are.

        Args:
            view_q: one view of N clips in all modalities, for the query encoders.
            view_k: the other view, for the key encoders.
            stage: ``"single"``, also if left out, for ``single/<modality>``; ``"cross"`` for ``context/<modality>``
                and ``exchange/<modality>``.
            groups: processes that call this at the same time, each with N clips of its own.

        Source: docs/method.md sections 5 and 6.
        """
        stage = self._check_stage(stage)
        with phase("query encoders"):
            features = encode(self.query_encoders, view_q, groups.statistics)
        with phase("heads"):
            embeddings = [project(self.query_encoders.head, features)]
            if stage == "cross" and self.exchange:
                embeddings.append(project(self.exchange_heads, features))
        k = self._keys(view_k, groups.statistics)
        measure = self._measure_single if stage == "single" else self._measure_cross
        return replace(settle(partial(measure, k, groups.queue), *embeddings), keys=k)

    def _check_stage(self, stage: str | None) -> str:
        stage = "single" if stage is None else stage
        if stage not in STAGES:
            raise ValueError(f"stage must be 'single' or 'cross', got {stage!r}")
        if stage == "cross" and self.context and len(self.modalities) < 2:
            raise ValueError("stage 'cross' needs at least 2 modalities, got 1: turn the context loss off")
        return stage

    def _idle_modules(self, stage: str | None) -> list[nn.Module]:
        if self._check_stage(stage) == "single":
            return [self.exchange_heads]
        return [] if self.context else [self.query_encoders.head]

    def _measure_single(self, k: Tensor, group: ProcessGroup | None, q: Tensor) -> Losses:
        with phase("single contrast"):
            losses, accuracies = ops.info_nce_and_accuracy(
                self.as_compared(q), k, self.queue, self.temperature, group=group
            )
        return self._named("single", losses), self._named("single", accuracies)

    def _measure_cross(self, k: Tensor, group: ProcessGroup | None, q: Tensor, e: Tensor | None = None) -> Losses:
        losses, accuracies = {}, {}
        if self.context:
            with phase("context exchange"):
                of_context = ops.context_loss_and_accuracy(
                    self.as_compared(q), k, self.queue, self.temperature, self.topk, group=group
                )
            losses.update(self._named("context", of_context[0]))
            accuracies.update(self._named("single", of_context[1]))
        if e is not None:
            with phase("implicit exchange"):
                of_exchange = ops.exchange_loss_and_accuracy(
                    self.as_compared(e), k, self.queue, self.temperature, group=group
                )
            losses.update(self._named("exchange", of_exchange[0]))
            accuracies.update(self._named("exchange", of_exchange[1]))
        return losses, accuracies

    def _named(self, kind: str, values: Tensor) -> dict[str, Tensor]:
        return {f"{kind}/{name}": value for name, value in zip(self.modalities, values, strict=True)}

    @torch.no_grad()
    def _keys(self, view_k: ClipViews, group: ProcessGroup | None) -> Tensor:
        with phase("key encoders"):
            features = encode(self.key_encoders, view_k, group)
        with phase("heads"):
            return project(self.key_encoders.head, features)

    def moving_modalities(self, stage: str) -> tuple[str, ...]:
        """The modalities whose key encoders move in a stage."""
        if stage == "cross" and self.quirks.partial_momentum_update:
            return tuple(name for name in self.modalities if name in _MOVING_IN_CROSS_STAGE)
        return self.modalities

    def _move_key_encoders(self, stage: str) -> None:
        streams = [self.modalities.index(name) for name in self.moving_modalities(stage)]
        keys, queries = self._moved(self.key_encoders), self._moved(self.query_encoders)
        if len(streams) < len(self.modalities):
            keys, queries = ([tensor[stream] for tensor in side for stream in streams] for side in (keys, queries))
        ops.momentum_update_(keys, queries, self.momentum)

    def _moved(self, encoders: nn.Module) -> list[Tensor]:
        """The tensors of encoders that the momentum update moves, in order, streams first."""
        moved = [parameter.detach() for parameter in encoders.parameters()]
        if self.momentum_buffers:
            moved += [b for name, b in encoders.named_buffers() if name.endswith(("running_mean", "running_var"))]
        return moved
