import math

import numpy as np
import pytest
import torch
from contrast_inputs import negative_log_share, units

from ikem_fast import ops

TEMPERATURE = 0.07


def inputs(streams=3, num_clips=2, size=5, queue_size=7, dtype=torch.float64):
    e = units(streams, num_clips, streams * size, dim=2, seed=0, dtype=dtype)
    k = units(streams, num_clips, size, dim=2, seed=1, dtype=dtype)
    queue = units(streams, size, queue_size, dim=1, seed=2, dtype=dtype)
    return e, k, queue


@pytest.mark.parametrize("sizes", [(1, 1, 2, 1), (3, 2, 5, 7), (6, 3, 4, 19)])
def test_equals_the_formula_written_out(sizes):
    e, k, queue = inputs(*sizes)
    streams, num_clips, size, queue_size = sizes
    # The concatenation of S unit vectors has norm sqrt(S).
    blocks = e.view(streams, num_clips, streams, size)
    losses = np.zeros(streams)
    for a in range(streams):
        for n in range(num_clips):
            logits = [sum(float(blocks[a, n, b] @ k[b, n]) for b in range(streams))]
            logits += [sum(float(blocks[a, n, b] @ queue[b, :, i]) for b in range(streams)) for i in range(queue_size)]
            scaled = [logit / math.sqrt(streams) / TEMPERATURE for logit in logits]
            losses[a] += negative_log_share(scaled, [0]) / num_clips
    torch.testing.assert_close(ops.exchange_loss(e, k, queue, TEMPERATURE), torch.tensor(losses))


def test_gradients():
    e, k, queue = inputs()
    assert torch.autograd.gradcheck(lambda e: ops.exchange_loss(e, k, queue, TEMPERATURE), e.requires_grad_())


def test_wrong_arguments_are_named():
    _, k, queue = inputs()
    with pytest.raises(ValueError, match=r"e must be \(S, N, S\*D\) = \(3, 2, 15\) floating point, got \(3, 2, 5\)"):
        ops.exchange_loss(k, k, queue, TEMPERATURE)
