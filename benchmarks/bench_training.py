"""Pretraining from end to end: a step of training with its data path, and the time until it has learned something.

    pytest benchmarks/bench_training.py                                      # a made-up set
    pytest benchmarks/bench_training.py --profile full                       # one of NTU-60's size
    IKEM_FAST_DATA=FOLDER pytest benchmarks/bench_training.py --profile full # and the recordings in FOLDER/nw_ucla

Prepared clips come through the trainer's own source, in the epochs' order, and losses are read back after every step.
The eager ways hold the clips in memory and draw their batches there. What is checked is the command ``pretrain``: the
losses that it logs of its first two steps, on batches of a few clips and without dropout, against those of the eager
way from the same weights, clips and augmentation.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import step_floors
from benchmarks.baselines import eager, release_manner, trainers
from benchmarks.cases import EAGER, OURS, OURS_BF16, RELEASE_MANNER, STEP, Case
from benchmarks.made_up_sets import NTU60_XSUB_TRAINING, make_clips
from benchmarks.steps import as_eager_augmentation
from ikem_fast import floors, layouts, ops
from ikem_fast.data import ClipSet, prepare
from ikem_fast.data.sources import open_source
from ikem_fast.engine import load_config, pretrain
from ikem_fast.engine.config import Config, augmentation_settings
from ikem_fast.engine.randomness import epoch_order, seed_everything
from ikem_fast.engine.run_log import read_log
from ikem_fast.engine.runs import new_ikem
from ikem_fast.engine.step import TrainingStep
from ikem_fast.floors import Work
from ikem_fast.methods import IKEM
from ikem_fast.methods.ikem import STAGES

STAGE_NAMES = dict(zip(STAGES, ("stage 1", "stage 2"), strict=True))
CHECKED_CLIPS, CHECKED_STEPS = 8, 2
TOLERANCE = {EAGER: 1e-4, RELEASE_MANNER: 1e-4, OURS: 1e-4, OURS_BF16: 5e-2}
EAGER_BYTES_A_CLIP = 160_000_000  # that eager steps of the published width hold until their backward pass
ACCURACY = 0.7  # of the nearest neighbour among the training clips, all modalities
MADE_UP, NTU60, NW_UCLA = "made-up", "NTU-60 size", "NW-UCLA"
NTU60_OP = f"training, {NTU60}"


# ---- sets of clips


@functools.cache
def _folder() -> tempfile.TemporaryDirectory:
    """For sets and runs; goes with the process."""
    return tempfile.TemporaryDirectory(prefix="ikem_fast-benchmarks-")


@functools.cache
def clip_set(name: str) -> ClipSet:
    folder = Path(_folder().name, name.replace(" ", "-"))
    if name == NW_UCLA:
        prepare("nw-ucla", Path(os.environ["IKEM_FAST_DATA"], "nw_ucla"), folder)
        return ClipSet.open(folder)
    return make_clips(folder, {MADE_UP: 64, NTU60: NTU60_XSUB_TRAINING}[name])


def settings(name: str, stage: str, way: str, device: str) -> Config:
    """The published recipe with other sizes where a set is small, all of it in one stage."""
    preset = {MADE_UP: "cpu-small", NTU60: "ntu60-xsub", NW_UCLA: "nw-ucla-small"}[name]
    precision = "bf16" if way == OURS_BF16 else "fp32"
    overrides = ["pretrain.max_gradient_norm=null", "pretrain.learning_rate=0.001", f"device={device}"]
    if name == MADE_UP:
        overrides += ["model.queue_size=64", "pretrain.batch_size=8"]
    return load_config(
        preset,
        [*overrides, f"model.precision={precision}", f"pretrain.cross_epoch={1 if stage == 'cross' else 'null'}"],
    )


# ---- what is timed


@functools.lru_cache(maxsize=1)  # of all ways and sets only the one at hand takes memory
def training(name: str, stage: str, way: str, device: str) -> Callable[[], Tensor]:
    """One step after another: each call takes the next batch and returns the losses, on the host."""
    config = settings(name, stage, way, device)
    clips = clip_set(name).split("train")
    method = _new_method(clips, config).to(device).train()
    batches = _batches(len(clips), config)
    recipe = config.pretrain
    if way in (OURS, OURS_BF16):
        source = open_source(clips, device=torch.device(device), file_frame_count=method.quirks.file_frame_count)
        step = TrainingStep(
            method,
            recipe,
            seed=config.seed,
            clip_length=clips.clip_length,
            augmentation=augmentation_settings(config),
            note=lambda text: None,
        )
        step.begin_epoch(1, stage, recipe.learning_rate)
        stored = source.batches(batches)
        return lambda: step(next(stored)).values.cpu()
    eager_step = trainers.TrainingStep(
        trainers.like(method, release_manner if way == RELEASE_MANNER else eager), stage, recipe.learning_rate
    )
    values, num_frames = _all_clips(clips, device)
    return lambda: torch.stack(list(eager_step(values, num_frames, _to(next(batches), device)).values())).cpu()


def _new_method(clips: ClipSet, config: Config) -> IKEM:
    """With the weights that ``pretrain`` begins with."""
    seed_everything(config.seed)
    return new_ikem(clips, config)


def _batches(num_clips: int, config: Config) -> Iterator:
    """Positions of the clips of batch after batch, epoch after epoch, as ``pretrain`` takes them."""
    size = config.pretrain.batch_size
    for epoch in range(1, config.pretrain.epochs + 1):
        order = epoch_order(num_clips, config.seed, epoch).numpy()
        yield from order[: num_clips // size * size].reshape(-1, size)


def _all_clips(clips: ClipSet, device: str) -> tuple[Tensor, Tensor]:
    batch = clips.batch(range(len(clips)))
    return batch.clips.to(device), batch.num_frames.to(device)


def _to(positions, device: str) -> Tensor:
    return torch.from_numpy(positions).to(device)


# ---- what is checked


def logged_losses(name: str, stage: str, way: str, device: str, seed: int) -> list[dict[str, float]]:
    """What ``pretrain`` logs of its first steps."""
    config = _checked_settings(name, stage, way, device, seed)
    with tempfile.TemporaryDirectory(dir=_folder().name) as run:
        pretrain(clip_set(name).folder, run, config, progress=False)
        return [line["losses"] for line in read_log(run) if line["kind"] == "train"]


def eager_losses(name: str, stage: str, way: str, device: str, seed: int) -> list[dict[str, float]]:
    """The same losses of an eager way on the same clips with the same augmentation."""
    config = _checked_settings(name, stage, EAGER, device, seed)
    clips = clip_set(name).split("train")
    manner = release_manner if way == RELEASE_MANNER else eager
    trainer = trainers.like(_new_method(clips, config).to(device), manner)
    step = trainers.TrainingStep(trainer, stage, config.pretrain.learning_rate)
    losses = []
    for batch in open_source(clips, device=device).batches(_batches(len(clips), config)):
        drawn = as_eager_augmentation(seed, 1, batch.samples)
        values = step(batch.clips, batch.num_frames, batch.indices, drawn)
        losses.append({loss: float(value) for loss, value in values.items()})
        if len(losses) == CHECKED_STEPS:
            return losses
    raise AssertionError(f"{name} has no {CHECKED_STEPS} batches of {CHECKED_CLIPS} clips")


def largest_difference(result: list[dict[str, float]], expected: list[dict[str, float]]) -> float:
    """Of any loss of any step, relative to it where it is above 1; the first ones can be as small as rounding."""
    if [list(step) for step in result] != [list(step) for step in expected]:
        return math.inf
    pairs = [
        (step[name], value) for step, of_step in zip(result, expected, strict=True) for name, value in of_step.items()
    ]
    errors = [abs(loss - value) / max(1.0, abs(value)) for loss, value in pairs]
    return max(math.inf if math.isnan(error) else error for error in errors)


def _checked_settings(name: str, stage: str, way: str, device: str, seed: int) -> Config:
    config = settings(name, stage, way, device)
    config.seed = seed
    config.max_steps = CHECKED_STEPS
    config.model.dropout = 0.0
    config.pretrain.batch_size = CHECKED_CLIPS
    config.logging.log_every_steps = 1
    config.logging.knn_every_epochs = 0
    config.logging.tensorboard = False
    return config


# ---- cases


def make_case(name: str, stage: str, ways: tuple[str, ...], device: str) -> Case:
    config = settings(name, stage, OURS, device)
    sizes = {
        "clips": config.pretrain.batch_size,
        "queue": config.model.queue_size,
        "modalities": len(config.model.modalities),
        "width": config.model.hidden_channels,
    }

    def checked(way: str) -> Callable[[int], list[dict[str, float]]]:
        losses = logged_losses if way in (OURS, OURS_BF16) else eager_losses
        return lambda seed: losses(name, stage, way, device, seed)

    return Case(
        op=f"training, {name}",
        phase=f"{STEP}, {STAGE_NAMES[stage]}",
        sizes=sizes,
        draw=lambda generator: generator.initial_seed(),
        ways={way: lambda _, way=way: training(name, stage, way, device)() for way in ways},
        checked={way: checked(way) for way in ways},
        expected=checked(EAGER),
        expected_of={EAGER: checked(OURS)},
        tolerance=TOLERANCE,
        floor=_floor(name, stage, sizes, "fp32"),
        floor_bf16=_floor(name, stage, sizes, "bf16"),
        error=largest_difference,
        clips=config.pretrain.batch_size,
        bytes_needed={EAGER: EAGER_BYTES_A_CLIP * config.pretrain.batch_size} if name == NTU60 else {},
    )


def time_to_accuracy(device: str) -> Case:
    """The recipe of the preset for this set, from the first step until its kNN check, after every epoch, shows
    ``ACCURACY``. Checks, checkpoints and the beginning anew after each of them are part of the time.
    """
    case = make_case(NW_UCLA, "single", (OURS, OURS_BF16), device)
    return dataclasses.replace(
        case,
        phase=f"until {ACCURACY:.0%} kNN accuracy",
        ways={way: lambda seed, way=way: train_until_accurate(way, device) for way in case.ways},
        floor=Work(0),  # nobody knows the least number of steps
        floor_bf16=None,
        clips=0,
        once=True,
    )


def train_until_accurate(way: str, device: str) -> int:
    """Epochs that it took."""
    precision = "bf16" if way == OURS_BF16 else "fp32"
    config = load_config(
        "nw-ucla-small", [f"device={device}", f"model.precision={precision}", "logging.knn_every_epochs=1"]
    )
    steps = len(clip_set(NW_UCLA).split("train")) // config.pretrain.batch_size
    with tempfile.TemporaryDirectory(dir=_folder().name) as run:
        for epoch in range(1, config.pretrain.epochs + 1):
            config.max_steps = epoch * steps
            pretrain(clip_set(NW_UCLA).folder, run, config, progress=False)
            accuracies = [line["accuracy"]["all"] for line in read_log(run) if line["kind"] == "knn"]
            if accuracies[-1] >= ACCURACY:
                return epoch
    raise AssertionError(f"{way} reached {max(accuracies):.3f} in {epoch} epochs, not {ACCURACY}")


def _floor(name: str, stage: str, sizes: dict[str, int], kind: str) -> Work:
    layout, persons = (layouts.get("nw-ucla"), 1) if name == NW_UCLA else (layouts.get("ntu-rgb+d"), 2)
    edges, groups = floors.edges_and_groups(ops.graph_edges(layout.adjacency()).tolist())
    skeleton = {"joints": layout.num_joints, "persons": persons, "edges": edges, "groups": groups}
    return step_floors.pretraining_step(step_floors.Shapes(**sizes, **skeleton, kind=kind), stage)


def cases(profile: str, device: str) -> list[Case]:
    if profile == "small":
        return [make_case(MADE_UP, stage, (EAGER, OURS, OURS_BF16), device) for stage in STAGES]
    listed = [make_case(NTU60, stage, (EAGER, OURS, OURS_BF16), device) for stage in STAGES]
    if "IKEM_FAST_DATA" in os.environ:
        listed += [make_case(NW_UCLA, stage, (EAGER, OURS, OURS_BF16, RELEASE_MANNER), device) for stage in STAGES]
        listed.append(time_to_accuracy(device))
    return listed


def test_training(measure, case, way, launch):
    if launch == "graph":
        pytest.skip("the trainer captures its steps itself")
    measure(case, way)
