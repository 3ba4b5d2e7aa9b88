"""Contrast of each query with its key against a queue of other keys (stage 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from ikem_fast.ops._checks import check_queries_keys_queue, check_temperature


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
    check_queries_keys_queue(q, k, queue)
    check_temperature(temperature)
    positive = (q * k).sum(dim=2, keepdim=True)
    logits = torch.cat([positive, q @ queue], dim=2) / temperature
    return -logits.log_softmax(dim=2)[..., 0].mean(dim=1)


info_nce = info_nce_reference
