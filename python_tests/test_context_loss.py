import numpy as np
import pytest
import torch
from contrast_inputs import largest, negative_log_share, pair_logits, units

from ikem_fast import ops

TEMPERATURE = 0.07


def inputs(streams=3, num_clips=2, size=5, queue_size=7, dtype=torch.float64):
    q = units(streams, num_clips, size, dim=2, seed=0, dtype=dtype)
    k = units(streams, num_clips, size, dim=2, seed=1, dtype=dtype)
    queue = units(streams, size, queue_size, dim=1, seed=2, dtype=dtype)
    return q, k, queue


def written_out(q, k, queue, topk):
    streams, num_clips, _ = q.shape
    queue_size = queue.shape[2]
    similarity = (q @ queue).numpy()
    losses = np.zeros(streams)
    for a in range(streams):
        for b in range(streams):
            for n in range(num_clips if a != b else 0):
                neighbours = largest(similarity[b, n], topk)
                positives = [0, *(1 + i for i in neighbours), *(1 + queue_size + i for i in neighbours)]
                logits = pair_logits(float(q[a, n] @ k[a, n]), similarity[a, n], similarity[b, n], TEMPERATURE)
                losses[a] += negative_log_share(logits, positives) / (num_clips * (streams - 1))
    return torch.tensor(losses)


@pytest.mark.parametrize("topk", [1, 3])
@pytest.mark.parametrize("sizes", [(2, 1, 3, 3), (3, 2, 5, 7), (6, 3, 4, 19)])
def test_equals_the_formula_written_out(sizes, topk):
    arguments = inputs(*sizes)
    torch.testing.assert_close(ops.context_loss(*arguments, TEMPERATURE, topk), written_out(*arguments, topk))


@pytest.mark.parametrize("topk", [1, 2])
def test_gradients_reach_both_queries_of_a_pair(topk):
    q, k, queue = inputs(streams=2)
    assert torch.autograd.gradcheck(lambda q: ops.context_loss(q, k, queue, TEMPERATURE, topk), q.requires_grad_())
    gradient = torch.autograd.grad(ops.context_loss(q, k, queue, TEMPERATURE, topk)[0], q)[0]
    assert (gradient.abs().amax(dim=(1, 2)) > 0).all()


def test_wrong_arguments_are_named():
    q, k, queue = inputs()
    with pytest.raises(ValueError, match=r"topk must be in 1 \.\.\. K = 7, got 8"):
        ops.context_loss(q, k, queue, TEMPERATURE, 8)
    with pytest.raises(ValueError, match="at least 2 modalities to exchange context, got 1"):
        ops.context_loss(q[:1], k[:1], queue[:1], TEMPERATURE, 1)
