"""Cross-modality context: neighbours in one modality are positives in another (stage 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast.ops._checks import check_queries_keys_queue, check_temperature, check_topk


def context_loss_reference(q: Tensor, k: Tensor, queue: Tensor, temperature: float, topk: int) -> Tensor:
    """Context loss of every modality, the mean over its S - 1 partners.

    With ``s_a = q_a · queue_a`` and ``p_a = q_a · k_a``, the logits of the ordered pair (a, b) are
    ``[p_a, s_a, s_a * s_b] / temperature``; positive are p_a and, in both other parts, the ``topk`` largest of s_b.
    Gradients reach q_a and q_b.

    Args:
        q: (S, N, D) unit query embeddings, S >= 2.
        k: (S, N, D) unit key embeddings of the same clips.
        queue: (S, D, K) unit keys of earlier clips; column i of all modalities is the same clip.
        temperature: divides the similarities; above 0.
        topk: number of neighbours mined in the partner's queue.

    Returns:
        (S,) mean over positives, clips and partners.

    Source: docs/method.md section 6.
    """
    check_queries_keys_queue(q, k, queue)
    check_temperature(temperature)
    check_topk(topk, queue.shape[2])
    streams, queue_size = q.shape[0], queue.shape[2]
    if streams < 2:
        raise ValueError(f"q must hold at least 2 modalities to exchange context, got {streams}")
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


context_loss = context_loss_reference
