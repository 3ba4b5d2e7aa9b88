"""temporal_convolution's ways on CUDA: the one through frequencies with its steps in plain PyTorch here, and both with
their kernels on a GPU.
"""

import math

import pytest
import torch

from ikem_fast.ops import _temporal_convolution_cuda as on_cuda
from ikem_fast.ops import temporal_convolution_reference

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Relative to the largest magnitude. bfloat16 rounds slots and their products.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 3e-2}
SIZES = [
    # S, B, T, V, C_in, C_out, K
    (1, 1, 1, 1, 8, 8, 1),
    (2, 3, 13, 3, 16, 8, 9),
    (1, 2, 5, 2, 8, 16, 11),
    (2, 2, 16, 1, 8, 8, 3),
    (1, 3, 17, 2, 8, 8, 9),
    (2, 1, 50, 2, 8, 24, 9),
    (1, 2, 20, 1, 8, 8, 17),
]


def random(*shape, dtype, device="cpu", seed, deviation=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (deviation * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(device, dtype)


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(sizes, dtype, device="cpu", activation=True):
    streams, sequences, frames, joints, in_channels, out_channels, taps = sizes
    x = random(streams, sequences, frames, joints, in_channels, dtype=dtype, device=device, seed=1)
    of_channels = {"dtype": computed(dtype), "device": device}
    scale = random(streams, in_channels, **of_channels, seed=2) if activation else None
    shift = random(streams, in_channels, **of_channels, seed=3) if activation else None
    deviation = 1 / math.sqrt(in_channels * taps)
    weight = random(streams, out_channels, in_channels, taps, **of_channels, seed=4, deviation=deviation)
    return x, scale, shift, weight, random(streams, out_channels, **of_channels, seed=5)


def assert_near(actual, expected, tolerance):
    assert actual.shape == expected.shape
    if not expected.numel():
        return
    largest = 1e-6 + expected.double().abs().amax().item()
    error = (actual.double().cpu() - expected.double().cpu()).abs().amax().item()
    assert error <= tolerance * largest, f"off by {error:.1e} of {largest:.1e}"


def expected_results(x, scale, shift, weight, bias, gradients=None, stride=1, **options):
    """The twin's results in float64 and, with gradients of them, those of x, scale, shift, weight and bias."""
    given = [
        None if value is None else value.detach().double().cpu().requires_grad_()
        for value in (x, scale, shift, weight, bias)
    ]
    options = {
        name: value.double().cpu() if isinstance(value, torch.Tensor) else value for name, value in options.items()
    }
    if gradients is None:
        with torch.no_grad():
            return temporal_convolution_reference(*given, stride=stride, **options)
    results = temporal_convolution_reference(*given, stride=stride, **options)
    total = sum(
        (g.double().cpu() * result).sum() for g, result in zip(gradients, results, strict=True) if g is not None
    )
    wanted = [value for value in given if value is not None]
    of_wanted = list(torch.autograd.grad(total, wanted))
    return results, [None if value is None else of_wanted.pop(0) for value in given]


def upstream(results, with_mean=True, with_variance=True):
    """Gradients of y, mean and variance of a size to make each of them count."""
    y, mean, variance = results
    count = y[0, ..., 0].numel()
    return (
        random(*y.shape, dtype=y.dtype, device=y.device, seed=6),
        random(*mean.shape, dtype=mean.dtype, device=y.device, seed=7, deviation=count) if with_mean else None,
        random(*variance.shape, dtype=mean.dtype, device=y.device, seed=8, deviation=count / 4)
        if with_variance
        else None,
    )


@pytest.mark.parametrize("frames", [1, 2, 12, 13, 16, 17, 24, 25, 50, 300])
@pytest.mark.parametrize("taps", [1, 3, 9, 15, 21, 27, 29])
def test_plans_keep_to_the_limits_of_the_kernels(frames, taps):
    plan = on_cuda.spectral_plan(frames, taps)
    if taps == 29 or (taps > 21 and frames > 16):
        assert plan is None
        return
    assert plan.tile_frames <= 16
    assert plan.window <= 24
    assert plan.frequencies <= 16
    assert plan.tiles(frames) * plan.tile_frames >= frames
    # The circle is long enough for what goes round its end to meet zeros.
    assert plan.slots >= (plan.window if plan.tiles(frames) > 1 else frames + taps // 2)


def test_sizes_of_the_model():
    assert on_cuda.spectral_plan(13, 9) == on_cuda.SpectralPlan(13, 0, 8)
    preferred = {}
    for channels, frames in ((16, 50), (32, 25), (64, 13), (128, 13), (256, 13)):
        x = torch.empty(6, 256, frames, 25, channels, dtype=torch.bfloat16, device="meta")
        preferred[channels] = on_cuda.prefers_spectral(x, torch.empty(6, channels, channels, 9, device="meta"), 1)
    assert preferred == {16: False, 32: False, 64: False, 128: True, 256: True}
    weight = torch.empty(6, 256, 256, 9, device="meta")
    x = torch.empty(6, 256, 13, 25, 256, dtype=torch.bfloat16, device="meta")
    assert not on_cuda.prefers_spectral(x, weight, 2)
    assert not on_cuda.prefers_spectral(x[:, :0], weight, 1)
    assert not on_cuda.prefers_spectral(x[..., :255], weight[:, :, :255], 1)


def test_basis_is_orthonormal_and_turns_taps():
    """The spectrum of a convolution is the product of the spectra, for taps and frames around the middle."""
    whole = on_cuda.frames_basis(17, 8)
    torch.testing.assert_close(whole @ whole.T, torch.eye(17, dtype=torch.float64))
    h, w = random(13, dtype=torch.float64, seed=1), random(9, dtype=torch.float64, seed=2)
    slots, factors = on_cuda.frames_basis(13, 8) @ h, on_cuda.taps_basis(9, 8) @ w
    of_h = torch.complex(slots[1::2], slots[2::2])
    of_w = torch.complex(factors[1::2], factors[2::2])
    products = torch.view_as_real(of_h * of_w).flatten()
    y = on_cuda.frames_basis(13, 8).T @ torch.cat([slots[:1] * factors[:1], products])
    expected = torch.nn.functional.conv1d(h.view(1, 1, -1), w.view(1, 1, -1), padding=4).flatten()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_spectral_form_equals_the_definition(sizes, activation, dtype, device):
    given = inputs(sizes, dtype, device, activation)
    ours = on_cuda.spectral(*given, 1, True, None, None, None)
    gradients = upstream(ours)
    expected, expected_gradients = expected_results(*given, gradients)
    assert ours[0].dtype == dtype
    assert ours[1].dtype == computed(dtype)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_near(actual, wanted.detach(), TOLERANCES[dtype])
    x, scale, shift, weight, _ = given
    made = on_cuda.spectral_backward(x, scale, shift, weight, 1, *ours[:2], *gradients, True)
    assert [value.dtype for value in made] == [dtype, *[computed(dtype)] * 4]
    if not activation:
        assert [tuple(value.shape) for value in made[1:3]] == [(0,), (0,)]
    for actual, wanted in zip(made, expected_gradients, strict=True):
        if wanted is not None:
            assert_near(actual, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("limit", [1, 20000])
@pytest.mark.parametrize("sizes", [(2, 5, 13, 2, 8, 16, 9), (2, 5, 18, 2, 8, 8, 5)], ids=str)
def test_pieces_of_the_batch_make_no_difference(sizes, limit, device, monkeypatch):
    dtype = torch.float64 if device == "cpu" else torch.float32
    given = inputs(sizes, dtype, device)

    def run():
        results = on_cuda.spectral(*given, 1, True, None, None, None)
        gradients = upstream(results)
        return *results, *on_cuda.spectral_backward(*given[:4], 1, *results[:2], *gradients, True)

    whole = run()
    monkeypatch.setattr(on_cuda, "_SLOT_BYTES", limit)
    plan = on_cuda.spectral_plan(sizes[2], sizes[6])
    pieces = on_cuda._pieces(given[0], given[3], plan)
    assert len(pieces) > 1
    assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(sizes[1]))
    for actual, wanted in zip(run(), whole, strict=True):
        assert_near(actual, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residual", [True, False])
def test_spectral_form_for_inference(residual, device):
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    sizes = (2, 3, 13, 2, 8, 16, 9)
    given = inputs(sizes, dtype, device)
    added = random(2, 3, 13, 2, 16, dtype=dtype, device=device, seed=9) if residual else None
    factor, summand = (random(2, 16, dtype=computed(dtype), device=device, seed=seed) for seed in (10, 11))
    ours = on_cuda.spectral(*given, 1, False, factor, summand, added)
    expected = expected_results(*given, statistics=False, output_scale=factor, output_shift=summand, residual=added)
    assert_near(ours[0], expected[0], TOLERANCES[dtype])
    assert [tuple(value.shape) for value in ours[1:]] == [(0,), (0,)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("with_mean", "with_variance", "with_x"), [(False, False, True), (True, False, False),
                                                                   (False, True, False)])  # fmt: skip
@pytest.mark.parametrize("activation", [True, False])
def test_parts_of_the_backward_pass(activation, with_mean, with_variance, with_x, device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    given = inputs((2, 2, 13, 3, 8, 16, 9), dtype, device, activation)
    results = on_cuda.spectral(*given, 1, True, None, None, None)
    gradients = upstream(results, with_mean, with_variance)
    _, expected = expected_results(*given, gradients)
    made = on_cuda.spectral_backward(*given[:4], 1, *results[:2], *gradients, with_x)
    if not with_x:
        assert made[0].shape == (0,)
    for actual, wanted in list(zip(made, expected, strict=True))[0 if with_x else 1 :]:
        if wanted is not None:
            assert_near(actual, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_spectral_form_of_strided_tensors(device):
    dtype = torch.float64 if device == "cpu" else torch.float32
    x, scale, shift, weight, bias = inputs((2, 3, 13, 4, 8, 16, 9), dtype, device)
    expected = on_cuda.spectral(x, scale, shift, weight, bias, 1, True, None, None, None)
    strided = x.permute(1, 4, 0, 2, 3).contiguous().permute(2, 0, 3, 4, 1)
    flipped = weight.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    longer = torch.empty(x.numel() + 1, dtype=dtype, device=device)[1:].view(x.shape).copy_(x)  # not aligned
    for same in (strided, longer):
        results = on_cuda.spectral(same, scale, shift, flipped, bias, 1, True, None, None, None)
        for actual, wanted in zip(results, expected, strict=True):
            assert_near(actual, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
def test_spectral_form_of_nothing(device):
    x, scale, shift, weight, bias = inputs((2, 0, 13, 3, 8, 16, 9), torch.float32, device)
    y, mean, variance = on_cuda.spectral(x, scale, shift, weight, bias, 1, True, None, None, None)
    assert y.shape == (2, 0, 13, 3, 16)
    assert not mean.any()
    assert not variance.any()
    made = on_cuda.spectral_backward(x, scale, shift, weight, 1, y, mean, y, mean, variance, True)
    assert [tuple(value.shape) for value in made] == [(2, 0, 13, 3, 8), (2, 8), (2, 8), (2, 16, 8, 9), (2, 16)]
    assert not any(value.any() for value in made)


@pytest.mark.parametrize("device", DEVICES)
def test_mean_far_above_the_deviation(device):
    x, _, _, weight, bias = inputs((1, 4, 13, 5, 8, 8, 9), torch.float32, device, activation=False)
    bias = bias + 1e4
    _, mean, variance = on_cuda.spectral(x, None, None, weight, bias, 1, True, None, None, None)
    _, exact_mean, exact_variance = expected_results(x, None, None, weight, bias)
    assert_near(mean, exact_mean, 1e-6)
    assert_near(variance, exact_variance, 1e-2)


def test_what_has_no_spectral_form_is_refused():
    x, scale, shift, weight, bias = inputs((1, 2, 30, 1, 8, 8, 23), torch.float64)
    with pytest.raises(ValueError, match="for stride 1 and few taps, got 30 frames, 23 taps and stride 1"):
        on_cuda.spectral(x, scale, shift, weight, bias, 1, True, None, None, None)
    with pytest.raises(ValueError, match="got 8 frames, 23 taps and stride 2"):
        on_cuda.spectral(x[:, :, :8], scale, shift, weight, bias, 2, True, None, None, None)


@pytest.mark.parametrize("activation", [True, False])
def test_direct_way_gets_whole_channels(activation, monkeypatch):
    """The kernels take channels in eights: others go to them with zeros, which leave no trace."""
    given = inputs((2, 2, 5, 3, 3, 13, 3), torch.float64, activation=activation)

    def operator(x, scale, shift, weight, bias, stride, statistics, output_scale, output_shift, residual):
        assert x.shape[4] % 8 == weight.shape[1] % 8 == weight.shape[2] % 8 == 0
        return temporal_convolution_reference(
            x, scale, shift, weight, bias, stride=stride, statistics=statistics,
            output_scale=output_scale, output_shift=output_shift, residual=residual,
        )  # fmt: skip

    def backward(x, scale, shift, weight, stride, y, mean, *gradients_and_choice):
        *gradients, _ = gradients_and_choice
        assert y.shape[4] == mean.shape[1] == weight.shape[1]
        bias = torch.zeros(weight.shape[:2], dtype=x.dtype)
        _, made = expected_results(x, scale, shift, weight, bias, gradients, stride)
        return [x.new_empty(0) if value is None else value for value in made]

    monkeypatch.setattr(torch.ops.ikem_fast, "_temporal_convolution_direct", operator, raising=False)
    monkeypatch.setattr(torch.ops.ikem_fast, "_temporal_convolution_direct_backward", backward, raising=False)
    ours = on_cuda.direct(*given, 2, True, None, None, None)
    gradients = upstream(ours)
    expected, expected_gradients = expected_results(*given, gradients, stride=2)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_near(actual, wanted.detach(), 1e-10)
    with torch.enable_grad():
        made = on_cuda.direct_backward(*given[:4], 2, *ours[:2], *gradients, True)
    for actual, wanted in zip(made, expected_gradients, strict=True):
        if wanted is not None:
            assert_near(actual, wanted, 1e-10)
    factor, summand = (random(2, 13, dtype=torch.float64, seed=seed) for seed in (10, 11))
    residual = random(*ours[0].shape, dtype=torch.float64, seed=12)
    made = on_cuda.direct(*given, 2, False, factor, summand, residual)
    expected = expected_results(
        *given, stride=2, statistics=False, output_scale=factor, output_shift=summand, residual=residual
    )
    assert_near(made[0], expected[0], 1e-10)


# On a GPU: the operator, whichever way it goes.

DIRECT_SIZES = [
    # S, B, T, V, C_in, C_out, K, stride
    (2, 3, 50, 25, 16, 16, 9, 1),
    (2, 2, 50, 25, 32, 32, 9, 2),
    (1, 3, 25, 25, 64, 64, 9, 2),
    (2, 2, 13, 25, 64, 64, 9, 1),
    (1, 2, 7, 5, 3, 13, 5, 1),
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 2, 9, 20, 24, 136, 3, 3),
    (1, 2, 6, 128, 136, 24, 11, 1),
]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("sizes", DIRECT_SIZES, ids=str)
def test_cuda_direct_way_equals_the_definition(sizes, activation, dtype):
    *sizes, stride = sizes
    given = inputs(sizes, dtype, "cuda", activation)
    ours = on_cuda.direct(*given, stride, True, None, None, None)
    gradients = upstream(ours)
    expected, expected_gradients = expected_results(*given, gradients, stride)
    for actual, wanted in zip(ours, expected, strict=True):
        assert_near(actual, wanted.detach(), TOLERANCES[dtype])
    made = on_cuda.direct_backward(*given[:4], stride, *ours[:2], *gradients, True)
    for actual, wanted in zip(made, expected_gradients, strict=True):
        if wanted is not None:
            assert_near(actual, wanted, TOLERANCES[dtype])


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(2, 4, 25, 25, 32, 32, 9), (2, 8, 13, 25, 256, 256, 9)], ids=str)
def test_cuda_operator_repeats_its_bits_and_can_be_captured(sizes, dtype):
    x, scale, shift, weight, bias = inputs(sizes, dtype, "cuda")
    operator, backward = torch.ops.ikem_fast.temporal_convolution, torch.ops.ikem_fast.temporal_convolution_backward

    def run():
        results = operator(x, scale, shift, weight, bias, 1, True, None, None, None)
        return *results, *backward(x, scale, shift, weight, 1, *results[:2], *gradients, True)

    gradients = upstream(operator(x, scale, shift, weight, bias, 1, True, None, None, None))
    expected = run()
    assert all(torch.equal(*pair) for pair in zip(run(), expected, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    x.copy_(x.flip(1))
    expected = run()
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(captured, expected, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("channels", [64, 256])
def test_cuda_what_is_not_a_number_stays_visible(channels):
    x, scale, shift, weight, bias = inputs((1, 2, 13, 4, channels, channels, 9), torch.bfloat16, "cuda")
    x[0, 1, 6, 2, 3] = math.nan
    y, mean, variance = torch.ops.ikem_fast.temporal_convolution(
        x, scale, shift, weight, bias, 1, True, None, None, None
    )
    assert y[0, 1, 6, 2].isnan().all()
    assert y[0, 0].isfinite().all()
    assert mean.isnan().all()
    assert variance.isnan().all()


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(6, 256, 13, 25, 256, 256, 9), (6, 256, 13, 25, 64, 64, 9)], ids=str)
def test_cuda_ways_agree_at_the_size_of_the_model(sizes):
    given = inputs(sizes, torch.bfloat16, "cuda")
    results = on_cuda.direct(*given, 1, True, None, None, None)
    gradients = upstream(results)
    of_direct = (*results, *on_cuda.direct_backward(*given[:4], 1, *results[:2], *gradients, True))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    of_spectral = on_cuda.spectral(*given, 1, True, None, None, None)
    assert torch.cuda.max_memory_allocated() - before < on_cuda._SLOT_BYTES + 2 * results[0].nbytes
    of_spectral += on_cuda.spectral_backward(*given[:4], 1, *results[:2], *gradients, True)
    for one, other in zip(of_direct, of_spectral, strict=True):
        assert_near(one, other, TOLERANCES[torch.bfloat16])
