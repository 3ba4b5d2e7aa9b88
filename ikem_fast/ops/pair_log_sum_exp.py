"""Log-sum-exps of similarities with queues and of their products, with the nearest neighbours, in one pass."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import (
    as_computed,
    check_constant,
    check_rows_and_queue,
    check_tensor,
    check_topk,
    computed_dtype,
    describe,
    has_kernel,
)


class PairLogSumExp(NamedTuple):
    """What :func:`pair_log_sum_exp` returns, in float32 (float64 for float64).

    Attributes:
        single: (A, N) of the similarities s_a; with y (U, N) of g_u.
        pair: (A (A - 1) / 2, N) of the products s_a s_b, a < b, in the order of ``torch.triu_indices(A, A, 1)``; with
            y (A U, N), row a U + u being that of s_a g_u.
        neighbours: (A, N, topk) int64, where s_a is largest, in descending order; of equal values the lowest position.
        mined: (A, N, topk, A): ``mined[b, n, i, a]`` is s_a at ``neighbours[b, n, i]``; with y (A, N, topk, 1 + U):
            s_a, g_0 ... at a's own neighbours.
    """

    single: Tensor
    pair: Tensor
    neighbours: Tensor
    mined: Tensor


def pair_log_sum_exp(
    x: Tensor,
    queue: Tensor,
    scale: float,
    topk: int,
    y: Tensor | None = None,
    y_queue: Tensor | None = None,
) -> PairLogSumExp:
    """What context and distillation need of similarities with queues of K keys, in memory that does not grow with K.

    With ``s_a = x_a @ queue_a`` and, where there is y, ``g_u = y_u @ y_queue``: the log-sum-exps over the keys of
    ``scale`` times the similarities and their products, and the largest s_a of every row with the other similarities
    there. Goes through the queues in tiles; safe for similarities of any size whose products are finite. Differentiable
    once, in x or, where there is y, in y alone: backward computes the similarities again, so the queues must not change
    before. Runs a compiled kernel on the CPU and, if the package was built with its CUDA part, on CUDA; otherwise it is
    :func:`pair_log_sum_exp_reference`.

    Args:
        x: (A, N, D), float32, bfloat16 or float64. bfloat16 is multiplied as such and added up in float32.
        queue: (A, D, K) of the dtype of x with any strides; float32 beside bfloat16 is rounded tile by tile.
        scale: 1 / temperature, above 0.
        topk: number of neighbours, 1 ... K.
        y: (U, N, E) of the dtype of x; with y, x must not require a gradient.
        y_queue: (E, K) of the dtype of queue.

    Raises:
        ValueError: an argument of the wrong shape, dtype, device or value, or one without a gradient that requires one.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md sections 6 and 7.
    """
    _check_arguments(x, queue, scale, topk, y, y_queue)
    _extension.require()
    if not has_kernel(x):
        return pair_log_sum_exp_reference(x, queue, scale, topk, y, y_queue)
    return PairLogSumExp(*torch.ops.ikem_fast.pair_log_sum_exp(x, queue, y, y_queue, scale, topk))


def pair_log_sum_exp_reference(
    x: Tensor,
    queue: Tensor,
    scale: float,
    topk: int,
    y: Tensor | None = None,
    y_queue: Tensor | None = None,
) -> PairLogSumExp:
    """:func:`pair_log_sum_exp` in plain PyTorch: the same arguments, result and errors."""
    _check_arguments(x, queue, scale, topk, y, y_queue)
    s = _similarities(x, queue)
    # A stable sort keeps equal values in their order.
    neighbours = s.detach().sort(dim=2, descending=True, stable=True).indices[..., :topk].contiguous()
    if y is None or y_queue is None:
        first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
        single, products = s, s[first] * s[second]
        mined = torch.stack([one.gather(1, neighbours.permute(1, 0, 2).flatten(1)) for one in s], dim=-1)
        mined = mined.unflatten(1, (len(x), topk)).transpose(0, 1)
    else:
        single = _similarities(y, y_queue)
        products = (s.unsqueeze(1) * single).flatten(0, 1)
        mined = torch.stack([s, *(one.expand_as(s) for one in single)], dim=-1)
        mined = mined.gather(2, neighbours.unsqueeze(-1).expand(*neighbours.shape, mined.shape[-1]))
    return PairLogSumExp(
        (scale * single).logsumexp(dim=2), (scale * products).logsumexp(dim=2), neighbours, mined.contiguous()
    )


def _similarities(x: Tensor, queue: Tensor) -> Tensor:
    """Products of numbers as rounded as x, exact but for their sum."""
    return as_computed(x) @ as_computed(queue.to(x.dtype))


def _check_arguments(
    x: Tensor, queue: Tensor, scale: float, topk: int, y: Tensor | None, y_queue: Tensor | None
) -> None:
    check_tensor("x", x, "(A, N, D)", None, None, None)
    num_x, num_rows, size = x.shape
    check_tensor("queue", queue, "(A, D, K)", num_x, size, None)
    if num_x == 0 or size == 0:
        raise ValueError(f"x must be (A, N, D) with A and D not 0, got {describe(x)}")
    check_rows_and_queue("x", x, queue)
    if (y is None) != (y_queue is None):
        raise ValueError("y and y_queue must be given together")
    if y is not None and y_queue is not None:
        check_tensor("y", y, "(U, N, E)", None, num_rows, None)
        check_tensor("y_queue", y_queue, "(E, K)", y.shape[2], queue.shape[2])
        if 0 in (y.shape[0], y.shape[2]):
            raise ValueError(f"y must be (U, N, E) with U and E not 0, got {describe(y)}")
        if (y.dtype, y_queue.dtype) != (x.dtype, queue.dtype):
            raise ValueError(
                "y and y_queue must have the dtypes of x and queue, got "
                f"{describe(y)} and {describe(y_queue)} beside {describe(x)} and {describe(queue)}"
            )
        if y.device != x.device:
            raise ValueError(f"y must be on x's device {x.device}, got {y.device}")
        check_rows_and_queue("y", y, y_queue, "y_queue")
        check_constant("x", x)
    if not (scale > 0 and math.isfinite(scale)):
        raise ValueError(f"scale must be above 0 and finite, got {scale}")
    check_topk(topk, queue.shape[2])


def _fake(x, queue, y, y_queue, scale, topk):
    dtype = computed_dtype(x)
    num_x, num_rows, _ = x.shape
    num_left, num_pairs, num_mined = (
        (num_x, num_x * (num_x - 1) // 2, num_x) if y is None else (y.shape[0], num_x * y.shape[0], 1 + y.shape[0])
    )
    return (
        x.new_empty((num_left, num_rows), dtype=dtype),
        x.new_empty((num_pairs, num_rows), dtype=dtype),
        x.new_empty((num_x, num_rows, topk), dtype=torch.int64),
        x.new_empty((num_x, num_rows, topk, num_mined), dtype=dtype),
    )


def _fake_backward(
    x, queue, y, y_queue, scale, single, pair, neighbours, single_gradient, pair_gradient, mined_gradient
):
    left = x if y is None else y
    return left.new_empty(left.shape, dtype=computed_dtype(x))


def _setup_context(ctx, inputs, output) -> None:
    x, queue, y, y_queue, ctx.scale, _ = inputs
    single, pair, neighbours, _ = output
    ctx.mark_non_differentiable(neighbours)
    ctx.save_for_backward(x, queue, y, y_queue, single, pair, neighbours)


def _backward(ctx, single_gradient, pair_gradient, _, mined_gradient):
    x, queue, y, y_queue, single, pair, neighbours = ctx.saved_tensors
    gradient = torch.ops.ikem_fast.pair_log_sum_exp_backward(
        x, queue, y, y_queue, ctx.scale, single, pair, neighbours, single_gradient, pair_gradient, mined_gradient
    ).to(x.dtype)
    # x, queue, y, y_queue, scale, topk
    return (gradient if y is None else None, None, None if y is None else gradient, None, None, None)


def _second_backward(ctx, gradient):
    raise RuntimeError("pair_log_sum_exp is differentiable once, not twice: use pair_log_sum_exp_reference")


if _extension.available():
    torch.library.register_fake("ikem_fast::pair_log_sum_exp", _fake)
    torch.library.register_fake("ikem_fast::pair_log_sum_exp_backward", _fake_backward)
    torch.library.register_autograd("ikem_fast::pair_log_sum_exp", _backward, setup_context=_setup_context)
    torch.library.register_autograd("ikem_fast::pair_log_sum_exp_backward", _second_backward)
