"""IKEM pretraining: momentum contrast per modality, then cross-modality context and implicit exchange."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ikem_fast import ops
from ikem_fast.layouts import Layout
from ikem_fast.methods.common import Trainer, embed, encode, project
from ikem_fast.modalities import MODALITIES
from ikem_fast.nn import initialize_weights
from ikem_fast.ops import ClipViews
from ikem_fast.quirks import Quirks

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
        quirks: behaviours of the authors' release.

    Source: docs/method.md sections 5 and 6.
    """

    method = "ikem"
    config_fields = (
        *("modalities", "hidden_channels", "feature_size", "embedding_size", "queue_size", "temperature", "momentum"),
        *("topk", "dropout", "context", "exchange"),
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
        quirks: Quirks = Quirks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(layout, modalities, quirks)
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
        self.query_encoders = nn.ModuleDict(
            {name: self.encoder(feature_size, embedding_size) for name in self.modalities}
        )
        self.key_encoders = copy.deepcopy(self.query_encoders)
        if quirks.redraw_key_weights:
            initialize_weights(self.key_encoders)
        self.key_encoders.requires_grad_(False)
        self.exchange_heads = nn.ModuleDict()
        if exchange:
            exchange_size = len(self.modalities) * embedding_size
            for name in self.modalities:
                self.exchange_heads[name] = nn.Sequential(
                    nn.Linear(feature_size, exchange_size), nn.ReLU(), nn.Linear(exchange_size, exchange_size)
                )
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

    def losses(self, view_q: ClipViews, view_k: ClipViews, stage: str | None = None) -> dict[str, Tensor]:
        """Losses of one training step; their sum is the step's loss.

        Moves the key encoders before they are used and fills the queues after the losses.

        Args:
            view_q: one view of N clips in all modalities, for the query encoders.
            view_k: the other view, for the key encoders.
            stage: ``"single"``, also if left out, for ``single/<modality>``; ``"cross"`` for ``context/<modality>``
                and ``exchange/<modality>``.

        Returns:
            Scalar tensors by name.

        Source: docs/method.md sections 5 and 6.
        """
        stage = "single" if stage is None else stage
        if stage not in STAGES:
            raise ValueError(f"stage must be 'single' or 'cross', got {stage!r}")
        if stage == "cross" and self.context and len(self.modalities) < 2:
            raise ValueError("stage 'cross' needs at least 2 modalities, got 1: turn the context loss off")
        self._move_key_encoders(stage)
        features = encode(self.query_encoders, view_q)
        q = project([encoder.head for encoder in self.query_encoders.values()], features)
        k = self._keys(view_k)
        # Backward reads the queue as it was, while the new keys already take their places.
        queue = self.queue.clone()
        losses = {}
        if stage == "single":
            losses.update(self._named("single", ops.info_nce(q, k, queue, self.temperature)))
        else:
            if self.context:
                losses.update(self._named("context", ops.context_loss(q, k, queue, self.temperature, self.topk)))
            if self.exchange:
                e = project(self.exchange_heads.values(), features)
                losses.update(self._named("exchange", ops.exchange_loss(e, k, queue, self.temperature)))
        ops.enqueue_(self.queue, k, self.queue_pointer)
        return losses

    def _named(self, kind: str, losses: Tensor) -> dict[str, Tensor]:
        return {f"{kind}/{name}": loss for name, loss in zip(self.modalities, losses, strict=True)}

    @torch.no_grad()
    def _keys(self, view_k: ClipViews) -> Tensor:
        return embed(self.key_encoders, view_k)

    def _move_key_encoders(self, stage: str) -> None:
        moving = self.modalities
        if stage == "cross" and self.quirks.partial_momentum_update:
            moving = tuple(name for name in moving if name in _MOVING_IN_CROSS_STAGE)
        keys = [p for name in moving for p in self.key_encoders[name].parameters()]
        queries = [p for name in moving for p in self.query_encoders[name].parameters()]
        ops.momentum_update_(keys, queries, self.momentum)
