"""The convolution over frames in the frequency domain: the compiled operators against the plain definition."""

from __future__ import annotations

import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops import temporal_convolution_reference

pytestmark = pytest.mark.skipif(not _extension.available(), reason="the compiled part is missing")

# Largest error allowed, in units of a result's largest number; of bfloat16 the factors are rounded (about 2^-9).
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


class Given(NamedTuple):
    x: Tensor
    scale: Tensor | None
    shift: Tensor | None
    weight: Tensor
    bias: Tensor


class Results(NamedTuple):
    y: Tensor
    mean: Tensor
    variance: Tensor
    of_x: Tensor
    of_scale: Tensor
    of_shift: Tensor
    of_weight: Tensor
    of_bias: Tensor


def inputs(streams, batch, frames, joints, channels, out_channels, taps, dtype, activated=True) -> Given:
    generator = torch.Generator().manual_seed(streams + 2 * batch + 3 * frames + 5 * channels + 7 * out_channels)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    computed = torch.float64 if dtype == torch.float64 else torch.float32
    x = draw(streams, batch, frames, joints, channels).to(dtype)
    scale, shift = (0.7 + 0.2 * draw(streams, channels)).to(computed), (0.2 * draw(streams, channels)).to(computed)
    weight = (draw(streams, out_channels, channels, taps) / (channels * taps) ** 0.5).to(computed)
    bias = draw(streams, out_channels).to(computed)
    return Given(x, scale, shift, weight, bias) if activated else Given(x, None, None, weight, bias)


