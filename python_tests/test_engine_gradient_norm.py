from __future__ import annotations

import pytest
import torch

from ikem_fast.engine.gradient_norm import limit_gradient_norms


def with_gradients(*gradients):
    parameters = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_each_stream_is_limited_by_itself():
    # Norms of the two streams over both tensors: 5 and 0.5.
    first, second = torch.tensor([[3.0, 0.0], [0.3, 0.0]]), torch.tensor([[[4.0]], [[0.4]]])
    parameters = with_gradients(first, second)
    norms = limit_gradient_norms(parameters, 1.0)
    torch.testing.assert_close(norms, torch.tensor([5.0, 0.5]))
    torch.testing.assert_close(parameters[0].grad, torch.tensor([[0.6, 0.0], [0.3, 0.0]]))
    torch.testing.assert_close(parameters[1].grad, torch.tensor([[[0.8]], [[0.4]]]))


def test_one_stream_is_limited_as_torch_does():
    gradients = [torch.randn(1, 3, 4), torch.randn(1, 5)]
    ours, theirs = with_gradients(*gradients), with_gradients(*gradients)
    expected = torch.nn.utils.clip_grad_norm_(theirs, 0.7)
    torch.testing.assert_close(limit_gradient_norms(ours, 0.7), expected.view(1))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


def test_weights_without_gradient_are_left_out():
    (parameter,) = with_gradients(torch.tensor([[2.0], [0.0]]))
    untouched = torch.nn.Parameter(torch.ones(3, 1))
    limit_gradient_norms([untouched, parameter], 1.0)
    assert untouched.grad is None
    torch.testing.assert_close(parameter.grad, torch.tensor([[1.0], [0.0]]))
    assert limit_gradient_norms([untouched], 1.0).shape == (0,)


def test_not_a_number_stays_in_its_stream():
    (parameter,) = with_gradients(torch.tensor([[float("nan")], [4.0]]))
    limit_gradient_norms([parameter], 1.0)
    assert parameter.grad[0].isnan().all()
    torch.testing.assert_close(parameter.grad[1], torch.tensor([1.0]))


def test_different_numbers_of_streams_are_refused():
    with pytest.raises(ValueError, match=r"same streams, got \[1, 2\]"):
        limit_gradient_norms(with_gradients(torch.ones(1, 2), torch.ones(2, 2)), 1.0)
