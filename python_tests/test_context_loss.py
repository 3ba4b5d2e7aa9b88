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


# bfloat16 rounds what it multiplies in backward.
TOLERANCE = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 1e-4), torch.bfloat16: (2e-6, 2e-2)}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.01, 0.07, 1.0])
@pytest.mark.parametrize("sizes", [(2, 1, 3, 3), (3, 9, 5, 257), (6, 4, 16, 1000)])
def test_equals_the_plain_definition(sizes, temperature, dtype):
    q, k, queue = inputs(*sizes, dtype=dtype)
    weights = torch.arange(1.0, sizes[0] + 1, dtype=torch.float64)
    for topk in (1, 3, sizes[3]):
        losses, gradients = [], []
        for function in (ops.context_loss, ops.context_loss_reference):
            query, key = q.clone().requires_grad_(), k.clone().requires_grad_()
            losses.append(function(query, key, queue, temperature, topk))
            gradients.append(torch.autograd.grad((losses[-1] * weights).sum(), (query, key)))
        assert losses[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(*losses, rtol=TOLERANCE[dtype][0], atol=TOLERANCE[dtype][0])
        for ours, expected in zip(*gradients, strict=True):
            assert ours.dtype == dtype
            error = (ours - expected).double().abs().max() / expected.double().abs().max()
            assert error < TOLERANCE[dtype][1]


def test_float32_queue_beside_bfloat16():
    q, k, queue = inputs(3, 4, 5, 200, dtype=torch.bfloat16)
    _, _, exact = inputs(3, 4, 5, 200, dtype=torch.float32)
    expected = ops.context_loss(q, k, queue, TEMPERATURE, 2)
    torch.testing.assert_close(ops.context_loss(q, k, exact, TEMPERATURE, 2), expected)
    torch.testing.assert_close(ops.context_loss_reference(q, k, exact, TEMPERATURE, 2), expected)


def test_other_dtypes_are_refused():
    for function in (ops.context_loss, ops.context_loss_reference):
        with pytest.raises(ValueError, match=r"q must be float32, bfloat16 or float64, got .* float16"):
            function(*inputs(dtype=torch.float16), TEMPERATURE, 2)


def test_no_clips():
    for function in (ops.context_loss, ops.context_loss_reference):
        losses = function(*inputs(num_clips=0), TEMPERATURE, 1)
        assert losses.shape == (3,)
        assert losses.isnan().all()  # the mean of nothing


def test_compiles_without_a_graph_break():
    q, k, queue = inputs(dtype=torch.float32)

    def total(q):
        return ops.context_loss(q, k, queue, TEMPERATURE, 2).sum()

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        query = q.clone().requires_grad_()
        function(query).backward()
        gradients.append(query.grad)
    torch.testing.assert_close(*gradients)


def test_wrong_arguments_are_named():
    q, k, queue = inputs()
    for function in (ops.context_loss, ops.context_loss_reference):
        with pytest.raises(ValueError, match=r"queue must not require a gradient, .* pass queue.detach\(\)"):
            function(q, k, queue.clone().requires_grad_(), TEMPERATURE, 1)
        with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
            function(q, k, queue, 0, 1)
    with pytest.raises(ValueError, match=r"topk must be in 1 \.\.\. K = 7, got 8"):
        ops.context_loss(q, k, queue, TEMPERATURE, 8)
    with pytest.raises(ValueError, match="at least 2 modalities to exchange context, got 1"):
        ops.context_loss(q[:1], k[:1], queue[:1], TEMPERATURE, 1)
