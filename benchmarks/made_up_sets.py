"""Prepared clips in any number, for benchmarks at the size of a dataset that is not there."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np

from ikem_fast.data import ClipSet, synthetic
from ikem_fast.data.clip_set import CLIPS_FILE, DATASET_FILE, SAMPLES_FILE

NTU60_XSUB_TRAINING = 40091  # clips of NTU RGB+D 60 that train in the cross-subject protocol
_NOISE = 0.01  # metres
_AT_A_TIME = 1024


def make_clips(folder: Path, num_training: int, *, seed: int = 0) -> ClipSet:
    """A prepared folder of NTU's skeleton, two persons, 50 frames.

    Made-up recordings are read and prepared, and repeated, each time turned about the vertical axis, scaled and with
    noise of its own: a clip costs microseconds, where writing and reading its text file would cost ten thousand times
    that.

    Args:
        folder: new.
        num_training: clips of the training split; as many recordings as were prepared for test are there besides.
        seed: of everything.
    """
    originals_folder = folder.with_name(folder.name + "-originals")
    synthetic.prepare_synthetic(originals_folder, num_subjects=2, num_repetitions=1, num_cameras=1, seed=seed)
    originals = ClipSet.open(originals_folder)
    training, test = originals.split("train"), originals.split("test")
    folder.mkdir()
    total = num_training + len(test)
    clips = np.lib.format.open_memmap(
        folder / CLIPS_FILE, mode="w+", dtype=np.float32, shape=(total, *originals.clip_shape)
    )
    generator = np.random.default_rng(seed)
    sources = np.arange(num_training) % len(training)
    for start in range(0, num_training, _AT_A_TIME):
        chosen = training.clips[sources[start : start + _AT_A_TIME]]
        clips[start : start + len(chosen)] = _turned_and_noisy(chosen, generator)
    clips[num_training:] = test.clips
    clips.flush()
    with open(originals_folder / SAMPLES_FILE, newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    by_split = {split: [row for row in rows if row[-1] == split] for split in ("train", "test")}
    with open(folder / SAMPLES_FILE, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(header)
        for number, source in enumerate(sources):
            name, *others = by_split["train"][source]
            table.writerow([f"{name}-{number}", *others])
        table.writerows(by_split["test"])
    shutil.copy(originals_folder / DATASET_FILE, folder)
    return ClipSet.open(folder)


def _turned_and_noisy(clips: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Clips (N, 3, T, V, M), each turned about y and scaled; joints of absent persons stay zero."""
    angle, scale = generator.uniform(-np.pi, np.pi, len(clips)), generator.uniform(0.9, 1.1, len(clips))
    turn = np.zeros((len(clips), 3, 3), dtype=np.float32)
    turn[:, 0, 0] = turn[:, 2, 2] = np.cos(angle)
    turn[:, 0, 2], turn[:, 2, 0] = np.sin(angle), -np.sin(angle)
    turn[:, 1, 1] = 1
    moved = np.einsum("nij,njtvm->nitvm", turn * scale[:, None, None].astype(np.float32), clips)
    noise = generator.normal(0, _NOISE, clips.shape).astype(np.float32)
    return np.where(clips == 0, 0, moved + noise)
