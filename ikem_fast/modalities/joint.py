"""The joint modality: the coordinates themselves."""

from __future__ import annotations

from torch import Tensor

from ikem_fast.layouts import Layout


def derive(clips: Tensor, num_frames: Tensor, layout: Layout, *, chest_normal: bool = True) -> Tensor:
    """x, docs/method.md section 3: ``(N, 3, T, V, M)`` in the unit of the clips (metres); the other arguments are
    there because every modality takes them.
    """
    return clips
