"""Augmentation of clips: temporal crop, shear, camera view, motion scale.

Every function takes its random parameters as arguments, one set per clip; ``draw_augmentation`` draws them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from ikem_fast.ops._checks import check_clips, check_indices, check_tensor


@dataclass(frozen=True)
class AugmentationConfig:
    """Strength of each augmentation; the defaults are the published recipe (docs/method.md section 2).

    Attributes:
        crop_padding_ratio: T // ratio frames are mirrored at both ends before T are taken; 0 turns the crop off.
        shear: the shear's coefficients are uniform in [-shear, shear]; 0 turns it off.
        camera_view: c of the random scale and rotation; 0 turns it off.
        motion_scale: whether the motion around each frame's neighbours is scaled.
    """

    crop_padding_ratio: int = 6
    shear: float = 0.5
    camera_view: float = 0.0
    motion_scale: bool = False

    def __post_init__(self) -> None:
        if self.crop_padding_ratio < 0 or self.shear < 0 or self.camera_view < 0:
            raise ValueError(f"crop_padding_ratio, shear and camera_view must be 0 or more, got {self}")


@dataclass(frozen=True)
class AugmentationParameters:
    """Random parameters of a batch of N clips; ``None`` where an augmentation is off."""

    crop_start: Tensor | None = None  # (N,) int64
    crop_padding_ratio: int = 6
    shear_first: Tensor | None = None  # (N, 3)
    shear_second: Tensor | None = None  # (N, 3)
    camera_scale: Tensor | None = None  # (N,)
    camera_angles: Tensor | None = None  # (N, 3) radians
    motion_scale: Tensor | None = None  # (N,)


def temporal_crop(clips: Tensor, start: Tensor, padding_ratio: int = 6) -> Tensor:
    """T frames from ``start`` on, of the clip with T // padding_ratio frames mirrored at both ends.

    The mirrored part repeats the end frames: frames p-1 ... 0, 0 ... T-1, T-1 ... T-p.

    Args:
        clips: (N, C, T, V, M).
        start: (N,) int64 in 0 ... 2p with p = T // padding_ratio.
        padding_ratio: at least 1.

    Source: docs/method.md section 2.
    """
    check_clips(clips)
    check_indices("start", start, clips.shape[0])
    if padding_ratio < 1:
        raise ValueError(f"padding_ratio must be at least 1, got {padding_ratio}")
    num_frames = clips.shape[2]
    padding = num_frames // padding_ratio
    frames = torch.arange(num_frames, device=clips.device) + start.unsqueeze(1) - padding
    frames = torch.where(frames < 0, -1 - frames, frames)
    frames = torch.where(frames >= num_frames, 2 * num_frames - 1 - frames, frames)
    return clips.gather(2, frames[:, None, :, None, None].expand(clips.shape))


def _transform(clips: Tensor, matrices: Tensor) -> Tensor:
    return torch.einsum("nij,njtvm->nitvm", matrices.to(clips.dtype), clips)


def shear(clips: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """``x'_i = sum_j R_ij x_j`` with ``R = [[1, a1, b1], [a2, 1, b2], [a3, b3, 1]]``.

    Args:
        clips: (N, 3, T, V, M).
        first: (N, 3), the coefficients a.
        second: (N, 3), the coefficients b.

    Source: docs/method.md section 2.
    """
    check_clips(clips)
    check_tensor("first", first, "(N, 3)", clips.shape[0], 3)
    check_tensor("second", second, "(N, 3)", clips.shape[0], 3)
    one = torch.ones_like(first[:, 0])
    a, b = first.unbind(1), second.unbind(1)
    rows = [torch.stack(row, dim=1) for row in ((one, a[0], b[0]), (a[1], one, b[1]), (a[2], b[2], one))]
    return _transform(clips, torch.stack(rows, dim=1))


def camera_view(clips: Tensor, scale: Tensor, angles: Tensor) -> Tensor:
    """Scales a clip and rotates it counter-clockwise about x, then y, then z.

    Args:
        clips: (N, 3, T, V, M).
        scale: (N,).
        angles: (N, 3) radians about x, y, z.

    Source: docs/method.md section 2.
    """
    check_clips(clips)
    check_tensor("scale", scale, "(N,)", clips.shape[0])
    check_tensor("angles", angles, "(N, 3)", clips.shape[0], 3)
    rotation = torch.eye(3, dtype=angles.dtype, device=angles.device).expand(clips.shape[0], 3, 3)
    for axis in range(3):
        rotation = _axis_rotation(axis, angles[:, axis]) @ rotation
    return _transform(clips, scale[:, None, None] * rotation)


def _axis_rotation(axis: int, angle: Tensor) -> Tensor:
    """(N, 3, 3) counter-clockwise rotations about one coordinate axis."""
    rotation = torch.eye(3, dtype=angle.dtype, device=angle.device).repeat(angle.shape[0], 1, 1)
    i, j = (axis + 1) % 3, (axis + 2) % 3
    rotation[:, i, i] = rotation[:, j, j] = angle.cos()
    rotation[:, i, j] = -angle.sin()
    rotation[:, j, i] = angle.sin()
    return rotation


def motion_scale(clips: Tensor, scale: Tensor) -> Tensor:
    """Scales each inner frame's offset from the mean of its neighbours; the first and last frame stay.

    Args:
        clips: (N, C, T, V, M).
        scale: (N,).

    Source: docs/method.md section 2.
    """
    check_clips(clips)
    check_tensor("scale", scale, "(N,)", clips.shape[0])
    if clips.shape[2] < 3:
        return clips.clone()
    middle = (clips[:, :, :-2] + clips[:, :, 2:]) / 2
    inner = middle + scale.to(clips.dtype)[:, None, None, None, None] * (clips[:, :, 1:-1] - middle)
    return torch.cat([clips[:, :, :1], inner, clips[:, :, -1:]], dim=2)


def draw_augmentation(
    num_clips: int, num_frames: int, config: AugmentationConfig, generator: Generator
) -> AugmentationParameters:
    """Random parameters of one view of ``num_clips`` clips of ``num_frames`` frames, on the generator's device.

    Source: docs/method.md section 2.
    """

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low

    crop_start = shear_first = shear_second = camera_scale = camera_angles = scale = None
    if config.crop_padding_ratio:
        last = 2 * (num_frames // config.crop_padding_ratio)
        crop_start = torch.randint(last + 1, (num_clips,), generator=generator, device=generator.device)
    if config.shear:
        shear_first = uniform(-config.shear, config.shear, num_clips, 3)
        shear_second = uniform(-config.shear, config.shear, num_clips, 3)
    if config.camera_view:
        camera_scale = uniform(0.5 * config.camera_view, 1.5 * config.camera_view, num_clips)
        limit = config.camera_view * math.pi / 6
        camera_angles = uniform(-limit, limit, num_clips, 3)
    if config.motion_scale:
        scale = uniform(-2.0, 3.0, num_clips)
    return AugmentationParameters(
        crop_start=crop_start,
        crop_padding_ratio=config.crop_padding_ratio,
        shear_first=shear_first,
        shear_second=shear_second,
        camera_scale=camera_scale,
        camera_angles=camera_angles,
        motion_scale=scale,
    )


def augment(clips: Tensor, parameters: AugmentationParameters) -> Tensor:
    """One augmented view of clips (N, 3, T, V, M): crop, shear, camera view, motion scale, each if it is on.

    Source: docs/method.md section 2.
    """
    if parameters.crop_start is not None:
        clips = temporal_crop(clips, parameters.crop_start, parameters.crop_padding_ratio)
    if parameters.shear_first is not None and parameters.shear_second is not None:
        clips = shear(clips, parameters.shear_first, parameters.shear_second)
    if parameters.camera_scale is not None and parameters.camera_angles is not None:
        clips = camera_view(clips, parameters.camera_scale, parameters.camera_angles)
    if parameters.motion_scale is not None:
        clips = motion_scale(clips, parameters.motion_scale)
    return clips
