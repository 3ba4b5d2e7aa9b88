"""The context loss of stage 2 over all ordered pairs of modalities, forward and with the gradient of the queries."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import contrast
from benchmarks.cases import Case, over_threads
from benchmarks.contrast import EMBEDDING, MODALITIES, TEMPERATURE, TOPK, unit
from ikem_fast import floors, ops


def make_case(phase: str, sizes: tuple[int, int, str]) -> Case:
    clips, queue, _ = sizes

    def draw(generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        shape = (MODALITIES, clips, EMBEDDING)
        return [unit(generator, *shape)], [unit(generator, *shape)]

    def with_queue(function):
        return lambda q, k: function(q, k, contrast.queues(queue, q.device.type)[0], TEMPERATURE, TOPK)

    floor = functools.partial(floors.context_loss, MODALITIES, clips, EMBEDDING, queue)
    return contrast.loss_case(
        "context_loss", phase, sizes, draw, with_queue(ops.context_loss), with_queue(ops.context_loss_reference), floor
    )


def cases(profile: str, device: str) -> list[Case]:
    listed = contrast.phases(contrast.SIZES[profile], make_case)
    return listed + (over_threads(listed[1]) if (profile, device) == ("full", "cpu") else [])


def test_context_loss(measure, case, way):
    measure(case, way)
