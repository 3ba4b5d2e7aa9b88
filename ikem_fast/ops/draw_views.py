"""Random parameters of augmented views: a function of seed, epoch, sample and view, and of nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import describe
from ikem_fast.ops.augment import AugmentationConfig, AugmentationParameters


@dataclass(frozen=True)
class ViewParameters:
    """Random parameters of R views of a batch of B samples; ``None`` where an augmentation is off.

    The augmentations are those of ``ikem_fast.ops.augment``, in its order: crop, shear, camera view, motion scale.
    """

    crop_start: Tensor | None = None  # (R, B) int64 in 0 ... 2p, p = T // crop_padding_ratio
    crop_padding_ratio: int = 6
    shear: Tensor | None = None  # (R, B, 2, 3): the coefficients a, then b
    camera_scale: Tensor | None = None  # (R, B)
    camera_angles: Tensor | None = None  # (R, B, 3) radians about x, y, z
    motion_scale: Tensor | None = None  # (R, B)

    def view(self, number: int) -> AugmentationParameters:
        """One view's parameters, as ``ikem_fast.ops.augment`` takes them."""

        def row(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[number]

        shear = row(self.shear)
        return AugmentationParameters(
            crop_start=row(self.crop_start),
            crop_padding_ratio=self.crop_padding_ratio,
            shear_first=None if shear is None else shear[:, 0],
            shear_second=None if shear is None else shear[:, 1],
            camera_scale=row(self.camera_scale),
            camera_angles=row(self.camera_angles),
            motion_scale=row(self.motion_scale),
        )

    def only(self, number: int) -> ViewParameters:
        """One view's parameters as those of a single view (R = 1); negative numbers count from the last."""
        return ViewParameters.stack([self.view(number)])

    @classmethod
    def stack(cls, views: Sequence[AugmentationParameters]) -> ViewParameters:
        """The parameters of several views of the same batch; in each the same augmentations are on."""

        def rows(name: str) -> Tensor | None:
            values = [getattr(view, name) for view in views]
            return None if values[0] is None else torch.stack(values)

        first, second = rows("shear_first"), rows("shear_second")
        return cls(
            crop_start=rows("crop_start"),
            crop_padding_ratio=views[0].crop_padding_ratio,
            shear=None if first is None or second is None else torch.stack([first, second], dim=2),
            camera_scale=rows("camera_scale"),
            camera_angles=rows("camera_angles"),
            motion_scale=rows("motion_scale"),
        )


def draw_views(
    seed: int, epoch: int | Tensor, indices: Tensor, num_frames: int, config: AugmentationConfig, num_views: int = 2
) -> ViewParameters:
    """Random parameters of ``num_views`` views of a batch, drawn from the numbers of the samples.

    A sample's parameters depend on seed, epoch, its own number and the view alone: not on the rest of the batch, its
    order, the device or the process that draws them. They come from Philox4x32-10 with the seed as its key and (draw,
    view, sample, epoch) as its counter; CPU, CUDA and :func:`draw_views_reference` give the same bits.

    Args:
        seed: 0 ... 2^64 - 1.
        epoch: 0 ... 2^32 - 1; a number, or a (1,) int64 tensor on the device of ``indices``, from which a captured CUDA
            graph reads it anew whenever it is replayed.
        indices: numbers of the samples in the whole set, (B,) int64 in 0 ... 2^32 - 1. Values of tensors are checked on
            the CPU only.
        num_frames: T, frames of a clip.
        config: which augmentations are on and how strong they are.
        num_views: R.

    Returns:
        Parameters of R views on the device of ``indices``, float32.

    Raises:
        ValueError: an argument out of its range or of the wrong shape or dtype.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 2.
    """
    epoch = _check(seed, epoch, indices)
    _extension.require()
    if indices.device.type not in ("cpu", "meta") and not (indices.is_cuda and _extension.cuda_available()):
        return draw_views_reference(seed, epoch, indices, num_frames, config, num_views)
    drawn = torch.ops.ikem_fast.draw_views(
        indices,
        seed if seed < 2**63 else seed - 2**64,
        epoch,
        num_views,
        num_frames,
        config.crop_padding_ratio,
        config.shear,
        config.camera_view,
    )
    return _select(config, *drawn)


def draw_views_reference(
    seed: int, epoch: int | Tensor, indices: Tensor, num_frames: int, config: AugmentationConfig, num_views: int = 2
) -> ViewParameters:
    """:func:`draw_views` in plain PyTorch: the same arguments and the same bits."""
    epoch = _check(seed, epoch, indices)
    _check_values(epoch, indices, num_frames, num_views)
    view = torch.arange(num_views, device=indices.device).view(-1, 1).expand(num_views, indices.shape[0])
    sample = indices.expand_as(view)

    def words(draw: int) -> list[Tensor]:
        return philox([torch.full_like(view, draw), view, sample, epoch.expand_as(view)], seed)

    def uniform(word: Tensor, low: float, high: float) -> Tensor:
        return (word >> 8).float() * 2.0**-24 * (high - low) + low

    first, second, third = words(0), words(1), words(2)
    padding = num_frames // config.crop_padding_ratio if config.crop_padding_ratio else 0
    angle = config.camera_view * math.pi / 6
    shear = [uniform(word, -config.shear, config.shear) for word in (*first[1:], *second[:3])]
    return _select(
        config,
        (first[0] * (2 * padding + 1)) >> 32,
        torch.stack(shear, dim=2).view(*view.shape, 2, 3),
        uniform(third[0], 0.5 * config.camera_view, 1.5 * config.camera_view),
        torch.stack([uniform(word, -angle, angle) for word in third[1:]], dim=2),
        uniform(second[3], -2.0, 3.0),
    )


def philox(counter: Sequence[Tensor], seed: int | Tensor) -> list[Tensor]:
    """Philox4x32-10: four random words for each counter of four words, all int64 tensors of 32-bit values.

    The seed may be an int64 tensor, whose bits are the key.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    mask = 2**32 - 1
    c0, c1, c2, c3 = counter
    first_key, second_key = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        # Products of 64 bits wrap around in int64; the shift brings ones from the left, which the mask takes off.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            ((second >> 32) & mask) ^ c1 ^ first_key,
            second & mask,
            ((first >> 32) & mask) ^ c3 ^ second_key,
            first & mask,
        )
        first_key = (first_key + 0x9E3779B9) & mask
        second_key = (second_key + 0xBB67AE85) & mask
    return [c0, c1, c2, c3]


def _select(
    config: AugmentationConfig,
    crop_start: Tensor,
    shear: Tensor,
    camera_scale: Tensor,
    camera_angles: Tensor,
    motion_scale: Tensor,
) -> ViewParameters:
    """What is on; everything is drawn, so that turning one augmentation on does not change another."""
    return ViewParameters(
        crop_start=crop_start if config.crop_padding_ratio else None,
        crop_padding_ratio=config.crop_padding_ratio,
        shear=shear if config.shear else None,
        camera_scale=camera_scale if config.camera_view else None,
        camera_angles=camera_angles if config.camera_view else None,
        motion_scale=motion_scale if config.motion_scale else None,
    )


def _check(seed: int, epoch: int | Tensor, indices: Tensor) -> Tensor:
    """Checks what needs no look at a tensor's values, and gives the epoch as a tensor on the device of ``indices``."""
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
        raise ValueError(f"indices must be (B,) int64, got {describe(indices)}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be 0 ... 2^64 - 1, got {seed}")
    if not isinstance(epoch, Tensor):
        if not 0 <= epoch < 2**32:
            raise ValueError(f"epoch must be 0 ... 2^32 - 1, got {epoch}")
        return torch.full((1,), epoch, dtype=torch.int64, device=indices.device)
    if epoch.dtype != torch.int64 or tuple(epoch.shape) != (1,):
        raise ValueError(f"epoch must be (1,) int64, got {describe(epoch)}")
    if epoch.device != indices.device:
        raise ValueError(f"epoch must be on the device of indices, {indices.device}, got {epoch.device}")
    return epoch


def _check_values(epoch: Tensor, indices: Tensor, num_frames: int, num_views: int) -> None:
    if epoch.device.type == "cpu" and not 0 <= epoch.item() < 2**32:
        raise ValueError(f"epoch must be 0 ... 2^32 - 1, got {epoch.item()}")
    if num_views < 1:
        raise ValueError(f"num_views must be 1 ... 65535, got {num_views}")
    if num_frames < 1:
        raise ValueError(f"num_frames must be above 0, got {num_frames}")
    if indices.device.type == "cpu" and bool(((indices < 0) | (indices >= 2**32)).any()):
        raise ValueError(f"indices must be 0 ... 2^32 - 1, got {indices.min().item()} ... {indices.max().item()}")


def _fake(indices, seed, epoch, num_views, num_frames, crop_padding_ratio, shear, camera_view):
    def floats(*sizes: int) -> Tensor:
        return indices.new_empty((num_views, indices.shape[0], *sizes), dtype=torch.float32)

    return indices.new_empty((num_views, indices.shape[0])), floats(2, 3), floats(), floats(3), floats()


if _extension.available():
    torch.library.register_fake("ikem_fast::draw_views", _fake)
