"""Views of stored clips in one pass: augmented, in all modalities, in the encoder's own layout and dtype."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.layouts import Layout
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops._checks import as_computed, computed_dtype, describe
from ikem_fast.ops.augment import augment
from ikem_fast.ops.derive_modalities import CUDA_MAX_JOINTS, check_modalities, derive_modalities_reference
from ikem_fast.ops.draw_views import ViewParameters

_STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_VIEW_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class ClipViews(NamedTuple):
    """R views of B samples in S modalities.

    Attributes:
        views: (R, S, B·M, T, V, 3), contiguous: the persons of a sample one after another, channels last.
        statistics: sums and sums of squares of the values in ``views`` over persons and frames, (2, R, S, V, 3)
            float64, or ``None`` if they were not asked for.
        num_persons: M.
    """

    views: Tensor
    statistics: Tensor | None
    num_persons: int

    def view(self, number: int) -> ClipViews:
        """One of the views alone (R = 1), sharing memory; negative numbers count from the last."""
        number = range(len(self.views))[number]
        one = slice(number, number + 1)
        return self._replace(
            views=self.views[one], statistics=None if self.statistics is None else self.statistics[:, one]
        )

    def mean_and_variance(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance of every view, modality, joint and channel, each (R, S, V, 3) float64: the batch
        statistics of the encoder's input norm.
        """
        if self.statistics is None:
            raise ValueError("statistics were not made: call clip_views with statistics=True")
        count = self.views.shape[2] * self.views.shape[3]
        mean, mean_square = self.statistics / count
        return mean, (mean_square - mean.square()).clamp_min(0)


