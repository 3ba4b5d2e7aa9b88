"""Deriving a batch's modalities, from coordinates to all of them at once."""

from __future__ import annotations

import functools

import torch

from benchmarks import clips as stored
from benchmarks.baselines import eager, release_manner
from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, RELEASE_MANNER, Case, Inputs, compiled, of_phase
from benchmarks.clips import FRAMES, JOINTS, LAYOUT, PERSONS
from ikem_fast import floors, ops
from ikem_fast.modalities import MODALITIES

# Clips, modalities, sweep.
SIZES = {
    "small": [(16, 6, "")],
    "full": [(128, 6, "batch"), (32, 6, "batch"), (512, 6, "batch"), (128, 1, "modalities"), (128, 3, "modalities")],
}


def error(result, expected) -> float:
    if isinstance(expected, torch.Tensor):
        return stored.error_of_modalities(result, expected, 0, MODALITIES[: len(expected)])
    (derived,), (gradient,) = result
    (of_derived,), (of_gradient,) = expected
    # The gradient is that of all modalities at once; angular velocity's is as badly conditioned as itself.
    of_clips = stored.error_of_modalities(gradient[None], of_gradient[None], 0, ("angular_velocity",))
    return max(error(derived, of_derived), of_clips)


def make_case(phase: str, clips: int, modalities: int, sweep: str) -> Case:
    names = MODALITIES[:modalities]

    def draw(generator: torch.Generator) -> Inputs:
        numbers = {"generator": generator, "device": generator.device}
        sizes = (clips, 3, FRAMES, JOINTS, PERSONS)
        values = torch.randn(sizes, **numbers).requires_grad_(phase == BOTH)
        cotangents = (torch.randn(modalities, *sizes, **numbers),) if phase == BOTH else ()
        return Inputs((values, torch.randint(20, 300, (clips,), **numbers)), cotangents)

    competent = stored.stacking(eager.derive_modalities, names)
    definition = functools.partial(ops.derive_modalities_reference, layout=LAYOUT, modalities=names)
    ways = {
        EAGER: competent,
        COMPILED: compiled(competent),
        OURS: functools.partial(ops.derive_modalities, layout=LAYOUT, modalities=names),
    }
    if phase == FORWARD and not sweep.startswith("modal"):
        ways[RELEASE_MANNER] = stored.stacking(release_manner.derive_modalities, names)
    return Case(
        op="derive_modalities",
        phase=phase,
        sizes={"clips": clips, "modalities": modalities},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        expected=of_phase(phase, definition),
        tolerance=dict.fromkeys(ways, 4e-5),
        floor=floors.derive_modalities(clips, FRAMES, JOINTS, PERSONS, modalities, backward=phase == BOTH),
        error=error,
        clips=clips,
        sweep=sweep,
    )


def cases(profile: str, device: str) -> list[Case]:
    return [*(make_case(FORWARD, *sizes) for sizes in SIZES[profile]), make_case(BOTH, *SIZES[profile][0])]


def test_derive_modalities(measure, case, way):
    measure(case, way)
