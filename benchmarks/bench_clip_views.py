"""Both augmented views of a batch of stored clips in all modalities, in the layout of the encoder's input.

The baselines gather, crop, shear and derive, and leave the modalities as (N, 3, T, V, M); that the encoder's input norm
is given its sums is ours alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks import clips as stored
from benchmarks.baselines import eager, release_manner
from benchmarks.cases import COMPILED, EAGER, FORWARD, OURS, OURS_BF16, RELEASE_MANNER, Case, compiled, over_threads
from benchmarks.clips import FRAMES, JOINTS, LAYOUT, PERSONS
from ikem_fast import floors, ops
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops.clip_views import ClipViews

VIEWS = 2
STORED = {"cpu": 1024, "cuda": 16384}  # more than a cache holds
# Clips, modalities, sweep.
SIZES = {
    "small": [(16, 6, "")],
    "full": [(128, 6, "batch"), (32, 6, "batch"), (512, 6, "batch"), (128, 1, "modalities"), (128, 3, "modalities")],
}
# Rounding moves values of lower precision to a neighbour.
TOLERANCE = {EAGER: 4e-5, COMPILED: 4e-5, RELEASE_MANNER: 4e-5, OURS: 4e-5, OURS_BF16: 1.01 * 2.0**-7}


def composition(augment, derive):
    """Two views by a baseline: (N, 3, T, V, M) of every modality."""

    def run(inputs) -> list[list[Tensor]]:
        indices, parameters = inputs
        clips, num_frames = stored.stored_clips(STORED[indices.device.type], indices.device.type)
        clips, num_frames = clips[indices], num_frames[indices]
        views = []
        for view in range(VIEWS):
            drawn = eager.Augmentation(
                parameters.crop_start[view], parameters.shear[view, :, 0], parameters.shear[view, :, 1]
            )
            views.append(list(derive(augment(clips, drawn), num_frames).values()))
        return views

    return run


def views_of(function, modalities: tuple[str, ...], dtype: torch.dtype = torch.float32):
    def run(inputs) -> ClipViews:
        indices, parameters = inputs
        clips, num_frames = stored.stored_clips(STORED[indices.device.type], indices.device.type)
        return function(clips, num_frames, indices, parameters, LAYOUT, modalities, dtype=dtype)

    return run


def error(result: ClipViews | list[list[Tensor]], expected: ClipViews, modalities: tuple[str, ...]) -> float:
    if not isinstance(result, ClipViews):
        laid_out = [torch.stack([m.permute(0, 4, 2, 3, 1).flatten(0, 1) for m in view]) for view in result]
        result = expected._replace(views=torch.stack(laid_out))
    of_sums = (result.statistics - expected.statistics).abs().amax() / expected.statistics.abs().amax()
    return max(stored.error_of_modalities(result.views, expected.views, 1, modalities), float(of_sums))


def make_case(clips: int, modalities: int, sweep: str) -> Case:
    names = MODALITIES[:modalities]

    def draw(generator: torch.Generator):
        device = generator.device
        indices = torch.randperm(STORED[device.type], generator=generator, device=device)[:clips]
        epoch = torch.randint(2**31, (1,), generator=generator, device=device)
        return indices, ops.draw_views(1, epoch, indices, FRAMES, ops.AugmentationConfig(), VIEWS)

    def deriving(baseline):
        return functools.partial(baseline.derive_modalities, layout=LAYOUT, modalities=names)

    competent = composition(eager.augment, deriving(eager))
    ways = {
        EAGER: competent,
        COMPILED: composition(compiled(eager.augment), compiled(deriving(eager))),
        OURS: views_of(ops.clip_views, names),
        OURS_BF16: views_of(ops.clip_views, names, torch.bfloat16),
    }
    if sweep != "modalities":
        ways[RELEASE_MANNER] = composition(release_manner.augment, deriving(release_manner))
    sizes = (clips, FRAMES, JOINTS, PERSONS, modalities, VIEWS)
    return Case(
        op="clip_views",
        phase=FORWARD,
        sizes={"clips": clips, "modalities": modalities},
        draw=draw,
        ways=ways,
        expected=views_of(ops.clip_views_reference, names),
        expected_of={OURS_BF16: views_of(ops.clip_views_reference, names, torch.bfloat16)},
        tolerance=TOLERANCE,
        floor=floors.clip_views(*sizes),
        floor_bf16=floors.clip_views(*sizes, kind="bf16"),
        error=functools.partial(error, modalities=names),
        clips=clips,
        sweep=sweep,
    )


def cases(profile: str, device: str) -> list[Case]:
    listed = [make_case(*sizes) for sizes in SIZES[profile]]
    return listed + (over_threads(listed[0]) if (profile, device) == ("full", "cpu") else [])


def test_clip_views(measure, case, way):
    measure(case, way)
