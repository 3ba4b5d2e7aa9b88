"""Small trainers and clips, so that a test takes fractions of a second."""

from __future__ import annotations

import torch

from ikem_fast import ops
from ikem_fast.methods import IKEM, RelationalDistillation

SIZES = {
    "hidden_channels": 2,
    "feature_size": 6,
    "embedding_size": 4,
    "queue_size": 12,
    "dropout": 0.0,
}


def ikem(**changes) -> IKEM:
    torch.manual_seed(0)
    return IKEM(**{"layout": "nw-ucla", **SIZES, **changes})


def distillation(teacher: IKEM | None = None, **changes) -> RelationalDistillation:
    torch.manual_seed(1)
    return RelationalDistillation.from_teacher(teacher or ikem(), **changes)


def batch(num_clips: int = 5, num_frames: int = 12, num_joints: int = 20, num_persons: int = 1, seed: int = 0):
    """view_q, view_k, num_frames."""
    generator = torch.Generator().manual_seed(seed)
    views = torch.randn(2, num_clips, 3, num_frames, num_joints, num_persons, generator=generator)
    return views[0], views[1], torch.randint(10, 100, (num_clips,), generator=generator)


def derived(module: IKEM | RelationalDistillation, clips: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """The modalities (S, N, 3, T, V, M) of clips, not by the op that the trainers call."""
    return ops.derive_modalities(clips, num_frames, module.layout, module.modalities)
