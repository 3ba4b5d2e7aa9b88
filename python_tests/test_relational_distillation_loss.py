import numpy as np
import pytest
import torch
from contrast_inputs import largest, negative_log_share, pair_logits, units

from ikem_fast import ops

TEMPERATURE = 0.07


def inputs(students=2, streams=3, num_clips=2, size=4, queue_size=7, dtype=torch.float64):
    student = units(students, num_clips, streams * size, dim=2, seed=0, dtype=dtype)
    teacher = units(streams, num_clips, size, dim=2, seed=1, dtype=dtype)
    queues = units(streams, size, queue_size, dim=1, seed=2, dtype=dtype)
    teacher_queue = units(streams * size, queue_size, dim=0, seed=3, dtype=dtype)
    return student, teacher, queues, teacher_queue


def written_out(student, teacher, queues, teacher_queue, topk):
    streams, num_clips, _ = teacher.shape
    queue_size = queues.shape[2]
    similarity = (teacher @ queues).numpy()
    target = torch.cat(list(teacher), dim=1)
    target = target / target.norm(dim=1, keepdim=True)
    losses = np.zeros(len(student))
    for s, embedding in enumerate(student):
        for n in range(num_clips):
            relation = (embedding[n] @ teacher_queue).numpy()
            for a in range(streams):
                neighbours = largest(similarity[a, n], topk)
                positives = [0, *(1 + i for i in neighbours), *(1 + queue_size + i for i in neighbours)]
                logits = pair_logits(float(embedding[n] @ target[n]), relation, similarity[a, n], TEMPERATURE)
                losses[s] += negative_log_share(logits, positives) / (num_clips * streams)
    return torch.tensor(losses)


@pytest.mark.parametrize("topk", [1, 2])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 3, 2), (2, 3, 2, 4, 7), (3, 6, 3, 4, 19)])
def test_equals_the_formula_written_out(sizes, topk):
    arguments = inputs(*sizes)
    actual = ops.relational_distillation_loss(*arguments, TEMPERATURE, topk)
    torch.testing.assert_close(actual, written_out(*arguments, topk))


def test_gradients():
    student, *rest = inputs()
    assert torch.autograd.gradcheck(
        lambda student: ops.relational_distillation_loss(student, *rest, TEMPERATURE, 2), student.requires_grad_()
    )


def test_wrong_arguments_are_named():
    student, teacher, queues, teacher_queue = inputs()
    with pytest.raises(ValueError, match=r"teacher_queue must be \(S\*D, K\) = \(12, 7\) floating.*got \(12, 6\)"):
        ops.relational_distillation_loss(student, teacher, queues, teacher_queue[:, 1:], TEMPERATURE, 1)
    with pytest.raises(ValueError, match=r"student must be \(students, N, S\*D\) = \(any, 2, 12\)"):
        ops.relational_distillation_loss(student[..., 1:], teacher, queues, teacher_queue, TEMPERATURE, 1)
