"""Contrast against a queue in one pass: log-sum-exp, the largest logit and the gradient, with no logits kept."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ikem_fast import _extension
from ikem_fast.ops._checks import as_computed, check_rows_and_queue, check_tensor, computed_dtype, has_kernel


def queue_log_sum_exp(x: Tensor, queue: Tensor, positive: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """``log(exp(positive) + sum over j of exp(scale * x·queue_j))`` of each row, and the largest of the queue's logits.

    The queue is read once, in tiles; nothing of its length is made. The gradient with respect to ``x`` is made in the
    same pass, so that ``queue`` may be changed before backward. float64 and float32 are computed as they are, bfloat16
    with bfloat16 products summed in float32; results are float32, for float64 input float64. The same bits every time
    for the same number of threads. On a device without a kernel this is :func:`queue_log_sum_exp_reference`.

    Args:
        x: (B, R, D) float32, bfloat16 or (not compiled for CUDA) float64.
        queue: (B, D, K), one key a column, of x's dtype; for bfloat16 x also float32, of which each number is rounded
            as it is read. Any strides. Must not require a gradient.
        positive: (B, R) floating point, a logit that is already scaled; -inf for none.
        scale: factor of the similarities; above 0.

    Returns:
        The log-sum-exps (B, R), differentiable once in ``x`` and ``positive``, and the largest ``scale * x·queue_j``
        (B, R), -inf for K = 0, without gradient.

    Raises:
        ValueError: an argument of the wrong shape, dtype or device, a scale that is not above 0, or a queue that
            requires a gradient.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.
    """
    _check_arguments(x, queue, positive, scale)
    _extension.require()
    if not has_kernel(x):
        return queue_log_sum_exp_reference(x, queue, positive, scale)
    with_gradient = x.requires_grad and torch.is_grad_enabled()
    log_sum_exp, best, _ = torch.ops.ikem_fast.queue_log_sum_exp(
        x, queue, positive.to(computed_dtype(x)), scale, with_gradient
    )
    return log_sum_exp, best.detach()


def queue_log_sum_exp_reference(x: Tensor, queue: Tensor, positive: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """:func:`queue_log_sum_exp` in plain PyTorch: the same arguments, results and errors."""
    _check_arguments(x, queue, positive, scale)
    dtype = computed_dtype(x)
    logits = scale * (as_computed(x) @ as_computed(queue.to(x.dtype)))
    best = logits.detach().amax(dim=2) if queue.shape[2] else logits.new_full(x.shape[:2], -math.inf)
    return torch.cat([positive.to(dtype).unsqueeze(2), logits], dim=2).logsumexp(dim=2), best


def _check_arguments(x: Tensor, queue: Tensor, positive: Tensor, scale: float) -> None:
    check_tensor("x", x, "(B, R, D)", None, None, None)
    batch, rows, size = x.shape
    check_tensor("queue", queue, "(B, D, K)", batch, size, None)
    check_tensor("positive", positive, "(B, R)", batch, rows)
    check_rows_and_queue("x", x, queue)
    if positive.device != x.device:
        raise ValueError(f"positive must be on x's device {x.device}, got {positive.device}")
    if not 0 < scale < math.inf:
        raise ValueError(f"scale must be above 0 and finite, got {scale}")


def _fake(x, queue, positive, scale, with_gradient):
    dtype = computed_dtype(x)
    statistics = x.new_empty(x.shape[:2], dtype=dtype)
    gradient = x.new_empty(x.shape if with_gradient else (0,), dtype=dtype)
    return statistics, torch.empty_like(statistics), gradient


def _setup_context(ctx, inputs, output) -> None:
    x, _, positive, _, with_gradient = inputs
    log_sum_exp, _, gradient = output
    ctx.set_materialize_grads(False)
    ctx.dtype = x.dtype
    ctx.with_gradient = with_gradient
    ctx.save_for_backward(gradient, positive, log_sum_exp)


@once_differentiable
def _backward(ctx, upstream: Tensor | None, _best: Tensor | None, _gradient: Tensor | None):
    if upstream is None:
        return None, None, None, None, None
    gradient, positive, log_sum_exp = ctx.saved_tensors
    of_x = of_positive = None
    if ctx.needs_input_grad[0]:
        if not ctx.with_gradient:
            raise RuntimeError("queue_log_sum_exp has no gradient of x: it was called with with_gradient=False")
        of_x = (upstream.unsqueeze(2) * gradient).to(ctx.dtype)
    if ctx.needs_input_grad[2]:
        # A logit of -inf has no share, also where it is all there is.
        of_positive = upstream * torch.where(positive == -math.inf, 0.0, torch.exp(positive - log_sum_exp))
    return of_x, None, of_positive, None, None


if _extension.available():
    torch.library.register_fake("ikem_fast::queue_log_sum_exp", _fake)
    torch.library.register_autograd("ikem_fast::queue_log_sum_exp", _backward, setup_context=_setup_context)
