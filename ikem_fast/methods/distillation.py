"""Relational cross-modality distillation of a frozen teacher into a student of fewer modalities."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from ikem_fast import modalities as modality_registry
from ikem_fast import ops
from ikem_fast.layouts import Layout
from ikem_fast.methods.common import (
    ALONE,
    THREE_MODALITIES,
    Groups,
    Losses,
    StepLosses,
    Trainer,
    encode,
    encoder_input,
    fuse_early,
    leaves_chest_normal_out,
    project,
    random_queue,
    settle,
)
from ikem_fast.methods.ikem import IKEM
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops import ClipViews
from ikem_fast.quirks import Quirks
from ikem_fast.ranges import phase

EARLY_FUSION = "early_fusion"


class RelationalDistillation(Trainer):
    """A frozen teacher with S modalities, and students that learn its neighbourhoods.

    Args:
        layout: the skeleton, by name, path or itself.
        modalities: names of the teacher's S modalities.
        student_modalities: names of the students' modalities.
        hidden_channels: h of all encoders.
        feature_size: d of all encoders.
        embedding_size: D of the teacher's embeddings; the students' have S·D.
        queue_size: K, embeddings kept per queue.
        temperature: divides all similarities.
        topk: neighbours mined in each of the teacher's queues.
        dropout: of the encoders.
        precision: of encoders and similarities, as for :class:`ikem_fast.methods.IKEM`.
        quirks: behaviours of the authors' release.

    Source: docs/method.md section 7.
    """

    method = "relational_distillation"
    config_fields = (
        *("modalities", "student_modalities", "hidden_channels", "feature_size", "embedding_size", "queue_size"),
        *("temperature", "topk", "dropout", "precision"),
    )
    queue_names = ("queue", "teacher_queue")
    teacher_queue: Tensor
    teacher_queue_pointer: Tensor

    def __init__(
        self,
        layout: str | Layout = "ntu-rgb+d",
        modalities: Iterable[str] = MODALITIES,
        *,
        student_modalities: Iterable[str] = THREE_MODALITIES,
        hidden_channels: int = 16,
        feature_size: int = 256,
        embedding_size: int = 128,
        queue_size: int = 32768,
        temperature: float = 0.07,
        topk: int = 1,
        dropout: float = 0.5,
        precision: str = "fp32",
        quirks: Quirks = Quirks(),  # noqa: B008 - frozen
    ) -> None:
        super().__init__(layout, modalities, quirks, precision)
        self.student_modalities = modality_registry.check(student_modalities, "student_modalities")
        self.hidden_channels = hidden_channels
        self.feature_size = feature_size
        self.embedding_size = embedding_size
        self.queue_size = queue_size
        self.temperature = temperature
        self.topk = topk
        self.dropout = dropout
        size = len(self.modalities) * embedding_size
        self.teacher_encoders = self.encoder(len(self.modalities), feature_size, embedding_size)
        self.teacher_encoders.requires_grad_(False)
        self.early_fusion = leaves_chest_normal_out(quirks, self.modalities) and leaves_chest_normal_out(
            quirks, self.student_modalities
        )
        self.feature_names = (EARLY_FUSION,) if self.early_fusion else self.student_modalities
        in_channels = 3 * len(THREE_MODALITIES) if self.early_fusion else 3
        self.student_encoders = self.encoder(len(self.feature_names), size, size, in_channels=in_channels)
        self.make_queues()
        self.register_buffer("teacher_queue", random_queue(size, queue_size))
        self.register_buffer("teacher_queue_pointer", torch.zeros(1, dtype=torch.int64))
        self.train()

    @classmethod
    def from_teacher(
        cls,
        teacher: IKEM,
        *,
        student_modalities: Iterable[str] = THREE_MODALITIES,
        queue_size: int | None = None,
        temperature: float | None = None,
        topk: int | None = None,
        dropout: float | None = None,
        precision: str | None = None,
        quirks: Quirks | None = None,
    ) -> RelationalDistillation:
        """A distillation of a pretrained module's query encoders; what is left out is as in the teacher."""
        module = cls(
            teacher.layout,
            teacher.modalities,
            student_modalities=student_modalities,
            hidden_channels=teacher.hidden_channels,
            feature_size=teacher.feature_size,
            embedding_size=teacher.embedding_size,
            queue_size=teacher.queue_size if queue_size is None else queue_size,
            temperature=teacher.temperature if temperature is None else temperature,
            topk=teacher.topk if topk is None else topk,
            dropout=teacher.dropout if dropout is None else dropout,
            precision=teacher.precision if precision is None else precision,
            quirks=teacher.quirks if quirks is None else quirks,
        )
        module.teacher_encoders.load_state_dict(teacher.query_encoders.state_dict())
        return module

    def train(self, mode: bool = True) -> RelationalDistillation:
        """Sets the mode of the students; the teacher follows only with quirk Q3, else it stays in eval mode."""
        super().train(mode)
        if not self.quirks.teacher_in_training_mode:
            self.teacher_encoders.eval()
        return self

    @property
    def teacher_feature_names(self) -> tuple[str, ...]:
        """Names of the rows of ``features(..., part="teacher")``."""
        return self.modalities

    def features(self, clips: Tensor, num_frames: Tensor, part: str = "student") -> Tensor:
        """Features (rows, N, d) of the students or the teacher; the caller chooses train or eval mode.

        Args:
            clips: (N, 3, T, V, M).
            num_frames: (N,) frames of each recording.
            part: ``"student"`` (rows are ``feature_names``) or ``"teacher"`` (``teacher_feature_names``).
        """
        if part not in ("student", "teacher"):
            raise ValueError(f"part must be 'student' or 'teacher', got {part!r}")
        teacher_modalities, student_modalities = self.view_modalities
        if part == "teacher":
            return encode(self.teacher_encoders, self.derive(clips, num_frames, teacher_modalities))
        return self._student_features(self.derive(clips, num_frames, student_modalities))

    @property
    def view_modalities(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The teacher's modalities, and the students'."""
        return self.modalities, THREE_MODALITIES if self.early_fusion else self.student_modalities

    def contrast(
        self, view_q: ClipViews, view_k: ClipViews, stage: str | None = None, groups: Groups = ALONE
    ) -> StepLosses:
        """Losses ``distill/<student>`` of some clips' two views against the queues, which stay as they are.

        Args:
            view_q: one view of N clips in the teacher's modalities.
            view_k: the other view, in the students' modalities.
            stage: distillation has one stage; accepted so that all trainers are called alike.
            groups: processes that call this at the same time, each with N clips of its own.

        Source: docs/method.md section 7.
        """
        teacher = self._teacher_embeddings(view_q, groups.statistics)
        with phase("student encoders"):
            features = self._student_features(view_k, groups.statistics)
        with phase("heads"):
            student = project(self.student_encoders.head, features)
        return replace(settle(partial(self._measure, teacher, groups.queue), student), keys=teacher)

    def _enqueue(self, keys: Tensor, group: ProcessGroup | None) -> None:
        super()._enqueue(keys, group)
        joint_embedding = functional.normalize(torch.cat(list(keys), dim=1), dim=1)
        ops.enqueue_(self.teacher_queue, joint_embedding, self.teacher_queue_pointer, **self._columns(group))

    def _measure(self, teacher: Tensor, group: ProcessGroup | None, student: Tensor) -> Losses:
        with phase("relational distillation"):
            losses = ops.relational_distillation_loss(
                self.as_compared(student),
                self.as_compared(teacher),
                self._queues(),
                self.teacher_queue,
                self.temperature,
                self.topk,
                group=group,
            )
        return {f"distill/{name}": loss for name, loss in zip(self.feature_names, losses, strict=True)}, {}

    @torch.no_grad()
    def _teacher_embeddings(self, view: ClipViews, group: ProcessGroup | None) -> Tensor:
        with phase("teacher encoders"):
            features = encode(self.teacher_encoders, view, group)
        with phase("heads"):
            return project(self.teacher_encoders.head, features)

    def _student_features(self, view: ClipViews, group: ProcessGroup | None = None) -> Tensor:
        if not self.early_fusion:
            return encode(self.student_encoders, view, group)
        return self.student_encoders.features(fuse_early(encoder_input(view)), group)

    def _queues(self) -> Tensor:
        """The queues that the teacher's embeddings are compared with (quirk Q2 swaps one)."""
        names = self.modalities
        swapped = self.quirks.bone_queue_for_angular_velocity and {"bone", "angular_velocity"} <= set(names)
        if not swapped:
            return self.queue
        queues = self.queue.clone()
        queues[names.index("angular_velocity")] = self.queue[names.index("bone")]
        return queues
