"""The whole method in either manner: one plain-PyTorch encoder per modality, queues, and steps of training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.baselines import eager, release_manner
from benchmarks.baselines.eager import Augmentation
from ikem_fast.layouts import Layout
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.methods.distillation import EARLY_FUSION
from ikem_fast.nn import STGCNReference, initialize_weights
from ikem_fast.quirks import Quirks
from ikem_fast.reference import _NAMES, reference_encoder_name, to_reference

Manner = ModuleType | SimpleNamespace
# Quirk Q1: the key encoders that still move in stage 2.
_MOVING_IN_CROSS_STAGE = ("motion", "acceleration", "angular_velocity")


def compiled() -> SimpleNamespace:
    """The eager manner under torch.compile: augmentation, modalities, the encoder and the loss of a pair, each a graph
    of its own that serves all streams and pairs.
    """
    compile_ = partial(torch.compile, dynamic=False)
    pair = compile_(eager.mined_loss)
    return SimpleNamespace(
        draw_augmentation=eager.draw_augmentation,
        augment=compile_(eager.augment),
        derive_modalities=compile_(eager.derive_modalities),
        features=compile_(STGCNReference.features),
        info_nce=compile_(eager.info_nce),
        context_losses=partial(eager.context_losses, loss_of_pair=pair),
        relational_distillation_losses=partial(eager.relational_distillation_losses, loss_of_pair=pair),
        momentum_update_=eager.momentum_update_,
    )


def autocast() -> SimpleNamespace:
    """The eager manner with encoders under torch.autocast in bfloat16, as one does for speed."""

    def features(encoder: STGCNReference, clips: Tensor) -> Tensor:
        with torch.autocast(clips.device.type, torch.bfloat16):
            return STGCNReference.features(encoder, clips).float()

    return SimpleNamespace(**{**vars(eager), "features": features})


class Trainer(nn.Module, ABC):
    """What pretraining and distillation share.

    Args:
        manner: ``eager``, ``release_manner``, ``compiled()`` or ``autocast()``.
        layout: the skeleton.
        modalities: names of the S modalities.
        hidden_channels: h of all encoders.
        feature_size: d of all encoders.
        embedding_size: D.
        queue_size: K.
        temperature: divides all similarities.
        topk: neighbours mined in each queue.
        dropout: of the encoders.
        quirks: behaviours of the authors' release.
    """

    queue: Tensor
    pointer: Tensor

    def __init__(
        self,
        manner: Manner,
        layout: Layout,
        modalities: Sequence[str],
        *,
        hidden_channels: int,
        feature_size: int,
        embedding_size: int,
        queue_size: int,
        temperature: float = 0.07,
        topk: int = 1,
        dropout: float = 0.5,
        quirks: Quirks = Quirks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__()
        self.manner = manner
        self.layout = layout
        self.modalities = tuple(modalities)
        self.feature_size = feature_size
        self.temperature = temperature
        self.topk = topk
        self.quirks = quirks
        self._sizes = {"hidden_channels": hidden_channels, "feature_size": feature_size, "dropout": dropout}
        self._features = getattr(manner, "features", STGCNReference.features)
        self.register_buffer("queue", _random_queue(len(self.modalities), embedding_size, queue_size))
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))

    def make_encoders(self, names: Sequence[str], *head_sizes: int) -> nn.ModuleDict:
        adjacency = self.layout.adjacency(distance_limit=1 if self.quirks.one_hop_graph else None)
        return nn.ModuleDict({name: STGCNReference(adjacency, head_sizes=head_sizes, **self._sizes) for name in names})

    def encode(self, encoders: nn.ModuleDict, views: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Features (N, d), encoder by encoder."""
        return {name: self._features(encoder, views[name]) for name, encoder in encoders.items()}

    def derive(self, clips: Tensor, num_frames: Tensor, modalities: Sequence[str]) -> dict[str, Tensor]:
        return self.manner.derive_modalities(clips, num_frames, self.layout, modalities)

    @abstractmethod
    def losses(
        self, view_q: Tensor, view_k: Tensor, num_frames: Tensor, stage: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses by name, and what ``enqueue`` takes after the backward pass.

        Args:
            view_q: (N, 3, T, V, M) one augmented view of the clips.
            view_k: the other one.
            num_frames: (N,) frames of each recording.
            stage: ``"single"`` or ``"cross"``; distillation has but one.
        """

    @torch.no_grad()
    def enqueue(self, keys: Mapping[str, Tensor]) -> None:
        """Puts keys (N, D) into all queues at the same place."""
        self._fill(self.queue, torch.stack(list(keys.values())).mT)

    def _fill(self, queue: Tensor, columns: Tensor) -> None:
        number, size = columns.shape[-1], queue.shape[-1]
        places = (self.pointer + torch.arange(number, device=queue.device)) % size
        queue.index_copy_(queue.dim() - 1, places, columns)
        self.pointer.copy_((self.pointer + number) % size)

    def tensors_by_release_name(self) -> dict[str, Tensor]:
        """Weights, statistics and queues, sharing memory, under the names of a released checkpoint."""
        named = {}
        for name, queue in zip(self.modalities, self.queue, strict=True):
            named[f"queue{_NAMES[name][0]}"] = queue
            named[f"queue_ptr{_NAMES[name][0]}"] = self.pointer  # the release has one for each, all equal
        for prefix, encoder in self._named_encoders():
            for name, tensor in encoder.state_dict(keep_vars=True).items():
                named[f"{prefix}.{reference_encoder_name(name)}"] = tensor
        return named

    @abstractmethod
    def _named_encoders(self) -> list[tuple[str, STGCNReference]]:
        """Encoders with what the release puts before the names of their tensors."""

    @torch.no_grad()
    def load_release(self, state: Mapping[str, Tensor]) -> None:
        """Takes over a released checkpoint."""
        for name, tensor in self.tensors_by_release_name().items():
            tensor.copy_(state[name])


class Pretraining(Trainer):
    """Stages 1 and 2 (docs/method.md sections 5 and 6); arguments as of ``Trainer``, and ``momentum`` of the keys."""

    def __init__(self, *arguments: Any, embedding_size: int, momentum: float = 0.999, **sizes: Any) -> None:
        super().__init__(*arguments, embedding_size=embedding_size, **sizes)
        self.momentum = momentum
        heads = (self.feature_size, embedding_size)
        self.query_encoders = self.make_encoders(self.modalities, *heads)
        self.key_encoders = self.make_encoders(self.modalities, *heads).requires_grad_(False)
        self.key_encoders.load_state_dict(self.query_encoders.state_dict())
        joint_size = len(self.modalities) * embedding_size
        self.exchange_heads = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.Linear(self.feature_size, joint_size), nn.ReLU(), nn.Linear(joint_size, joint_size)
                )
                for name in self.modalities
            }
        )
        initialize_weights(self.exchange_heads)

    def features(self, clips: Tensor, num_frames: Tensor) -> Tensor:
        """Features (S, N, d) of clips (N, 3, T, V, M); the caller chooses train or eval mode."""
        encoded = self.encode(self.query_encoders, self.derive(clips, num_frames, self.modalities))
        return torch.stack(list(encoded.values()))

    def losses(
        self, view_q: Tensor, view_k: Tensor, num_frames: Tensor, stage: str
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        self._move_keys(stage)
        features = self.encode(self.query_encoders, self.derive(view_q, num_frames, self.modalities))
        q = {name: _unit(self.query_encoders[name].head(feature)) for name, feature in features.items()}
        with torch.no_grad():
            encoded = self.encode(self.key_encoders, self.derive(view_k, num_frames, self.modalities))
            k = {name: _unit(self.key_encoders[name].head(feature)) for name, feature in encoded.items()}
        if stage == "single":
            losses = {
                f"single/{name}": self.manner.info_nce(q[name], k[name], queue, self.temperature)
                for name, queue in zip(self.modalities, self.queue, strict=True)
            }
            return losses, k
        context = self.manner.context_losses(q, k, self.queue, self.temperature, self.topk)
        losses = {f"context/{name}": loss for name, loss in context.items()}
        joint_key = _unit(torch.cat(list(k.values()), dim=1))
        joint_queue = functional.normalize(self.queue.flatten(0, 1), dim=0)
        for name, feature in features.items():
            e = _unit(self.exchange_heads[name](feature))
            losses[f"exchange/{name}"] = self.manner.info_nce(e, joint_key, joint_queue, self.temperature)
        return losses, k

    def _move_keys(self, stage: str) -> None:
        partial = stage == "cross" and self.quirks.partial_momentum_update
        moving = [name for name in self.modalities if not partial or name in _MOVING_IN_CROSS_STAGE]
        keys, queries = (
            [parameter for name in moving for parameter in encoders[name].parameters()]
            for encoders in (self.key_encoders, self.query_encoders)
        )
        self.manner.momentum_update_(keys, queries, self.momentum)

    def tensors_by_release_name(self) -> dict[str, Tensor]:
        named = super().tensors_by_release_name()
        for name, head in self.exchange_heads.items():
            for key, tensor in head.state_dict(keep_vars=True).items():
                named[f"mlp2{_NAMES[name][1]}.{key}"] = tensor
        return named

    def _named_encoders(self) -> list[tuple[str, STGCNReference]]:
        sides = (("encoder_q", self.query_encoders), ("encoder_k", self.key_encoders))
        return [(side + _NAMES[name][0], encoder) for side, encoders in sides for name, encoder in encoders.items()]


class Distillation(Trainer):
    """Distillation of a frozen teacher (docs/method.md section 7); without the variant of quirk Q4.

    Args:
        student_modalities: names of the students' modalities; the other arguments as of ``Trainer``.
    """

    joint_queue: Tensor

    def __init__(
        self,
        *arguments: Any,
        student_modalities: Sequence[str] = ("joint", "motion", "bone"),
        embedding_size: int,
        queue_size: int,
        **sizes: Any,
    ) -> None:
        super().__init__(*arguments, embedding_size=embedding_size, queue_size=queue_size, **sizes)
        self.student_modalities = tuple(student_modalities)
        joint_size = len(self.modalities) * embedding_size
        self.teacher = self.make_encoders(self.modalities, self.feature_size, embedding_size).requires_grad_(False)
        self.students = self.make_encoders(self.student_modalities, joint_size, joint_size)
        self.register_buffer("joint_queue", _random_queue(joint_size, queue_size))
        self.train()

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        if not self.quirks.teacher_in_training_mode:
            self.teacher.eval()
        return self

    def losses(
        self, view_q: Tensor, view_k: Tensor, num_frames: Tensor, stage: str = ""
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        with torch.no_grad():
            encoded = self.encode(self.teacher, self.derive(view_q, num_frames, self.modalities))
            teacher = {name: _unit(self.teacher[name].head(feature)) for name, feature in encoded.items()}
        encoded = self.encode(self.students, self.derive(view_k, num_frames, self.student_modalities))
        students = {name: _unit(self.students[name].head(feature)) for name, feature in encoded.items()}
        losses = self.manner.relational_distillation_losses(
            students, teacher, _joint(teacher), self._compared_queues(), self.joint_queue, self.temperature, self.topk
        )
        return {f"distill/{name}": loss for name, loss in losses.items()}, teacher

    def _compared_queues(self) -> list[Tensor]:
        queues = dict(zip(self.modalities, self.queue, strict=True))
        if self.quirks.bone_queue_for_angular_velocity and {"bone", "angular_velocity"} <= set(queues):
            queues["angular_velocity"] = queues["bone"]
        return list(queues.values())

    @torch.no_grad()
    def enqueue(self, keys: Mapping[str, Tensor]) -> None:
        before = self.pointer.clone()
        self._fill(self.joint_queue, _joint(keys).T)
        self.pointer.copy_(before)
        super().enqueue(keys)

    def tensors_by_release_name(self) -> dict[str, Tensor]:
        joint = {"queue_teacher": self.joint_queue, "queue_ptr_teacher": self.pointer}
        return {**super().tensors_by_release_name(), **joint}

    def _named_encoders(self) -> list[tuple[str, STGCNReference]]:
        teacher = [(f"encoder_q{_NAMES[name][0]}", encoder) for name, encoder in self.teacher.items()]
        return teacher + [(f"encoder_student_{_NAMES[name][1]}", encoder) for name, encoder in self.students.items()]


class TrainingStep:
    """A step from stored clips to updated weights.

    Args:
        trainer: what is trained.
        stage: see ``Trainer.losses``.
        learning_rate, sgd_momentum, weight_decay: of SGD.
    """

    def __init__(
        self, trainer: Trainer, stage: str, learning_rate: float, sgd_momentum: float = 0.9, weight_decay: float = 1e-4
    ) -> None:
        self.trainer = trainer
        self.stage = stage
        trained = [parameter for parameter in trainer.parameters() if parameter.requires_grad]
        # The fused update is the best that there is; releases take the default.
        fused = None if trainer.manner is release_manner else True
        self.optimizer = torch.optim.SGD(
            trained, lr=learning_rate, momentum=sgd_momentum, weight_decay=weight_decay, fused=fused
        )

    def __call__(
        self,
        clips: Tensor,
        num_frames: Tensor,
        indices: Tensor,
        drawn: Sequence[Augmentation] | None = None,
    ) -> dict[str, Tensor]:
        """Trains on some of the stored clips and returns the losses.

        Args:
            clips: (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
            indices: (B,) int64, which clips.
            drawn: of the two views; ``None`` to draw them here.
        """
        manner, trainer = self.trainer.manner, self.trainer
        batch, num_frames = clips[indices], num_frames[indices]
        if drawn is None:
            drawn = [manner.draw_augmentation(len(batch), batch.shape[2], batch.device) for _ in range(2)]
        view_q, view_k = (manner.augment(batch, parameters) for parameters in drawn)
        losses, keys = trainer.losses(view_q, view_k, num_frames, self.stage)
        self.optimizer.zero_grad(set_to_none=True)
        torch.stack(list(losses.values())).sum().backward()
        trainer.enqueue(keys)
        self.optimizer.step()
        return {name: loss.detach() for name, loss in losses.items()}


def like(module: IKEM | RelationalDistillation, manner: Manner, **changes: Any) -> Trainer:
    """A trainer of the same sizes, quirks, weights and queues as one of ikem_fast, where that is, in training mode.

    Args:
        module: what it shall be like.
        manner: see ``Trainer``.
        changes: other values for arguments of ``Trainer``.
    """
    if EARLY_FUSION in module.feature_names:
        raise ValueError("module must have a student for each modality, got an early-fusion student (quirk Q4)")
    names = (
        "hidden_channels",
        "feature_size",
        "embedding_size",
        "queue_size",
        "temperature",
        "topk",
        "dropout",
        "quirks",
    )
    arguments = {name: getattr(module, name) for name in names}
    if isinstance(module, IKEM):
        kind: Callable[..., Trainer] = Pretraining
        arguments["momentum"] = module.momentum
    else:
        kind = Distillation
        arguments["student_modalities"] = module.student_modalities
    trainer = kind(manner, module.layout, module.modalities, **{**arguments, **changes}).to(module.queue)
    trainer.load_release(to_reference(module))
    return trainer.train()


def _random_queue(*shape: int) -> Tensor:
    return functional.normalize(torch.randn(*shape), dim=-2)


def _unit(vectors: Tensor) -> Tensor:
    return functional.normalize(vectors, dim=1)


def _joint(embeddings: Mapping[str, Tensor]) -> Tensor:
    """The normalised concatenation (N, S·D)."""
    return _unit(torch.cat(list(embeddings.values()), dim=1))
