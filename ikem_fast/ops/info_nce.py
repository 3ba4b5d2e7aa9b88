"""Contrast of each query with its key against a queue of other keys (stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ikem_fast.ops._checks import (
    as_computed,
    check_queries_keys_queue,
    check_rows_and_queue,
    check_temperature,
)
from ikem_fast.ops._collectives import check_group
from ikem_fast.ops._sharded import sharded_queue_log_sum_exp


def info_nce_reference(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """InfoNCE of every stream: cross-entropy of ``[q·k, q·queue] / temperature``, the first being the target.

    Args:
        q: (S, N, D) unit query embeddings.
        k: (S, N, D) unit key embeddings of the same clips.
        queue: (S, D, K) unit keys of earlier clips, one a column.
        temperature: divides the similarities; above 0.

    Returns:
        (S,) mean over the clips.

    Source: docs/method.md section 5.
    """
    _check_arguments(q, k, queue, temperature)
    q, k, queue = as_computed(q), as_computed(k), as_computed(queue.to(q.dtype))
    positive = (q * k).sum(dim=2, keepdim=True)
    logits = torch.cat([positive, q @ queue], dim=2) / temperature
    return -logits.log_softmax(dim=2)[..., 0].mean(dim=1)


def info_nce(q: Tensor, k: Tensor, queue: Tensor, temperature: float, group: ProcessGroup | None = None) -> Tensor:
    """:func:`info_nce_reference` in one pass over the queue, keeping nothing of its length
    (:func:`ikem_fast.ops.queue_log_sum_exp`).

    Takes the same arguments: float32, float64, or bfloat16 (the queue also float32) with sums in float32.
    Differentiable once in q and k, not in the queue, which may be changed before backward. Losses are float32, for
    float64 input float64.

    Args:
        group: the ranks that share the queue. Then ``queue`` is this rank's K / W columns of it
            (:func:`ikem_fast.ops.queue_columns`) and q and k are this rank's clips, as many on every rank; results and
            gradients are those with the whole queue. ``None`` if the queue is whole.
    """
    return info_nce_and_accuracy(q, k, queue, temperature, group)[0]


def info_nce_and_accuracy(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`info_nce` and how often the contrast is won.

    Returns:
        The losses (S,), and the share (S,) of clips whose own key is more similar to the query than every key of the
        queue, without gradient.
    """
    _check_arguments(q, k, queue, temperature)
    check_group(group)
    scale = 1 / temperature
    positive = (as_computed(q) * as_computed(k)).sum(dim=2) * scale
    log_sum_exp, best = sharded_queue_log_sum_exp(q, queue, positive, scale, group)
    return (log_sum_exp - positive).mean(dim=1), (positive > best).to(best.dtype).mean(dim=1)


def _check_arguments(q: Tensor, k: Tensor, queue: Tensor, temperature: float) -> None:
    check_queries_keys_queue(q, k, queue)
    check_temperature(temperature)
    check_rows_and_queue("q", q, queue)
