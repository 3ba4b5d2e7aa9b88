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


# bfloat16 rounds what it multiplies in backward.
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 1e-4), torch.bfloat16: (2e-6, 2e-2)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("sizes", [(1, 1, 1, 3, 3), (3, 6, 5, 8, 257), (1, 2, 9, 5, 1000), (6, 2, 3, 4, 40)])
def test_equals_the_plain_definition(sizes, temperature, dtype):
    student, *rest = inputs(*sizes, dtype=dtype)
    weights = torch.arange(1.0, sizes[0] + 1, dtype=torch.float64)
    for topk in (1, 3, sizes[4]):
        losses, gradients = [], []
        for function in (ops.relational_distillation_loss, ops.relational_distillation_loss_reference):
            left = student.clone().requires_grad_()
            losses.append(function(left, *rest, temperature, topk))
            gradients.append(torch.autograd.grad((losses[-1] * weights).sum(), left)[0])
        assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(*losses, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][0])
        assert gradients[0].dtype == dtype
        error = (gradients[0] - gradients[1]).double().abs().max() / gradients[1].double().abs().max()
        assert error < TOLERANCE[dtype][1]


def test_other_dtypes_are_refused():
    for function in (ops.relational_distillation_loss, ops.relational_distillation_loss_reference):
        with pytest.raises(ValueError, match=r"teacher must be float32, bfloat16 or float64, got .* float16"):
            function(*inputs(dtype=torch.float16), TEMPERATURE, 2)


def test_compiles_without_a_graph_break():
    student, *rest = inputs(dtype=torch.float32)

    def total(student):
        return ops.relational_distillation_loss(student, *rest, TEMPERATURE, 2).sum()

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        left = student.clone().requires_grad_()
        function(left).backward()
        gradients.append(left.grad)
    torch.testing.assert_close(*gradients)


def test_wrong_arguments_are_named():
    student, teacher, queues, teacher_queue = inputs()
    for function in (ops.relational_distillation_loss, ops.relational_distillation_loss_reference):
        with pytest.raises(ValueError, match=r"teacher must not require a gradient, .* pass teacher.detach\(\)"):
            function(student, teacher.clone().requires_grad_(), queues, teacher_queue, TEMPERATURE, 1)
    with pytest.raises(ValueError, match=r"teacher_queue must be \(S\*D, K\) = \(12, 7\) floating.*got \(12, 6\)"):
        ops.relational_distillation_loss(student, teacher, queues, teacher_queue[:, 1:], TEMPERATURE, 1)
    with pytest.raises(ValueError, match=r"student must be \(students, N, S\*D\) = \(any, 2, 12\)"):
        ops.relational_distillation_loss(student[..., 1:], teacher, queues, teacher_queue, TEMPERATURE, 1)
