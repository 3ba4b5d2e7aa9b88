"""Implicit knowledge exchange: one modality predicts the embedding of all (stage 2)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ikem_fast.ops._checks import check_temperature, check_tensor


def exchange_loss_reference(e: Tensor, k: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """Implicit exchange loss of every modality.

    ``k* = normalize(concatenation of the S keys)``, the queue likewise; cross-entropy of
    ``[e_a · k*, e_a · queue*] / temperature``, the first being the target.

    Args:
        e: (S, N, S·D) unit exchange embeddings.
        k: (S, N, D) unit key embeddings of the same clips.
        queue: (S, D, K) unit keys of earlier clips; column i of all modalities is the same clip.
        temperature: divides the similarities; above 0.

    Returns:
        (S,) mean over the clips.

    Source: docs/method.md section 6.
    """
    check_tensor("k", k, "(S, N, D)", None, None, None)
    streams, num_clips, size = k.shape
    check_tensor("e", e, "(S, N, S*D)", streams, num_clips, streams * size)
    check_tensor("queue", queue, "(S, D, K)", streams, size, None)
    check_temperature(temperature)
    joint_key = functional.normalize(torch.cat(list(k), dim=1), dim=1)
    joint_queue = functional.normalize(torch.cat(list(queue), dim=0), dim=0)
    positive = (e * joint_key).sum(dim=2, keepdim=True)
    logits = torch.cat([positive, e @ joint_queue], dim=2) / temperature
    return -logits.log_softmax(dim=2)[..., 0].mean(dim=1)


exchange_loss = exchange_loss_reference
