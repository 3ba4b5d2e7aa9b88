import pytest
import torch

from ikem_fast import ops


def one_by_one(queue, keys, start):
    """Where the keys come to lie if they are enqueued one after the other."""
    queue = queue.clone()
    for i in range(keys.shape[1]):
        queue[:, :, (start + i) % queue.shape[2]] = keys[:, i]
    return queue


@pytest.mark.parametrize("num_keys", [0, 1, 3, 7, 8, 20])
@pytest.mark.parametrize("start", [0, 4, 6])
def test_wraps_around_for_any_batch(num_keys, start):
    queue, keys = torch.randn(2, 5, 7), torch.randn(2, num_keys, 5)
    pointer = torch.tensor([start])
    expected = one_by_one(queue, keys, start)
    ops.enqueue_(queue, keys, pointer)
    assert torch.equal(queue, expected)
    assert pointer.tolist() == [(start + num_keys) % 7]


def test_a_single_queue_is_filled_in_place():
    queue, keys, pointer = torch.zeros(5, 7), torch.randn(3, 5), torch.tensor([5])
    ops.enqueue_(queue, keys, pointer)
    assert torch.equal(queue[:, [5, 6, 0]], keys.T)
    assert not queue[:, 1:5].any()


def test_keys_that_need_gradients_leave_no_graph():
    queue, pointer = torch.zeros(1, 2, 3), torch.tensor([0])
    ops.enqueue_(queue, torch.ones(1, 2, 2, requires_grad=True), pointer)
    assert not queue.requires_grad


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"keys must be \(S, N, D\) = \(2, any, 5\) floating point, got \(2, 3, 4\)"):
        ops.enqueue_(torch.zeros(2, 5, 7), torch.zeros(2, 3, 4), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"pointer must be \(1,\) int64, got \(\) int64"):
        ops.enqueue_(torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor(0))
