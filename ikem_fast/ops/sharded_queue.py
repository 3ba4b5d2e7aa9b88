"""Queues that are spread over ranks: which columns a rank keeps, and the way from whole queues to parts and back."""

from __future__ import annotations

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from ikem_fast.ops._collectives import check_group, num_ranks

# What rank 0 holds at once beside the whole queue, which is on the CPU.
_GATHERED_BYTES = 64 << 20


def queue_columns(queue_size: int, group: ProcessGroup | None) -> slice:
    """The columns of a queue that this rank keeps: of W ranks the r-th keeps ``r * K / W ... (r + 1) * K / W - 1``.

    Args:
        queue_size: K.
        group: the ranks that share the queue; ``None`` for all columns.

    Raises:
        ValueError: the number of ranks does not divide K.
    """
    check_group(group)
    ranks = num_ranks(group)
    if queue_size % ranks != 0:
        raise ValueError(f"queue_size must be a multiple of the {ranks} ranks that share the queue, got {queue_size}")
    columns = queue_size // ranks
    rank = 0 if group is None else group.rank()
    return slice(rank * columns, (rank + 1) * columns)


def own_columns(queue: Tensor, group: ProcessGroup | None) -> Tensor:
    """This rank's columns of a whole queue (..., K), as a tensor of their own.

    Raises:
        ValueError: the number of ranks does not divide K.
    """
    return queue[..., queue_columns(queue.shape[-1], group)].clone(memory_format=torch.contiguous_format)


@torch.no_grad()
def gather_queue(queue: Tensor, group: ProcessGroup | None) -> Tensor | None:
    """The whole queue of which every rank keeps some columns, for a checkpoint.

    Goes block by block, so that the device never holds a second copy. Every rank of the group must call it.

    Args:
        queue: (..., K / W), this rank's columns, at least one dimension before them.
        group: the ranks that share the queue; ``None`` if ``queue`` is whole.

    Returns:
        On the group's first rank the queue (..., K) on the CPU, in memory of its own; on others ``None``.
    """
    check_group(group)
    if group is None or group.size() == 1:
        return queue.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    ranks, columns = group.size(), queue.shape[-1]
    rows = queue.flatten(0, -2)
    whole = torch.empty((len(rows), ranks, columns), dtype=queue.dtype) if group.rank() == 0 else None
    rows_of_block = max(1, _GATHERED_BYTES // max(1, ranks * columns * queue.element_size()))
    for start in range(0, len(rows), rows_of_block):
        block = rows[start : start + rows_of_block].contiguous()
        parts = None if whole is None else [torch.empty_like(block) for _ in range(ranks)]
        distributed.gather(block, parts, group=group, group_dst=0)
        if whole is not None and parts is not None:
            for rank, part in enumerate(parts):
                whole[start : start + rows_of_block, rank] = part
    return None if whole is None else whole.view(*queue.shape[:-1], ranks * columns)
