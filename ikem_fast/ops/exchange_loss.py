"""Implicit knowledge exchange: one modality predicts the embedding of all (stage 2)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from ikem_fast.ops._checks import as_computed, check_rows_and_queue, check_temperature, check_tensor
from ikem_fast.ops._collectives import check_group
from ikem_fast.ops._sharded import sharded_queue_log_sum_exp


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
    _check_arguments(e, k, queue, temperature)
    e, k, queue = as_computed(e), as_computed(k), as_computed(queue.to(e.dtype))
    joint_key = functional.normalize(torch.cat(list(k), dim=1), dim=1)
    joint_queue = functional.normalize(torch.cat(list(queue), dim=0), dim=0)
    positive = (e * joint_key).sum(dim=2, keepdim=True)
    logits = torch.cat([positive, e @ joint_queue], dim=2) / temperature
    return -logits.log_softmax(dim=2)[..., 0].mean(dim=1)


def exchange_loss(e: Tensor, k: Tensor, queue: Tensor, temperature: float, group: ProcessGroup | None = None) -> Tensor:
    """:func:`exchange_loss_reference` in one pass over the queue, keeping nothing of its length
    (:func:`ikem_fast.ops.queue_log_sum_exp`).

    Takes the same arguments: float32, float64, or bfloat16 (the queue also float32) with sums in float32. The
    concatenation of a column of every modality is taken to have the norm √S that S unit keys give it. Differentiable
    once in e and k, not in the queue, which may be changed before backward. Losses are float32, for float64 input
    float64.

    Args:
        group: the ranks that share the queue. Then ``queue`` is this rank's K / W columns of it
            (:func:`ikem_fast.ops.queue_columns`) and e and k are this rank's clips, as many on every rank; results and
            gradients are those with the whole queue. ``None`` if the queue is whole.
    """
    return exchange_loss_and_accuracy(e, k, queue, temperature, group)[0]


def exchange_loss_and_accuracy(
    e: Tensor, k: Tensor, queue: Tensor, temperature: float, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor]:
    """:func:`exchange_loss` and how often the contrast is won.

    Returns:
        The losses (S,), and the share (S,) of clips whose own joint key is more similar to the prediction than that of
        every clip in the queue, without gradient.
    """
    _check_arguments(e, k, queue, temperature)
    check_group(group)
    streams, num_clips, joint_size = e.shape
    joint_key = functional.normalize(torch.cat(list(as_computed(k)), dim=1), dim=1)
    positive = (as_computed(e) * joint_key).sum(dim=2) / temperature
    log_sum_exp, best = sharded_queue_log_sum_exp(
        e.reshape(1, streams * num_clips, joint_size),
        queue.reshape(1, joint_size, queue.shape[2]),
        positive.reshape(1, streams * num_clips),
        1 / (temperature * math.sqrt(streams)),
        group,
    )
    losses = log_sum_exp.view_as(positive) - positive
    return losses.mean(dim=1), (positive > best.view_as(positive)).to(best.dtype).mean(dim=1)


def _check_arguments(e: Tensor, k: Tensor, queue: Tensor, temperature: float) -> None:
    check_tensor("k", k, "(S, N, D)", None, None, None)
    streams, num_clips, size = k.shape
    check_tensor("e", e, "(S, N, S*D)", streams, num_clips, streams * size)
    check_tensor("queue", queue, "(S, D, K)", streams, size, None)
    check_temperature(temperature)
    check_rows_and_queue("e", e, queue)
