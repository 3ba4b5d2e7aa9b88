"""Batch statistics over the batches of several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup, all_gather, all_reduce


def synchronise_moments(mean: Tensor, variance: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the values of all processes, from those of each one's values.

    One collective, and one in backward. The results are the same on every process, bit for bit.

    Args:
        mean: of this process's values, of any shape, floating point.
        variance: likewise, not corrected for the number of values. Every process must have as many.
        group: the processes; all of them call this with the same shapes.

    Returns:
        mean and variance, differentiable once. A process's gradients are those of the sum of what all processes make
        of them.
    """
    return _SynchroniseMoments.apply(mean, variance, group)


class _SynchroniseMoments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mean: Tensor, variance: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor]:
        own = torch.stack([mean, variance])
        of_ranks = [torch.empty_like(own) for _ in range(group.size())]
        all_gather(of_ranks, own, group=group)
        means, variances = torch.stack(of_ranks, dim=1)
        whole = means.mean(dim=0)
        ctx.group = group
        ctx.save_for_backward(mean - whole)
        return whole, (variances + (means - whole).square()).mean(dim=0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_mean: Tensor, of_variance: Tensor) -> tuple[Tensor, Tensor, None]:
        (offset,) = ctx.saved_tensors
        gradients = torch.stack([of_mean, of_variance])
        all_reduce(gradients, group=ctx.group)
        of_mean, of_variance = gradients / ctx.group.size()
        return of_mean + 2 * offset * of_variance, of_variance, None
