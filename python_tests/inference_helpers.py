"""Runs of a few steps on synthetic recordings, with raw files and linear heads, for the tests of their use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from evaluation_helpers import small_config

from ikem_fast import engine
from ikem_fast.data import ClipSet, prepare_synthetic
from ikem_fast.engine import checkpoints
from ikem_fast.evaluation import evaluate_run

PREPARATION = {"num_frames": 16}


@dataclass(frozen=True)
class TrainedRuns:
    """Folders of recordings, of their clips, of a pretraining of three modalities and of its distillation into two."""

    raw: Path
    clips: Path
    teacher: Path
    student: Path

    @property
    def clip_set(self) -> ClipSet:
        return ClipSet.open(self.clips)


def train_runs(folder: Path) -> TrainedRuns:
    """Trains both and evaluates the student."""
    runs = TrainedRuns(folder / "raw", folder / "clips", folder / "teacher", folder / "student")
    sizes = {"num_subjects": 4, "num_repetitions": 1, "num_cameras": 2, "num_actions": 4}
    prepare_synthetic(runs.clips, raw=runs.raw, **sizes, **PREPARATION)
    modalities = "model.modalities=[joint,bone,angular_velocity]"
    config = small_config(modalities, "distill.student_modalities=[joint,angular_velocity]")
    engine.pretrain(runs.clips, runs.teacher, config, progress=False)
    engine.distill(None, runs.teacher, runs.student, config, progress=False)
    tell_clips_apart(runs.student)
    evaluate(runs.student)
    return runs


def evaluate(run: Path) -> None:
    overrides = ["epochs=100", "linear.milestones=[80]", "learning_rate=5"]
    evaluate_run("linear", run, overrides=overrides, untrained=True, progress=False)


def tell_clips_apart(run: Path) -> None:
    """Gives the encoders weights of a size at which features differ from clip to clip, as two steps do not."""
    path = run / "checkpoints" / "last.pt"
    checkpoint = checkpoints.load(path)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in checkpoint["model"].items():
        if "encoders" in name and name.endswith(("_conv.weight", "residual.0.weight")):
            fan_in = tensor[0].numel() / tensor.shape[-3 if "temporal" in name else -2]
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5)
    checkpoints.save(path, checkpoint)
