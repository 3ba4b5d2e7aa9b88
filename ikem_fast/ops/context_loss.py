"""Cross-modality context: neighbours in one modality are positives in another (stage 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from ikem_fast.ops._checks import (
    as_computed,
    check_queries_keys_queue,
    check_rows_and_queue,
    check_temperature,
    check_topk,
)
from ikem_fast.ops._collectives import check_group, num_ranks
from ikem_fast.ops._sharded import sharded_pair_log_sum_exp


def context_loss(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, topk: int, group: ProcessGroup | None = None
) -> Tensor:
    """Context loss of every modality, the mean over its S - 1 partners.

    With ``s_a = q_a · queue_a`` and ``p_a = q_a · k_a``, the logits of the ordered pair (a, b) are
    ``[p_a, s_a, s_a * s_b] / temperature``; positive are p_a and, in both other parts, the ``topk`` largest of s_b.
    Gradients reach q_a and q_b. Computed by :func:`ikem_fast.ops.pair_log_sum_exp`, in memory that does not grow with
    K wherever that has a kernel.

    Args:
        q: (S, N, D) unit query embeddings, S >= 2.
        k: (S, N, D) unit key embeddings of the same clips.
        queue: (S, D, K) unit keys of earlier clips; column i of all modalities is the same clip. Must not change
            before backward.
        temperature: divides the similarities; above 0.
        topk: number of neighbours mined in the partner's queue.
        group: the ranks that share the queue. Then ``queue`` is this rank's K / W columns of it
            (:func:`ikem_fast.ops.queue_columns`) and q and k are this rank's clips, as many on every rank; results and
            gradients are those with the whole queue. ``None`` if the queue is whole.

    Returns:
        (S,) mean over positives, clips and partners; float32 for bfloat16.

    Raises:
        ValueError: an argument of the wrong shape or value.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 6.
    """
    return context_loss_and_accuracy(q, k, queue, temperature, topk, group)[0]


def context_loss_and_accuracy(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, topk: int, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`context_loss` and how often the contrast within a modality is won, which its similarities tell as well.

    Returns:
        The losses (S,), and the share (S,) of clips whose own key is more similar to the query than every key of the
        queue, without gradient.
    """
    _check_arguments(q, k, queue, temperature, topk, group)
    streams = q.shape[0]
    scale = 1 / temperature
    found = sharded_pair_log_sum_exp(q, queue, scale, topk, None, None, group)
    positive = (as_computed(q) * as_computed(k)).sum(dim=2)  # (S, N)
    own = torch.logaddexp(scale * positive, found.single)
    # Of the ordered pair (a, b), all (S, S, N); what stands at a = b is left out in the end.
    pair = found.pair.index_select(0, _pair_rows(streams, q.device).flatten()).unflatten(0, (streams, streams))
    total = torch.logaddexp(own.unsqueeze(1), pair)
    # mined[b, n, i, a] is s_a at the neighbours of b, and mined[b, n, i, b] is s_b there.
    partner = found.mined.diagonal(dim1=0, dim2=3).permute(2, 0, 1).unsqueeze(-1)
    mined = (found.mined * (1 + partner)).sum(dim=2).permute(2, 0, 1)
    positives = scale * (positive.unsqueeze(1) + mined) / (1 + 2 * topk)
    same = torch.eye(streams, dtype=torch.bool, device=q.device)
    losses = (total - positives).mean(dim=2).masked_fill(same, 0)
    nearest = found.mined[:, :, 0].diagonal(dim1=0, dim2=2).mT
    return losses.sum(dim=1) / (streams - 1), (positive > nearest).to(losses.dtype).mean(dim=1)


def context_loss_reference(q: Tensor, k: Tensor, queue: Tensor, temperature: float, topk: int) -> Tensor:
    """:func:`context_loss` in plain PyTorch: the same arguments, result and errors."""
    _check_arguments(q, k, queue, temperature, topk)
    q, k, queue = as_computed(q), as_computed(k), as_computed(queue.to(q.dtype))
    streams, queue_size = q.shape[0], queue.shape[2]
    positive = (q * k).sum(dim=2, keepdim=True)
    similarity = q @ queue
    neighbours = similarity.topk(topk, dim=2).indices
    losses = []
    for a in range(streams):
        pair_losses = []
        for b in range(streams):
            if a == b:
                continue
            product = similarity[a] * similarity[b]
            logits = torch.cat([positive[a], similarity[a], product], dim=1) / temperature
            own = torch.zeros_like(neighbours[b][:, :1])
            positives = torch.cat([own, neighbours[b] + 1, neighbours[b] + 1 + queue_size], dim=1)
            pair_losses.append(-logits.log_softmax(dim=1).gather(1, positives).mean())
        losses.append(torch.stack(pair_losses).mean())
    return torch.stack(losses)


def _check_arguments(
    q: Tensor, k: Tensor, queue: Tensor, temperature: float, topk: int, group: ProcessGroup | None = None
) -> None:
    check_group(group)
    check_queries_keys_queue(q, k, queue)
    check_temperature(temperature)
    check_topk(topk, num_ranks(group) * queue.shape[2])
    check_rows_and_queue("q", q, queue)
    if q.shape[0] < 2:
        raise ValueError(f"q must hold at least 2 modalities to exchange context, got {q.shape[0]}")


def _pair_rows(streams: int, device: torch.device) -> Tensor:
    """The row of pair (a, b) among pairs a < b in the order of ``torch.triu_indices``, (S, S); any row for a = b."""
    number = torch.arange(streams, device=device)
    first, second = torch.minimum(number, number.unsqueeze(1)), torch.maximum(number, number.unsqueeze(1))
    rows = first * (2 * streams - first - 1) // 2 + second - first - 1
    return torch.where(first == second, 0, rows)
