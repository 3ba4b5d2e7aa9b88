"""Batch norm as one factor and one summand per channel: few numbers, so that what counts is what a call costs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, Case, Inputs, compiled, of_phase
from ikem_fast import floors, ops

MODALITIES, EPSILON = 6, 1e-5
CHANNELS = {"small": [64], "full": [16, 64, 256]}


def make_case(phase: str, channels: int) -> Case:
    def draw(generator: torch.Generator) -> Inputs:
        def normal() -> Tensor:
            return torch.randn(MODALITIES, channels, generator=generator, device=generator.device)

        leaves = (normal(), normal().square() + 0.1, 1 + 0.1 * normal(), normal())
        if phase == FORWARD:
            return Inputs(leaves)
        return Inputs(tuple(value.requires_grad_() for value in leaves), (normal(), normal()))

    definition = functools.partial(ops.batch_norm_coefficients_reference, eps=EPSILON)
    ours = functools.partial(ops.batch_norm_coefficients, eps=EPSILON)
    ways = {EAGER: definition, COMPILED: compiled(definition), OURS: ours}
    return Case(
        op="batch_norm_coefficients",
        phase=phase,
        sizes={"modalities": MODALITIES, "channels": channels},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        expected=of_phase(phase, definition),
        tolerance=dict.fromkeys(ways, 1e-5),
        floor=floors.batch_norm_coefficients(MODALITIES, channels, backward=phase == BOTH),
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(phase, channels) for channels in CHANNELS[profile] for phase in (FORWARD, BOTH)]


def test_batch_norm_coefficients(measure, case, way):
    measure(case, way)
