"""From a recording of F frames to a clip of T frames (docs/method.md section 1), as readable numpy.

All functions take and give arrays ``(3, frames, V, M)`` in metres, with zeros where a person was not detected.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from ikem_fast.layouts import Layout

# Keeps arccos away from the division by zero of an absent person; part of the published preparation.
SHOULDER_EPSILON = 1e-4


def count_detected_frames(xyz: np.ndarray, layout: Layout) -> int:
    """L: the number of frames in which the presence joint of the first person is not all zero."""
    return int(np.count_nonzero(np.any(xyz[:, :, layout.presence_joint, 0] != 0, axis=0)))


def centre(xyz: np.ndarray, layout: Layout) -> np.ndarray:
    """Subtracts the centre joint of the same frame and person, which leaves absent persons at zero."""
    return xyz - xyz[:, :, layout.center : layout.center + 1]


def resample(xyz: np.ndarray, num_frames: int) -> np.ndarray:
    """Linear interpolation in time to ``num_frames`` frames with half-pixel centres.

    Frame t is read at position (t + 1/2) L / T - 1/2 of the L frames, held at the first and last of them: the same as
    ``torch.nn.functional.interpolate(mode="linear", align_corners=False)``. One frame is repeated.
    """
    length = xyz.shape[1]
    positions = np.clip((np.arange(num_frames) + 0.5) * (length / num_frames) - 0.5, 0, length - 1)
    before = positions.astype(np.int64)
    after = np.minimum(before + 1, length - 1)
    weight = (positions - before)[:, None, None]
    return xyz[:, before] * (1 - weight) + xyz[:, after] * weight


def rotate_to_front(xyz: np.ndarray, layout: Layout) -> np.ndarray:
    """Rotates every frame of every person about y until the line between the shoulders is parallel to x.

    With u from the first to the second shoulder joint and u_y = 0: theta = arccos(u_x / (|u| + 1e-4)), negated in all
    frames of a person when the sum of u_z over time is not negative. The sign is thus one per person, as in the
    published preparation, although the angle is one per frame.
    """
    first, second = layout.shoulders
    u_x, _, u_z = xyz[:, :, second] - xyz[:, :, first]
    theta = np.arccos(u_x / (np.hypot(u_x, u_z) + SHOULDER_EPSILON))
    theta = np.where(u_z.sum(axis=0) >= 0, -theta, theta)
    cosine, sine = np.cos(theta)[:, None], np.sin(theta)[:, None]
    x, y, z = xyz
    return np.stack((cosine * x - sine * z, y, sine * x + cosine * z))


def fit_persons(xyz: np.ndarray, num_persons: int) -> np.ndarray:
    """A recording (3, F, V, up to M) with M persons, those it does not have being zero, as absent persons are.

    Raises:
        ValueError: it is no array of four dimensions, or has more persons.
    """
    if xyz.ndim != 4 or not 1 <= xyz.shape[3] <= num_persons:
        raise ValueError(f"a recording must be (3, F, V, M) with 1 to {num_persons} persons, got {xyz.shape}")
    return np.pad(xyz, ((0, 0), (0, 0), (0, 0), (0, num_persons - xyz.shape[3])))


def prepare_clip(
    xyz: np.ndarray, layout: Layout, num_frames: int = 50, *, with_centre: bool = True, with_rotation: bool = True
) -> tuple[np.ndarray, int]:
    """One recording as a clip: count detected frames, centre, cut to them, resample, rotate.

    Args:
        xyz: (3, F, V, M) floating point, metres, zero where a person is absent.
        layout: gives V and the centre, shoulder and presence joints.
        num_frames: T.
        with_centre: subtract the centre joint.
        with_rotation: turn the shoulder line parallel to x.

    Returns:
        The clip, (3, T, V, M) float32, and L, the number of detected frames it was made of: the first L frames.

    Raises:
        ValueError: the array has another shape, no frame has the presence joint (L = 0), or a coordinate is not
            finite in float32.
    """
    if xyz.ndim != 4 or xyz.shape[0] != 3 or xyz.shape[2] != layout.num_joints:
        raise ValueError(f"xyz must be (3, F, {layout.num_joints}, M), got {xyz.shape}")
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    length = count_detected_frames(xyz, layout)
    if length == 0:
        joint = layout.joint_names[layout.presence_joint]
        raise ValueError(f"the joint '{joint}' of the first person is zero in all {xyz.shape[1]} frames")
    clip = xyz[:, :length]
    with np.errstate(over="ignore", invalid="ignore"):  # told of below, with a better reason
        if with_centre:
            clip = centre(clip, layout)
        clip = resample(clip, num_frames)
        if with_rotation:
            clip = rotate_to_front(clip, layout)
        clip = np.ascontiguousarray(clip, dtype=np.float32)
    if not np.isfinite(clip).all():
        raise ValueError(f"coordinates are too large for float32: up to {np.abs(xyz).max():.1e}")
    return clip, length


def prepare_recordings(
    recordings: Iterable[np.ndarray],
    layout: Layout,
    num_frames: int = 50,
    *,
    num_persons: int = 1,
    with_centre: bool = True,
    with_rotation: bool = True,
    file_frame_count: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Recordings of different lengths as clips that encoders take.

    Args:
        recordings: arrays (3, F, V, M or fewer) in metres, zero where a person is absent.
        layout: the skeleton, with V joints.
        num_frames: T.
        num_persons: M.
        with_centre, with_rotation: see ``prepare_clip``.
        file_frame_count: F is all frames of a recording; otherwise those with a detection (quirk Q6).

    Returns:
        clips (N, 3, T, V, M) float32, and their frame counts (N,) int64.

    Raises:
        ValueError: see ``prepare_clip`` and ``fit_persons``.
    """
    clips, counts = [], []
    for recording in recordings:
        xyz = fit_persons(np.asarray(recording, dtype=np.float64), num_persons)
        clip, detected = prepare_clip(xyz, layout, num_frames, with_centre=with_centre, with_rotation=with_rotation)
        clips.append(clip)
        counts.append(xyz.shape[1] if file_frame_count else detected)
    return np.stack(clips), np.array(counts)
