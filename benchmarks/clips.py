"""Clips for benchmarks, the baselines' views of them, and how far two results lie apart, modality by modality."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ikem_fast import layouts

LAYOUT = layouts.get("ntu-rgb+d")
FRAMES, JOINTS, PERSONS = 50, 25, 2


@functools.lru_cache(maxsize=2)
def stored_clips(count: int, device: str) -> tuple[Tensor, Tensor]:
    """A set (N, 3, T, V, M) in metres, and the frames of its recordings."""
    generator = torch.Generator(device).manual_seed(0)
    clips = torch.randn(count, 3, FRAMES, JOINTS, PERSONS, generator=generator, device=device)
    return clips, torch.randint(20, 300, (count,), generator=generator, device=device)


def stacking(derive: Callable[..., Mapping[str, Tensor]], modalities: Sequence[str]) -> Callable[..., Tensor]:
    """A baseline's modalities (S, N, 3, T, V, M), as one tensor."""

    def run(clips: Tensor, num_frames: Tensor) -> Tensor:
        return torch.stack(list(derive(clips, num_frames, LAYOUT, modalities).values()))

    return run


def error_of_modalities(result: Tensor, expected: Tensor, dim: int, modalities: Sequence[str]) -> float:
    """The largest error of any modality relative to its largest magnitude.

    That of angular velocity counts a hundredth: its largest values lie where bones are nearly parallel, so that
    rounding of coordinates turns its axis.
    """
    if result.shape != expected.shape:
        return math.inf
    over = [other for other in range(expected.dim()) if other != dim]
    difference = (result.detach().double() - expected.detach().double()).abs().amax(over)
    errors = difference / expected.detach().double().abs().amax(over)
    weights = torch.tensor([1e-2 if name == "angular_velocity" else 1.0 for name in modalities], device=errors.device)
    error = float((weights * errors).max())
    return error if math.isfinite(error) else math.inf
