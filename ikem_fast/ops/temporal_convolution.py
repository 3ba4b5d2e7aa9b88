"""Convolution over frames that applies batch norm and ReLU on load and returns the batch statistics of its result."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension
from ikem_fast.ops._checks import check_tensor, computed_dtype, describe, has_kernel

_MOST_JOINTS_ON_CUDA = 128
_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def temporal_convolution(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    statistics: bool = True,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The convolution over the frames of ``relu(scale * x + shift)``, of S streams with their own weights, in one pass.

    The activation is made as x is loaded and not kept; it is zero beyond the first and the last frame. float32 and
    float64 are computed as they are; of bfloat16 x the activation and the weights are rounded to bfloat16, their
    products summed in float32 and the result rounded once. The same bits every time for the same number of threads. On
    a device or for a dtype without a kernel this is :func:`temporal_convolution_reference`.

    Args:
        x: (S, B, T, V, C_in) float32, bfloat16 or float64, any strides.
        scale: (S, C_in) of the computed dtype (float32, for float64 x float64), or ``None``.
        shift: likewise; without both the convolution is of x itself.
        weight: (S, C_out, C_in, K) of the computed dtype, K odd.
        bias: (S, C_out) of the computed dtype.
        stride: every how many frames there is a result: T' = ceil(T / stride).
        statistics: whether mean and variance are wanted.
        output_scale: (S, C_out) of the computed dtype, or ``None``. For inference only, without statistics: the result
            is ``relu(output_scale * y + output_shift + residual)``.
        output_shift: likewise, given together with ``output_scale``.
        residual: (S, B, T', V, C_out) of x's dtype, or ``None``; only with ``output_scale``.

    Returns:
        y (S, B, T', V, C_out) of x's dtype, and its mean and biased variance over sequences, frames and joints before
        it is rounded, (S, C_out) of the computed dtype; they are 0 for an empty batch, and (0,) without ``statistics``.
        All three are differentiable once.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, arguments that exclude each other, or a gradient
            wanted with ``output_scale``.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    arguments = (x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual)
    _check_arguments(*arguments)
    _extension.require()
    if not _has_kernel(x):
        return _reference(*arguments)
    return torch.ops.ikem_fast.temporal_convolution(*arguments)


def temporal_convolution_reference(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    stride: int = 1,
    statistics: bool = True,
    output_scale: Tensor | None = None,
    output_shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`temporal_convolution` in plain PyTorch: the same arguments, results and errors."""
    arguments = (x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual)
    _check_arguments(*arguments)
    return _reference(*arguments)


