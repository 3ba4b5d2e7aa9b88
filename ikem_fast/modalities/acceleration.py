"""The acceleration modality: how fast each joint's motion changes."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import forward_difference, pad_frames, time_scale


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """a_t = r (v_{t+1} - v_t) with the motion v and r = 50 / F, zero in the last two frames (docs/method.md section 3).

    Args:
        clips: joint coordinates ``(N, 3, T, V, M)``.
        num_frames: F, frames of each recording before it was resampled to T, ``(N,)`` integers.
        layout, chest_normal: not used.

    Returns:
        ``(N, 3, T, V, M)``, the unit of the clips per squared reference frame.
    """
    scale = time_scale(num_frames, clips)
    return pad_frames(forward_difference(forward_difference(clips, scale), scale), clips.shape[2])
