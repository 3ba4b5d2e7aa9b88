"""Whole training steps as cases: every way takes the same stored clips through a step of its own trainer.

A step is everything that training does with a batch: augmented views of stored clips, encoders, losses, backward pass,
momentum update, enqueue and SGD. Ours is the engine's own ``TrainingStep``. All ways start from the same weights, and
draw dropout and augmentation of their own while they are timed. What is checked is the same step without dropout, on
the first clips of the batch, with the augmentation of ours: its losses, and by how much every encoder, head and queue
was changed, against the eager way in float64.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import step_floors
from benchmarks.baselines import eager, release_manner, trainers
from benchmarks.cases import COMPILED, EAGER, OURS, OURS_BF16, RELEASE_MANNER, STEP, Case
from benchmarks.clips import FRAMES, LAYOUT, stored_clips
from ikem_fast import ops
from ikem_fast.data.sources import StoredBatch
from ikem_fast.engine.config import PretrainConfig
from ikem_fast.engine.step import TrainingStep
from ikem_fast.floors import Work
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.modalities import MODALITIES
from ikem_fast.quirks import Quirks
from ikem_fast.reference import to_reference

DISTILL = "distill"
OPS = {"single": "step, stage 1", "cross": "step, stage 2", DISTILL: "step, distillation"}
STORED = 256  # clips, more than a batch
CHECKED_CLIPS = 8
TIMED_RATE, CHECKED_RATE = 1e-4, 1.0  # of learning; weights stay in order, or change by more than rounding
# Of the changes: rounding can turn the sign before a ReLU, and bfloat16 make another clip the nearest neighbour.
TOLERANCE = {EAGER: 1e-2, COMPILED: 1e-2, RELEASE_MANNER: 1e-2, OURS: 1e-2, OURS_BF16: 0.3}
LOSSES_WEIGH = 30  # a loss may be off by a thirtieth of what changes may
MOST_ROUNDS_OF_OURS, SEED, EPOCH = 10, 1, 1


class Batch(NamedTuple):
    """Which of the stored clips a step takes, and as which samples random numbers are drawn for them."""

    indices: Tensor
    samples: Tensor


def make_module(stage: str, sizes: Mapping[str, int], dropout: float, precision: str) -> IKEM | RelationalDistillation:
    """A trainer of ours, always with the same weights."""
    width = sizes["width"]
    torch.manual_seed(0)
    module = IKEM(
        LAYOUT,
        MODALITIES[: sizes["modalities"]],
        hidden_channels=width,
        feature_size=16 * width,
        embedding_size=8 * width,
        queue_size=sizes["queue"],
        dropout=dropout,
        precision=precision,
        # So that the momentum update has something to move.
        quirks=Quirks(redraw_key_weights=True),
    )
    return RelationalDistillation.from_teacher(module) if stage == DISTILL else module


@functools.lru_cache(maxsize=1)  # of all ways and sizes only the one at hand takes memory
def make_step(
    way: str, stage: str, sizes: tuple[tuple[str, int], ...], device: str, dropout: float, rate: float
) -> Callable[[Batch, bool], Any]:
    """A way's step, which goes on from batch to batch; with True it also returns its ``changes``."""
    ours = way in (OURS, OURS_BF16)
    module = make_module(stage, dict(sizes), dropout, "bf16" if way == OURS_BF16 else "fp32").to(device)
    clips, num_frames = stored_clips(STORED, device)
    if ours:
        recipe = PretrainConfig(learning_rate=rate)
        step = TrainingStep(
            module, recipe, seed=SEED, clip_length=FRAMES, augmentation=ops.AugmentationConfig(), capture=False,
            note=lambda text: None,
        )  # fmt: skip
        step.begin_epoch(EPOCH, stage, rate)
        module.train()
        names = functools.partial(to_reference, module)
    else:
        manners = {COMPILED: trainers.compiled, _AUTOCAST: trainers.autocast, RELEASE_MANNER: lambda: release_manner}
        trainer = trainers.like(module, manners.get(way, lambda: eager)())
        if way == _DEFINITION:
            trainer, clips = trainer.double(), clips.double()
        step = trainers.TrainingStep(trainer, stage, rate)
        names = trainer.tensors_by_release_name

    def run(batch: Batch, checked: bool = False) -> Any:
        before = _copies(names()) if checked else {}
        if ours:
            values = step(StoredBatch(clips, num_frames, batch.indices, batch.samples))
        else:
            values = step(
                clips, num_frames, batch.indices, as_eager_augmentation(SEED, EPOCH, batch.samples) if checked else None
            )
        return (_named_losses(values), _changes(before, _copies(names()))) if checked else values

    return run


_DEFINITION, _AUTOCAST = "eager, float64", "eager, bfloat16"