def _reference(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual):
    streams, batch = x.shape[:2]
    dtype = computed_dtype(x)
    h = x.to(dtype)
    if scale is not None:
        h = _rounded(torch.relu(_of_channels(scale) * h + _of_channels(shift)), x.dtype)
    # One group a stream: (B, S * C, T, V).
    h = h.permute(1, 0, 4, 2, 3).flatten(1, 2)
    kernel = _rounded(weight, x.dtype).flatten(0, 1).unsqueeze(3)
    y = torch.nn.functional.conv2d(
        h, kernel, bias.flatten(), (stride, 1), padding=(weight.shape[3] // 2, 0), groups=streams
    )
    y = y.unflatten(1, (streams, -1)).permute(1, 0, 3, 4, 2)
    if output_scale is not None:
        y = _of_channels(output_scale) * y + _of_channels(output_shift)
        y = torch.relu(y if residual is None else y + residual.to(dtype))
    if not statistics:
        mean, variance = y.new_empty(0), y.new_empty(0)
    elif batch == 0:
        mean, variance = torch.zeros_like(bias), torch.zeros_like(bias)
    else:
        variance, mean = torch.var_mean(y, dim=(1, 2, 3), correction=0)
    return y.to(x.dtype).contiguous(), mean, variance


def _of_channels(values: Tensor) -> Tensor:
    """(S, C) to be broadcast over (S, B, T, V, C)."""
    return values[:, None, None, None]


def _rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values rounded to a dtype, in their own; the gradient passes as it is."""
    return values if values.dtype == dtype else values + (values.to(dtype).to(values.dtype) - values).detach()


def _has_kernel(x: Tensor) -> bool:
    return has_kernel(x) and (not x.is_cuda or x.shape[3] <= _MOST_JOINTS_ON_CUDA)


def _check_arguments(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual) -> None:
    check_tensor("x", x, "(S, B, T, V, C_in)", None, None, None, None, None)
    if x.dtype not in _DTYPES:
        raise ValueError(f"x must be (S, B, T, V, C_in) float32, bfloat16 or float64, got {describe(x)}")
    streams, batch, frames, joints, in_channels = x.shape
    if 0 in (streams, frames, joints, in_channels):
        raise ValueError(f"x must be (S, B, T, V, C_in), none but B 0, got {describe(x)}")
    check_tensor("weight", weight, "(S, C_out, C_in, K)", streams, None, in_channels, None)
    out_channels, taps = weight.shape[1], weight.shape[3]
    if out_channels == 0 or taps % 2 == 0:
        raise ValueError(f"weight must be (S, C_out, C_in, K), C_out not 0 and K odd, got {describe(weight)}")
    if stride < 1:
        raise ValueError(f"stride must be at least 1, got {stride}")
    check_tensor("bias", bias, "(S, C_out)", streams, out_channels)
    coefficients = {"weight": weight, "bias": bias}
    for prefix, factor, summand, shape, size in (
        ("", scale, shift, "(S, C_in)", in_channels),
        ("output_", output_scale, output_shift, "(S, C_out)", out_channels),
    ):
        if (factor is None) != (summand is None):
            raise ValueError(f"{prefix}scale and {prefix}shift must be given together")
        if factor is not None:
            check_tensor(f"{prefix}scale", factor, shape, streams, size)
            check_tensor(f"{prefix}shift", summand, shape, streams, size)
            coefficients |= {f"{prefix}scale": factor, f"{prefix}shift": summand}
    dtype = computed_dtype(x)
    for name, value in coefficients.items():
        if value.dtype != dtype:
            expected = str(dtype).removeprefix("torch.")
            raise ValueError(f"{name} must be {expected} for x {describe(x)}, got {describe(value)}")
    tensors = dict(coefficients)
    if residual is not None:
        if output_scale is None:
            raise ValueError("residual must be given with output_scale and output_shift, got it without")
        out_frames = -(-frames // stride)
        check_tensor("residual", residual, "(S, B, T', V, C_out)", streams, batch, out_frames, joints, out_channels)
        if residual.dtype != x.dtype:
            raise ValueError(f"residual must be of x's dtype, got {describe(residual)} beside x {describe(x)}")
        tensors["residual"] = residual
    for name, value in tensors.items():
        if value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")
    if output_scale is None:
        return
    if statistics:
        raise ValueError("statistics must be False with output_scale, got True")
    if torch.is_grad_enabled() and (x.requires_grad or any(value.requires_grad for value in tensors.values())):
        raise ValueError("output_scale is for inference, without gradients: call under torch.no_grad()")


def _fake(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual):
    streams, batch, frames, joints, _ = x.shape
    y = x.new_empty(streams, batch, (frames + stride - 1) // stride, joints, weight.shape[1])
    mean = x.new_empty(bias.shape if statistics else (0,), dtype=computed_dtype(x))
    return y, mean, torch.empty_like(mean)


def _fake_backward(
    x, scale, shift, weight, stride, y, mean, y_gradient, mean_gradient, variance_gradient, with_x_gradient
):
    dtype = computed_dtype(x)
    of_x = x.new_empty(x.shape if with_x_gradient else (0,))
    of_scale = x.new_empty((0,) if scale is None else scale.shape, dtype=dtype)
    of_shift = torch.empty_like(of_scale)
    return of_x, of_scale, of_shift, x.new_empty(weight.shape, dtype=dtype), x.new_empty(weight.shape[:2], dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, scale, shift, weight, _, ctx.stride, ctx.statistics, output_scale, _, _ = inputs
    y, mean, _ = output
    ctx.set_materialize_grads(False)
    ctx.for_inference = output_scale is not None
    ctx.save_for_backward(x, scale, shift, weight, y, mean)


@once_differentiable
def _backward(ctx, of_y: Tensor | None, of_mean: Tensor | None, of_variance: Tensor | None):
    if of_y is None and of_mean is None and of_variance is None:
        return (None,) * 10
    if ctx.for_inference:
        raise RuntimeError("temporal_convolution has no gradient: it was called with output_scale")
    x, scale, shift, weight, y, mean = ctx.saved_tensors
    if of_y is None:
        of_y = torch.zeros_like(y)
    if not ctx.statistics:
        of_mean = of_variance = None
    of_x, of_scale, of_shift, of_weight, of_bias = torch.ops.ikem_fast.temporal_convolution_backward(
        x, scale, shift, weight, ctx.stride, y, mean, of_y, of_mean, of_variance, ctx.needs_input_grad[0]
    )
    if scale is None:
        of_scale = of_shift = None
    gradients = (of_x, of_scale, of_shift, of_weight, of_bias)
    needed = ctx.needs_input_grad[:5]
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), None, None, None, None, None


if _extension.available():
    torch.library.register_fake("ikem_fast::temporal_convolution", _fake)
    torch.library.register_fake("ikem_fast::temporal_convolution_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::temporal_convolution", _backward, setup_context=_setup_context)
