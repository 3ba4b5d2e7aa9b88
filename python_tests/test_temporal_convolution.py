"""Convolution over frames with batch norm on load: the compiled operator against its plain definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from ikem_fast import ops
from ikem_fast.ops import temporal_convolution, temporal_convolution_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Relative to the largest magnitude. In bfloat16 the gradient that reaches y is rounded before the products, in the
# twin only their results are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
# S, B, T, V, C_in, C_out, K, stride: the encoder's, and such that leave a rest in every block, group, panel and pair.
SIZES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 3, 7, 5, 16, 16, 9, 1),
    (1, 2, 50, 25, 16, 16, 9, 1),
    (2, 1, 50, 25, 32, 32, 9, 2),
    (1, 2, 25, 25, 64, 64, 9, 2),
    (2, 2, 13, 25, 64, 64, 9, 1),
    (1, 1, 13, 25, 256, 256, 9, 1),
    (1, 2, 6, 3, 5, 7, 3, 1),
    (2, 1, 9, 4, 33, 48, 5, 3),
    (1, 1, 4, 3, 17, 40, 9, 4),
    (1, 2, 11, 2, 16, 3, 3, 5),
    (3, 1, 1, 25, 3, 16, 9, 1),
    (1, 2, 8, 1, 80, 16, 1, 2),
]
NAMES = ("y", "mean", "variance", "of x", "of weight", "of bias", "of scale", "of shift")


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(sizes, dtype=torch.float64, seed=0):
    """x, scale, shift, weight, bias."""
    streams, batch, frames, joints, in_channels, out_channels, taps, _ = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(streams, batch, frames, joints, in_channels).to(dtype)
    weight = draw(streams, out_channels, in_channels, taps) / (in_channels * taps) ** 0.5
    rest = (draw(streams, in_channels), draw(streams, in_channels), weight, draw(streams, out_channels))
    return x, *(values.to(computed(dtype)) for values in rest)


def results(function, x, scale, shift, weight, bias, stride=1, statistics=True):
    """y, mean, variance and the gradients of a weighted sum of all of them."""
    leaves = [values.detach().requires_grad_() for values in (x, weight, bias)]
    coefficients = [] if scale is None else [values.detach().requires_grad_() for values in (scale, shift)]
    x, weight, bias = leaves
    made = function(x, *(coefficients or (None, None)), weight, bias, stride=stride, statistics=statistics)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for index, values in enumerate(made):
        # Weights that bfloat16 holds; those of the statistics are of the weight of the sum over y.
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64).bfloat16().to(values.dtype)
        loss = loss + (weights * values).sum() * (1 if index == 0 else made[0][..., 0].numel() ** 0.5)
    return *(values.detach() for values in made), *torch.autograd.grad(loss, leaves + coefficients)


def assert_agree(ours, expected, tolerance):
    assert len(ours) == len(expected)
    for name, one, other in zip(NAMES, ours, expected, strict=False):
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        if one.numel() == 0 or torch.equal(one, other):
            continue
        allowed = tolerance * (4 if name.startswith("of ") else 1)
        scale = float(other.double().abs().max())
        error = float((one.double() - other.double()).abs().max())
        assert error <= allowed * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


@by_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operator_agrees_with_definition(sizes, dtype):
    given = inputs(sizes, dtype)
    expected = results(temporal_convolution_reference, *given, stride=sizes[-1])
    ours = results(temporal_convolution, *given, stride=sizes[-1])
    assert ours[0].dtype == ours[3].dtype == dtype
    assert all(values.dtype == computed(dtype) for values in (*ours[1:3], *ours[4:]))
    assert_agree(ours, expected, TOLERANCE[dtype])


@by_dtype
@pytest.mark.parametrize("sizes", [(2, 2, 9, 5, 16, 32, 9, 1), (1, 2, 7, 3, 20, 17, 3, 2)], ids=str)
def test_without_coefficients(sizes, dtype):
    x, _, _, weight, bias = inputs(sizes, dtype)
    given = (x, None, None, weight, bias)
    expected = results(temporal_convolution_reference, *given, stride=sizes[-1])
    assert_agree(results(temporal_convolution, *given, stride=sizes[-1]), expected, TOLERANCE[dtype])


@by_dtype
@pytest.mark.parametrize("sizes", [(2, 3, 11, 5, 16, 16, 9, 1), (1, 2, 14, 7, 40, 64, 9, 2)], ids=str)
def test_every_instruction_set(sizes, dtype, capability):
    given = inputs(sizes, dtype)
    expected = results(temporal_convolution_reference, *given, stride=sizes[-1])
    assert_agree(results(temporal_convolution, *given, stride=sizes[-1]), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_long_sequences_in_parts(stride, dtype):
    sizes = (1, 1, 203, 25, 64, 48, 9, stride)
    given = inputs(sizes, dtype)
    expected = results(temporal_convolution_reference, *given, stride=stride)
    assert_agree(results(temporal_convolution, *given, stride=stride), expected, TOLERANCE[dtype])


def test_number_of_joints_and_frames():
    for joints in range(1, 14):
        for frames in (1, 2, 5, 12):
            sizes = (1, 2, frames, joints, 16, 16, 5, 1 + joints % 2)
            for dtype in (torch.float32, torch.bfloat16):
                given = inputs(sizes, dtype)
                expected = results(temporal_convolution_reference, *given, stride=sizes[-1])
                assert_agree(results(temporal_convolution, *given, stride=sizes[-1]), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("stride", [1, 2])
def test_gradients(stride):
    given = [values.requires_grad_() for values in inputs((2, 2, 5, 3, 3, 4, 3, stride))]
    assert torch.autograd.gradcheck(lambda *values: temporal_convolution(*values, stride=stride), given)
    x, _, _, weight, bias = given
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: temporal_convolution(x, None, None, weight, bias, stride=stride), (x, weight, bias)
    )


@by_dtype
def test_operator_is_well_formed(dtype):
    given = inputs((2, 2, 5, 3, 3, 4, 3, 2), dtype)
    x, _, _, weight, bias = given
    forward = torch.ops.ikem_fast.temporal_convolution.default
    differentiable = [values.requires_grad_() for values in given]
    torch.library.opcheck(forward, (*differentiable, 2, True, None, None, None))
    torch.library.opcheck(forward, (x, None, None, weight, bias, 2, False, None, None, None))
    x, scale, shift, weight, bias = (values.detach() for values in given)
    y, mean, _ = forward(x, scale, shift, weight, bias, 2, True, None, None, None)
    torch.library.opcheck(
        forward, (x, scale, shift, weight, bias, 2, False, mean, torch.ones_like(mean), torch.ones_like(y))
    )
    backward = torch.ops.ikem_fast.temporal_convolution_backward.default
    for of_mean, of_variance, with_x_gradient in ((mean, mean, True), (None, None, False), (None, mean, False)):
        arguments = (x, scale, shift, weight, 2, y, mean, y.square(), of_mean, of_variance, with_x_gradient)
        torch.library.opcheck(backward, arguments)
    torch.library.opcheck(backward, (x, None, None, weight, 2, y, mean, y.square(), None, None, False))


def test_compiles():
    given = inputs((2, 2, 9, 5, 16, 16, 9, 1), torch.float32)
    compiled = torch.compile(temporal_convolution, backend="aot_eager", fullgraph=True)
    assert_agree(results(compiled, *given), results(temporal_convolution, *given), 0.0)


@by_dtype
def test_gradients_that_are_not_wanted(dtype):
    sizes = (2, 2, 9, 5, 16, 20, 9, 2)
    given = inputs(sizes, dtype)
    expected = results(temporal_convolution, *given, stride=2)
    x, scale, shift, weight, _ = given
    y, mean, variance = temporal_convolution(*given, stride=2)
    backward = torch.ops.ikem_fast.temporal_convolution_backward
    complete = backward(x, scale, shift, weight, 2, y, mean, y, mean, variance, True)
    partial = backward(x, scale, shift, weight, 2, y, mean, y, mean, variance, False)
    assert partial[0].shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(complete[1:], partial[1:], strict=True))
    without = backward(x, None, None, weight, 2, y, mean, y, mean, variance, False)
    assert [values.shape for values in without[:3]] == [(0,)] * 3
    for wanted in range(5):
        leaves = [values.detach().requires_grad_(index == wanted) for index, values in enumerate(given)]
        (made, _, _) = temporal_convolution(*leaves, stride=2)
        made.sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(5)]
    with torch.no_grad():
        made = temporal_convolution(*[values.requires_grad_() for values in given], stride=2)
    assert all(torch.equal(one, other) for one, other in zip(made, expected[:3], strict=True))
    assert not made[0].requires_grad


@by_dtype
def test_gradients_through_one_result_alone(dtype):
    given = inputs((2, 2, 9, 5, 16, 20, 9, 1), dtype)
    for chosen in range(3):
        gradients = []
        for function in (temporal_convolution, temporal_convolution_reference):
            leaves = [values.detach().requires_grad_() for values in given]
            made = function(*leaves)[chosen]
            weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).to(made.dtype)
            gradients.append(torch.autograd.grad((weights * made).sum(), leaves))
        # The variance's gradients of the bias cancel: rounding is measured by all gradients.
        scale = max(float(values.double().abs().max()) for values in gradients[1])
        for one, other in zip(*gradients, strict=True):
            assert float((one.double() - other.double()).abs().max()) <= 4 * TOLERANCE[dtype] * scale


def test_second_derivatives_are_refused():
    given = [values.requires_grad_() for values in inputs((1, 2, 5, 3, 3, 4, 3, 1))]
    (first,) = torch.autograd.grad(temporal_convolution(*given)[0].square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@by_dtype
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("sizes", [(2, 3, 9, 5, 16, 16, 9, 1), (1, 2, 9, 5, 20, 37, 9, 2)], ids=str)
def test_inference(sizes, with_residual, dtype):
    given = inputs(sizes, dtype)
    scale, shift = (torch.randn(sizes[0], sizes[5], dtype=computed(dtype)) for _ in range(2))
    residual = torch.randn_like(temporal_convolution(*given, stride=sizes[-1])[0]) if with_residual else None
    settings = {"stride": sizes[-1], "statistics": False, "output_scale": scale, "output_shift": shift}
    ours = temporal_convolution(*given, residual=residual, **settings)
    expected = temporal_convolution_reference(*given, residual=residual, **settings)
    assert (ours[0] == 0).any()
    assert (ours[0] > 0).any()
    assert_agree(ours, expected, TOLERANCE[dtype])
    plain = temporal_convolution(*given, stride=sizes[-1], statistics=False)
    assert torch.equal(plain[0], temporal_convolution(*given, stride=sizes[-1])[0])
    assert plain[1].shape == plain[2].shape == (0,)


@by_dtype
def test_statistics_of_a_large_mean(dtype):
    x, scale, shift, weight, bias = inputs((2, 8, 30, 25, 4, 16, 9, 1), dtype)
    bias = bias + 1000
    _, mean, variance = temporal_convolution(x, scale, shift, weight, bias)
    if dtype == torch.bfloat16:  # whose activations and weights are rounded
        exact = temporal_convolution_reference(x, scale, shift, weight, bias - 1000)
        exact = (exact[0], exact[1] + 1000, exact[2])
    else:
        exact = temporal_convolution_reference(*(values.double() for values in (x, scale, shift, weight, bias)))
    torch.testing.assert_close(mean.double(), exact[1].double(), rtol=1e-6, atol=0)
    # What float32 leaves of values around 1000.
    torch.testing.assert_close(variance.double(), exact[2].double(), rtol=1e-4, atol=1e-7)


@by_dtype
def test_no_sequences(dtype):
    given = inputs((2, 0, 5, 3, 4, 6, 3, 2), dtype)
    for function in (temporal_convolution, temporal_convolution_reference):
        made = results(function, *given, stride=2)
        assert made[0].shape == (2, 0, 3, 3, 6)
        assert made[3].shape == (2, 0, 5, 3, 4)
        for values in made[1:3]:
            assert values.shape == (2, 6)
            assert not values.any()
        assert not any(values.any() for values in made[3:])


@by_dtype
def test_strided_inputs(dtype):
    given = inputs((2, 3, 7, 5, 16, 18, 9, 1), dtype)
    expected = results(temporal_convolution, *given)
    x, scale, shift, weight, bias = given
    channels_first = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    wide = torch.cat([x, x], dim=1)[:, 3:]
    other_weight = weight.transpose(1, 3).contiguous().transpose(1, 3)
    for other in (channels_first, wide):
        assert not other.is_contiguous()
        strided = (
            other,
            scale.t().contiguous().t(),
            shift.t().contiguous().t(),
            other_weight,
            bias.t().contiguous().t(),
        )
        assert_agree(results(temporal_convolution, *strided), expected, 0.0)
    same = (x[:1].expand(2, -1, -1, -1, -1), *given[1:])  # one input for all streams
    assert_agree(results(temporal_convolution, *same), results(temporal_convolution, same[0].clone(), *given[1:]), 0.0)


@by_dtype
def test_number_of_threads(dtype):
    for sizes in ((3, 5, 20, 25, 16, 16, 9, 1), (2, 4, 21, 7, 48, 33, 9, 2)):
        given = inputs(sizes, dtype)
        before = torch.get_num_threads()
        try:
            by_threads = {}
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                by_threads[threads] = results(temporal_convolution, *given, stride=sizes[-1])
                assert_agree(results(temporal_convolution, *given, stride=sizes[-1]), by_threads[threads], 0.0)
        finally:
            torch.set_num_threads(before)
        for threads in (2, 3, 7):
            # The statistics' rounding moves the gradients, of which bfloat16 are rounded to the other side.
            assert_agree(by_threads[threads], by_threads[1], TOLERANCE[dtype])
            assert torch.equal(by_threads[threads][0], by_threads[1][0])


@by_dtype
def test_streams_do_not_touch_each_other(dtype):
    given = inputs((3, 2, 9, 5, 16, 20, 9, 2), dtype)
    together = results(temporal_convolution, *given, stride=2, statistics=False)
    for stream in range(3):
        alone = temporal_convolution(*(values[stream : stream + 1] for values in given), stride=2)[0]
        assert torch.equal(alone[0], together[0][stream])


@by_dtype
def test_what_is_not_a_number_stays_visible(dtype):
    x, scale, shift, weight, bias = inputs((2, 2, 20, 5, 16, 16, 9, 1), dtype)
    x[0, 1, 10, 2, 3] = torch.nan
    y, mean, variance = temporal_convolution(x, scale, shift, weight, bias)
    seen = y.isnan().all(dim=-1)
    assert torch.equal(seen, y.isnan().any(dim=-1))
    assert seen[0, 1, 6:15, 2].all()
    assert int(seen.sum()) == 9
    assert mean[0].isnan().all()
    assert variance[0].isnan().all()
    assert mean[1].isfinite().all()
    made = results(temporal_convolution, x, scale, shift, weight, bias, statistics=False)
    assert made[4][0, :, 3].isnan().all()
    assert made[4][1].isfinite().all()
    assert made[6][0, 3].isnan()
    # A gradient of infinity reaches x at the frames that took part in the value, and no other joint.
    x, scale, shift, weight, bias = inputs((1, 1, 20, 5, 16, 16, 9, 1), dtype)
    x.requires_grad_()
    y, _, _ = temporal_convolution(x, None, None, weight, bias)
    upstream = torch.zeros_like(y)
    upstream[0, 0, 10, 2, 3] = torch.inf
    (of_x,) = torch.autograd.grad(y, x, upstream)
    reached = (~of_x.isfinite()).any(dim=-1)
    assert reached[0, 0, 6:15, 2].all()
    assert not reached[0, 0, :6].any()
    assert not reached[0, 0, 15:].any()


MEASURE = """
import resource, sys, torch
from ikem_fast import ops
frames, channels = map(int, sys.argv[1:])
torch.set_num_threads(2)
weight, bias = torch.randn(1, channels, channels, 9), torch.randn(1, channels)
scale, shift = torch.ones(1, channels), torch.zeros(1, channels)
def run(x):
    with torch.no_grad():
        y, mean, _ = ops.temporal_convolution(x, scale, shift, weight, bias)
        torch.ops.ikem_fast.temporal_convolution_backward(x, scale, shift, weight, 1, y, mean, y, mean, mean, True)
