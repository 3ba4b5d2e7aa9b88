"""The loss of distillation: three students against a teacher's queues, forward and with the students' gradient."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import contrast
from benchmarks.cases import Case
from benchmarks.contrast import EMBEDDING, MODALITIES, STUDENTS, TEMPERATURE, TOPK, unit
from ikem_fast import floors, ops


def make_case(phase: str, sizes: tuple[int, int, str]) -> Case:
    clips, queue, _ = sizes

    def draw(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        students = unit(generator, STUDENTS, clips, MODALITIES * EMBEDDING)
        return [students], [unit(generator, MODALITIES, clips, EMBEDDING)]

    def with_queues(function):
        return lambda students, teacher: function(
            students, teacher, *contrast.queues(queue, students.device.type), TEMPERATURE, TOPK
        )

    floor = functools.partial(floors.relational_distillation_loss, STUDENTS, MODALITIES, clips, EMBEDDING, queue)
    return contrast.loss_case(
        "relational_distillation_loss",
        phase,
        sizes,
        draw,
        with_queues(ops.relational_distillation_loss),
        with_queues(ops.relational_distillation_loss_reference),
        floor,
        terms=STUDENTS,
    )


def cases(profile: str, device: str) -> list[Case]:
    return contrast.phases(contrast.SIZES[profile], make_case)


def test_relational_distillation_loss(measure, case, way):
    measure(case, way)
