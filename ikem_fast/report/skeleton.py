"""Drawing of skeletons and of the vectors of their modalities: what the pictures and the animation share."""

from __future__ import annotations

import math

import numpy as np

from ikem_fast.layouts import Layout

# Seen from a little to the side and above, so that depth shows; radians.
YAW, PITCH = math.radians(25), math.radians(12)
# Vectors shorter than this part of the typical longest are noise of the recording and left out.
_SHORTEST = 0.04
_ARROW, _NORMAL = 0.28, 0.22
"""Lengths of a modality's longest arrows and of the chest's normal, as parts of the body's height."""


def project(points: np.ndarray, yaw: float = YAW, pitch: float = PITCH) -> np.ndarray:
    """(..., 3) to (..., 2): x right, y up."""
    x, y, z = np.moveaxis(points, -1, 0)
    right = np.cos(yaw) * x - np.sin(yaw) * z
    depth = np.sin(yaw) * x + np.cos(yaw) * z
    return np.stack([right, np.cos(pitch) * y - np.sin(pitch) * depth], axis=-1)


def by_frame(modalities: np.ndarray, joints: int) -> np.ndarray:
    """(S, 3, T, V, M) to (S, T, M', V, 3) float64 with the persons that are in the clip, or the first if none is.

    Args:
        modalities: one clip in its modalities.
        joints: which of them are the joints' positions.
    """
    array = np.asarray(modalities, dtype=float).transpose(0, 2, 4, 3, 1)
    present = np.flatnonzero(np.abs(array[joints]).max(axis=(0, 2, 3)) > 0)
    return array[:, :, present if len(present) else [0]]


def typical_length(vectors: np.ndarray) -> float:
    """Length that nearly all vectors (..., 3) of a modality stay below; 1 where all are zero."""
    lengths = np.linalg.norm(vectors, axis=-1)
    return float(np.quantile(lengths[lengths > 0], 0.97)) if (lengths > 0).any() else 1.0


def arrows(vectors: np.ndarray, name: str, layout: Layout, height: float) -> np.ndarray:
    """A modality's vectors as they are drawn: (T, M, V, 3) of the same shape, in the unit of ``height``.

    Bones keep their size, and run from the parent to the joint; all others are scaled so that the typical longest is
    about a quarter of the body, and begin at the joint. Single outliers of noisy recordings keep their direction and
    are shortened to the typical longest. Vectors too short to be seen are zero.

    Args:
        vectors: (T, M, V, 3).
        name: the modality's.
        layout: the skeleton.
        height: the body's.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    typical = typical_length(vectors)
    if name == "bone":
        drawn = vectors.copy()
        # The root's is a normal without a length of its own.
        drawn[..., layout.root, :] *= _NORMAL * height / np.maximum(lengths[..., layout.root, :], 1e-12)
    else:
        drawn = vectors * (_ARROW * height / typical) * np.minimum(1, typical / np.maximum(lengths, 1e-12))
    return np.where(lengths > _SHORTEST * typical, drawn, 0.0)


def arrow_starts(joints: np.ndarray, name: str, layout: Layout) -> np.ndarray:
    """Where the arrows of a modality begin: (..., V, 3) positions of joints to the same shape."""
    return joints[..., list(layout.bone_parents), :] if name == "bone" else joints
