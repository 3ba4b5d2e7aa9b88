"""``queue_log_sum_exp`` and ``pair_log_sum_exp`` against queues of which every rank keeps some of the columns.

The rows of all ranks are compared with the columns that are here, and of what comes out the ranks get the part for
their own rows: in all the same products as with whole queues, and no more traffic than embeddings and a few numbers a
row. Memory is that of the operators, independent of the length of the queues.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ikem_fast.ops._checks import computed_dtype
from ikem_fast.ops._collectives import gather_rows, scatter_rows
from ikem_fast.ops.pair_log_sum_exp import PairLogSumExp, pair_log_sum_exp
from ikem_fast.ops.queue_log_sum_exp import queue_log_sum_exp


def sharded_queue_log_sum_exp(
    x: Tensor, queue: Tensor, positive: Tensor, scale: float, group: ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """:func:`ikem_fast.ops.queue_log_sum_exp` of this rank's rows and the columns of all ranks.

    Args:
        x: (B, R, D), this rank's rows, as many on every rank.
        queue: (B, D, K / W), the columns that are here, as many on every rank.
        positive: (B, R), of this rank's rows.
        scale: factor of the similarities; above 0.
        group: the W ranks that keep columns; ``None`` if all are here.
    """
    if group is None or group.size() == 1:
        return queue_log_sum_exp(x, queue, positive, scale)
    rows = gather_rows(x, group)
    nothing = torch.full(rows.shape[:2], -math.inf, dtype=computed_dtype(x), device=x.device)
    log_sum_exp, best = queue_log_sum_exp(rows, queue, nothing, scale)
    of_ranks, best_of_ranks = scatter_rows(torch.stack([log_sum_exp, best], dim=2), group).unbind(3)
    every = torch.cat([positive.to(of_ranks.dtype).unsqueeze(0), of_ranks])
    return every.logsumexp(dim=0), best_of_ranks.detach().amax(dim=0)


def sharded_pair_log_sum_exp(
    x: Tensor,
    queue: Tensor,
    scale: float,
    topk: int,
    y: Tensor | None,
    y_queue: Tensor | None,
    group: ProcessGroup | None,
) -> PairLogSumExp:
    """:func:`ikem_fast.ops.pair_log_sum_exp` of this rank's rows and the columns of all ranks.

    Args:
        x: (A, N, D), this rank's rows, as many on every rank.
        queue: (A, D, K / W), the columns that are here, as many on every rank.
        scale: 1 / temperature, above 0.
        topk: number of neighbours, 1 ... K.
        y: (U, N, E) this rank's rows, or ``None``.
        y_queue: (E, K / W), or ``None``.
        group: the W ranks that keep columns; ``None`` if all are here.

    Returns:
        As for whole queues; ``neighbours`` counts the columns of all ranks, those of the first rank first.
    """
    if group is None or group.size() == 1:
        return pair_log_sum_exp(x, queue, scale, topk, y, y_queue)
    columns = queue.shape[2]
    y_rows = None if y is None else gather_rows(y, group)
    here = pair_log_sum_exp(gather_rows(x, group), queue, scale, min(topk, columns), y_rows, y_queue)
    single, pair, mined = _scatter_together(here.single, here.pair, here.mined, group=group)
    neighbours = scatter_rows(here.neighbours + group.rank() * columns, group)
    # Candidates of all ranks, (A, N, W * candidates of one) in rank order: of equal ones the lowest column comes first.
    mined, neighbours = mined.permute(1, 2, 0, 3, 4).flatten(2, 3), neighbours.permute(1, 2, 0, 3).flatten(2, 3)
    own = mined.diagonal(dim1=0, dim2=3).permute(2, 0, 1) if y is None else mined[..., 0]
    order = own.detach().sort(dim=2, descending=True, stable=True).indices[..., :topk]
    return PairLogSumExp(
        single.logsumexp(dim=0),
        pair.logsumexp(dim=0),
        neighbours.gather(2, order),
        mined.gather(2, order.unsqueeze(3).expand(-1, -1, -1, mined.shape[3])),
    )


def _scatter_together(*values: Tensor, group: ProcessGroup) -> list[Tensor]:
    """``scatter_rows`` of several tensors (B, W·N, ...) of one dtype in one message."""
    wide = [value.movedim(1, 0).flatten(1) for value in values]  # (W·N, numbers of a row)
    received = scatter_rows(torch.cat(wide, dim=1).unsqueeze(0), group).squeeze(1)  # (W, N, numbers)
    parts = received.split([one.shape[1] for one in wide], dim=2)
    return [
        part.unflatten(2, (value.shape[0], *value.shape[2:])).movedim(2, 1)
        for part, value in zip(parts, values, strict=True)
    ]
