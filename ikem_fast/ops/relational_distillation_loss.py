"""Relational cross-modality distillation: the student keeps the teacher's neighbours."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ikem_fast.ops._checks import check_temperature, check_tensor, check_topk


def relational_distillation_loss_reference(
    student: Tensor, teacher: Tensor, queues: Tensor, teacher_queue: Tensor, temperature: float, topk: int
) -> Tensor:
    """Distillation loss of every student, the mean over the S teacher modalities.

    With ``t = normalize(concatenation of the teacher's S embeddings)``, ``g = u · teacher_queue`` and
    ``s_a = q_a · queue_a``, the logits for teacher modality a are ``[u · t, g, s_a * g] / temperature``; positive are
    u·t and, in both other parts, the ``topk`` largest of s_a.

    Args:
        student: (students, N, S·D) unit embeddings of the students.
        teacher: (S, N, D) unit embeddings of the teacher's modalities.
        queues: (S, D, K) the teacher's earlier embeddings, one queue a modality.
        teacher_queue: (S·D, K) the teacher's earlier ``t``; column i is the same clip in all queues.
        temperature: divides the similarities; above 0.
        topk: number of neighbours mined in each queue.

    Returns:
        (students,) mean over positives, clips and teacher modalities.

    Source: docs/method.md section 7.
    """
    check_tensor("teacher", teacher, "(S, N, D)", None, None, None)
    streams, num_clips, size = teacher.shape
    check_tensor("student", student, "(students, N, S*D)", None, num_clips, streams * size)
    check_tensor("queues", queues, "(S, D, K)", streams, size, None)
    queue_size = queues.shape[2]
    check_tensor("teacher_queue", teacher_queue, "(S*D, K)", streams * size, queue_size)
    check_temperature(temperature)
    check_topk(topk, queue_size)
    target = functional.normalize(torch.cat(list(teacher), dim=1), dim=1)
    similarity = teacher @ queues
    neighbours = similarity.topk(topk, dim=2).indices
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


relational_distillation_loss = relational_distillation_loss_reference
