"""What the multi-stream encoder and its plain-PyTorch definition share: sizes, input and initialisation."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ikem_fast.ops._checks import describe

NUM_PARTITIONS = 3
TEMPORAL_KERNEL = 9
_WEIGHT_DEVIATION = 0.02  # of every drawn weight (docs/method.md section 4)


def block_plan(hidden_channels: int, feature_size: int) -> list[tuple[int, int]]:
    """Output channels and temporal stride of the ten blocks."""
    h = hidden_channels
    wide = [(h, 1)] * 4 + [(2 * h, 2)] + [(2 * h, 1)] * 2 + [(4 * h, 2), (4 * h, 1)]
    return [*wide, (feature_size, 1)]


def check_sizes(adjacency: Tensor, hidden_channels: int, feature_size: int, dropout: float) -> None:
    """Checks what every encoder is made of."""
    num_joints = adjacency.shape[-1]
    if tuple(adjacency.shape) != (NUM_PARTITIONS, num_joints, num_joints):
        raise ValueError(f"adjacency must be (3, V, V) float32, got {describe(adjacency)}")
    for name, size in (("hidden_channels", hidden_channels), ("feature_size", feature_size)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")


class EncoderInput(NamedTuple):
    """One view of N clips, as ``ikem_fast.ops.clip_views`` lays it out.

    Attributes:
        values: (S, N·M, T, V, C), the persons of a clip one after another; of a single stream (N·M, T, V, C).
        num_persons: M.
        mean: over persons and frames, (S, V, C) or (V, C), or ``None`` where nobody made it.
        variance: likewise, not corrected for the number of values.
    """

    values: Tensor
    num_persons: int
    mean: Tensor | None = None
    variance: Tensor | None = None

    @classmethod
    def of_clips(cls, x: Tensor) -> EncoderInput:
        """Clips (N, C, T, V, M), or of several streams (S, N, C, T, V, M), laid out so."""
        return cls(x.movedim(-4, -1).movedim(-2, -4).flatten(-5, -4), x.shape[-1])


@torch.no_grad()
def initialize_weights(module: nn.Module) -> None:
    """Draws weights as the method does: convolutions and linear layers N(0, 0.02), norms N(1, 0.02), biases 0.

    Source: docs/method.md section 4.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear) or getattr(layer, "weight_mean", None) == 0.0:
            nn.init.normal_(layer.weight, 0.0, _WEIGHT_DEVIATION)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) or getattr(layer, "weight_mean", None) == 1.0:
            nn.init.normal_(layer.weight, 1.0, _WEIGHT_DEVIATION)
            nn.init.zeros_(layer.bias)
