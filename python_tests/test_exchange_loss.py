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


@pytest.mark.parametrize(
    ("dtype", "tolerance", "gradient_tolerance"),
    [(torch.float64, 1e-13, 1e-12), (torch.float32, 2e-6, 1e-5), (torch.bfloat16, 2e-4, 2.0**-6)],
)
@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.01])
def test_fused_agrees_with_reference(dtype, tolerance, gradient_tolerance, temperature):
    e, k, queue = (values.to(dtype) for values in inputs(3, 17, 11, 901))
    # What the reference computes in bfloat16 is that of the same numbers in float32, but for the norm of the joint
    # keys, which rounded keys miss.
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    outcomes = []
    for function, numbers in ((ops.exchange_loss, dtype), (ops.exchange_loss_reference, wide)):
        leaves = [values.to(numbers).requires_grad_() for values in (e, k)]
        losses = function(*leaves, queue.to(numbers), temperature)
        gradients = torch.autograd.grad((losses * torch.tensor([1.0, 2.0, 3.0])).sum(), leaves)
        outcomes.append((losses, *gradients))
    ours, expected = outcomes
    assert ours[0].dtype == wide
    assert ours[1].dtype == dtype
    for one, other, allowed in zip(ours, expected, (tolerance, gradient_tolerance, gradient_tolerance), strict=True):
        assert (one.double() - other.double()).abs().max() <= allowed * other.double().abs().max()


def test_strided_queue():
    e, k, queue = inputs()
    expected = ops.exchange_loss(e, k, queue, TEMPERATURE)
    for strided in (queue.repeat(1, 1, 2)[:, :, :7], queue.transpose(0, 2).contiguous().transpose(0, 2)):
        assert not strided.is_contiguous()
        torch.testing.assert_close(ops.exchange_loss(e, k, strided, TEMPERATURE), expected)


def test_accuracy_is_the_share_of_clips_whose_key_wins():
    e, k, queue = inputs(3, 40, 2, 3, dtype=torch.float32)
    losses, accuracy = ops.exchange_loss_and_accuracy(e.requires_grad_(), k, queue, TEMPERATURE)
    joint_key, joint_queue = torch.cat(list(k), dim=1), torch.cat(list(queue), dim=0)
    wins = (e * joint_key).sum(dim=2) > (e @ joint_queue).amax(dim=2)
    assert 0 < wins.sum() < wins.numel()
    torch.testing.assert_close(accuracy, wins.float().mean(dim=1))
    assert not accuracy.requires_grad
    assert torch.equal(losses, ops.exchange_loss(e, k, queue, TEMPERATURE))


def test_wrong_arguments_are_named():
    e, k, queue = inputs()
    with pytest.raises(ValueError, match=r"e must be float32, bfloat16 or float64, got \(3, 2, 15\) float16"):
        ops.exchange_loss(e.half(), k.half(), queue.half(), TEMPERATURE)
    with pytest.raises(ValueError, match=r"e must be \(S, N, S\*D\) = \(3, 2, 15\) floating point, got \(3, 2, 5\)"):
        ops.exchange_loss(k, k, queue, TEMPERATURE)
