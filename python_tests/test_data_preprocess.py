"""From a recording to a clip: the reference vectors of the authors' release, and each step by itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from ikem_fast import layouts
from ikem_fast.data import preprocess
from ikem_fast.data.readers import ntu_rgb_d

GOLDEN = Path(__file__).parent / "golden"
NTU = layouts.get("ntu-rgb+d")
NAMES = [path.name for path in sorted((GOLDEN / "raw").glob("*.skeleton"))]


@pytest.fixture(scope="module")
def vectors():
    with np.load(GOLDEN / "preprocess.npz") as file:
        return dict(file)


def test_the_reference_vectors_cover_all_raw_files(vectors):
    assert sorted(vectors["names"].tolist()) == NAMES
    assert len(NAMES) == 4


@pytest.mark.parametrize("name", NAMES)
def test_raw_files_are_read_as_by_the_release(vectors, name):
    xyz = ntu_rgb_d.read(GOLDEN / "raw" / name, NTU)
    np.testing.assert_array_equal(xyz, vectors[f"xyz/{name}"])
    assert xyz.shape[1] == vectors["num_frames"][vectors["names"].tolist().index(name)]


# The release computes in float32, where arccos near 1 amplifies rounding: hence the wider tolerance with rotation.
@pytest.mark.parametrize(("rotation", "key", "tolerance"), [(False, "_without_rotation", 5e-7), (True, "", 5e-6)])
@pytest.mark.parametrize("name", NAMES)
def test_clips_agree_with_the_release(vectors, name, rotation, key, tolerance):
    clip, _ = preprocess.prepare_clip(vectors[f"xyz/{name}"], NTU, with_rotation=rotation)
    expected = vectors[f"position{key}/{name}"]
    assert clip.dtype == np.float32
    assert clip.shape == expected.shape
    assert np.abs(clip - expected).max() <= tolerance * np.abs(expected).max()


def test_the_clip_is_made_of_the_first_l_frames_however_detections_are_missing(vectors):
    """Frames without detection in the middle stay, and as many are cut at the end: as the release does."""
    name = "S002C003P003R002A003.skeleton"
    xyz = vectors[f"xyz/{name}"]
    clip, length = preprocess.prepare_clip(xyz, NTU)
    assert (xyz.shape[1], length) == (75, 70)
    changed = xyz.copy()
    changed[:, 70:] += 1
    np.testing.assert_array_equal(preprocess.prepare_clip(changed, NTU)[0], clip)


@pytest.mark.parametrize("length", [1, 2, 7, 50, 51, 137])
def test_resampling_is_linear_interpolation_with_half_pixel_centres(length):
    xyz = np.random.default_rng(length).normal(size=(3, length, 5, 2))
    flat = torch.from_numpy(xyz).permute(0, 2, 3, 1).reshape(1, -1, length)
    expected = torch.nn.functional.interpolate(flat, size=50, mode="linear", align_corners=False)
    expected = expected.reshape(3, 5, 2, 50).permute(0, 3, 1, 2).numpy()
    np.testing.assert_allclose(preprocess.resample(xyz, 50), expected, rtol=0, atol=1e-12)


def test_centring_uses_the_same_frame_and_person_and_keeps_absent_persons_at_zero():
    xyz = np.random.default_rng(0).normal(size=(3, 6, 25, 2))
    xyz[:, 2:, :, 1] = 0
    centred = preprocess.centre(xyz, NTU)
    np.testing.assert_array_equal(centred[:, :, NTU.center], 0)
    np.testing.assert_array_equal(centred[:, 2:, :, 1], 0)
    np.testing.assert_allclose(centred[:, 1, 3, 1], xyz[:, 1, 3, 1] - xyz[:, 1, NTU.center, 1])


@pytest.mark.parametrize("name", layouts.names())
def test_rotation_turns_the_shoulders_parallel_to_x_and_keeps_lengths(name):
    layout = layouts.get(name)
    xyz = np.random.default_rng(1).normal(size=(3, 9, layout.num_joints, 2))
    first, second = layout.shoulders
    u_z = xyz[2, :, second] - xyz[2, :, first]
    xyz[2, :, second] += np.abs(u_z) - u_z + 0.1  # one sign of u_z in all frames: that one rotation is exact
    turned = preprocess.rotate_to_front(xyz, layout)
    u = turned[:, :, second] - turned[:, :, first]
    length = np.hypot(u[0], u[2])
    assert np.abs(u[2]).max() < 0.05
    assert (u[0] > 0.99 * length).all()
    np.testing.assert_allclose(np.linalg.norm(turned, axis=0), np.linalg.norm(xyz, axis=0), rtol=1e-12)
    np.testing.assert_array_equal(turned[1], xyz[1])


def test_the_sign_of_the_rotation_is_one_per_person():
    """By the sum over time of u_z, as in the release: a frame with u_z of the other sign is turned the wrong way."""
    layout = NTU
    xyz = np.zeros((3, 3, 25, 2))
    second = layout.shoulders[1]
    xyz[:, :, second, 0] = np.array([[1, 0, 2], [1, 0, 2], [1, 0, -1]], dtype=float).T
    turned = preprocess.rotate_to_front(xyz, layout)
    shoulder = turned[:, :, second, 0]
    assert np.abs(shoulder[2, :2]).max() < 1e-3
    theta = np.arccos(1 / (np.sqrt(2) + preprocess.SHOULDER_EPSILON))
    np.testing.assert_allclose(shoulder[2, 2], -np.sin(theta) - np.cos(theta), rtol=1e-12)
    np.testing.assert_array_equal(turned[..., 1], 0)


def test_one_frame_is_repeated():
    xyz = np.random.default_rng(2).normal(size=(3, 1, 25, 2))
    clip, length = preprocess.prepare_clip(xyz, NTU, 8, with_centre=False, with_rotation=False)
    assert length == 1
    np.testing.assert_array_equal(clip, np.repeat(xyz.astype(np.float32), 8, axis=1))


def test_the_presence_joint_of_the_layout_decides():
    layout = layouts.from_dict(layouts.get("utd-mhad").to_dict() | {"presence_joint": "spine"})
    xyz = np.ones((3, 4, 20, 1))
    xyz[:, :, 0] = 0
    assert preprocess.count_detected_frames(xyz, layouts.get("utd-mhad")) == 0
    assert preprocess.count_detected_frames(xyz, layout) == 4
    xyz[:2, 1, layout.presence_joint] = 0
    xyz[:, 2, layout.presence_joint] = 0
    assert preprocess.count_detected_frames(xyz, layout) == 3


def test_errors_name_what_came():
    with pytest.raises(ValueError, match="the joint 'spine_base' of the first person is zero in all 5 frames"):
        preprocess.prepare_clip(np.zeros((3, 5, 25, 2)), NTU)
    with pytest.raises(ValueError, match=r"xyz must be \(3, F, 25, M\), got \(3, 5, 20, 1\)"):
        preprocess.prepare_clip(np.ones((3, 5, 20, 1)), NTU)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        preprocess.prepare_clip(np.ones((3, 5, 25, 1)), NTU, 0)
