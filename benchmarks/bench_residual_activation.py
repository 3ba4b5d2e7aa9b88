"""The end of an encoder's block: batch norm, dropout, residual, ReLU.

Dropout of the baselines has random numbers of its own: without it they are compared with the definition without it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import (
    BOTH,
    COMPILED,
    EAGER,
    FORWARD,
    OURS,
    OURS_BF16,
    Case,
    Inputs,
    activations_as_bfloat16,
    compiled,
    exact_in_bfloat16,
    of_phase,
)
from benchmarks.clips import JOINTS, PERSONS
from ikem_fast import floors, ops

MODALITIES, DROPOUT, LAYER = 6, 0.5, 3
SIZES = {"small": [(50, 16)], "full": [(50, 16), (13, 64)]}  # frames, channels
CLIPS = {("small", "cpu"): 4, ("small", "cuda"): 32, ("full", "cpu"): 128, ("full", "cuda"): 128}
TOLERANCE = {EAGER: 1e-5, COMPILED: 1e-5, OURS: 1e-5, OURS_BF16: 1e-2}


def composition(dropout: float):
    def run(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, seed: Tensor) -> Tensor:
        normalised = scale[:, None, None, None] * x + shift[:, None, None, None]
        return functional.relu(functional.dropout(normalised, dropout) + residual)

    return run


def fused(function, dropout: float):
    def run(x: Tensor, scale: Tensor, shift: Tensor, residual: Tensor, seed: Tensor) -> Tensor:
        return function(x, scale, shift, residual, dropout=dropout, seed=seed, layer=LAYER)

    return run


def make_case(phase: str, clips: int, frames: int, channels: int) -> Case:
    sizes = (MODALITIES, PERSONS * clips, frames, JOINTS, channels)

    def draw(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int) -> Tensor:
            return exact_in_bfloat16(torch.randn(sizes, generator=generator, device=generator.device))

        x, residual = normal(*sizes), normal(*sizes)
        scale, shift = normal(MODALITIES, channels), normal(MODALITIES, channels)
        seed = torch.randint(2**62, (1,), generator=generator, device=generator.device)
        leaves = tuple(value.requires_grad_(phase == BOTH) for value in (x, scale, shift, residual))
        return Inputs((*leaves, seed), (normal(*sizes),) if phase == BOTH else ())

    ours = fused(ops.residual_activation, DROPOUT)
    ways = {EAGER: composition(DROPOUT), COMPILED: compiled(composition(DROPOUT)), OURS: ours, OURS_BF16: ours}
    checked = {EAGER: composition(0.0), COMPILED: compiled(composition(0.0))}
    without_dropout = of_phase(phase, fused(ops.residual_activation_reference, 0.0))
    return Case(
        op="residual_activation",
        phase=phase,
        sizes={"clips": clips, "frames": frames, "channels": channels},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        checked={name: of_phase(phase, function) for name, function in checked.items()},
        prepare={OURS_BF16: activations_as_bfloat16(0, 3)},
        expected=of_phase(phase, fused(ops.residual_activation_reference, DROPOUT)),
        expected_of=dict.fromkeys(checked, without_dropout),
        tolerance=TOLERANCE,
        floor=floors.residual_activation(*sizes, backward=phase == BOTH),
        floor_bf16=floors.residual_activation(*sizes, kind="bf16", backward=phase == BOTH),
        clips=clips,
    )


def cases(profile: str, device: str) -> list[Case]:
    clips = CLIPS[profile, device]
    return [make_case(phase, clips, *sizes) for sizes in SIZES[profile] for phase in (FORWARD, BOTH)]


def test_residual_activation(measure, case, way):
    measure(case, way)
