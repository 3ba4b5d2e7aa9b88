"""The bone modality: where each joint lies as seen from its parent."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import bones


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """b_j = x_j - x_parent(j); at the root the chest normal, a unit vector (docs/method.md section 3).

    Args:
        clips: joint coordinates ``(N, 3, T, V, M)``.
        num_frames: not used.
        layout: the skeleton, with V joints.
        chest_normal: false leaves the root's bone zero.

    Returns:
        ``(N, 3, T, V, M)``, the unit of the clips; the chest normal has length 1.
    """
    return bones(clips, layout, chest_normal)
