"""Differentiable collectives on the rows of all ranks, of operators that gloo and NCCL both have in every torch.

All ranks must call them in the same order with tensors of the same sizes, gradient wanted or not alike on all; then
backward, which communicates too, runs in the same order everywhere. Nothing waits for the device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def check_group(group: ProcessGroup | None) -> None:
    if group is not None and not isinstance(group, ProcessGroup):
        raise ValueError(f"group must be a torch.distributed.ProcessGroup that this rank is in, or None, got {group!r}")


def num_ranks(group: ProcessGroup | None) -> int:
    """How many ranks share the work, 1 without a group."""
    return 1 if group is None else group.size()


def gather_rows(x: Tensor, group: ProcessGroup | None) -> Tensor:
    """The rows of all ranks in rank order, (B, W·N, ...) of each rank's x (B, N, ...).

    Backward gives every rank the sum over ranks of the gradients of its rows, added in rank order.
    """
    return x if group is None or group.size() == 1 else _GatherRows.apply(x, group)


def scatter_rows(values: Tensor, group: ProcessGroup) -> Tensor:
    """What every rank has for this rank's rows: (W, B, N, ...) of values (B, W·N, ...) for the rows of all.

    Backward returns the gradients to the ranks that the values came from.
    """
    ranks = group.size()
    return _Exchange.apply(values.unflatten(1, (ranks, values.shape[1] // ranks)).movedim(1, 0), group)


def _exchange(x: Tensor, group: ProcessGroup) -> Tensor:
    """Of x (W, ...) the r-th part goes to rank r; what comes from rank r is the r-th part of the result."""
    received = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    distributed.all_to_all_single(received, x.contiguous(), group=group)
    return received


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _exchange(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(group.size())]
        distributed.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # As much is sent as a reduce-scatter would; the order of the sum is fixed, and bfloat16 is added in float32.
        return scatter_rows(gradient, ctx.group).sum(dim=0), None
