"""Contrast against a queue in one pass: the compiled operator against its plain definition."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from contrast_inputs import units

from ikem_fast import ops
from ikem_fast.ops import queue_log_sum_exp, queue_log_sum_exp_reference

SCALE = 1 / 0.07
# x, queue, and what log-sum-exps and gradients may be off, relative to the largest magnitude. A bfloat16 product rounds
# the shares of the columns before they are summed; in the twin only its result is rounded.
NUMBERS = [
    (torch.float64, torch.float64, 1e-13, 1e-12),
    (torch.float32, torch.float32, 1e-6, 2e-6),
    (torch.bfloat16, torch.bfloat16, 1e-6, 2.0**-7),
    (torch.bfloat16, torch.float32, 1e-6, 2.0**-7),
]
SIZES = [
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (3, 5, 1, 33),
    (1, 201, 33, 1),
    (2, 130, 129, 515),
    (1, 7, 770, 300),
]
by_numbers = pytest.mark.parametrize("numbers", NUMBERS, ids=lambda n: f"{n[0]}-{n[1]}".replace("torch.", ""))


def statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def inputs(batch, rows, size, queue_size, dtype=torch.float64, queue_dtype=None):
    x = units(batch, rows, size, dim=2, seed=0, dtype=dtype)
    queue = units(batch, size, queue_size, dim=1, seed=1, dtype=queue_dtype or dtype)
    generator = torch.Generator().manual_seed(2)
    positive = SCALE * torch.rand(batch, rows, generator=generator, dtype=torch.float64)
    return x, queue, positive.to(statistics(dtype))


def results(function, x, queue, positive, scale=SCALE):
    """Log-sum-exps, largest logits, and gradients of a weighted sum."""
    x, positive = x.detach().requires_grad_(), positive.detach().requires_grad_()
    log_sum_exp, best = function(x, queue, positive, scale)
    weights = torch.linspace(0.5, 2.0, log_sum_exp.numel(), dtype=log_sum_exp.dtype).view_as(log_sum_exp)
    gradients = torch.autograd.grad((weights * log_sum_exp).sum(), (x, positive))
    return log_sum_exp.detach(), best, *gradients


def assert_agree(ours, expected, tolerance, gradient_tolerance):
    for name, one, other in zip(("log_sum_exp", "best", "of x", "of positive"), ours, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        allowed = gradient_tolerance if name == "of x" else max(tolerance, 1e-14)
        if torch.equal(one, other):
            continue
        scale = float(other.double().abs().max())
        error = float((one.double() - other.double()).abs().max())
        assert error <= allowed * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


@by_numbers
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operator_agrees_with_definition(sizes, numbers):
    dtype, queue_dtype, tolerance, gradient_tolerance = numbers
    given = inputs(*sizes, dtype, queue_dtype)
    ours, expected = results(queue_log_sum_exp, *given), results(queue_log_sum_exp_reference, *given)
    assert ours[0].dtype == statistics(dtype)
    assert ours[2].dtype == dtype
    # A share close to 1 has the rounding of a logit of some 30 in its exponent.
    assert_agree(ours, expected, 4 * tolerance, gradient_tolerance)


@by_numbers
def test_every_instruction_set(numbers, capability):
    dtype, queue_dtype, tolerance, gradient_tolerance = numbers
    given = inputs(2, 37, 45, 301, dtype, queue_dtype)
    expected = results(queue_log_sum_exp_reference, *given)
    assert_agree(results(queue_log_sum_exp, *given), expected, 4 * tolerance, gradient_tolerance)


# Multiples of the blocks of rows, columns and inner numbers that a product is made in, and a rest in each of them.
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 13])
@by_numbers
def test_products_with_a_rest_in_every_block(rows, numbers, capability):
    dtype, queue_dtype, tolerance, gradient_tolerance = numbers
    for size, queue_size in ((64, 64), (257, 65), (63, 33), (16, 515)):
        given = inputs(1, rows, size, queue_size, dtype, queue_dtype)
        expected = results(queue_log_sum_exp_reference, *given)
        assert_agree(results(queue_log_sum_exp, *given), expected, 4 * tolerance, gradient_tolerance)


def test_gradients():
    x, queue, positive = inputs(2, 3, 5, 40)
    assert torch.autograd.gradcheck(
        lambda x, positive: queue_log_sum_exp(x, queue, positive, SCALE)[0],
        (x.requires_grad_(), positive.requires_grad_()),
    )


@by_numbers
def test_operator_is_well_formed(numbers):
    x, queue, positive = inputs(2, 3, 5, 40, *numbers[:2])
    operator = torch.ops.ikem_fast.queue_log_sum_exp.default
    torch.library.opcheck(operator, (x.requires_grad_(), queue, positive.requires_grad_(), SCALE, True))
    torch.library.opcheck(operator, (x.detach(), queue, positive, SCALE, False))


def test_compiles():
    x, queue, positive = inputs(2, 3, 5, 40, torch.float32)
    compiled = torch.compile(queue_log_sum_exp, backend="aot_eager", fullgraph=True)
    assert_agree(results(compiled, x, queue, positive), results(queue_log_sum_exp, x, queue, positive), 0.0, 1e-7)


def test_without_gradient():
    x, queue, positive = inputs(2, 3, 5, 40, torch.float32)
    expected = results(queue_log_sum_exp, x, queue, positive)
    with torch.no_grad():
        log_sum_exp, best = queue_log_sum_exp(x.requires_grad_(), queue, positive, SCALE)
    assert torch.equal(log_sum_exp, expected[0])
    assert torch.equal(best, expected[1])
    assert not log_sum_exp.requires_grad
    assert torch.ops.ikem_fast.queue_log_sum_exp(x.detach(), queue, positive, SCALE, False)[2].shape == (0,)
    only_positive = positive.requires_grad_()
    queue_log_sum_exp(x.detach(), queue, only_positive, SCALE)[0].sum().backward()
    assert only_positive.grad.isfinite().all()


def test_largest_logit_has_no_gradient_and_second_derivatives_are_refused():
    x, queue, positive = inputs(2, 3, 5, 40)
    log_sum_exp, best = queue_log_sum_exp(x.requires_grad_(), queue, positive, SCALE)
    assert not best.requires_grad
    (first,) = torch.autograd.grad(log_sum_exp.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@by_numbers
def test_nothing_to_do(numbers):
    for sizes in ((2, 0, 5, 7), (0, 3, 5, 7), (2, 3, 5, 0), (2, 3, 0, 7)):
        given = inputs(*sizes, *numbers[:2])
        assert_agree(results(queue_log_sum_exp, *given), results(queue_log_sum_exp_reference, *given), 1e-6, 0.0)
    x, queue, positive = inputs(1, 2, 5, 0, *numbers[:2])
    log_sum_exp, best = queue_log_sum_exp(x, queue, positive, SCALE)
    assert torch.equal(log_sum_exp, positive)
    assert (best == -math.inf).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logits_beyond_the_range_of_exp(dtype):
    # |s| up to 50 with a scale of 100; exp overflows at 88 (float32) and 709 (float64).
    x, queue, positive = inputs(2, 9, 17, 600, dtype)
    x, scale = 50 * x, 100.0
    positive = 5000 * torch.linspace(-1, 1, 18, dtype=dtype).view(2, 9)
    # The rounding of similarities of up to 50 times 100 stands in an exponent.
    gradient_tolerance = 1e-3 if dtype == torch.float32 else 1e-12
    ours = results(queue_log_sum_exp, x, queue, positive, scale)
    expected = results(queue_log_sum_exp_reference, x, queue, positive, scale)
    assert all(values.isfinite().all() for values in ours)
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=gradient_tolerance, atol=gradient_tolerance)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)


def test_similarities_as_large_as_they_come():
    x = torch.tensor([[[1.0], [-1.0]]])
    queue = torch.tensor([[[3e38, -3e38, 1e38]]])
    log_sum_exp, best = queue_log_sum_exp(x.requires_grad_(), queue, torch.zeros(1, 2), 1.0)
    torch.testing.assert_close(log_sum_exp.detach(), torch.tensor([[3e38, 3e38]]))
    torch.testing.assert_close(best, torch.tensor([[3e38, 3e38]]))
    log_sum_exp.sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([[[3e38], [-3e38]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_positive_decides_or_does_not_matter(dtype):
    x, queue, _ = inputs(1, 3, 6, 50, dtype)
    positive = torch.tensor([[1e4, -1e4, -math.inf]], dtype=statistics(dtype))
    log_sum_exp, _, of_x, of_positive = results(queue_log_sum_exp, x, queue, positive)
    alone = SCALE * (x.to(positive.dtype) @ queue.to(positive.dtype))
    assert log_sum_exp[0, 0] == 1e4
    torch.testing.assert_close(log_sum_exp[0, 1:], alone.logsumexp(dim=2)[0, 1:])
    assert of_x[0, 0].count_nonzero() == 0
    assert of_x[0, 1:].count_nonzero() > 0
    assert of_positive[0, 0] == 0.5
    assert of_positive[0, 1:].tolist() == [0.0, 0.0]


def test_infinite_logits():
    queue = torch.tensor([[[1.0, 2.0, 3.0]]])
    nothing = torch.full((1, 1), -math.inf)
    # All logits are -inf: nothing is there, and nothing has a gradient.
    log_sum_exp, best, _, of_positive = results(queue_log_sum_exp, torch.full((1, 1, 1), -math.inf), queue, nothing)
    assert log_sum_exp.item() == best.item() == -math.inf
    assert of_positive.item() == 0.0
    log_sum_exp, _ = queue_log_sum_exp(torch.full((1, 1, 1), -math.inf), queue, torch.ones(1, 1), 1.0)
    assert log_sum_exp.item() == 1.0
    for x, positive in ((math.inf, 1.0), (1.0, math.inf)):
        log_sum_exp, _ = queue_log_sum_exp(torch.full((1, 1, 1), x), queue, torch.full((1, 1), positive), 1.0)
        assert log_sum_exp.item() == math.inf
    assert queue_log_sum_exp(torch.ones(1, 1, 1), queue[..., :0], nothing, 1.0)[0].item() == -math.inf


@by_numbers
def test_what_is_not_a_number_stays_visible(numbers):
    x, queue, positive = inputs(1, 4, 6, 700, *numbers[:2])
    for name in ("x", "queue", "positive"):
        bad_x, bad_queue, bad_positive = x.clone(), queue.clone(), positive.clone()
        {"x": bad_x, "queue": bad_queue, "positive": bad_positive}[name].view(-1)[2] = math.nan
        log_sum_exp, _, of_x, _ = results(queue_log_sum_exp, bad_x, bad_queue, bad_positive)
        row = 2 if name == "positive" else 0
        assert log_sum_exp[0, row].isnan()
        assert of_x[0, row].isnan().all()
        assert log_sum_exp[0, 1].isnan() == (name == "queue")


@by_numbers
def test_strided_inputs(numbers):
    x, queue, positive = inputs(2, 9, 11, 230, *numbers[:2])
    expected = results(queue_log_sum_exp, x, queue, positive)
    wide = torch.cat([queue, queue], dim=2)
    for strided in (
        wide[:, :, :230],  # a part of a longer queue
        wide[:, :, 230:],
        queue.transpose(1, 2).contiguous().transpose(1, 2),  # keys one after another
        queue.repeat_interleave(2, dim=2)[:, :, ::2],
        queue.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        assert not strided.is_contiguous()
        assert_agree(results(queue_log_sum_exp, x, strided, positive), expected, 0.0, 0.0)
    for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert_agree(results(queue_log_sum_exp, strided, queue, positive.t().contiguous().t()), expected, 0.0, 0.0)
    same = queue[:1].expand(2, -1, -1)  # one queue for all
    assert_agree(
        results(queue_log_sum_exp, x, same, positive),
        results(queue_log_sum_exp, x, same.contiguous(), positive),
        0.0,
        0.0,
    )


@by_numbers
def test_width_of_tiles_does_not_matter(numbers, monkeypatch):
    dtype, queue_dtype, _, gradient_tolerance = numbers
    given = inputs(2, 13, 21, 700, dtype, queue_dtype)
    expected = results(queue_log_sum_exp, *given)
    for tile in (1, 7, 64, 256, 699, 700, 5000):
        monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", str(tile))
        ours = results(queue_log_sum_exp, *given)
        assert_agree(ours, expected, 1e-5, 1e-5 if dtype != torch.bfloat16 else gradient_tolerance)
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", "wide")
    with pytest.raises(ValueError, match=r"IKEM_FAST_QUEUE_TILE must be 1 \.\.\. 1048576, got 'wide'"):
        queue_log_sum_exp(*given, SCALE)


@by_numbers
def test_number_of_threads(numbers):
    dtype, queue_dtype, _, gradient_tolerance = numbers
    # One batch and several, of which threads share one; more rows than are looked at together.
    for sizes in ((1, 200, 64, 2000), (3, 70, 64, 1500)):
        given = inputs(*sizes, dtype, queue_dtype)
        before = torch.get_num_threads()
        try:
            by_threads = {}
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                by_threads[threads] = results(queue_log_sum_exp, *given)
                again = results(queue_log_sum_exp, *given)
                assert all(torch.equal(one, other) for one, other in zip(by_threads[threads], again, strict=True))
        finally:
            torch.set_num_threads(before)
        for threads in (2, 3, 5):
            # The gradient of bfloat16 is itself rounded.
            allowed = 1e-6 if dtype != torch.bfloat16 else gradient_tolerance
            assert_agree(by_threads[threads], by_threads[1], 1e-6, allowed)


def test_queue_may_change_before_backward():
    x, queue, positive = inputs(2, 3, 5, 40, torch.float32)
    expected = results(queue_log_sum_exp, x, queue, positive)[2]
    log_sum_exp, _ = queue_log_sum_exp(x.requires_grad_(), queue, positive, SCALE)
    queue.fill_(math.nan)
    weights = torch.linspace(0.5, 2.0, 6).view(2, 3)
    (weights * log_sum_exp).sum().backward()
    assert torch.equal(x.grad, expected)


MEASURE = """
import resource, sys, torch
from ikem_fast import ops
batch, rows, size, queue_size = map(int, sys.argv[1:])
torch.set_num_threads(2)
generator = torch.Generator().manual_seed(0)
def run(x, queue):
    x = x.requires_grad_()
    ops.queue_log_sum_exp(x, queue, torch.zeros(x.shape[:2]), 14.0)[0].sum().backward()
