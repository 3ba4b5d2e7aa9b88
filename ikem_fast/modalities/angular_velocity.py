"""The angular velocity modality: how fast each bone turns against the bone before it, and about which axis."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import (
    angle,
    bones,
    cross,
    forward_difference,
    normalize,
    pad_frames,
    previous_bones,
    time_scale,
)


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """r (theta_{t+1} - theta_t) normalize(o_t), zero in the last frame (docs/method.md section 3).

    o is the rotation axis and theta = atan2(|n x n'|, n . n') the angle between the directions n and n' of a bone and
    the bone before it.

    Args:
        clips: joint coordinates ``(N, 3, T, V, M)``.
        num_frames: F, frames of each recording before it was resampled to T, ``(N,)`` integers.
        layout: the skeleton, with V joints.
        chest_normal: false takes the root's bone as zero.

    Returns:
        ``(N, 3, T, V, M)``, radians per reference frame. Where theta_t is near 0 or pi the axis is ill-defined, and
        rounding of the coordinates is amplified in its direction (never in the length).
    """
    all_bones = bones(clips, layout, chest_normal)
    before = previous_bones(all_bones, layout)
    angles = angle(normalize(all_bones), normalize(before))
    axes = normalize(cross(all_bones, before))
    speeds = forward_difference(angles, time_scale(num_frames, clips))
    return pad_frames(speeds * axes[:, :, :-1], clips.shape[2])
