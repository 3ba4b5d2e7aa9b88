"""Batch norm as one factor and one summand per channel, which the next operation applies as it loads."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension
from ikem_fast.ops._checks import check_tensor, describe, has_kernel


def batch_norm_coefficients(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The coefficients with which ``scale * x + shift`` is the batch norm of x.

    One kernel forward and one backward. On a device without one this is :func:`batch_norm_coefficients_reference`.

    Args:
        mean: of each stream and channel, (S, C) float32 or (not compiled for CUDA) float64.
        variance: likewise, not corrected for the number of values.
        weight: factor of the normalised values, (S, C).
        bias: summand of the normalised values, (S, C).
        eps: added to the variance; at least 0.

    Returns:
        ``scale = weight / sqrt(variance + eps)`` and ``shift = bias - mean * scale``, both (S, C), differentiable once
        in all four tensors.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or an eps below 0.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    _check_arguments(mean, variance, weight, bias, eps)
    _extension.require()
    if not has_kernel(mean):
        return batch_norm_coefficients_reference(mean, variance, weight, bias, eps)
    return torch.ops.ikem_fast.batch_norm_coefficients(mean, variance, weight, bias, eps)


def batch_norm_coefficients_reference(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """:func:`batch_norm_coefficients` in plain PyTorch: the same arguments, results and errors."""
    _check_arguments(mean, variance, weight, bias, eps)
    scale = weight / torch.sqrt(variance + eps)
    return scale, bias - mean * scale


def _check_arguments(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    check_tensor("mean", mean, "(S, C)", None, None)
    if mean.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"mean must be (S, C) float32 or float64, got {describe(mean)}")
    for name, value in (("variance", variance), ("weight", weight), ("bias", bias)):
        check_tensor(name, value, "(S, C)", *mean.shape)
        if value.dtype != mean.dtype:
            raise ValueError(f"{name} must be {describe(mean)} as mean is, got {describe(value)}")
        if value.device != mean.device:
            raise ValueError(f"{name} must be on mean's device {mean.device}, got {value.device}")
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, got {eps}")


def _fake(mean, variance, weight, bias, eps):
    return mean.new_empty(mean.shape), mean.new_empty(mean.shape)


def _fake_backward(mean, variance, weight, eps, scale_gradient, shift_gradient):
    return tuple(mean.new_empty(mean.shape) for _ in range(4))


def _setup_context(ctx, inputs, output) -> None:
    mean, variance, weight, _, eps = inputs
    ctx.eps = eps
    ctx.save_for_backward(mean, variance, weight)


@once_differentiable
def _backward(ctx, scale_gradient: Tensor, shift_gradient: Tensor):
    gradients = torch.ops.ikem_fast.batch_norm_coefficients_backward(
        *ctx.saved_tensors, ctx.eps, scale_gradient, shift_gradient
    )
    return (*gradients, None)


if _extension.available():
    torch.library.register_fake("ikem_fast::batch_norm_coefficients", _fake)
    torch.library.register_fake("ikem_fast::batch_norm_coefficients_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::batch_norm_coefficients", _backward, setup_context=_setup_context)
