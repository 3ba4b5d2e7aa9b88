import numpy as np
import pytest
import torch
from contrast_inputs import negative_log_share, units

from ikem_fast import ops

TEMPERATURE = 0.07


def inputs(streams=2, num_clips=3, size=5, queue_size=7, dtype=torch.float64):
    q = units(streams, num_clips, size, dim=2, seed=0, dtype=dtype)
    k = units(streams, num_clips, size, dim=2, seed=1, dtype=dtype)
    queue = units(streams, size, queue_size, dim=1, seed=2, dtype=dtype)
    return q, k, queue


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 3, 5, 7), (6, 4, 8, 33)])
def test_equals_the_formula_written_out(sizes):
    q, k, queue = inputs(*sizes)
    expected = [
        np.mean(
            [
                negative_log_share(
                    [float(q[s, n] @ k[s, n]) / TEMPERATURE, *(q[s, n] @ queue[s] / TEMPERATURE).tolist()], [0]
                )
                for n in range(sizes[1])
            ]
        )
        for s in range(sizes[0])
    ]
    torch.testing.assert_close(ops.info_nce(q, k, queue, TEMPERATURE), torch.tensor(expected, dtype=torch.float64))


def test_gradients():
    q, k, queue = inputs()
    assert torch.autograd.gradcheck(lambda q: ops.info_nce(q, k, queue, TEMPERATURE), q.requires_grad_())


def test_non_contiguous_inputs():
    q, k, queue = inputs()
    strided = (q.transpose(0, 1).contiguous().transpose(0, 1), k, queue.transpose(1, 2).contiguous().transpose(1, 2))
    torch.testing.assert_close(ops.info_nce(*strided, TEMPERATURE), ops.info_nce(q, k, queue, TEMPERATURE))


def test_small_temperature_does_not_overflow():
    q, k, queue = inputs(dtype=torch.float32)
    assert ops.info_nce(q, k, queue, 0.001).isfinite().all()


def test_wrong_arguments_are_named():
    q, k, queue = inputs()
    with pytest.raises(ValueError, match=r"queue must be \(S, D, K\) = \(2, 5, any\) floating point, got \(5, 7\) flo"):
        ops.info_nce(q, k, queue[0], TEMPERATURE)
    with pytest.raises(ValueError, match=r"k must be \(S, N, D\) = \(2, 3, 5\) floating point, got \(2, 2, 5\)"):
        ops.info_nce(q, k[:, :2], queue, TEMPERATURE)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ops.info_nce(q, k, queue, 0)