def clip_views(
    clips: Tensor,
    num_frames: Tensor,
    indices: Tensor | None = None,
    parameters: ViewParameters | None = None,
    layout: str | Path | Layout = "ntu-rgb+d",
    modalities: Sequence[str] = MODALITIES,
    *,
    dtype: torch.dtype | None = None,
    chest_normal: bool = True,
    statistics: bool = True,
) -> ClipViews:
    """Augmented views of stored clips in all modalities, as the encoder reads them (docs/method.md sections 2 and 3).

    Takes samples out of a set of stored clips, crops them, applies shear and camera view as one matrix, scales their
    motion, derives the modalities and writes each value once. Computes in float32, or in float64 for float64 clips.
    Runs a compiled kernel for the modalities of ``MODALITIES``; with modalities registered in Python alone it is
    :func:`clip_views_reference`. Not differentiable: :func:`ikem_fast.ops.derive_modalities` is.

    Args:
        clips: the stored set (N, 3, T, V, M), float32, float16, bfloat16 or (not on CUDA) float64. Never copied: each
            clip must be contiguous, the first dimension may have any stride.
        num_frames: F, frames of each stored recording before it was resampled to T, (N,) integers above 0.
        indices: which clips, (B,) int64 in any order, also repeatedly; ``None`` for all N in order. Out of range they
            are an error on the CPU; on CUDA, where looking would wait for the device, their views are NaN.
        parameters: of R views (``ikem_fast.ops.draw_views``); ``None`` for one view without augmentation.
        layout: the skeleton with V joints: a name, the path of a YAML file, or a ``Layout``.
        modalities: S distinct names of modalities, in the order of the result.
        dtype: of the views: float32, bfloat16 or float16, rounded to nearest even; float64 for float64 clips. ``None``
            for float64 if the clips are, float32 otherwise.
        chest_normal: false leaves the root's bone zero.
        statistics: whether to add up the views for the encoder's input norm, in float64 and in an order that does not
            depend on the number of threads.

    Returns:
        ``views`` (R, S, B·M, T, V, 3), ``statistics`` and ``num_persons``.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or name, clips that are not contiguous or require a
            gradient, a frame count below 1, or a crop outside the clip.
        IndexError: an index outside the set.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    dtype = _check_arguments(clips, num_frames, indices, parameters, dtype)
    parents, previous_bones, chest_joints = check_modalities(clips, layout, modalities)
    _extension.require()
    if not _has_kernel(clips, modalities):
        return clip_views_reference(
            clips, num_frames, indices, parameters, layout, modalities,
            dtype=dtype, chest_normal=chest_normal, statistics=statistics,
        )  # fmt: skip
    drawn = _as_computed(parameters or ViewParameters(), clips)
    views, sums = torch.ops.ikem_fast.clip_views(
        clips,
        indices,
        num_frames.long(),
        drawn.crop_start,
        0 if drawn.crop_start is None else clips.shape[2] // drawn.crop_padding_ratio,
        drawn.shear,
        drawn.camera_scale,
        drawn.camera_angles,
        drawn.motion_scale,
        parents,
        previous_bones,
        chest_joints if chest_normal else (),
        [MODALITIES.index(name) for name in modalities],
        _num_views(parameters),
        dtype,
        statistics,
    )
    return ClipViews(views, sums if statistics else None, clips.shape[4])


def clip_views_reference(
    clips: Tensor,
    num_frames: Tensor,
    indices: Tensor | None = None,
    parameters: ViewParameters | None = None,
    layout: str | Path | Layout = "ntu-rgb+d",
    modalities: Sequence[str] = MODALITIES,
    *,
    dtype: torch.dtype | None = None,
    chest_normal: bool = True,
    statistics: bool = True,
) -> ClipViews:
    """:func:`clip_views` in plain PyTorch: the same arguments, result and errors, from ``ikem_fast.ops.augment`` and
    the functions of ``ikem_fast.modalities``.
    """
    dtype = _check_arguments(clips, num_frames, indices, parameters, dtype)
    check_modalities(clips, layout, modalities)
    if clips.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(clips, indices, parameters)
    if indices is not None:
        clips, num_frames = clips[indices], num_frames[indices]
    clips = as_computed(clips)
    views = []
    for number in range(_num_views(parameters)):
        augmented = clips if parameters is None else augment(clips, _as_computed(parameters, clips).view(number))
        derived = derive_modalities_reference(augmented, num_frames, layout, modalities, chest_normal=chest_normal)
        views.append(derived.permute(0, 1, 5, 3, 4, 2).flatten(1, 2))
    rounded = torch.stack(views).to(dtype)
    if not statistics:
        return ClipViews(rounded, None, clips.shape[4])
    exact = rounded.double()
    sums = torch.stack([exact.sum(dim=(2, 3)), exact.square().sum(dim=(2, 3))])
    return ClipViews(rounded, sums, clips.shape[4])


def _as_computed(parameters: ViewParameters, clips: Tensor) -> ViewParameters:
    dtype = computed_dtype(clips)
    floats = {name: values for name, values in _tensors(parameters).items() if name != "crop_start"}
    return replace(parameters, **{name: None if v is None else v.to(dtype) for name, v in floats.items()})


def _num_views(parameters: ViewParameters | None) -> int:
    given = [] if parameters is None else [values for values in _tensors(parameters).values() if values is not None]
    return given[0].shape[0] if given else 1


def _tensors(parameters: ViewParameters) -> dict[str, Tensor | None]:
    names = ("crop_start", "shear", "camera_scale", "camera_angles", "motion_scale")
    return {name: getattr(parameters, name) for name in names}


def _has_kernel(clips: Tensor, modalities: Sequence[str]) -> bool:
    if not set(modalities) <= set(MODALITIES):
        return False
    if clips.is_cuda:
        fits = clips.shape[3] <= CUDA_MAX_JOINTS and clips.dtype != torch.float64
        return fits and _extension.cuda_available()
    return clips.device.type in ("cpu", "meta")


def _check_arguments(
    clips: Tensor,
    num_frames: Tensor,
    indices: Tensor | None,
    parameters: ViewParameters | None,
    dtype: torch.dtype | None,
) -> torch.dtype:
    """The dtype of the views, once shapes, dtypes and devices fit."""
    _check_clips(clips, num_frames)
    if dtype is None:
        dtype = computed_dtype(clips)
    if dtype not in ((torch.float64,) if clips.dtype == torch.float64 else _VIEW_DTYPES):
        raise ValueError(
            "dtype must be float64 for float64 clips and float32, bfloat16 or float16 for others, got "
            f"{str(dtype).removeprefix('torch.')} for {describe(clips)}"
        )
    if indices is not None:
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 1:
            raise ValueError(f"indices must be (B,) int64, got {describe(indices)}")
        if indices.device != clips.device:
            raise ValueError(f"indices must be on the clips' device {clips.device}, got {indices.device}")
    if parameters is not None:
        _check_parameters(clips, parameters, clips.shape[0] if indices is None else indices.shape[0])
    return dtype


def _check_clips(clips: Tensor, num_frames: Tensor) -> None:
    fits = isinstance(clips, Tensor) and clips.dtype in _STORED_DTYPES and clips.dim() == 5 and clips.shape[1] == 3
    if not fits:
        raise ValueError(f"clips must be (N, 3, T, V, M) float32, float16, bfloat16 or float64, got {describe(clips)}")
    if 0 in clips.shape[2:]:
        raise ValueError(f"clips must have at least one frame, joint and person, got {describe(clips)}")
    if clips.shape[0] and not clips[0].is_contiguous():
        raise ValueError(
            "clips must be contiguous within each clip (only the first dimension may have any stride), got "
            f"{describe(clips)} with strides {clips.stride()}"
        )
    if clips.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "clips must not require a gradient, which clip_views does not compute: pass clips.detach(), or use "
            "ikem_fast.ops.derive_modalities"
        )
    is_integer = isinstance(num_frames, Tensor) and not (
        num_frames.is_floating_point() or num_frames.is_complex() or num_frames.dtype == torch.bool
    )
    if not is_integer or num_frames.shape != clips.shape[:1]:
        raise ValueError(f"num_frames must be ({clips.shape[0]},) integers, got {describe(num_frames)}")
    if num_frames.device != clips.device:
        raise ValueError(f"num_frames must be on the clips' device {clips.device}, got {num_frames.device}")


def _check_parameters(clips: Tensor, parameters: ViewParameters, batch: int) -> None:
    num_views = _num_views(parameters)
    more_sizes = {"shear": (2, 3), "camera_angles": (3,)}
    for name, values in _tensors(parameters).items():
        if values is None:
            continue
        sizes = (num_views, batch, *more_sizes.get(name, ()))
        kind = "int64" if name == "crop_start" else "floating point"
        fits_kind = values.dtype == torch.int64 if name == "crop_start" else values.is_floating_point()
        if not fits_kind or tuple(values.shape) != sizes:
            raise ValueError(f"{name} must be {sizes} {kind}, got {describe(values)}")
        if values.device != clips.device:
            raise ValueError(f"{name} must be on the clips' device {clips.device}, got {values.device}")
    if parameters.crop_start is not None and parameters.crop_padding_ratio < 1:
        raise ValueError(f"crop_padding_ratio must be at least 1, got {parameters.crop_padding_ratio}")


def _check_values(clips: Tensor, indices: Tensor | None, parameters: ViewParameters | None) -> None:
    """What the compiled kernel looks at itself."""
    if indices is not None and bool(((indices < 0) | (indices >= clips.shape[0])).any()):
        raise IndexError(
            f"indices must be 0 ... {clips.shape[0] - 1}, got {indices.min().item()} ... {indices.max().item()}"
        )
    if parameters is not None and parameters.crop_start is not None:
        last, start = 2 * (clips.shape[2] // parameters.crop_padding_ratio), parameters.crop_start
        if bool(((start < 0) | (start > last)).any()):
            raise ValueError(f"crop_start must be 0 ... {last}, got {start.min().item()} ... {start.max().item()}")


def _fake(
    clips, indices, num_frames, crop_start, crop_padding, shear, camera_scale, camera_angles, motion_scale,
    bone_parents, previous_bones, chest_normal, modalities, num_views, dtype, statistics,
):  # fmt: skip
    _, _, frames, joints, persons = clips.shape
    batch = clips.shape[0] if indices is None else indices.shape[0]
    sums = (2, num_views, len(modalities), joints, 3) if statistics else (0,)
    return (
        clips.new_empty((num_views, len(modalities), batch * persons, frames, joints, 3), dtype=dtype),
        clips.new_empty(sums, dtype=torch.float64),
    )


if _extension.available():
    torch.library.register_fake("ikem_fast::clip_views", _fake)
