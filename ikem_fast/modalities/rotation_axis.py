"""The rotation axis modality: the axis about which each bone is turned against the bone before it."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import bones, cross, previous_bones


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """o_j = b_j x b_p(j), with p(j) the bone before bone j; zero at the root (docs/method.md section 3).

    Args:
        clips: joint coordinates ``(N, 3, T, V, M)``.
        num_frames: not used.
        layout: the skeleton, with V joints.
        chest_normal: false takes the root's bone as zero.

    Returns:
        ``(N, 3, T, V, M)``, the unit of the clips squared (bones before which lies the root: the unit of the clips).
    """
    all_bones = bones(clips, layout, chest_normal)
    return cross(all_bones, previous_bones(all_bones, layout))
