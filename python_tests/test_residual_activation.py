"""Batch norm, dropout, residual and ReLU in one pass: the compiled operator against its plain definition."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys

import pytest
import torch

from ikem_fast import ops
from ikem_fast.ops import residual_activation, residual_activation_reference

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
# Means and sums over frames, joints and sequences, relative to the largest; all else is equal to the last bit.
TOLERANCES = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 2e-6}
# S, B, T, V, C: one value; channels narrower and wider than registers, with and without a rest; a rest in the last
# period of a stream; a row of many channels.
SIZES = [(1, 1, 1, 1, 1), (2, 6, 5, 7, 16), (3, 2, 1, 5, 32), (1, 4, 13, 25, 24), (2, 4, 3, 5, 33), (1, 2, 2, 1, 1030)]
RESIDUALS = ["none", "plain", "scaled"]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
by_residual = pytest.mark.parametrize("residual", RESIDUALS)
NAMES = ("x", "scale", "shift", "residual", "residual_scale", "residual_shift")


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def seed_of(number=-123456789012345, device="cpu"):
    return torch.tensor([number], device=device)


def inputs(sizes, dtype=torch.float64, residual="scaled", device="cpu"):
    """What goes into the function, in its order."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    streams, *_, channels = sizes
    values = [draw(*sizes, dtype=dtype) for _ in range(2)]
    x, residual_values = values
    coefficients = [draw(streams, channels, dtype=computed(dtype)) for _ in range(4)]
    given = [x, *coefficients[:2], residual_values, *coefficients[2:]]
    kept = {"none": 3, "plain": 4, "scaled": 6}[residual]
    return given[:kept] + [None] * (6 - kept)


def results(function, given, **options):
    """The result and the gradients of a weighted sum of it, by name."""
    given = [None if value is None else value.detach().requires_grad_() for value in given]
    out = function(*given, **options)
    weights = torch.linspace(-1.0, 1.5, out.numel(), dtype=torch.float64).view(out.shape).to(out)
    named = {name: value for name, value in zip(NAMES, given, strict=True) if value is not None}
    gradients = torch.autograd.grad((weights * out).sum(), list(named.values()))
    return {"out": out.detach(), **dict(zip(named, gradients, strict=True))}


def assert_agree(ours, expected, tolerance, pool=0):
    assert ours.keys() == expected.keys()
    for name, one in ours.items():
        other = expected[name]
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        if torch.equal(one, other):
            continue
        assert name not in ("x", "residual"), f"{name} differs"
        assert name != "out" or pool, "out differs"
        scale = float(other.double().abs().max())
        error = float((one.double() - other.double()).abs().max())
        assert error <= tolerance * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


@by_dtype
@by_residual
@pytest.mark.parametrize("dropout", [0.0, 0.5, 0.3])
def test_operator_agrees_with_definition(dtype, residual, dropout):
    for sizes, pool in itertools.product(SIZES, (0, 1, 2)):
        if pool and sizes[1] % pool:
            continue
        given = inputs(sizes, dtype, residual)
        options = {"dropout": dropout, "seed": seed_of(), "layer": 3, "pool": pool}
        ours, expected = (
            results(function, given, **options) for function in (residual_activation, residual_activation_reference)
        )
        assert ours["out"].dtype == (computed(dtype) if pool else dtype)
        assert ours["x"].dtype == dtype
        assert_agree(ours, expected, TOLERANCES[dtype], pool)


@by_dtype
@by_residual
def test_every_instruction_set(dtype, residual, capability):
    for sizes, pool in (((2, 6, 5, 7, 16), 0), ((1, 3, 5, 11, 37), 0), ((2, 6, 3, 5, 20), 3), ((1, 2, 1, 1, 1031), 0)):
        given = inputs(sizes, dtype, residual)
        options = {"dropout": 0.4, "seed": seed_of(5), "layer": 2**32 - 1, "pool": pool}
        expected = results(residual_activation_reference, given, **options)
        assert_agree(results(residual_activation, given, **options), expected, TOLERANCES[dtype], pool)


def test_bfloat16_is_rounded_once():
    given = inputs((2, 3, 4, 5, 16), torch.bfloat16)
    exact = [value.double() for value in given]
    for pool in (0, 3):
        expected = residual_activation_reference(*exact, pool=pool)
        out = residual_activation(*given, pool=pool)
        eps = 2.0**-8 if pool == 0 else 1e-6
        torch.testing.assert_close(out.double(), expected, rtol=eps, atol=1e-5)