run(torch.randn(1, 1, 1, 25, channels))
x = torch.randn(1, 2, frames, 25, channels)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(x)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_frames():
    """y and the gradient of x take 61 MB each; the activation alone would take as much again."""
    done = subprocess.run([sys.executable, "-c", MEASURE, "5000", "64"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2 * 61 + 30


def test_wrong_arguments_are_named():
    x, scale, shift, weight, bias = inputs((2, 3, 7, 5, 4, 6, 3, 1), torch.float32)
    given = {"x": x, "scale": scale, "shift": shift, "weight": weight, "bias": bias}
    out_scale, out_shift, residual = torch.ones(2, 6), torch.ones(2, 6), torch.ones(2, 3, 7, 5, 6)
    inference = {"statistics": False, "output_scale": out_scale, "output_shift": out_shift, "residual": residual}
    for changes, message in (
        ({"x": x[0]}, r"x must be \(S, B, T, V, C_in\) = \(any, .*\) floating point, got \(3, 7, 5, 4\) float32"),
        ({"x": x.half()}, r"x must be \(S, B, T, V, C_in\) float32, bfloat16 or float64, got .* float16"),
        ({"x": x[:, :, :0]}, r"x must be \(S, B, T, V, C_in\), none but B 0, got \(2, 3, 0, 5, 4\) float32"),
        ({"weight": weight[:1]}, r"weight must be .* = \(2, any, 4, any\) floating point, got \(1, 6, 4, 3\)"),
        ({"weight": weight[..., :2]}, r"weight must be .* K odd, got \(2, 6, 4, 2\)"),
        ({"weight": weight.double()}, r"weight must be float32 for x .*, got \(2, 6, 4, 3\) float64"),
        ({"bias": bias[:, :5]}, r"bias must be \(S, C_out\) = \(2, 6\) floating point, got \(2, 5\) float32"),
        ({"scale": None}, "scale and shift must be given together"),
        ({"shift": shift[:, :3]}, r"shift must be \(S, C_in\) = \(2, 4\) floating point, got \(2, 3\) float32"),
        ({"scale": scale.double()}, r"scale must be float32 for x .*, got \(2, 4\) float64"),
        ({"bias": bias.to("meta")}, "bias must be on x's device cpu, got meta"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"output_scale": out_scale}, "output_scale and output_shift must be given together"),
        (
            {"output_scale": out_scale, "output_shift": out_shift},
            "statistics must be False with output_scale, got True",
        ),
        ({"residual": residual}, "residual must be given with output_scale and output_shift"),
        ({**inference, "output_shift": shift}, r"output_shift must be \(S, C_out\) = \(2, 6\)"),
        ({**inference, "residual": residual[:, :, :6]}, r"residual must be \(S, B, T', V, C_out\) = \(2, 3, 7, 5, 6\)"),
        ({**inference, "residual": residual.double()}, r"residual must be of x's dtype, got .* float64 beside x"),
        ({**inference, "x": x.clone().requires_grad_()}, "output_scale is for inference, without gradients"),
        ({**inference, "residual": residual.clone().requires_grad_()}, "output_scale is for inference"),
    ):
        for function in (temporal_convolution, temporal_convolution_reference):
            with pytest.raises(ValueError, match=message):
                function(**{**given, **changes})


def test_operator_checks_what_the_function_would():
    x, scale, shift, weight, bias = inputs((2, 3, 7, 5, 4, 6, 3, 1), torch.float32)
    ones = torch.ones(2, 6)
    good = [x, scale, shift, weight, bias, 1, True, None, None, None]
    for changes, message in (
        ({0: x[0]}, r"x must be \(S, B, T, V, C_in\), none but B 0, got \(3, 7, 5, 4\)"),
        ({0: x.half()}, "x must be float32, bfloat16 or float64, got Half"),
        ({3: weight[:, :, :3]}, r"weight must be .* = \(2, any, 4, odd\), C_out not 0, got \(2, 6, 3, 3\)"),
        ({3: weight[..., :2]}, r"weight must be .* got \(2, 6, 4, 2\)"),
        ({3: weight.double()}, "weight must be Float, got Double"),
        ({4: bias[:, :5]}, r"bias must be \(S, C_out\) = \(2, 6\), got \(2, 5\)"),
        ({1: None}, "scale and shift must be given together"),
        ({2: shift.double()}, "shift must be Float, got Double"),
        ({5: 0}, "stride must be at least 1, got 0"),
        ({7: ones}, "output_scale and output_shift must be given together"),
        ({7: ones, 8: ones}, "statistics must be False with output_scale, got True"),
        ({9: x}, "residual must be given with output_scale and output_shift"),
        ({6: False, 7: ones, 8: ones, 9: x}, r"residual must be \(S, B, T', V, C_out\) = \(2, 3, 7, 5, 6\)"),
    ):
        arguments = [changes.get(index, value) for index, value in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            torch.ops.ikem_fast.temporal_convolution(*arguments)
    y, mean, _ = torch.ops.ikem_fast.temporal_convolution(*good)
    good = [x, scale, shift, weight, 1, y, mean, y, mean, mean, True]
    for changes, message in (
        ({5: y[:, :, :6]}, r"y must be \(S, B, T', V, C_out\) = \(2, 3, 7, 5, 6\), got \(2, 3, 6, 5, 6\)"),
        ({6: mean[:0]}, r"mean must be \(S, C_out\) = \(2, 6\), got \(0, 6\)"),
        ({7: y.double()}, "y_gradient must be Float, got Double"),
        ({8: mean[:1]}, r"mean_gradient must be \(S, C_out\) = \(2, 6\), got \(1, 6\)"),
        ({9: mean.double()}, "variance_gradient must be Float, got Double"),
    ):
        arguments = [changes.get(index, value) for index, value in enumerate(good)]
        with pytest.raises(ValueError, match=message):
            torch.ops.ikem_fast.temporal_convolution_backward(*arguments)


def test_no_gradient_with_output_scale():
    x, scale, shift, weight, bias = inputs((1, 1, 3, 2, 4, 6, 3, 1), torch.float32)
    ones = torch.ones(1, 6)
    y, _, _ = torch.ops.ikem_fast.temporal_convolution(
        x.requires_grad_(), scale, shift, weight, bias, 1, False, ones, ones, None
    )
    with pytest.raises(RuntimeError, match="no gradient: it was called with output_scale"):
        y.sum().backward()


def test_exported():
    assert {"temporal_convolution", "temporal_convolution_reference"} <= set(ops.__all__)
