"""The contrast of stage 1: each query with its key against a queue, forward and with the gradient of the queries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import contrast
from benchmarks.cases import Case
from benchmarks.contrast import EMBEDDING, MODALITIES, TEMPERATURE, unit
from ikem_fast import floors, ops


def make_case(phase: str, sizes: tuple[int, int, str]) -> Case:
    clips, queue, _ = sizes

    def draw(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        shape = (MODALITIES, clips, EMBEDDING)
        return [unit(generator, *shape)], [unit(generator, *shape)]

    def with_queue(function):
        return lambda q, k: function(q, k, contrast.queues(queue, q.device.type)[0], TEMPERATURE)

    floor = functools.partial(floors.info_nce, MODALITIES, clips, EMBEDDING, queue)
    return contrast.loss_case(
        "info_nce", phase, sizes, draw, with_queue(ops.info_nce), with_queue(ops.info_nce_reference), floor
    )


def cases(profile: str, device: str) -> list[Case]:
    return contrast.phases(contrast.SIZES[profile], make_case)


def test_info_nce(measure, case, way):
    measure(case, way)
