"""The implicit exchange loss of stage 2, forward and with the gradient of the exchange embeddings."""

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
        exchange = unit(generator, MODALITIES, clips, MODALITIES * EMBEDDING)
        return [exchange], [unit(generator, MODALITIES, clips, EMBEDDING)]

    def with_queue(function):
        return lambda e, k: function(e, k, contrast.queues(queue, e.device.type)[0], TEMPERATURE)

    floor = functools.partial(floors.exchange_loss, MODALITIES, clips, EMBEDDING, queue)
    return contrast.loss_case(
        "exchange_loss",
        phase,
        sizes,
        draw,
        with_queue(ops.exchange_loss),
        with_queue(ops.exchange_loss_reference),
        floor,
    )


def cases(profile: str, device: str) -> list[Case]:
    return contrast.phases(contrast.SIZES[profile], make_case)


def test_exchange_loss(measure, case, way):
    measure(case, way)
