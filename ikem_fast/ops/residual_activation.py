"""The end of an encoder's block in one pass: batch norm, dropout, residual, ReLU, in the last block also the mean."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension
from ikem_fast.ops._checks import as_computed, check_tensor, computed_dtype, describe, has_kernel
from ikem_fast.ops.draw_views import philox

_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
# Dropout compares 16 random bits with a threshold.
_WHOLE = 65536


def residual_activation(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    layer: int = 0,
    pool: int = 0,
) -> Tensor:
    """``relu(dropout(scale * x + shift) + residual_scale * residual + residual_shift)``, or the mean of it.

    One pass forward and one backward. Sums are made, and the results of float64 and float32 are rounded, step by step
    as :func:`residual_activation_reference` does it; bfloat16 is computed in float32 and rounded once. The mask of
    dropout is a function of seed, layer, stream and place, the same on every device, and is made again for backward.
    The same bits every time. On a device without a kernel this is :func:`residual_activation_reference`.

    Args:
        x: (S, B, T, V, C) float32, bfloat16 or (not compiled for CUDA) float64, S streams of B sequences. Any strides.
        scale: factor of each stream and channel, (S, C) float32, for float64 x float64.
        shift: summand, likewise.
        residual: added before the ReLU, like x; ``None`` for nothing.
        residual_scale: factor of the residual, like scale; ``None``, then also for ``residual_shift``, for the residual
            as it is.
        residual_shift: summand of the residual.
        dropout: share of the values of ``scale * x + shift`` that is dropped, in [0, 1), a multiple of 1 / 65536
            (others are rounded to one); the kept are divided by what is kept.
        seed: (1,) int64 on x's device; needed for dropout above 0.
        layer: 0 ... 2^32 - 1; layers of the same seed drop differently.
        pool: 0, or M: the mean over frames, joints and each M sequences that follow each other.

    Returns:
        (S, B, T, V, C) of x's dtype, or for ``pool`` (S, B / M, C) float32, for float64 x float64; differentiable once
        in all tensors but the seed.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, or out of its range.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 4.
    """
    _check_arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool)
    _extension.require()
    if not has_kernel(x):
        return residual_activation_reference(
            x, scale, shift, residual, residual_scale, residual_shift,
            dropout=dropout, seed=seed, layer=layer, pool=pool,
        )  # fmt: skip
    return torch.ops.ikem_fast.residual_activation(
        x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool
    )


def residual_activation_reference(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    residual: Tensor | None = None,
    residual_scale: Tensor | None = None,
    residual_shift: Tensor | None = None,
    *,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    layer: int = 0,
    pool: int = 0,
) -> Tensor:
    """:func:`residual_activation` in plain PyTorch: the same arguments, results and errors."""
    _check_arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool)

    def per_channel(coefficient: Tensor) -> Tensor:
        return coefficient[:, None, None, None]

    out = per_channel(scale) * as_computed(x) + per_channel(shift)
    threshold = _threshold(dropout)
    if threshold:
        kept = _random_halves(x.shape, seed, layer) >= threshold
        out = torch.where(kept, out * (_WHOLE / (_WHOLE - threshold)), 0.0)
    if residual is not None:
        added = as_computed(residual)
        if residual_scale is not None:
            added = per_channel(residual_scale) * added + per_channel(residual_shift)
        out = out + added
    out = out.relu()
    if not pool:
        return out.to(x.dtype)
    return out.unflatten(1, (-1, pool)).mean(dim=(2, 3, 4))


def _threshold(dropout: float) -> int:
    return min(int(dropout * _WHOLE + 0.5), _WHOLE - 1)


def _random_halves(shape: torch.Size, seed: Tensor, layer: int) -> Tensor:
    """Random 16-bit numbers, one for each value of a tensor (S, B, T, V, C).

    Philox4x32-10 with the seed as its key gives those of eight values of a stream that follow each other; its counter
    is (q low, q high, stream, layer), q the number of these eight.
    """
    streams, *sizes = shape
    size = torch.Size(sizes).numel()
    q = torch.arange((size + 7) // 8, device=seed.device)
    stream = torch.arange(streams, device=seed.device).view(-1, 1)
    words = philox([q & (2**32 - 1), q >> 32, stream, torch.full_like(stream, layer)], seed)
    halves = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=2)
    return halves.flatten(1)[:, :size].view(shape)


def _check_arguments(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool) -> None:
    if not isinstance(x, Tensor) or x.dim() != 5 or x.dtype not in _DTYPES:
        raise ValueError(f"x must be (S, B, T, V, C) float32, bfloat16 or float64, got {describe(x)}")
    if (residual_scale is None) != (residual_shift is None) or (residual is None and residual_scale is not None):
        raise ValueError("residual_scale and residual_shift must be given both, with a residual, or none of them")
    streams, sequences, channels = x.shape[0], x.shape[1], x.shape[4]
    coefficients = (
        ("scale", scale),
        ("shift", shift),
        ("residual_scale", residual_scale),
        ("residual_shift", residual_shift),
    )
    for name, value in coefficients:
        if name.startswith("residual") and value is None:
            continue
        check_tensor(name, value, "(S, C)", streams, channels)
        if value.dtype != computed_dtype(x):
            wanted = str(computed_dtype(x)).removeprefix("torch.")
            raise ValueError(f"{name} must be {wanted} for x {describe(x)}, got {describe(value)}")
    if residual is not None:
        check_tensor("residual", residual, "(S, B, T, V, C)", *x.shape)
        if residual.dtype != x.dtype:
            raise ValueError(f"residual must be {describe(x)} as x is, got {describe(residual)}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be in [0, 1), got {dropout}")
    if not 0 <= layer < 2**32:
        raise ValueError(f"layer must be 0 ... 2^32 - 1, got {layer}")
    if seed is None and dropout > 0:
        raise ValueError(f"seed must be (1,) int64 for dropout {dropout}, got None")
    if seed is not None and (not isinstance(seed, Tensor) or seed.dtype != torch.int64 or seed.shape != (1,)):
        raise ValueError(f"seed must be (1,) int64, got {describe(seed)}")
    if pool < 0 or (pool and sequences % pool):
        raise ValueError(f"pool must be 0 or divide the {sequences} sequences of x, got {pool}")
    for name, value in (*coefficients, ("residual", residual), ("seed", seed)):
        if value is not None and value.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}, got {value.device}")


def _fake(x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool):
    if not pool:
        return x.new_empty(x.shape)
    return x.new_empty((x.shape[0], x.shape[1] // pool, x.shape[4]), dtype=computed_dtype(x))


def _fake_backward(
    x, scale, shift, residual, residual_scale, residual_shift, dropout, seed, layer, pool, gradient
):  # fmt: skip
    def like(value: Tensor | None) -> Tensor:
        return scale.new_empty((0,)) if value is None else value.new_empty(value.shape)

    return tuple(like(value) for value in (x, scale, shift, residual, residual_scale, residual_shift))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, dropout, seed, layer, pool = inputs
    ctx.options = dropout, layer, pool
    ctx.save_for_backward(*tensors, seed)


@once_differentiable
def _backward(ctx, gradient: Tensor):
    *tensors, seed = ctx.saved_tensors
    dropout, layer, pool = ctx.options
    gradients = torch.ops.ikem_fast.residual_activation_backward(*tensors, dropout, seed, layer, pool, gradient)
    given = (
        of_value if value is not None and needed else None
        for of_value, value, needed in zip(gradients, tensors, ctx.needs_input_grad, strict=False)
    )
    return (*given, None, None, None, None)


if _extension.available():
    torch.library.register_fake("ikem_fast::residual_activation", _fake)
    torch.library.register_fake("ikem_fast::residual_activation_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::residual_activation", _backward, setup_context=_setup_context)
