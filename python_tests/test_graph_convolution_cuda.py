"""graph_convolution on a GPU against its definition in float64 on the CPU."""

from __future__ import annotations

import pytest
import torch

from ikem_fast.ops import graph_convolution, graph_convolution_reference, graph_edges

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
# S, B, T, V, P, C_in, C_out, stride; the last is the identity of a residual's projection where P = 1
SIZES = (
    (2, 3, 7, 25, 3, 3, 16, 1),
    (2, 3, 5, 25, 3, 16, 16, 1),
    (1, 2, 9, 25, 3, 32, 64, 1),
    (2, 2, 5, 25, 3, 64, 64, 1),
    (1, 2, 6, 25, 3, 64, 256, 1),
    (2, 3, 9, 25, 1, 16, 32, 2),
    (1, 2, 3, 25, 1, 64, 256, 1),
    (3, 1, 4, 7, 2, 5, 9, 3),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (1, 2, 3, 128, 3, 40, 72, 1),
)
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def make(sizes, dtype, seed=0):
    """x, weight, bias, importance, adjacency and edges on the CPU; a chain of joints with random coefficients."""
    streams, batch, frames, joints, partitions, in_channels, out_channels, _ = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    on_edges = torch.eye(joints).repeat(partitions, 1, 1)
    for partition in range(1, partitions):
        on_edges[partition] = torch.diag(torch.ones(joints - 1), 1 if partition % 2 else -1)[:joints, :joints]
        on_edges[partition, joints // 2] = 1
    adjacency = on_edges * (1 + normal(partitions, joints, joints).abs()) if partitions > 1 else on_edges
    return (
        normal(streams, batch, frames, joints, in_channels).to(dtype),
        normal(streams, partitions, out_channels, in_channels),
        normal(streams, partitions, out_channels),
        normal(streams, partitions, joints, joints),
        adjacency,
        graph_edges(adjacency),
    )


def with_gradients(function, inputs, stride, weigh):
    """Results and gradients of x, weight, bias and importance."""
    inputs = [value.detach().requires_grad_(i < 4) for i, value in enumerate(inputs[:5])] + [inputs[5]]
    results = function(*inputs, stride=stride)
    total = sum((weigh(value.shape).to(value) * value).sum() for value in results)
    total.backward()
    return [*(value.detach() for value in results), *(value.grad for value in inputs[:4])]


def relative_error(got, wanted):
    return ((got.cpu().double() - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()


def make_weigh():
    generator = torch.Generator().manual_seed(1)
    return lambda shape: torch.randn(shape, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("sizes", SIZES)
def test_agrees_with_definition(sizes, dtype):
    inputs = make(sizes, dtype)
    got = with_gradients(graph_convolution, [value.to(DEVICE) for value in inputs], sizes[-1], make_weigh())
    exact = [value.double() if value.is_floating_point() else value for value in inputs]
    wanted = with_gradients(graph_convolution_reference, exact, sizes[-1], make_weigh())
    names = ("y", "mean", "variance", "x", "weight", "bias", "importance")
    for name, value, expected in zip(names, got, wanted, strict=True):
        assert relative_error(value, expected) < TOLERANCES[dtype], name
    assert (got[-1].cpu()[:, inputs[4] == 0] == 0).all()


def test_small_agrees_with_definition():
    """One that compute-sanitizer can run."""
    for dtype, tolerance in TOLERANCES.items():
        inputs = make((2, 2, 3, 5, 2, 8, 9, 2), dtype)
        got = with_gradients(graph_convolution, [value.to(DEVICE) for value in inputs], 2, make_weigh())
        exact = [value.double() if value.is_floating_point() else value for value in inputs]
        wanted = with_gradients(graph_convolution_reference, exact, 2, make_weigh())
        assert all(relative_error(value, expected) < tolerance for value, expected in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCES))
@pytest.mark.parametrize("activation", [True, False])
def test_scales_the_output(dtype, activation):
    inputs = make((2, 2, 4, 25, 3, 16, 32, 1), dtype)
    scale, shift = torch.randn(2, 32), torch.randn(2, 32)
    with torch.no_grad():
        got, mean, _ = graph_convolution(
            *(value.to(DEVICE) for value in inputs),
            statistics=False,
            output_scale=scale.to(DEVICE),
            output_shift=shift.to(DEVICE),
            output_activation=activation,
        )
        exact = [value.double() if value.is_floating_point() else value for value in inputs]
        plain, _, _ = graph_convolution_reference(*exact, statistics=False)
    wanted = plain * scale[:, None, None, None] + shift[:, None, None, None]
    assert relative_error(got, wanted.relu() if activation else wanted) < TOLERANCES[dtype]
    assert mean.shape == (0,)


def test_statistics_bear_a_mean_far_above_the_deviation():
    x, weight, bias, importance, adjacency, edges = make((2, 4, 9, 25, 1, 16, 16, 1), torch.float32)
    inputs = (0.01 * x, weight, 3000 + bias, torch.ones_like(importance), adjacency, edges)
    got = graph_convolution(*(value.to(DEVICE) for value in inputs))
    exact = [value.double() if value.is_floating_point() else value for value in inputs]
    wanted = graph_convolution_reference(*exact)
    assert relative_error(got[1], wanted[1]) < 1e-6
    # Each value is rounded to 3000 * 2^-24 of a deviation of 0.04.
    assert relative_error(got[2], wanted[2]) < 2e-2


@pytest.mark.slow
def test_same_bits_every_time():
    inputs = [value.to(DEVICE) for value in make((2, 40, 13, 25, 3, 32, 64, 1), torch.bfloat16)]
    first = with_gradients(graph_convolution, inputs, 1, make_weigh())
    for _ in range(3):
        again = with_gradients(graph_convolution, inputs, 1, make_weigh())
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_any_strides_and_empty_batches():
    inputs = [value.to(DEVICE) for value in make((2, 2, 4, 25, 3, 16, 16, 1), torch.float32)]
    wanted = graph_convolution(*inputs)
    scattered = torch.stack([inputs[0], inputs[0]], dim=-1)[..., 0]
    assert all(torch.equal(a, b) for a, b in zip(graph_convolution(scattered, *inputs[1:]), wanted, strict=True))
    empty = with_gradients(graph_convolution, [inputs[0][:, :0], *inputs[1:]], 1, make_weigh())
    assert empty[0].shape == (2, 0, 4, 25, 16)
    assert all((value == 0).all() for value in empty[1:])


@pytest.mark.slow
def test_more_joints_than_the_kernels_take():
    inputs = make((1, 1, 2, 130, 2, 8, 8, 1), torch.float32)
    got = with_gradients(graph_convolution, [value.to(DEVICE) for value in inputs], 1, make_weigh())
    wanted = with_gradients(graph_convolution_reference, inputs, 1, make_weigh())
    assert all(relative_error(a, b.double()) < 1e-4 for a, b in zip(got, wanted, strict=True))


@pytest.mark.slow
def test_replays_in_a_cuda_graph():
    x, *others = (value.to(DEVICE) for value in make((2, 3, 5, 25, 3, 16, 32, 1), torch.bfloat16))
    operators = torch.ops.ikem_fast

    def step():
        y, mean, variance = operators.graph_convolution(x, *others, 1, True, None, None, True)
        return y, operators.graph_convolution_backward(x, *others, 1, y, mean, y, mean, variance, True)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, gradients = step()
    for _ in range(2):
        x.normal_()
        graph.replay()
        wanted_y, wanted = step()
        assert torch.equal(y, wanted_y)
        assert all(torch.equal(a, b) for a, b in zip(gradients, wanted, strict=True))
