"""The real recordings, where a folder of them is there: IKEM_FAST_DATA names one with ntu_raw, nw_ucla and utd_mhad."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from ikem_fast.data import ClipSet, prepare
from ikem_fast.data.readers import ntu_rgb_d
from ikem_fast.layouts import get

FOLDER = Path(os.environ.get("IKEM_FAST_DATA", ""))
pytestmark = pytest.mark.skipif(
    "IKEM_FAST_DATA" not in os.environ, reason="set IKEM_FAST_DATA to a folder of real recordings to run this"
)


def parse_plainly(path, num_joints=25):
    """The same as the C++ parser in a few lines of Python, for files without mistakes."""
    lines = iter(path.read_text().split("\n"))
    xyz = np.zeros((3, int(next(lines)), num_joints, 2))
    for frame in range(xyz.shape[1]):
        for body in range(int(next(lines))):
            next(lines)
            for joint in range(int(next(lines))):
                point = next(lines).split()[:3]
                if body < 2:
                    xyz[:, frame, joint, body] = list(map(float, point))
    return xyz


@pytest.mark.parametrize(("folder", "count"), [("ntu_raw", 48), ("ntu_raw_crlf", 1)])
def test_every_ntu_file_is_parsed_as_it_reads(folder, count):
    paths = sorted((FOLDER / folder).glob("*.skeleton"))
    assert len(paths) == count
    for path in paths:
        np.testing.assert_array_equal(ntu_rgb_d.read(path, get("ntu-rgb+d")), parse_plainly(path))


@pytest.mark.parametrize(
    ("kind", "folder", "protocol", "num_train", "num_test", "frames"),
    [
        ("ntu-rgb+d", "ntu_raw", "ntu120-xset", 32, 16, (37, 144)),
        ("nw-ucla", "nw_ucla", "cross-view", 1020, 464, (1, 201)),
        ("nw-ucla", "nw_ucla", "cross-subject", 724, 760, (1, 201)),
        ("utd-mhad", "utd_mhad", "cross-subject", 431, 430, (41, 125)),
    ],
)
def test_data_sets_are_prepared(tmp_path, kind, folder, protocol, num_train, num_test, frames):
    summary = prepare(kind, FOLDER / folder, tmp_path / "out", protocol=protocol)
    assert (summary.num_train, summary.num_test, summary.bad_files) == (num_train, num_test, [])
    clip_set = ClipSet.open(tmp_path / "out")
    assert (clip_set.num_frames.min(), clip_set.num_frames.max()) == frames
    clips = clip_set.clips
    assert np.isfinite(clips).all()
    assert not clips[:, :, :, clip_set.layout.center].any()
    # The body is upright and about as tall as people are.
    head = clip_set.layout.joint_names.index("head")
    feet = [clip_set.layout.joint_names.index(f"foot_{side}") for side in ("left", "right")]
    height = np.median(clips[:, 1, :, head, 0] - clips[:, 1, :, feet, 0].min(axis=0))
    assert 1.2 < height < 2.0


def test_a_ridge_regression_reaches_the_known_floor(tmp_path):
    """Chance is about 10 %; readers that mixed up joints, axes or labels would not come near this."""
    prepare("nw-ucla", FOLDER / "nw_ucla", tmp_path / "out")
    clip_set = ClipSet.open(tmp_path / "out")

    def describe(part):
        positions = np.asarray(part.clips, dtype=np.float64)[:, :, ::2]
        return np.concatenate([positions, np.diff(positions, axis=2)], axis=2).reshape(len(part), -1)

    train, test = clip_set.split("train"), clip_set.split("test")
    features, test_features = describe(train), describe(test)
    mean = features.mean(axis=0)
    features, test_features = features - mean, test_features - mean
    targets = np.eye(clip_set.num_classes)[train.labels]
    weights = np.linalg.solve(features @ features.T + 10 * np.eye(len(train)), targets - targets.mean(axis=0))
    predicted = (test_features @ features.T @ weights + targets.mean(axis=0)).argmax(axis=1)
    assert (predicted == test.labels).mean() > 0.6
