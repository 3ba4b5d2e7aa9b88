"""Relational cross-modality distillation: the student keeps the teacher's neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn import functional

from ikem_fast.ops._checks import (
    as_computed,
    check_constant,
    check_rows_and_queue,
    check_temperature,
    check_tensor,
    check_topk,
)
from ikem_fast.ops._collectives import check_group, num_ranks
from ikem_fast.ops._sharded import sharded_pair_log_sum_exp


def relational_distillation_loss(
    student: Tensor,
    teacher: Tensor,
    queues: Tensor,
    teacher_queue: Tensor,
    temperature: float,
    topk: int,
    group: ProcessGroup | None = None,
) -> Tensor:
    """Distillation loss of every student, the mean over the S teacher modalities.

    With ``t = normalize(concatenation of the teacher's S embeddings)``, ``g = u · teacher_queue`` and
    ``s_a = q_a · queue_a``, the logits for teacher modality a are ``[u · t, g, s_a * g] / temperature``; positive are
    u·t and, in both other parts, the ``topk`` largest of s_a. Gradients reach u. Computed by
    :func:`ikem_fast.ops.pair_log_sum_exp`, in memory that does not grow with K wherever that has a kernel.

    Args:
        student: (students, N, S·D) unit embeddings of the students.
        teacher: (S, N, D) unit embeddings of the teacher's modalities.
        queues: (S, D, K) the teacher's earlier embeddings, one queue a modality.
        teacher_queue: (S·D, K) the teacher's earlier ``t``; column i is the same clip in all queues.
            Neither queue may change before backward.
        temperature: divides the similarities; above 0.
        topk: number of neighbours mined in each queue.
        group: the ranks that share the queues. Then queues are this rank's K / W columns of them
            (:func:`ikem_fast.ops.queue_columns`) and student and teacher are this rank's clips, as many on every rank;
            results and gradients are those with whole queues. ``None`` if the queues are whole.

    Returns:
        (students,) mean over positives, clips and teacher modalities; float32 for bfloat16.

    Raises:
        ValueError: an argument of the wrong shape or value, or another than ``student`` that requires a gradient.
        ikem_fast._extension.ExtensionError: the package's compiled part is missing or does not fit this torch.

    Source: docs/method.md section 7.
    """
    _check_arguments(student, teacher, queues, teacher_queue, temperature, topk, group)
    scale = 1 / temperature
    found = sharded_pair_log_sum_exp(teacher, queues, scale, topk, student, teacher_queue, group)
    positive = (as_computed(student) * _target(as_computed(teacher))).sum(dim=2)  # (students, N)
    own = torch.logaddexp(scale * positive, found.single)
    total = torch.logaddexp(own, found.pair.unflatten(0, (teacher.shape[0], student.shape[0])))  # (S, students, N)
    similarity, relations = found.mined[..., :1], found.mined[..., 1:]
    mined = (relations * (1 + similarity)).sum(dim=2).transpose(1, 2)
    positives = scale * (positive + mined) / (1 + 2 * topk)
    return (total - positives).mean(dim=(0, 2))


def relational_distillation_loss_reference(
    student: Tensor, teacher: Tensor, queues: Tensor, teacher_queue: Tensor, temperature: float, topk: int
) -> Tensor:
    """:func:`relational_distillation_loss` in plain PyTorch: the same arguments, result and errors."""
    _check_arguments(student, teacher, queues, teacher_queue, temperature, topk)
    queues, teacher_queue = as_computed(queues.to(teacher.dtype)), as_computed(teacher_queue.to(student.dtype))
    student, teacher = as_computed(student), as_computed(teacher)
    target = _target(teacher)
    similarity = teacher @ queues
    neighbours = similarity.topk(topk, dim=2).indices
    streams, queue_size = teacher.shape[0], queues.shape[2]
    losses = []
    for embedding in student:
        positive = (embedding * target).sum(dim=1, keepdim=True)
        relation = embedding @ teacher_queue
        modality_losses = []
        for a in range(streams):
            logits = torch.cat([positive, relation, similarity[a] * relation], dim=1) / temperature
            own = torch.zeros_like(neighbours[a][:, :1])
            positives = torch.cat([own, neighbours[a] + 1, neighbours[a] + 1 + queue_size], dim=1)
            modality_losses.append(-logits.log_softmax(dim=1).gather(1, positives).mean())
        losses.append(torch.stack(modality_losses).mean())
    return torch.stack(losses)


def _target(teacher: Tensor) -> Tensor:
    """The teacher's joint embedding t, (N, S·D)."""
    return functional.normalize(torch.cat(list(teacher), dim=1), dim=1)


def _check_arguments(
    student: Tensor,
    teacher: Tensor,
    queues: Tensor,
    teacher_queue: Tensor,
    temperature: float,
    topk: int,
    group: ProcessGroup | None = None,
) -> None:
    check_group(group)
    check_tensor("teacher", teacher, "(S, N, D)", None, None, None)
    streams, num_clips, size = teacher.shape
    check_tensor("student", student, "(students, N, S*D)", None, num_clips, streams * size)
    check_tensor("queues", queues, "(S, D, K)", streams, size, None)
    queue_size = queues.shape[2]
    check_tensor("teacher_queue", teacher_queue, "(S*D, K)", streams * size, queue_size)
    check_temperature(temperature)
    check_topk(topk, num_ranks(group) * queue_size)
    check_rows_and_queue("teacher", teacher, queues, "queues")
    check_rows_and_queue("student", student, teacher_queue, "teacher_queue")
    check_constant("teacher", teacher)