def as_eager_augmentation(seed: int, epoch: int, samples: Tensor) -> list[eager.Augmentation]:
    """What ours draws for both views of some samples (B,), as the eager ways take it."""
    epoch = torch.full((1,), epoch, dtype=torch.int64, device=samples.device)
    drawn = ops.draw_views_reference(seed, epoch, samples, FRAMES, ops.AugmentationConfig())
    views = [drawn.view(number) for number in range(2)]
    return [eager.Augmentation(view.crop_start, view.shear_first, view.shear_second) for view in views]


def _named_losses(values: Any) -> dict[str, float]:
    named = values if isinstance(values, dict) else dict(zip(values.names, values.values, strict=True))
    return {name: float(value) for name, value in named.items() if not name.startswith("accuracy/")}


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    return {name: tensor.detach().to("cpu", torch.float64, copy=True) for name, tensor in floats.items()}


def _changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By encoder, head and queue, what was added to its tensors, one after another; statistics of norms are apart."""
    changes: dict[str, list[Tensor]] = {}
    for name, tensor in before.items():
        part = name.split(".")[0] + (", statistics" if "running_" in name else "")
        changes.setdefault(part, []).append((after[name] - tensor).flatten())
    return {part: torch.cat(tensors) for part, tensors in changes.items()}


def error(result: tuple, expected: tuple) -> float:
    """The largest of all changes' distances, relative to the length that the change should have, and of all losses'
    relative errors times ``LOSSES_WEIGH``. Parts that do not change must not.
    """
    (losses, changes), (expected_losses, expected_changes) = result, expected
    if losses.keys() != expected_losses.keys() or changes.keys() != expected_changes.keys():
        return math.inf
    errors = [LOSSES_WEIGH * abs(losses[name] / value - 1) for name, value in expected_losses.items()]
    for part, change in expected_changes.items():
        distance, length = float((changes[part] - change).norm()), float(change.norm())
        errors.append(distance / length if length else (math.inf if distance else 0.0))
    return max(math.inf if math.isnan(value) else value for value in errors)


def make_case(
    stage: str,
    ways: tuple[str, ...],
    *,
    clips: int,
    queue: int,
    modalities: int = len(MODALITIES),
    width: int = 16,
    threads: int = 0,
    sweep: str = "",
    with_peak: bool = False,
    autocast: bool = False,
) -> Case:
    """A step of one stage or of a distillation.

    Args:
        stage: "single", "cross" or ``DISTILL``.
        ways: those to measure.
        clips: N.
        queue: K.
        modalities: S.
        width: h; features have 16 h numbers and embeddings 8 h.
        threads: of the CPU, other than the run's; 0 for the run's.
        sweep, with_peak: as of ``Case``.
        autocast: "eager" has its encoders under torch.autocast, and the op a name that says so.
    """
    own = {EAGER: _AUTOCAST} if autocast else {}
    tolerance = {way: TOLERANCE[OURS_BF16 if way in own else way] for way in ways}
    shape = {"clips": clips, "queue": queue, "modalities": modalities, "width": width}
    sizes = tuple(shape.items())

    def draw(generator: torch.Generator) -> Batch:
        indices = torch.randperm(STORED, generator=generator, device=generator.device)[:clips]
        samples = torch.randint(2**31, (clips,), generator=generator, device=generator.device)
        return Batch(indices, samples)

    def timed(way: str) -> Callable[[Batch], Any]:
        return lambda batch: make_step(way, stage, sizes, batch.indices.device.type, 0.5, TIMED_RATE)(batch)

    def checked(way: str) -> Callable[[Batch], Any]:
        def run(batch: Batch) -> Any:
            # Always a first step, from the weights that all ways have.
            make_step.cache_clear()
            step = make_step(way, stage, sizes, batch.indices.device.type, 0.0, CHECKED_RATE)
            return step(Batch(*(values[:CHECKED_CLIPS] for values in batch)), True)

        return run

    return Case(
        op=OPS[stage] + (", encoders in bfloat16" if autocast else ""),
        phase=STEP,
        sizes={**shape, **({"threads": threads} if threads else {})},
        draw=draw,
        ways={way: timed(own.get(way, way)) for way in ways},
        checked={way: checked(own.get(way, way)) for way in ways},
        expected=checked(_DEFINITION),
        tolerance=tolerance,
        floor=_floor(stage, shape, "bf16" if autocast else "fp32"),
        floor_bf16=_floor(stage, shape, "bf16"),
        error=error,
        clips=clips,
        sweep=sweep,
        with_peak=with_peak,
        fewest_rounds={OURS: MOST_ROUNDS_OF_OURS, OURS_BF16: MOST_ROUNDS_OF_OURS},
    )


def _floor(stage: str, sizes: Mapping[str, int], kind: str) -> Work:
    shapes = step_floors.Shapes(**sizes, kind=kind)
    return step_floors.distillation_step(shapes) if stage == DISTILL else step_floors.pretraining_step(shapes, stage)
