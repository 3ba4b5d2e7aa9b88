"""A tiny prepared data set and configuration for the tests of training and commands."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import torch

from ikem_fast import layouts
from ikem_fast.data.clip_set import FORMAT, FORMAT_VERSION, SAMPLE_COLUMNS
from ikem_fast.engine import Config, checkpoints, load_config
from ikem_fast.engine.run_log import read_log

NUM_TRAIN, NUM_TEST = 9, 5

TINY = (
    "model.modalities=[joint,motion]",
    "model.hidden_channels=2",
    "model.feature_size=8",
    "model.embedding_size=4",
    "model.queue_size=12",
    "model.dropout=0.5",
    "distill.dropout=0.5",
    "pretrain.max_gradient_norm=null",
    "distill.max_gradient_norm=null",
    "pretrain.epochs=4",
    "pretrain.cross_epoch=3",
    "pretrain.batch_size=4",
    "pretrain.milestones=[2]",
    "pretrain.learning_rate=0.02",
    "distill.epochs=2",
    "distill.batch_size=4",
    "distill.milestones=[1]",
    "distill.learning_rate=0.02",
    "distill.student_modalities=[joint]",
    "logging.log_every_steps=3",
    "logging.knn_every_epochs=2",
    "logging.save_every_epochs=1",
    "logging.tensorboard=false",
    "seed=7",
)


def write_clips(folder: Path, *, seed: int = 0, layout: str = "nw-ucla", num_train: int = NUM_TRAIN) -> Path:
    """A prepared folder of random clips, 12 frames long, of three classes: 9 to train on and 5 to test with."""
    folder.mkdir()
    skeleton = layouts.get(layout)
    number = num_train + NUM_TEST
    generator = np.random.default_rng(seed)
    clips = generator.standard_normal((number, 3, 12, skeleton.num_joints, 1)).astype(np.float32)
    np.save(folder / "clips.npy", clips)
    with open(folder / "samples.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(SAMPLE_COLUMNS)
        for index in range(number):
            split = "train" if index < num_train else "test"
            writer.writerow((f"clip{index:02}", index % 3, 1, 1, "", "", 20 + index, 20, split))
    metadata = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "kind": "random",
        "layout": skeleton.to_dict(),
        "protocol": "none",
        "num_frames": 12,
        "centring": True,
        "rotation": True,
        "class_names": ["a", "b", "c"],
    }
    (folder / "dataset.json").write_text(json.dumps(metadata), encoding="utf-8")
    return folder


def last(run):
    """The last checkpoint of a run."""
    return run / "checkpoints" / "last.pt"


def tiny_config(*overrides: str) -> Config:
    return load_config("cpu-small", (*TINY, *overrides))


def comparable_log(run):
    """The log without what depends on the clock and on how the steps were run."""
    lines = [line for line in read_log(run) if line["kind"] != "note"]
    return [{k: v for k, v in line.items() if k not in ("clips_per_second", "seconds")} for line in lines]


def assert_same_run(first, second):
    assert comparable_log(first) == comparable_log(second)
    one, other = (checkpoints.load(run / "checkpoints" / "last.pt") for run in (first, second))
    assert one["step"] == other["step"]
    assert (one["epoch"], one["step_in_epoch"]) == (other["epoch"], other["step_in_epoch"])
    assert set(one["model"]) == set(other["model"])
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    for key, value in one["optimizer"]["state"].items():
        assert torch.equal(value["momentum_buffer"], other["optimizer"]["state"][key]["momentum_buffer"]), key
    assert torch.equal(one["random_state"]["torch"], other["random_state"]["torch"])
