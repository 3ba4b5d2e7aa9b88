"""Batch norm as a factor and a summand: the compiled operator against its plain definition."""

from __future__ import annotations

import math

import pytest
import torch

from ikem_fast import ops
from ikem_fast.ops import batch_norm_coefficients, batch_norm_coefficients_reference

DTYPES = [torch.float64, torch.float32]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EPS = 1e-5


def inputs(streams, channels, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, streams, channels, generator=generator, dtype=torch.float64)
    values[1] = values[1] ** 2
    return list(values.to(device, dtype))


def results(function, given, eps=EPS):
    """Scale, shift, and the gradients of a weighted sum of both."""
    given = [value.detach().requires_grad_() for value in given]
    scale, shift = function(*given, eps)
    weights = torch.linspace(-1.0, 2.0, scale.numel(), dtype=torch.float64).view(scale.shape).to(scale)
    total = (weights * scale).sum() + (weights.square() * shift).sum()
    return scale.detach(), shift.detach(), *torch.autograd.grad(total, given)


@by_dtype
@pytest.mark.parametrize("sizes", [(1, 1), (6, 16), (3, 257), (2, 0), (0, 4)], ids=str)
def test_operator_agrees_with_definition(sizes, dtype, capability):
    given = inputs(*sizes, dtype)
    ours, expected = (results(f, given) for f in (batch_norm_coefficients, batch_norm_coefficients_reference))
    for one, other in zip(ours, expected, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


def test_it_is_batch_norm():
    generator = torch.Generator().manual_seed(1)
    x = 3 + 2 * torch.randn(2, 50, 7, generator=generator, dtype=torch.float64)
    _, _, weight, bias = inputs(2, 7)
    variance, mean = torch.var_mean(x, dim=1, correction=0)
    scale, shift = batch_norm_coefficients(mean, variance, weight, bias, EPS)
    for stream in range(2):
        expected = torch.nn.functional.batch_norm(
            x[stream], None, None, weight[stream], bias[stream], training=True, eps=EPS
        )
        torch.testing.assert_close(scale[stream] * x[stream] + shift[stream], expected)


def test_gradients():
    given = [value.requires_grad_() for value in inputs(2, 3)]
    assert torch.autograd.gradcheck(lambda *given: batch_norm_coefficients(*given, 0.1), given)


def test_one_result_may_stay_unused():
    for number in range(2):
        ours, expected = (
            [value.requires_grad_() for value in inputs(2, 3)],
            [value.requires_grad_() for value in inputs(2, 3)],
        )
        batch_norm_coefficients(*ours, EPS)[number].sum().backward()
        batch_norm_coefficients_reference(*expected, EPS)[number].sum().backward()
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one.grad, torch.zeros_like(one) if other.grad is None else other.grad)


@by_dtype
def test_operator_is_well_formed(dtype):
    mean, variance, weight, bias = inputs(2, 3, dtype)
    needing = [value.clone().requires_grad_() for value in (mean, variance, weight, bias)]
    torch.library.opcheck(torch.ops.ikem_fast.batch_norm_coefficients.default, (*needing, EPS))
    backward = torch.ops.ikem_fast.batch_norm_coefficients_backward.default
    torch.library.opcheck(backward, (mean, variance, weight, EPS, bias, mean.clone()))


def test_strided_inputs():
    given = inputs(4, 6)
    expected = results(batch_norm_coefficients, given)
    strided = [value.t().contiguous().t() for value in given]
    for one, other in zip(results(batch_norm_coefficients, strided), expected, strict=True):
        assert torch.equal(one, other)


def test_wrong_arguments_are_named():
    mean, variance, weight, bias = inputs(2, 3, torch.float32)
    for bad, message in (
        ((mean[0], variance, weight, bias, EPS), r"mean must be \(S, C\) = \(any, any\) floating point, got \(3,\)"),
        ((mean.half(), variance, weight, bias, EPS), r"mean must be \(S, C\) float32 or float64, got \(2, 3\) float16"),
        ((mean, variance[:1], weight, bias, EPS), r"variance must be \(S, C\) = \(2, 3\) .* got \(1, 3\)"),
        ((mean, variance, weight.double(), bias, EPS), r"weight must be \(2, 3\) float32 as mean is, got .* float64"),
        ((mean, variance, weight, bias.to("meta"), EPS), "bias must be on mean's device cpu, got meta"),
        ((mean, variance, weight, bias, -1.0), "eps must be at least 0 and finite, got -1.0"),
        ((mean, variance, weight, bias, math.inf), "eps must be at least 0 and finite, got inf"),
    ):
        for function in (batch_norm_coefficients, batch_norm_coefficients_reference):
            with pytest.raises(ValueError, match=message):
                function(*bad)
    operator = torch.ops.ikem_fast.batch_norm_coefficients
    for bad, message in (
        ((mean[0], variance, weight, bias, EPS), r"mean must be \(S, C\), got \(3\)"),
        ((mean, variance, weight[:, :2], bias, EPS), r"weight must be \(S, C\) = \(2, 3\), got \(2, 2\)"),
        ((mean, variance, weight, bias.double(), EPS), "bias must be Float on the CPU, got Double"),
        ((mean.int(), variance, weight, bias, EPS), "mean must be float32 or float64, got Int"),
        ((mean, variance, weight, bias, math.nan), "eps must be at least 0 and finite, got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(*bad)


def test_exported():
    assert {"batch_norm_coefficients", "batch_norm_coefficients_reference"} <= set(ops.__all__)


@pytest.mark.cuda
@by_dtype
def test_cuda_agrees_with_definition(dtype):
    for sizes in ((1, 1), (6, 256), (2, 0)):
        given = inputs(*sizes, dtype, device="cuda")
        ours, expected = (results(f, given) for f in (batch_norm_coefficients, batch_norm_coefficients_reference))
        for one, other in zip(ours, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=20 * torch.finfo(dtype).eps, atol=20 * torch.finfo(dtype).eps)


@pytest.mark.cuda
def test_cuda_graph():
    given = inputs(2, 5, torch.float32, device="cuda")
    batch_norm_coefficients(*given, EPS)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = batch_norm_coefficients(*given, EPS)
    given[0].add_(1.0)
    graph.replay()
    for one, other in zip(made, batch_norm_coefficients_reference(*given, EPS), strict=True):
        torch.testing.assert_close(one, other)