x = torch.randn(batch, rows, size, generator=generator)
queue = torch.empty(batch, size, queue_size).fill_(0.01)
run(x[:, :1], queue[:, :, :64])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(x, queue)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.parametrize(("sizes", "most"), [((1, 768, 96, 262144), 24), ((1, 768, 768, 4096), 24)])
def test_memory_does_not_grow_with_the_queue(sizes, most):
    """Logits alone would take 768 MB and 12 MB; the gradient takes 2.3 MB in the second case, a thread's sums the same
    and its tiles 2 MB.
    """
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, sizes)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < most


def test_wrong_arguments_are_named():
    x, queue, positive = inputs(2, 3, 5, 7, torch.float32)
    for bad, message in (
        (
            (x[0], queue, positive, 1.0),
            r"x must be \(B, R, D\) = \(any, any, any\) floating point, got \(3, 5\) float32",
        ),
        ((x, queue[:1], positive, 1.0), r"queue must be \(B, D, K\) = \(2, 5, any\) floating point, got \(1, 5, 7\)"),
        ((x, queue, positive[:, :2], 1.0), r"positive must be \(B, R\) = \(2, 3\) floating point, got \(2, 2\)"),
        ((x.half(), queue, positive, 1.0), r"x must be float32, bfloat16 or float64, got \(2, 3, 5\) float16"),
        ((x, queue.bfloat16(), positive, 1.0), r"queue must be float32 for x \(2, 3, 5\) float32, got .* bfloat16"),
        ((x.bfloat16(), queue.double(), positive, 1.0), r"queue must be bfloat16 or float32 for x .* got .* float64"),
        ((x, queue.to("meta"), positive, 1.0), "queue must be on x's device cpu, got meta"),
        ((x, queue, positive.to("meta"), 1.0), "positive must be on x's device cpu, got meta"),
        ((x, queue, positive, 0.0), "scale must be above 0 and finite, got 0.0"),
        ((x, queue, positive, math.inf), "scale must be above 0 and finite, got inf"),
        ((x, queue.clone().requires_grad_(), positive, 1.0), r"queue must not require a gradient.*queue.detach\(\)"),
    ):
        for function in (queue_log_sum_exp, queue_log_sum_exp_reference):
            with pytest.raises(ValueError, match=message):
                function(*bad)


def test_operator_checks_what_the_function_would():
    x, queue, positive = inputs(2, 3, 5, 7, torch.float32)
    operator = torch.ops.ikem_fast.queue_log_sum_exp
    for bad, message in (
        ((x[0], queue, positive, 1.0), r"x must be \(B, R, D\), got \(3, 5\)"),
        ((x, queue[:, :4], positive, 1.0), r"queue must be \(B, D, K\) = \(2, 5, any\), got \(2, 4, 7\)"),
        ((x, queue, positive[:1], 1.0), r"positive must be \(B, R\) = \(2, 3\), got \(1, 3\)"),
        ((x, queue, positive.double(), 1.0), "positive must be Float for x of Float, got Double"),
        ((x.half(), queue, positive, 1.0), "x must be float32, bfloat16 or float64, got Half"),
        ((x, queue.double(), positive, 1.0), "queue must be of x's dtype Float .* got Double"),
        ((x, queue, positive, -1.0), "scale must be above 0 and finite, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(*bad, False)


def test_exported():
    assert {"queue_log_sum_exp", "queue_log_sum_exp_reference"} <= set(ops.__all__)
