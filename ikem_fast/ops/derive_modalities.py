"""Modalities of a batch of clips, all in one pass over the coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension, layouts
from ikem_fast import modalities as modality_registry
from ikem_fast.layouts import Layout
from ikem_fast.modalities import MODALITIES
from ikem_fast.ops._checks import describe


def derive_modalities(
    clips: Tensor,
    num_frames: Tensor,
    layout: str | Path | Layout = "ntu-rgb+d",
    modalities: Sequence[str] = MODALITIES,
    *,
    chest_normal: bool = True,
) -> Tensor:
    """The modalities of a batch of clips (docs/method.md section 3).

    Runs a compiled kernel for the modalities of ``MODALITIES``, on CUDA if the package was built with its CUDA part;
    otherwise, and for modalities registered in Python alone, it is :func:`derive_modalities_reference`. Differentiable
    once with respect to ``clips``, by a kernel of its own.

    Args:
        clips: joint coordinates (N, 3, T, V, M), float32 or float64, in metres or any other unit. N may be 0.
        num_frames: F, frames of each recording before it was resampled to T, (N,) integers above 0. Velocities are
            scaled by 50 / F. Values are checked on the CPU only: on CUDA that would wait for the device.
        layout: the skeleton with V joints: a name, the path of a YAML file, or a ``Layout``.
        modalities: S distinct names of modalities, in the order of the result.
        chest_normal: false leaves the root's bone zero.

    Returns:
        (S, N, 3, T, V, M), contiguous, in the dtype of ``clips``. The units are those of the modalities' own
        functions in ``ikem_fast.modalities``.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or name, or a frame count below 1.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    bone_parents, previous_bones, chest_joints = _check_arguments(clips, num_frames, layout, modalities)
    _extension.require()
    compiled = [name for name in modalities if name in MODALITIES] if _has_kernel(clips) else []
    if not compiled:
        return _derive_with_functions(clips, num_frames, layouts.get(layout), modalities, chest_normal)
    derived = torch.ops.ikem_fast.derive_modalities(
        clips,
        num_frames.long(),
        bone_parents,
        previous_bones,
        chest_joints if chest_normal else (),
        [MODALITIES.index(name) for name in compiled],
    )
    if len(compiled) == len(modalities):
        return derived
    skeleton = layouts.get(layout)
    rows = dict(zip(compiled, derived, strict=True))
    return torch.stack(
        [
            rows[name]
            if name in rows
            else modality_registry.get(name)(clips, num_frames, skeleton, chest_normal=chest_normal)
            for name in modalities
        ]
    )


def derive_modalities_reference(
    clips: Tensor,
    num_frames: Tensor,
    layout: str | Path | Layout = "ntu-rgb+d",
    modalities: Sequence[str] = MODALITIES,
    *,
    chest_normal: bool = True,
) -> Tensor:
    """:func:`derive_modalities` in plain PyTorch: the same arguments, result and errors, from the functions of
    ``ikem_fast.modalities``.
    """
    _check_arguments(clips, num_frames, layout, modalities)
    return _derive_with_functions(clips, num_frames, layouts.get(layout), modalities, chest_normal)


# A tracer cannot follow the search for a layout's file, but takes the numbers found as constants.
@torch.compiler.assume_constant_result
def skeleton_numbers(layout: str | Path | Layout) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Name, parents, previous bones and chest joints: what the compiled operator and the checks need."""
    skeleton = layouts.get(layout)
    return skeleton.name, skeleton.bone_parents, skeleton.previous_bones, skeleton.chest_normal


def _derive_with_functions(
    clips: Tensor, num_frames: Tensor, layout: Layout, modalities: Sequence[str], chest_normal: bool
) -> Tensor:
    functions = [modality_registry.get(name) for name in modalities]
    return torch.stack([derive(clips, num_frames, layout, chest_normal=chest_normal) for derive in functions])


# The CUDA kernel takes the skeleton by value, in tables of this size (csrc/cuda/derive_modalities.h).
CUDA_MAX_JOINTS = 256


def _has_kernel(clips: Tensor) -> bool:
    if clips.device.type == "cuda":
        return _extension.cuda_available() and clips.shape[3] <= CUDA_MAX_JOINTS
    return clips.device.type in ("cpu", "meta")


def _check_arguments(
    clips: Tensor, num_frames: Tensor, layout: str | Path | Layout, modalities: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Parents, previous bones and chest joints of the layout, once every argument fits."""
    _check_tensors(clips, num_frames)
    joints = check_modalities(clips, layout, modalities)
    # Under a tracer there are no values; the compiled kernel looks at them when it runs.
    if num_frames.device.type == "cpu" and not torch.compiler.is_compiling() and bool((num_frames < 1).any()):
        raise ValueError(f"num_frames must be above 0, got {num_frames.min().item()}")
    return joints


def check_modalities(
    clips: Tensor, layout: str | Path | Layout, modalities: Sequence[str]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Parents, previous bones and chest joints of the layout, once it fits the clips and the modalities exist."""
    name, bone_parents, previous_bones, chest_joints = skeleton_numbers(layout)
    if clips.shape[3] != len(bone_parents):
        raise ValueError(f"clips must have the {len(bone_parents)} joints of layout '{name}', got {describe(clips)}")
    modality_registry.check(modalities)
    return bone_parents, previous_bones, chest_joints


def _check_tensors(clips: Tensor, num_frames: Tensor) -> None:
    fits = (
        isinstance(clips, Tensor)
        and clips.dtype in (torch.float32, torch.float64)
        and clips.dim() == 5
        and clips.shape[1] == 3
    )
    if not fits:
        raise ValueError(f"clips must be (N, 3, T, V, M) float32 or float64, got {describe(clips)}")
    if 0 in clips.shape[2:]:
        raise ValueError(f"clips must have at least one frame, joint and person, got {describe(clips)}")
    is_integer = isinstance(num_frames, Tensor) and not (
        num_frames.is_floating_point() or num_frames.is_complex() or num_frames.dtype == torch.bool
    )
    if not is_integer or num_frames.shape != clips.shape[:1]:
        raise ValueError(f"num_frames must be ({clips.shape[0]},) integers, got {describe(num_frames)}")
    if num_frames.device != clips.device:
        raise ValueError(f"num_frames must be on the clips' device {clips.device}, got {num_frames.device}")


def _fake(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities):
    _check_tensors(clips, num_frames)
    return torch.empty((len(modalities), *clips.shape), dtype=clips.dtype, device=clips.device)


def _fake_backward(clips, num_frames, bone_parents, previous_bones, chest_normal, modalities, gradient):
    return torch.empty(clips.shape, dtype=clips.dtype, device=clips.device)


def _setup_context(ctx, inputs, output) -> None:
    clips, num_frames, *ctx.numbers = inputs
    ctx.save_for_backward(clips, num_frames)


@once_differentiable
def _backward(ctx, gradient: Tensor):
    of_clips = torch.ops.ikem_fast.derive_modalities_backward(*ctx.saved_tensors, *ctx.numbers, gradient)
    return of_clips, None, None, None, None, None


if _extension.available():
    torch.library.register_fake("ikem_fast::derive_modalities", _fake)
    torch.library.register_fake("ikem_fast::derive_modalities_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::derive_modalities", _backward, setup_context=_setup_context)
