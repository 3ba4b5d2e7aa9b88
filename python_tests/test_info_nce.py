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


@pytest.mark.parametrize(
    ("dtype", "queue_dtype", "tolerance", "gradient_tolerance"),
    [
        (torch.float64, torch.float64, 1e-13, 1e-12),
        (torch.float32, torch.float32, 2e-6, 1e-5),
        (torch.bfloat16, torch.bfloat16, 2e-6, 2.0**-7),
        (torch.bfloat16, torch.float32, 2e-6, 2.0**-7),
    ],
)
@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.01])
def test_fused_agrees_with_reference(dtype, queue_dtype, tolerance, gradient_tolerance, temperature):
    q, k, queue = inputs(3, 17, 23, 901)
    q, k, queue = q.to(dtype), k.to(dtype), queue.to(queue_dtype)
    # What the reference computes in bfloat16 is that of the same numbers in float32.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outcomes = []
    for function, numbers in ((ops.info_nce, dtype), (ops.info_nce_reference, wide)):
        leaves = [values.to(numbers).requires_grad_() for values in (q, k)]
        other = queue if numbers == dtype else queue.to(dtype).to(numbers)
        losses = function(*leaves, other, temperature)
        gradients = torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 3.0])).sum(), leaves)
        outcomes.append((losses, *gradients))
    ours, expected = outcomes
    assert ours[0].dtype == wide
    assert ours[1].dtype == dtype
    for one, other, allowed in zip(ours, expected, (tolerance, gradient_tolerance, gradient_tolerance), strict=True):
        assert (one.double() - other.double()).abs().max() <= allowed * other.double().abs().max()


def test_accuracy_is_the_share_of_clips_whose_key_wins():
    q, k, queue = inputs(2, 40, 4, 3, dtype=torch.float32)
    losses, accuracy = ops.info_nce_and_accuracy(q.requires_grad_(), k, queue, TEMPERATURE)
    wins = (q * k).sum(dim=2) > (q @ queue).amax(dim=2)
    assert 0 < wins.sum() < wins.numel()
    torch.testing.assert_close(accuracy, wins.float().mean(dim=1))
    assert not accuracy.requires_grad
    assert torch.equal(losses, ops.info_nce(q, k, queue, TEMPERATURE))
    assert ops.info_nce_and_accuracy(q, q.detach(), 0.9 * queue, TEMPERATURE)[1].tolist() == [1.0, 1.0]
    assert ops.info_nce_and_accuracy(q, -q.detach(), queue, TEMPERATURE)[1].tolist() == [0.0, 0.0]


def test_queue_may_change_before_backward():
    q, k, queue = inputs(dtype=torch.float32)
    expected = torch.autograd.grad(ops.info_nce(q.requires_grad_(), k, queue, TEMPERATURE).sum(), q)[0]
    losses = ops.info_nce(q, k, queue, TEMPERATURE)
    queue.zero_()
    assert torch.equal(torch.autograd.grad(losses.sum(), q)[0], expected)


def test_wrong_arguments_are_named():
    q, k, queue = inputs()
    with pytest.raises(ValueError, match=r"q must be float32, bfloat16 or float64, got \(2, 3, 5\) float16"):
        ops.info_nce(q.half(), k.half(), queue.half(), TEMPERATURE)
    with pytest.raises(ValueError, match=r"queue must be float64 for q \(2, 3, 5\) float64, got \(2, 5, 7\) float32"):
        ops.info_nce(q, k, queue.float(), TEMPERATURE)
    with pytest.raises(ValueError, match="queue must not require a gradient"):
        ops.info_nce(q, k, queue.clone().requires_grad_(), TEMPERATURE)
    with pytest.raises(ValueError, match=r"queue must be \(S, D, K\) = \(2, 5, any\) floating point, got \(5, 7\) flo"):
        ops.info_nce(q, k, queue[0], TEMPERATURE)
    with pytest.raises(ValueError, match=r"k must be \(S, N, D\) = \(2, 3, 5\) floating point, got \(2, 2, 5\)"):
        ops.info_nce(q, k[:, :2], queue, TEMPERATURE)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        ops.info_nce(q, k, queue, 0)
