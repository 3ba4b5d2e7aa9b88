"""The motion modality: how fast each joint moves."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout
from ikem_fast.modalities.vectors import forward_difference, pad_frames, time_scale


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """v_t = r (x_{t+1} - x_t) with r = 50 / F, zero in the last frame (docs/method.md section 3).

    Args:
        clips: joint coordinates ``(N, 3, T, V, M)``.
        num_frames: F, frames of each recording before it was resampled to T, ``(N,)`` integers.
        layout, chest_normal: not used.

    Returns:
        ``(N, 3, T, V, M)``, the unit of the clips per reference frame.
    """
    return pad_frames(forward_difference(clips, time_scale(num_frames, clips)), clips.shape[2])
