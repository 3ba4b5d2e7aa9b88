"""Drawing the random parameters of both views of a batch.

The definition checks numbers in tensors, so that torch.compile would compile it anew for every epoch: it is left out.
"""

from __future__ import annotations

import torch

from benchmarks.cases import CALL, EAGER, OURS, Case
from ikem_fast import floors, ops

CLIPS = {"small": [128], "full": [128, 1024]}
SEED, FRAMES = 7, 50


def drawing(function):
    """A way: the parameters of the views of some samples in some epoch."""

    def run(inputs):
        indices, epoch = inputs
        drawn = function(SEED, epoch, indices, FRAMES, ops.AugmentationConfig())
        return drawn.crop_start, drawn.shear

    return run


def make_case(clips: int, sweep: str) -> Case:
    def draw(generator: torch.Generator):
        numbers = {"generator": generator, "device": generator.device}
        return torch.randint(2**31, (clips,), **numbers), torch.randint(300, (1,), **numbers)

    return Case(
        op="draw_views",
        phase=CALL,
        sizes={"clips": clips},
        draw=draw,
        ways={
            EAGER: drawing(ops.draw_views_reference),
            OURS: drawing(ops.draw_views),
        },
        expected=drawing(ops.draw_views_reference),
        tolerance={EAGER: 0.0, OURS: 0.0},  # the same bits
        floor=floors.draw_views(clips),
        clips=clips,
        sweep=sweep,
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(clips, "batch" if profile == "full" else "") for clips in CLIPS[profile]]


def test_draw_views(measure, case, way):
    measure(case, way)
