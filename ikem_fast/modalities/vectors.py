"""Vector arithmetic the modalities share. Coordinates lie in dimension 1 of ``(N, 3, T, V, M)`` tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ikem_fast.layouts import Layout

REFERENCE_FRAMES = 50
"""Velocities are scaled by this over the clip's own frame count, so that clips resampled to T frames compare."""

NORM_FLOOR = 1e-12
"""``normalize`` divides by at least this length."""


def time_scale(num_frames: Tensor, like: Tensor) -> Tensor:
    """r = 50 / F per clip: ``(N,)`` frame counts to ``(N, 1, 1, 1, 1)`` factors in the dtype of ``like``."""
    return (REFERENCE_FRAMES / num_frames.to(like.dtype)).view(-1, 1, 1, 1, 1)


def forward_difference(values: Tensor, scale: Tensor) -> Tensor:
    """scale (x_{t+1} - x_t), one frame shorter than ``values``."""
    return scale * (values[:, :, 1:] - values[:, :, :-1])


def pad_frames(values: Tensor, num_frames: int) -> Tensor:
    """Zero frames at the end, up to ``num_frames``."""
    return F.pad(values, (0, 0, 0, 0, 0, num_frames - values.shape[2]))


def cross(first: Tensor, second: Tensor) -> Tensor:
    """The cross product of two ``(N, 3, T, V, M)`` tensors.

    Written out, so that parallel vectors whose products round alike give exactly zero.
    """
    x1, y1, z1 = first.unbind(1)
    x2, y2, z2 = second.unbind(1)
    return torch.stack((y1 * z2 - z1 * y2, z1 * x2 - x1 * z2, x1 * y2 - y1 * x2), dim=1)


def norm(vectors: Tensor) -> Tensor:
    """Lengths, ``(N, 1, T, V, M)``; the gradient at length zero is zero."""
    return torch.linalg.vector_norm(vectors, dim=1, keepdim=True)


def normalize(vectors: Tensor) -> Tensor:
    """``vectors`` divided by their lengths, or by ``NORM_FLOOR`` where they are shorter than that.

    Below the floor no gradient passes: it would be 1e12 times the one that comes in, and says nothing.
    """
    lengths = norm(vectors)
    directions = vectors / lengths.clamp_min(NORM_FLOOR)
    return torch.where(lengths < NORM_FLOOR, directions.detach(), directions)


def angle(first: Tensor, second: Tensor) -> Tensor:
    """Angles between unit (or zero) vectors in [0, pi], ``(N, 1, T, V, M)``; 0 where a vector is zero.

    atan2 of sine and cosine keeps its accuracy at 0 and pi, where arccos of the cosine loses half the digits.
    """
    sine = norm(cross(first, second))
    cosine = (first * second).sum(dim=1, keepdim=True)
    undefined = (sine == 0) & (cosine == 0)
    return torch.atan2(sine, torch.where(undefined, 1.0, cosine))


def bones(clips: Tensor, layout: Layout, chest_normal: bool = True) -> Tensor:
    """Bones b_j = x_j - x_parent(j), ``(N, 3, T, V, M)``.

    The root has no parent: its "bone" is the chest normal normalize((b_a - b_c) x (b_b - b_c)) of the layout's three
    joints (a, b, c), or zero where ``chest_normal`` is false.
    """
    differences = clips - clips[:, :, :, list(layout.bone_parents)]
    if not chest_normal:
        return differences
    a, b, c = (differences[:, :, :, joint] for joint in layout.chest_normal)
    normal = normalize(cross(a - c, b - c))
    is_root = torch.arange(layout.num_joints, device=clips.device).view(-1, 1) == layout.root
    return torch.where(is_root, normal.unsqueeze(3), differences)


def previous_bones(all_bones: Tensor, layout: Layout) -> Tensor:
    """For each bone the one before it on the way to the root, ``(N, 3, T, V, M)``; the root's is itself."""
    return all_bones[:, :, :, list(layout.previous_bones)]
