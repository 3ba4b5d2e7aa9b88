"""A small prepared data set and a small module for the tests of evaluation, report and demo."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

import ikem_fast
from ikem_fast import layouts
from ikem_fast.data import ClipSet
from ikem_fast.engine import Config, load_config
from ikem_fast.methods import IKEM


def write_clip_set(
    folder: Path, *, num_clips: int = 24, num_classes: int = 3, num_frames: int = 16, layout: str = "nw-ucla"
) -> ClipSet:
    """Prepared clips in which each class waves another joint; every third clip is a test clip."""
    skeleton = layouts.get(layout)
    generator = np.random.default_rng(7)
    pose = generator.normal(0, 0.4, (3, 1, skeleton.num_joints, 1))
    clips = np.repeat(pose[None], num_clips, axis=0).repeat(num_frames, axis=2)
    labels = np.arange(num_clips) % num_classes
    time = np.linspace(0, 2 * np.pi, num_frames)
    for clip, label in enumerate(labels):
        clips[clip, 1, :, 4 + 5 * label, 0] += np.sin(2 * time + generator.uniform(0, 6))
    clips += generator.normal(0, 0.02, clips.shape)
    folder.mkdir(parents=True)
    np.save(folder / "clips.npy", clips.astype(np.float32))
    columns = ["name", "label", "subject", "camera", "setup", "replication", "num_frames", "valid_frames", "split"]
    with open(folder / "samples.csv", "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for clip, label in enumerate(labels):
            split = "test" if clip // num_classes % 3 == 2 else "train"
            writer.writerow([f"clip{clip:03d}", label, "1", "1", "", "", 40 + clip, 30 + clip, split])
    metadata = {
        "format": "ikem_fast clips",
        "format_version": 1,
        "kind": "nw-ucla",
        "protocol": "test",
        "layout": skeleton.to_dict(),
        "num_frames": num_frames,
        "centring": True,
        "rotation": True,
        "class_names": [f"action {label}" for label in range(num_classes)],
        "version": ikem_fast.__version__,
    }
    (folder / "dataset.json").write_text(json.dumps(metadata))
    return ClipSet.open(folder)


def small_ikem(layout: str = "nw-ucla", **arguments) -> IKEM:
    """An IKEM module that takes milliseconds."""
    torch.manual_seed(3)
    sizes = {"hidden_channels": 2, "feature_size": 8, "embedding_size": 4, "queue_size": 16, "dropout": 0.2}
    return IKEM(layout, **{**sizes, **arguments})


def small_config(*overrides: str) -> Config:
    """A configuration of two steps in each training."""
    sizes = ["model.hidden_channels=2", "model.feature_size=8", "model.embedding_size=4", "model.queue_size=16"]
    steps = ["pretrain.epochs=2", "pretrain.cross_epoch=2", "pretrain.milestones=[]", "pretrain.batch_size=8"]
    distill = ["distill.epochs=2", "distill.milestones=[]", "distill.batch_size=8"]
    rest = ["logging.knn_every_epochs=1", "logging.log_every_steps=1", "logging.tensorboard=false", "device=cpu"]
    return load_config("cpu-small", [*sizes, *steps, *distill, *rest, *overrides])