def test_it_is_what_modules_make_one_after_another():
    generator = torch.Generator().manual_seed(3)
    x, skipped = (torch.randn(1, 4, 5, 6, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    norms = [torch.nn.BatchNorm2d(8, dtype=torch.float64) for _ in range(2)]
    for norm in norms:
        torch.nn.init.normal_(norm.weight, 1.0, 0.3, generator=generator)
        torch.nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)

    def ours(x, skipped):
        coefficients = []
        for norm, values in zip(norms, (x, skipped), strict=True):
            flat = values.flatten(1, 3)
            variance, mean = torch.var_mean(flat, dim=1, correction=0)
            pair = ops.batch_norm_coefficients(mean, variance, norm.weight[None], norm.bias[None], norm.eps)
            coefficients.append(pair)
        return residual_activation(x, *coefficients[0], skipped, *coefficients[1])

    def theirs(x, skipped):
        made = [norm(values[0].permute(0, 3, 1, 2)) for norm, values in zip(norms, (x, skipped), strict=True)]
        return (made[0] + made[1]).relu().permute(0, 2, 3, 1)[None]

    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    of_both = []
    for function in (ours, theirs):
        leaves = [value.clone().requires_grad_() for value in (x, skipped)]
        out = function(*leaves)
        weights = torch.linspace(-1, 2, out.numel(), dtype=torch.float64).view_as(out)
        of_both.append((out.detach(), *torch.autograd.grad((weights * out).sum(), [*leaves, *parameters])))
    for one, other in zip(*of_both, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("function", [residual_activation, residual_activation_reference])
@pytest.mark.parametrize("pool", [1, 3])
def test_mean_over_frames_joints_and_persons(function, pool):
    given = inputs((2, 6, 4, 5, 8), torch.float32)
    full = function(*given)
    expected = full.double().view(2, 6 // pool, pool, 4, 5, 8).mean(dim=(2, 3, 4))
    torch.testing.assert_close(function(*given, pool=pool).double(), expected, rtol=1e-5, atol=1e-6)


@by_residual
def test_gradients(residual):
    for pool, dropout in ((0, 0.5), (2, 0.5), (0, 0.0)):
        given = [
            None if value is None else value.requires_grad_() for value in inputs((2, 2, 2, 3, 3), residual=residual)
        ]
        assert torch.autograd.gradcheck(
            lambda *given, pool=pool, dropout=dropout: residual_activation(
                *given, dropout=dropout, seed=seed_of(), pool=pool
            ),
            given,
        )


@by_dtype
def test_operator_is_well_formed(dtype):
    operator = torch.ops.ikem_fast.residual_activation.default
    for residual, pool in (("none", 0), ("plain", 2), ("scaled", 0)):
        given = [None if v is None else v.requires_grad_() for v in inputs((2, 2, 2, 3, 5), dtype, residual)]
        torch.library.opcheck(operator, (*given, 0.5, seed_of(), 1, pool))
    torch.library.opcheck(operator, (*inputs((2, 2, 2, 3, 5), dtype, "none"), 0.0, None, 0, 0))
    backward = torch.ops.ikem_fast.residual_activation_backward.default
    given = inputs((2, 2, 2, 3, 5), dtype, "plain")
    torch.library.opcheck(backward, (*given, 0.5, seed_of(), 1, 0, torch.ones_like(given[0])))


def test_compiles():
    given = inputs((2, 4, 2, 3, 5), torch.float32)
    options = {"dropout": 0.5, "seed": seed_of(), "layer": 1, "pool": 2}
    compiled = torch.compile(residual_activation, backend="aot_eager", fullgraph=True)
    assert_agree(results(compiled, given, **options), results(residual_activation, given, **options), 0.0)


def test_only_what_needs_a_gradient_gets_one():
    x, scale, shift, residual, *_ = inputs((2, 2, 2, 3, 5), torch.float32)
    out = residual_activation(x, scale.requires_grad_(), shift, residual)
    out.sum().backward()
    assert scale.grad is not None
    assert all(value.grad is None for value in (x, shift, residual))
    with torch.no_grad():
        assert not residual_activation(x, scale, shift, residual).requires_grad


def random_halves(sizes, seed, layer):
    """The random numbers of dropout, in Python's integers."""
    mask = 2**32 - 1
    streams, *others = sizes
    size = math.prod(others)
    halves = []
    for stream, element in itertools.product(range(streams), range(size)):
        c0, c1, c2, c3 = element // 8, 0, stream, layer
        first_key, second_key = seed & mask, (seed >> 32) & mask
        for _ in range(10):
            first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
            c0, c1, c2, c3 = (
                (second >> 32) ^ c1 ^ first_key,
                second & mask,
                (first >> 32) ^ c3 ^ second_key,
                first & mask,
            )
            first_key, second_key = (first_key + 0x9E3779B9) & mask, (second_key + 0xBB67AE85) & mask
        halves.append((c0, c1, c2, c3)[element % 8 // 2] >> (16 * (element % 2)) & 0xFFFF)
    return torch.tensor(halves).view(sizes)


def kept_values(function, sizes, dropout, seed, layer=0):
    """What dropout makes of ones."""
    streams, *_, channels = sizes
    scale, shift = torch.ones(streams, channels), torch.zeros(streams, channels)
    return function(torch.ones(sizes), scale, shift, dropout=dropout, seed=seed_of(seed), layer=layer)


def test_mask_is_the_one_that_is_written_down(capability):
    for sizes, seed in (((2, 3, 2, 3, 5), 2**63 - 5), ((3, 1, 2, 2, 16), -7), ((1, 2, 9, 25, 8), 0)):
        wanted = random_halves(sizes, seed, 11)
        for dropout in (0.5, 0.3, 1 / 65536, 0.99):
            threshold = round(dropout * 65536)
            expected = (wanted >= threshold) * (65536 / (65536 - threshold))
            for function in (residual_activation, residual_activation_reference):
                torch.testing.assert_close(kept_values(function, sizes, dropout, seed, 11), expected.float())


def test_backward_drops_what_forward_dropped():
    sizes = (2, 4, 5, 7, 16)
    x, scale, shift, *_ = inputs(sizes, torch.float32, "none")
    x, shift = x.abs().requires_grad_(), shift.abs()
    scale = scale.abs()
    for pool in (0, 2):
        out = residual_activation(x, scale, shift, dropout=0.5, seed=seed_of(1), layer=2, pool=pool)
        (of_x,) = torch.autograd.grad(out.sum(), x)
        kept = residual_activation(x.detach(), scale, shift, dropout=0.5, seed=seed_of(1), layer=2) > 0
        count = 5 * 7 * 2 if pool else 1
        torch.testing.assert_close(of_x, kept * 2.0 * scale[:, None, None, None] / count)


def test_dropout_keeps_its_share():
    sizes = (3, 16, 10, 25, 16)
    values = math.prod(sizes[1:])
    for dropout in (0.5, 0.1):
        out = kept_values(residual_activation, sizes, dropout, 42)
        kept = out > 0
        assert float(out.max()) == pytest.approx(1 / (1 - dropout), rel=1e-4)
        # Five standard deviations of a binomial distribution, of all values, of a stream's and of a channel's.
        deviation = math.sqrt(dropout * (1 - dropout))
        for share, count in (
            (kept.double().mean(), 3 * values),
            (kept.double().mean(dim=(1, 2, 3, 4)), values),
            (kept.double().mean(dim=(1, 2, 3)), values / 16),
        ):
            assert float((share - (1 - dropout)).abs().max()) < 5 * deviation / math.sqrt(count)


def test_masks_of_streams_layers_and_seeds_are_independent():
    sizes = (2, 16, 10, 25, 16)
    masks = [
        mask
        for seed, layer in ((1, 0), (2, 0), (1, 1), (1 + 2**32, 0))
        for mask in kept_values(residual_activation, sizes, 0.5, seed, layer) > 0
    ]
    count = masks[0].numel()
    for one, other in itertools.combinations(masks, 2):
        assert abs(float((one == other).double().mean()) - 0.5) < 5 * 0.5 / math.sqrt(count)
    # Neighbours within a stream, too.
    flat = masks[0].flatten()
    for distance in (1, 2, 8, 16):
        agree = (flat[distance:] == flat[:-distance]).double().mean()
        assert abs(float(agree) - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_without_dropout_the_seed_does_not_matter():
    given = inputs((2, 2, 2, 3, 5), torch.float32)
    expected = residual_activation(*given)
    for options in ({"seed": seed_of(9)}, {"dropout": 1e-7, "seed": seed_of(9)}):
        assert torch.equal(residual_activation(*given, **options), expected)


def test_expectation_is_that_without_dropout():
    x = torch.full((1, 64, 8, 25, 8), 3.0)
    scale, shift = torch.full((1, 8), 0.5), torch.full((1, 8), 1.0)
    mean = float(residual_activation(x, scale, shift, dropout=0.5, seed=seed_of(4)).double().mean())
    assert mean == pytest.approx(2.5, abs=5 * 2.5 / math.sqrt(x.numel()))


@by_dtype
def test_strided_inputs(dtype):
    x, scale, shift, residual, residual_scale, residual_shift = inputs((2, 4, 3, 5, 6), dtype)
    options = {"dropout": 0.5, "seed": seed_of(), "layer": 1}
    expected = results(residual_activation, [x, scale, shift, residual, residual_scale, residual_shift], **options)
    strided = [
        x.permute(1, 0, 4, 3, 2).contiguous().permute(1, 0, 4, 3, 2),
        scale.t().contiguous().t(),
        torch.cat([shift, shift], dim=1)[:, :6],
        torch.cat([residual, residual], dim=1)[:, 4:],
        residual_scale.repeat_interleave(2, dim=1)[:, ::2],
        residual_shift.t().contiguous().t(),
    ]
    assert not any(value.is_contiguous() for value in strided)
    assert_agree(results(residual_activation, strided, **options), expected, 0.0)
    # A gradient of any strides.
    x = x.clone().requires_grad_()
    out = residual_activation(x, scale, shift, residual)
    gradient = torch.randn(6, 5, 3, 4, 2).to(dtype).permute(4, 3, 2, 1, 0)
    (one,) = torch.autograd.grad(out, x, gradient, retain_graph=True)
    (other,) = torch.autograd.grad(out, x, gradient.contiguous())
    assert torch.equal(one, other)
    # Values that begin anywhere in memory.
    shifted = torch.cat([x.detach().flatten()[:1], x.detach().flatten()])[1:].view(x.shape)
    assert torch.equal(residual_activation(shifted, scale, shift, residual), out.detach())


@by_dtype
@pytest.mark.parametrize("function", [residual_activation, residual_activation_reference])
def test_nothing(function, dtype):
    for sizes in ((2, 0, 3, 4, 5), (0, 2, 3, 4, 5), (2, 2, 3, 4, 0)):
        for pool in (0, 2):
            made = results(function, inputs(sizes, dtype), dropout=0.5, seed=seed_of(), pool=pool)
            assert made["out"].shape == ((sizes[0], sizes[1] // 2, sizes[4]) if pool else sizes)
            assert made["x"].shape == sizes
            assert made["residual_shift"].shape == (sizes[0], sizes[4])
            assert not made["scale"].any()
    for sizes in ((1, 2, 0, 4, 5), (1, 2, 3, 0, 5)):
        assert function(*inputs(sizes, dtype), pool=2).isnan().all()


@by_dtype
def test_not_a_number_is_not_hidden(dtype, capability):
    for pool in (0, 2):
        x, *others = inputs((1, 2, 2, 3, 16), dtype, "plain")
        x[0, 0, 0, 0, 3] = math.nan
        out = residual_activation(x, *others, pool=pool)
        assert out.isnan().sum() == 1
        assert out[(0, 0, 3) if pool else (0, 0, 0, 0, 3)].isnan()
        given = results(residual_activation, [x, *others], pool=pool)
        wanted = results(residual_activation_reference, [x, *others], pool=pool)
        assert torch.equal(given["x"], wanted["x"])
        assert given["scale"].isnan().sum() == wanted["scale"].isnan().sum() == 1


@by_dtype
def test_same_bits_for_any_number_of_threads(dtype):
    before = torch.get_num_threads()
    made = []
    try:
        for pool, sizes in ((0, (2, 32, 13, 25, 16)), (2, (2, 8, 13, 25, 40))):
            given = inputs(sizes, dtype)
            options = {"dropout": 0.5, "seed": seed_of(), "pool": pool}
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                made.append(results(residual_activation, given, **options))
    finally:
        torch.set_num_threads(before)
    for group in (made[:3], made[3:]):
        for other in group[1:]:
            assert all(torch.equal(group[0][name], value) for name, value in other.items())


def test_sums_of_many_values_are_exact():
    """A float alone, summed value by value, would be off by 1e-3 here."""
    x, scale, shift, *_ = inputs((1, 64, 50, 25, 8), torch.float32, "none")
    x, shift = x.abs() * 100 + 1000, shift.abs() + 5000.0
    ours = results(residual_activation, [x, scale, shift, None, None, None])
    double = [value.double() for value in (x, scale, shift)]
    expected = results(residual_activation_reference, [*double, None, None, None])
    for name in ("scale", "shift"):
        size = (expected[name].abs().max() + 1).item()
        assert float((ours[name].double() - expected[name]).abs().max()) / size < 1e-5


MEASURE = """
import resource, torch
from ikem_fast import ops
torch.set_num_threads(2)
def run(sequences):
    sizes = (2, sequences, 13, 25, 256)
    x = torch.zeros(sizes, requires_grad=True)
    coefficients = torch.ones(2, 256)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    out = ops.residual_activation(
        x, coefficients, coefficients, x, dropout=0.5, seed=torch.tensor([1]), pool=2)
    forward = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return x, out, forward
x, out, _ = run(2)
out.sum().backward()
x, out, forward = run(64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
torch.ops.ikem_fast.residual_activation_backward(
    x.detach(), torch.ones(2, 256), torch.ones(2, 256), None, None, None, 0.5, torch.tensor([1]), 0, 2,
    torch.ones(2, 32, 256))
print(forward / 1024, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_means_take_no_memory_of_the_values_size():
    """Values take 41 MB, and so does the gradient of x, all that backward makes here."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    forward, backward = map(float, done.stdout.split())
    assert forward < 8
    assert backward < 41 + 8


def test_wrong_arguments_are_named():
    x, scale, shift, residual, residual_scale, residual_shift = inputs((2, 4, 3, 5, 6), torch.float32)
    seed = seed_of()
    every = {
        "x": x,
        "scale": scale,
        "shift": shift,
        "residual": residual,
        "residual_scale": residual_scale,
        "residual_shift": residual_shift,
        "seed": seed,
    }
    for change, message in (
        ({"x": x[0]}, r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got \(4, 3, 5, 6\) float32"),
        ({"x": x.half()}, r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got .* float16"),
        ({"x": None}, r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got None"),
        ({"scale": scale[:1]}, r"scale must be \(S, C\) = \(2, 6\) floating point, got \(1, 6\) float32"),
        ({"shift": shift.double()}, r"shift must be float32 for x .* float32, got \(2, 6\) float64"),
        (
            {"residual": residual[:, :2]},
            r"residual must be \(S, B, T, V, C\) = .* got \(2, 2, 3, 5, 6\)",
        ),
        ({"residual": residual.bfloat16()}, r"residual must be .* float32 as x is, got .* bfloat16"),
        ({"residual_scale": None}, "residual_scale and residual_shift must be given both"),
        ({"residual": None}, "residual_scale and residual_shift must be given both, with a residual, or none"),
        ({"residual_shift": residual_shift[0]}, r"residual_shift must be \(S, C\) = \(2, 6\) .* got \(6,\)"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, r"dropout must be in \[0, 1\), got -0.1"),
        ({"dropout": 0.5, "seed": None}, r"seed must be \(1,\) int64 for dropout 0.5, got None"),
        ({"seed": seed.int()}, r"seed must be \(1,\) int64, got \(1,\) int32"),
        ({"seed": torch.tensor(3)}, r"seed must be \(1,\) int64, got \(\) int64"),
        ({"seed": seed.to("meta")}, "seed must be on x's device cpu, got meta"),
        ({"scale": scale.to("meta")}, "scale must be on x's device cpu, got meta"),
        ({"layer": -1}, r"layer must be 0 \.\.\. 2\^32 - 1, got -1"),
        ({"pool": 3}, "pool must be 0 or divide the 4 sequences of x, got 3"),
        ({"pool": -1}, "pool must be 0 or divide the 4 sequences of x, got -1"),
    ):
        for function in (residual_activation, residual_activation_reference):
            with pytest.raises(ValueError, match=message):
                function(**{**every, **change})


def test_operator_checks_what_the_function_would():
    given = inputs((2, 4, 3, 5, 6), torch.float32)
    x, scale = given[:2]
    forward, backward = torch.ops.ikem_fast.residual_activation, torch.ops.ikem_fast.residual_activation_backward
    rest = (0.0, None, 0, 0)
    for bad, message in (
        ((x[0], *given[1:], *rest), r"x must be \(S, B, T, V, C\), got \(4, 3, 5, 6\)"),
        ((x, scale[:, :5], *given[2:], *rest), r"scale must be \(S, C\) = \(2, 6\), got \(2, 5\)"),
        ((x, scale.double(), *given[2:], *rest), "scale must be Float on the CPU, got Double"),
        ((*given[:3], None, *given[4:], *rest), "must be given both, with a residual, or none"),
        ((*given[:3], given[3].double(), *given[4:], *rest), "residual must be Float on the CPU, got Double"),
        ((x.half(), *given[1:], *rest), "x must be float32, bfloat16 or float64, got Half"),
        ((*given, 0.5, None, 0, 0), r"seed must be \(1,\) int64 for dropout above 0, got none"),
        ((*given, 0.5, seed_of().int(), 0, 0), "seed must be Long on the CPU, got Int"),
        ((*given, 0.5, torch.tensor([1, 2]), 0, 0), r"seed must be \(1,\) = \(1\), got \(2\)"),
        ((*given, 1.5, seed_of(), 0, 0), r"dropout must be in \[0, 1\), got 1.5"),
        ((*given, 0.0, None, 2**32, 0), r"layer must be 0 \.\.\. 2\^32 - 1, got 4294967296"),
        ((*given, 0.0, None, 0, 3), "pool must be 0 or divide the 4 sequences of x, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(*bad)
    for gradient, message in (
        (x[:1], r"gradient must be \[2, 4, 3, 5, 6\], got \[1, 4, 3, 5, 6\]"),
        (x.double(), "gradient must be Float on the CPU, got Double"),
    ):
        with pytest.raises(ValueError, match=message):
            backward(*given, *rest, gradient)


def test_exported():
    assert {"residual_activation", "residual_activation_reference"} <= set(ops.__all__)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@by_residual
def test_cuda_agrees_with_definition(dtype, residual):
    sizes = [(1, 1, 1, 1, 1), (2, 4, 5, 7, 16), (1, 2, 3, 5, 24), (2, 2, 3, 5, 33), (1, 2, 1, 3, 2064)]
    for shape, pool in itertools.product(sizes, (0, 2)):
        if pool and shape[1] % pool:
            continue
        given = inputs(shape, dtype, residual)
        options = {"dropout": 0.5, "layer": 3, "pool": pool}
        expected = results(residual_activation_reference, given, seed=seed_of(), **options)
        on_device = [None if value is None else value.cuda() for value in given]
        ours = results(residual_activation, on_device, seed=seed_of(device="cuda"), **options)
        ours = {name: value.cpu() for name, value in ours.items()}
        assert_agree(ours, expected, 5e-6, pool)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_and_cpu_make_the_same_bits(dtype):
    for sizes, pool in (((6, 32, 13, 25, 64), 0), ((6, 16, 13, 25, 256), 2)):
        given = inputs(sizes, dtype)
        on_cpu = results(residual_activation, given, dropout=0.5, seed=seed_of(), layer=5, pool=pool)
        options = {"dropout": 0.5, "seed": seed_of(device="cuda"), "layer": 5, "pool": pool}
        first, again = (results(residual_activation, [v.cuda() for v in given], **options) for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert_agree({name: value.cpu() for name, value in first.items()}, on_cpu, 1e-5, pool)


@pytest.mark.cuda
def test_cuda_values_that_begin_anywhere():
    x, scale, shift, residual, *_ = inputs((2, 2, 3, 5, 8), torch.bfloat16, device="cuda")
    shifted = torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)
    expected = residual_activation(x, scale, shift, residual)
    assert torch.equal(residual_activation(shifted, scale, shift, residual), expected)


@pytest.mark.cuda
def test_cuda_graph_reads_the_seed_of_the_moment():
    x, scale, shift, residual, *_ = inputs((2, 2, 3, 5, 8), torch.float32, device="cuda")
    seed = seed_of(1, device="cuda")
    residual_activation(x, scale, shift, residual, dropout=0.5, seed=seed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = residual_activation(x, scale, shift, residual, dropout=0.5, seed=seed)
    for number in (1, 2):
        seed.fill_(number)
        graph.replay()
        expected = residual_activation_reference(x, scale, shift, residual, dropout=0.5, seed=seed)
        assert torch.equal(out, expected)