def upstream(given: Given) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients that reach y, mean and variance."""
    generator = torch.Generator().manual_seed(1)
    streams, batch, frames, joints, _ = given.x.shape
    of_y = torch.randn(streams, batch, frames, joints, given.weight.shape[1], generator=generator)
    of_mean, of_variance = (10 * torch.randn(given.bias.shape, generator=generator) for _ in range(2))
    return of_y.to(given.x.dtype), of_mean.to(given.bias.dtype), of_variance.to(given.bias.dtype)


def spectral(given: Given) -> Results:
    y, mean, variance = torch.ops.ikem_fast._temporal_convolution_spectral(*given, 1, True, None, None, None)
    of_y, of_mean, of_variance = upstream(given)
    gradients = torch.ops.ikem_fast._temporal_convolution_spectral_backward(
        *given[:4], 1, y, mean, of_y, of_mean, of_variance, True
    )
    return Results(y, mean, variance, *gradients)


def exact(given: Given) -> Results:
    """In float64, with nothing rounded on the way."""
    leaves = [value if value is None else value.double().requires_grad_() for value in given]
    made = temporal_convolution_reference(*leaves)
    wanted = [leaf for leaf in leaves if leaf is not None]
    gradients = list(torch.autograd.grad(made, wanted, [value.double() for value in upstream(given)]))
    if given.scale is None:
        gradients[1:1] = [torch.empty(0), torch.empty(0)]
    return Results(*(value.detach() for value in made), *gradients)


def assert_close(ours: Results, expected: Results, tolerance: float) -> None:
    for name, one, other in zip(Results._fields, ours, expected, strict=True):
        assert one.shape == other.shape, name
        if other.numel():
            error = (one.double() - other.double()).abs().max() / other.double().abs().max().clamp_min(1e-30)
            assert error <= tolerance, (name, float(error))


SIZES = [
    (2, 3, 13, 5, 16, 32, 9),
    (1, 5, 13, 25, 64, 64, 9),
    (2, 2, 4, 3, 7, 5, 9),
    (1, 2, 1, 1, 3, 3, 9),  # a single frame
    (2, 1, 2, 1, 40, 24, 3),
    (1, 2, 25, 3, 33, 20, 9),
    (2, 2, 38, 3, 8, 48, 9),
    (1, 2, 75, 2, 64, 64, 9),  # tiles
    (1, 1, 80, 1, 5, 4, 5),  # a last tile of fewer frames
    (2, 3, 7, 3, 5, 300, 3),  # more channels than are looked at at a time
    (1, 2, 6, 2, 529, 4, 3),
    (1, 2, 6, 2, 4, 4, 1),
    (1, 1, 9, 2, 3, 4, 31),  # more taps than frames
]


@by_dtype
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_agrees_with_definition(sizes, dtype):
    given = inputs(*sizes, dtype)
    assert_close(spectral(given), exact(given), TOLERANCE[dtype])


@by_dtype
def test_without_activation(dtype):
    for sizes in ((2, 3, 13, 5, 16, 32, 9), (1, 2, 50, 3, 9, 8, 9)):
        given = inputs(*sizes, dtype, activated=False)
        ours = spectral(given)
        assert_close(ours, exact(given), TOLERANCE[dtype])
        assert ours.of_scale.shape == ours.of_shift.shape == (0,)


@by_dtype
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_lesser_instruction_sets(capability, dtype, monkeypatch):
    try:
        monkeypatch.setenv("IKEM_FAST_CPU_CAPABILITY", capability)
        for sizes in ((2, 3, 13, 5, 17, 40, 9), (1, 1, 40, 3, 32, 16, 9)):
            given = inputs(*sizes, dtype)
            assert_close(spectral(given), exact(given), TOLERANCE[dtype])
    except RuntimeError as error:
        pytest.skip(str(error))


def relative_deviation(values: Tensor, expected: Tensor) -> float:
    return float((values.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt())


def test_accuracy_of_the_widest_layer():
    """float32 beside the exact convolution; bfloat16 beside what rounded factors and results leave of it."""
    given = inputs(1, 2, 13, 25, 256, 256, 9, torch.float32)
    expected, ours = exact(given), spectral(given)
    for name in ("y", "of_x", "of_weight"):
        assert relative_deviation(getattr(ours, name), getattr(expected, name)) < 1e-6, name
    narrow = given._replace(x=given.x.bfloat16(), bias=torch.zeros_like(given.bias))
    x, scale, shift, weight, bias = (value.double() for value in narrow)
    h = torch.relu(scale[:, None, None, None] * x + shift[:, None, None, None])
    exact_y, _, _ = temporal_convolution_reference(h, None, None, weight, bias)
    direct, _, _ = temporal_convolution_reference(h.bfloat16().double(), None, None, weight.bfloat16().double(), bias)
    of_direct = relative_deviation(direct.bfloat16(), exact_y)
    assert relative_deviation(spectral(narrow).y, exact_y) < 1.5 * of_direct


@by_dtype
def test_parts_of_the_gradient(dtype):
    given = inputs(2, 3, 13, 5, 20, 24, 9, dtype)
    backward = torch.ops.ikem_fast._temporal_convolution_spectral_backward
    y, mean, _ = torch.ops.ikem_fast._temporal_convolution_spectral(*given, 1, True, None, None, None)
    of_y, of_mean, of_variance = upstream(given)
    complete = backward(*given[:4], 1, y, mean, of_y, of_mean, of_variance, True)
    partial = backward(*given[:4], 1, y, mean, of_y, of_mean, of_variance, False)
    assert partial[0].shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(complete[1:], partial[1:], strict=True))
    bare = backward(given.x, None, None, given.weight, 1, y, mean, of_y, of_mean, of_variance, False)
    assert [value.shape for value in bare[:3]] == [(0,)] * 3
    assert bare[3].isfinite().all()
    # What is not given counts as zero.
    for chosen in ((True, False), (False, True), (False, False)):
        one = [value if wanted else None for value, wanted in zip((of_mean, of_variance), chosen, strict=True)]
        other = [v if wanted else 0 * v for v, wanted in zip((of_mean, of_variance), chosen, strict=True)]
        for a, b in zip(
            backward(*given[:4], 1, y, mean, of_y, *one, True),
            backward(*given[:4], 1, y, mean, of_y, *other, True),
            strict=True,
        ):
            assert torch.equal(a, b)


@by_dtype
def test_inference(dtype):
    for sizes in ((2, 3, 13, 5, 16, 20, 9), (1, 1, 60, 3, 8, 33, 9)):
        given = inputs(*sizes, dtype)
        operator = torch.ops.ikem_fast._temporal_convolution_spectral
        plain, mean, variance = operator(*given, 1, False, None, None, None)
        assert mean.shape == variance.shape == (0,)
        assert torch.equal(plain, spectral(given).y)
        generator = torch.Generator().manual_seed(3)
        scale, shift = (torch.randn(given.bias.shape, generator=generator).to(given.bias.dtype) for _ in range(2))
        residual = torch.randn(plain.shape, generator=generator).to(dtype)
        for more in (None, residual):
            ours, _, _ = operator(*given, 1, False, scale, shift, more)
            expected, _, _ = temporal_convolution_reference(
                *(value.double() for value in given),
                statistics=False,
                output_scale=scale.double(),
                output_shift=shift.double(),
                residual=None if more is None else more.double(),
            )
            assert (ours == 0).any()
            assert (ours.double() - expected).abs().max() <= TOLERANCE[dtype] * expected.max()


@by_dtype
def test_statistics_of_a_large_mean(dtype):
    given = inputs(2, 8, 30, 25, 4, 16, 9, dtype)
    _, mean, variance = torch.ops.ikem_fast._temporal_convolution_spectral(
        *given[:4], given.bias + 1000, 1, True, None, None, None
    )
    _, expected_mean, expected_variance = exact(given)[:3]
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4  # of what float32 leaves of values around 1000
    torch.testing.assert_close(mean.double() - 1000, expected_mean, rtol=0, atol=1e-2)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=tolerance, atol=0)


@by_dtype
def test_number_of_threads(dtype):
    before = torch.get_num_threads()
    # More chunks than threads, several threads to a stream, and threads that go on to the next stream.
    for sizes in ((3, 5, 13, 25, 16, 24, 9), (1, 9, 13, 25, 16, 16, 9), (2, 4, 40, 7, 48, 33, 9)):
        given = inputs(*sizes, dtype)
        try:
            by_threads = {}
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                by_threads[threads] = spectral(given)
                again = spectral(given)
                assert all(torch.equal(one, other) for one, other in zip(by_threads[threads], again, strict=True))
        finally:
            torch.set_num_threads(before)
        for threads in (2, 3, 7):
            assert_close(by_threads[threads], by_threads[1], TOLERANCE[dtype])


def test_many_streams_of_wide_weights():
    """More than are packed at a time."""
    before = torch.get_num_threads()
    given = inputs(5, 1, 5, 2, 256, 256, 9, torch.float32)
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            assert_close(spectral(given), exact(given), TOLERANCE[torch.float32])
    finally:
        torch.set_num_threads(before)


@by_dtype
def test_no_sequences(dtype):
    made = spectral(inputs(2, 0, 13, 3, 4, 6, 9, dtype))
    assert made.y.shape == (2, 0, 13, 3, 6)
    assert made.of_x.shape == (2, 0, 13, 3, 4)
    for name, shape in (
        ("mean", (2, 6)),
        ("variance", (2, 6)),
        ("of_scale", (2, 4)),
        ("of_shift", (2, 4)),
        ("of_weight", (2, 6, 4, 9)),
        ("of_bias", (2, 6)),
    ):
        assert getattr(made, name).shape == shape
        assert not getattr(made, name).any()


@by_dtype
def test_strided_inputs(dtype):
    given = inputs(2, 3, 13, 5, 16, 18, 9, dtype)
    expected = spectral(given)
    x = given.x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    weight = given.weight.transpose(1, 3).contiguous().transpose(1, 3)
    scale = given.scale.t().contiguous().t()
    assert not x.is_contiguous()
    for one, other in zip(spectral(Given(x, scale, given.shift, weight, given.bias)), expected, strict=True):
        assert torch.equal(one, other)


@by_dtype
def test_what_is_not_a_number_stays_visible(dtype):
    """It reaches all frames of its tile, and no other joint, sequence or stream."""
    given = inputs(2, 2, 13, 5, 16, 20, 9, dtype)
    given.x[0, 1, 6, 2, 3] = torch.nan
    made = spectral(given)
    seen = made.y.isnan().any(dim=-1)
    assert made.y[0, 1, :, 2].isnan().all()
    assert int(seen.sum()) == 13
    assert made.mean[0].isnan().all()
    assert made.variance[0].isnan().all()
    assert made.mean[1].isfinite().all()
    assert made.of_weight[0, :, 3].isnan().all()
    assert made.of_scale[0, 3].isnan()
    assert all(value[1].isfinite().all() for value in made)


MEASURE = """
import resource, sys, torch
import ikem_fast.ops
batch, channels = map(int, sys.argv[1:])
torch.set_num_threads(1)
weight, bias = torch.randn(1, channels, channels, 9), torch.randn(1, channels)
scale, shift = torch.ones(1, channels), torch.zeros(1, channels)
forward = torch.ops.ikem_fast._temporal_convolution_spectral
backward = torch.ops.ikem_fast._temporal_convolution_spectral_backward
x = torch.ones(1, batch, 13, 25, channels)
small = torch.ones(1, 1, 1, 1, channels)
for values in (small, x):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    y, mean, _ = forward(values, scale, shift, weight, bias, 1, True, None, None, None)
    backward(values, scale, shift, weight, 1, y, mean, y, mean, mean, True)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_sequences():
    """y and the gradient of x take 41 MB each; a form that keeps all slots takes 79 MB for each of its factors."""
    done = subprocess.run([sys.executable, "-c", MEASURE, "512", "64"], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 2 * 41 + 20


def test_wrong_arguments_are_named():
    given = inputs(2, 3, 7, 5, 4, 6, 3, torch.float32)
    operator = torch.ops.ikem_fast._temporal_convolution_spectral
    with pytest.raises(ValueError, match="stride must be 1 in the spectral form, got 2"):
        operator(*given, 2, True, None, None, None)
    with pytest.raises(ValueError, match=r"x must be \(S, B, T, V, C_in\), none but B 0, got \(3, 7, 5, 4\)"):
        operator(given.x[0], *given[1:], 1, True, None, None, None)
    with pytest.raises(ValueError, match="weight must be Float, got Double"):
        operator(*given[:3], given.weight.double(), given.bias, 1, True, None, None, None)
    y, mean, _ = operator(*given, 1, True, None, None, None)
    backward = torch.ops.ikem_fast._temporal_convolution_spectral_backward
    with pytest.raises(ValueError, match="stride must be 1 in the spectral form, got 3"):
        backward(*given[:4], 3, y[:, :, :3], mean, y[:, :, :3], mean, mean, True)
    with pytest.raises(ValueError, match=r"y_gradient must be \(S, B, T', V, C_out\) = \(2, 3, 7, 5, 6\)"):
        backward(*given[:4], 1, y, mean, y[:, :, :6], mean, mean, True)
