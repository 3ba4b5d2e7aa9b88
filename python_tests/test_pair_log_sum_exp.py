"""Log-sum-exps of similarities and their products: the compiled operator against its plain definition."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from ikem_fast import _extension
from ikem_fast.ops import pair_log_sum_exp, pair_log_sum_exp_reference

SCALE = 1 / 0.07
# Relative to the largest magnitude: of log-sum-exps and mined values, and of gradients, in whose products bfloat16
# rounds what float32 does not.
TOLERANCE = {torch.float64: (1e-13, 1e-12), torch.float32: (2e-6, 1e-4), torch.bfloat16: (2e-6, 1.5e-2)}
# A, N, D, K, then U and E, 0 without y.
SIZES = [
    (1, 3, 4, 7, 0, 0),
    (2, 1, 5, 33, 0, 0),
    (3, 5, 7, 129, 0, 0),
    (6, 17, 16, 700, 0, 0),
    (4, 9, 31, 1, 0, 0),
    (7, 2, 3, 65, 0, 0),
    (6, 21, 8, 300, 3, 48),
    (1, 2, 3, 5, 1, 3),
    (2, 40, 5, 260, 6, 7),
    (5, 1, 2, 1, 1, 9),
]


def make(sizes, dtype=torch.float64, magnitude=1.0, queue_dtype=None, seed=0):
    """x, queue, y, y_queue with similarities of about ``magnitude``."""
    num_x, num_rows, size, num_columns, num_y, y_size = sizes
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    x = draw(num_x, num_rows, size, scale=magnitude / size**0.5).to(dtype)
    queue = draw(num_x, size, num_columns).to(queue_dtype or dtype)
    if num_y == 0:
        return x, queue, None, None
    y = draw(num_y, num_rows, y_size, scale=magnitude / y_size**0.5).to(dtype)
    return x, queue, y, draw(y_size, num_columns).to(queue_dtype or dtype)


def with_gradient(function, x, queue, y, y_queue, scale=SCALE, topk=1):
    """The result, and the gradient of a random combination of it."""
    generator = torch.Generator().manual_seed(9)
    left = (x if y is None else y).detach().requires_grad_()
    result = function(*((left, queue) if y is None else (x, queue)), scale, topk, None if y is None else left, y_queue)
    total = sum(
        (part * torch.randn(part.shape, generator=generator, dtype=torch.float64).to(part)).sum()
        for part in (result.single, result.pair, result.mined)
    )
    return result, torch.autograd.grad(total, left)[0]


def relative_error(ours, expected):
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype
    if ours.numel() == 0:
        return 0.0
    difference = (ours.double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-30)).item()


def assert_agree(ours, expected, dtype, factor=1):
    (result, gradient), (wanted, wanted_gradient) = ours, expected
    tolerance, gradient_tolerance = TOLERANCE[dtype]
    assert torch.equal(result.neighbours, wanted.neighbours)
    for name in ("single", "pair", "mined"):
        error = relative_error(getattr(result, name), getattr(wanted, name))
        assert error <= factor * tolerance, f"{name} is off by {error:.1e}"
    error = relative_error(gradient, wanted_gradient)
    assert error <= factor * gradient_tolerance, f"the gradient is off by {error:.1e}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_operator_agrees_with_definition(sizes, dtype, capability):
    topks = {1, min(3, sizes[3])}
    if dtype == torch.float64:  # in the order of many float32 similarities some differ by rounding alone
        topks |= {min(40, sizes[3]), sizes[3]}
    for topk in sorted(topks):
        inputs = make(sizes, dtype)
        assert_agree(
            with_gradient(pair_log_sum_exp, *inputs, topk=topk),
            with_gradient(pair_log_sum_exp_reference, *inputs, topk=topk),
            dtype,
        )


def test_definition_is_the_formula_written_out():
    x, queue, y, y_queue = make((3, 2, 4, 6, 2, 5))
    s, g = x @ queue, y @ y_queue

    def log_sum_exp(values):
        return (SCALE * values).exp().sum(dim=-1).log()

    context = pair_log_sum_exp_reference(x, queue, SCALE, 2)
    distillation = pair_log_sum_exp_reference(x, queue, SCALE, 2, y, y_queue)
    torch.testing.assert_close(context.single, log_sum_exp(s))
    torch.testing.assert_close(
        context.pair, torch.stack([log_sum_exp(s[a] * s[b]) for a, b in ((0, 1), (0, 2), (1, 2))])
    )
    torch.testing.assert_close(distillation.single, log_sum_exp(g))
    products = [log_sum_exp(s[a] * g[u]) for a in range(3) for u in range(2)]
    torch.testing.assert_close(distillation.pair, torch.stack(products))
    for a in range(3):
        for n in range(2):
            best = s[a, n].argsort(descending=True)[:2]
            for result in (context, distillation):
                assert torch.equal(result.neighbours[a, n], best)
            assert torch.equal(context.mined[a, n], s[:, n, best].T)
            assert torch.equal(distillation.mined[a, n], torch.cat([s[a : a + 1, n, best], g[:, n, best]]).T)


def test_float32_queue_beside_bfloat16_is_rounded():
    for sizes in ((3, 5, 7, 129, 0, 0), (2, 4, 5, 70, 2, 9)):
        x, queue, y, y_queue = make(sizes, torch.bfloat16, queue_dtype=torch.float32)
        rounded = (queue.bfloat16(), None if y_queue is None else y_queue.bfloat16())
        ours = with_gradient(pair_log_sum_exp, x, queue, y, y_queue, topk=2)
        same = with_gradient(pair_log_sum_exp, x, rounded[0], y, rounded[1], topk=2)
        assert all(torch.equal(a, b) for a, b in zip(ours[0], same[0], strict=True))
        assert torch.equal(ours[1], same[1])
        assert_agree(ours, with_gradient(pair_log_sum_exp_reference, x, queue, y, y_queue, topk=2), torch.bfloat16)


@pytest.mark.parametrize("sizes", [(2, 2, 3, 9, 0, 0), (3, 1, 2, 5, 0, 0), (1, 2, 3, 1, 0, 0), (2, 2, 3, 5, 2, 4)])
def test_gradient(sizes):
    x, queue, y, y_queue = make(sizes)
    topk = min(2, sizes[3])

    def differentiable(left):
        given = (left, queue, 2.0, topk) if y is None else (x, queue, 2.0, topk, left, y_queue)
        result = pair_log_sum_exp(*given)
        return result.single, result.pair, result.mined

    left = (x if y is None else y).requires_grad_()
    assert gradcheck(differentiable, left)
    gradient = torch.autograd.grad(differentiable(left)[0].sum(), left, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="differentiable once, not twice"):
        torch.autograd.grad(gradient.sum(), left)


def test_operator_is_registered_completely():
    for sizes in ((3, 4, 5, 9, 0, 0), (2, 4, 5, 9, 2, 3)):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x, queue, y, y_queue = make(sizes, dtype)
            (x if y is None else y).requires_grad_()
            arguments = (x, queue, y, y_queue, SCALE, 2)
            operator = torch.ops.ikem_fast.pair_log_sum_exp.default
            torch.library.opcheck(operator, arguments)
            real = operator(*arguments)
            meta = operator(*(value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments))
            assert [(part.shape, part.dtype) for part in meta] == [(part.shape, part.dtype) for part in real]
            x, y = x.detach(), None if y is None else y.detach()
            single, pair, neighbours, mined = (part.detach() for part in real)
            torch.library.opcheck(
                torch.ops.ikem_fast.pair_log_sum_exp_backward.default,
                (x, queue, y, y_queue, SCALE, single, pair, neighbours, single, pair, mined),
            )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(3, 5, 7, 129, 0, 0), (2, 3, 5, 700, 2, 9)])
def test_similarities_far_above_one(sizes, dtype, capability):
    """Logits up to 1e11, of both signs: relative to a bound of all terms sums would vanish, and the rounding of a logit
    is itself far above what exp takes.
    """
    for magnitude, scale in ((3.0, 100.0), (40.0, SCALE), (1000.0, 1.0), (1e4, 100.0)):
        inputs = make(sizes, dtype, magnitude)
        result, gradient = with_gradient(pair_log_sum_exp, *inputs, scale=scale, topk=2)
        wanted, wanted_gradient = with_gradient(pair_log_sum_exp_reference, *inputs, scale=scale, topk=2)
        assert torch.equal(result.neighbours, wanted.neighbours)
        for name in ("single", "pair", "mined"):
            assert relative_error(getattr(result, name), getattr(wanted, name)) < TOLERANCE[dtype][0]
        assert gradient.isfinite().all()
        # Rounding of exponents turns up in shares of the gradient.
        if dtype == torch.float64:
            assert relative_error(gradient, wanted_gradient) < 1e-6


def test_similarities_grow_and_shrink_along_the_queue(capability, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", "16")
    x, queue, y, y_queue = make((2, 3, 4, 200, 2, 5), torch.float32)
    along = torch.logspace(-3, 2.5, 200)
    for factor in (along, along.flip(0), torch.where(torch.arange(200) == 100, 50.0, 0.01)):
        for arguments in ((x, queue * factor, None, None), (x, queue * factor, y, y_queue * factor)):
            result, wanted = (
                function(*arguments[:2], 100.0, 3, *arguments[2:])
                for function in (pair_log_sum_exp, pair_log_sum_exp_reference)
            )
            assert torch.equal(result.neighbours, wanted.neighbours)
            for name in ("single", "pair"):
                torch.testing.assert_close(getattr(result, name), getattr(wanted, name), rtol=2e-6, atol=2e-6)


def test_all_similarities_the_same_or_very_negative(capability):
    for value in (0.0, -3.0, 5.0, -50.0):
        x = torch.ones(2, 3, 1)
        queue = torch.full((2, 1, 70), value)
        result = pair_log_sum_exp(x, queue, 100.0, 2)
        count = torch.tensor(70.0).log()
        torch.testing.assert_close(result.single, (100 * value + count).expand(2, 3))
        torch.testing.assert_close(result.pair, (100 * value**2 + count).expand(1, 3))


@pytest.mark.parametrize("tile", ["", "8", "64"])
def test_of_equal_values_the_first_is_the_neighbour(tile, capability, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randint(-2, 3, (3, 9, 4), generator=generator).to(dtype)
        queue = torch.randint(-1, 2, (3, 4, 150), generator=generator).to(dtype)
        for topk in (1, 3, 60, 150):
            ours, expected = pair_log_sum_exp(x, queue, 1.0, topk), pair_log_sum_exp_reference(x, queue, 1.0, topk)
            assert torch.equal(ours.neighbours, expected.neighbours)
            assert torch.equal(ours.mined, expected.mined)
    zeros = pair_log_sum_exp(torch.zeros(2, 3, 4), torch.ones(2, 4, 300), 1.0, 5)
    assert torch.equal(zeros.neighbours, torch.arange(5).expand(2, 3, 5))


def test_not_a_number_stays_in_its_row():
    x, queue, _, _ = make((3, 4, 5, 100, 0, 0), torch.float32)
    expected = pair_log_sum_exp(x, queue, SCALE, 3)
    x[1, 2, 0] = float("nan")
    result = pair_log_sum_exp(x, queue, SCALE, 3)
    assert result.single.isnan().nonzero().tolist() == [[1, 2]]
    assert result.pair.isnan().nonzero().tolist() == [[0, 2], [2, 2]]
    assert ((result.neighbours >= 0) & (result.neighbours < 100)).all()
    others = torch.tensor([0, 1, 3])
    assert torch.equal(result.pair[:, others], expected.pair[:, others])
    assert torch.equal(result.mined[:, others], expected.mined[:, others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_does_not_depend_on_the_tile(dtype, monkeypatch):
    for sizes in ((6, 5, 16, 1500, 0, 0), (2, 5, 8, 1500, 2, 24)):
        inputs = make(sizes, dtype)
        expected, expected_gradient = with_gradient(pair_log_sum_exp, *inputs, topk=3)
        for tile in ("1", "7", "50", "64", "1499", "1500", "4000"):
            monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
            result, gradient = with_gradient(pair_log_sum_exp, *inputs, topk=3)
            assert torch.equal(result.neighbours, expected.neighbours)
            for name in ("single", "pair", "mined"):
                assert relative_error(getattr(result, name), getattr(expected, name)) < 1e-6
            # Of bfloat16 the gradient is rounded when it is done.
            assert relative_error(gradient, expected_gradient) < (1e-5 if dtype == torch.float32 else 2**-8)
        monkeypatch.delenv("IKEM_FAST_QUEUE_TILE")
    for wrong in ("0", "-3", "many", "7x"):
        monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", wrong)
        with pytest.raises(ValueError, match=r"IKEM_FAST_QUEUE_TILE must be 1 \.\.\. \d+, got"):
            pair_log_sum_exp(*make(SIZES[0])[:2], SCALE, 1)


def test_threads_and_repetition():
    before = torch.get_num_threads()
    for sizes in ((6, 33, 16, 3000, 0, 0), (3, 200, 8, 100, 0, 0), (2, 70, 8, 900, 3, 24)):
        inputs = make(sizes, torch.float32)
        runs = {}
        try:
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                runs[threads] = with_gradient(pair_log_sum_exp, *inputs, topk=4)
                again = with_gradient(pair_log_sum_exp, *inputs, topk=4)
                assert all(torch.equal(a, b) for a, b in zip(runs[threads][0], again[0], strict=True))
                assert torch.equal(runs[threads][1], again[1])
        finally:
            torch.set_num_threads(before)
        for run in runs.values():
            assert_agree(run, runs[1], torch.float32)


def test_any_strides_are_read_in_place():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x, queue, y, y_queue = make((3, 6, 5, 70, 2, 9), dtype)
        expected = with_gradient(pair_log_sum_exp, x, queue, topk=2, y=y, y_queue=y_queue)
        wide = torch.zeros(3, 9, 200, dtype=dtype)
        wide[:, 2:7, 30:170:2] = queue
        for strided in (
            (wide[:, 2:7, 30:170:2], y_queue),
            (queue.transpose(1, 2).contiguous().transpose(1, 2), y_queue.T.contiguous().T),
            (queue.transpose(0, 1).contiguous().transpose(0, 1), torch.cat([y_queue, y_queue], dim=1)[:, 70:]),
        ):
            ours = with_gradient(pair_log_sum_exp, x, strided[0], topk=2, y=y, y_queue=strided[1])
            assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0], strict=True))
            assert torch.equal(ours[1], expected[1])
        turned = x.transpose(0, 1).contiguous().transpose(0, 1)
        assert not turned.is_contiguous()
        ours = with_gradient(pair_log_sum_exp, turned, queue, topk=2, y=y.transpose(1, 2).clone().transpose(1, 2),
                             y_queue=y_queue)  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(ours[0], expected[0], strict=True))
        assert torch.equal(ours[1], expected[1])
    same = make((1, 2, 3, 50, 0, 0), torch.float32)[1].expand(4, 3, 50)  # one queue for all
    rows = torch.randn(4, 2, 3)
    assert torch.equal(pair_log_sum_exp(rows, same, 1.0, 1).pair, pair_log_sum_exp(rows, same.clone(), 1.0, 1).pair)


def test_no_rows():
    for function in (pair_log_sum_exp, pair_log_sum_exp_reference):
        for sizes in ((3, 0, 4, 7, 0, 0), (3, 0, 4, 7, 2, 5)):
            result, gradient = with_gradient(function, *make(sizes, torch.float32), topk=2)
            num_left, num_pairs, num_mined = (2, 6, 3) if sizes[4] else (3, 3, 3)
            assert result.single.shape == (num_left, 0)
            assert result.pair.shape == (num_pairs, 0)
            assert result.neighbours.shape == (3, 0, 2)
            assert result.mined.shape == (3, 0, 2, num_mined)
            assert gradient.numel() == 0


def test_backward_wants_the_queue_as_it_was():
    x, queue, _, _ = make((2, 3, 4, 9, 0, 0), torch.float32)
    result = pair_log_sum_exp(x.requires_grad_(), queue, SCALE, 1)
    queue[0, 0, 0] = 5
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.single.sum().backward()


def test_compiles_without_a_graph_break():
    x, queue, _, _ = make((3, 4, 5, 90, 0, 0), torch.float32)

    def total(x):
        result = pair_log_sum_exp(x, queue, SCALE, 2)
        return result.single.sum() + result.pair.sum() + result.mined.square().sum()

    gradients = []
    for function in (total, torch.compile(total, fullgraph=True, backend="aot_eager")):
        left = x.clone().requires_grad_()
        function(left).backward()
        gradients.append(left.grad)
    torch.testing.assert_close(*gradients)


MEMORY = """
import resource, torch
from ikem_fast.ops import pair_log_sum_exp
torch.set_num_threads(1)
x, queue = torch.randn(3, 128, 16) / 4, torch.randn(3, 16, 131072)
y, y_queue = torch.randn(2, 128, 48) / 7, torch.randn(48, 131072)
pair_log_sum_exp(x.requires_grad_(), queue[..., :600], 14.0, 1).pair.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for rows, given in ((x, ()), (y.requires_grad_(), (y, y_queue))):
    result = pair_log_sum_exp(x if rows is x else x.detach(), queue, 14.0, 1, *given)
    (result.single.sum() + result.pair.sum() + result.mined.sum()).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_memory_does_not_grow_with_the_queue():
    """One matrix of similarities would be 64 MiB."""
    grown = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 32


GOOD = make((2, 3, 4, 9, 2, 5), torch.float32)


def test_wrong_arguments_are_named():
    x, queue, y, y_queue = GOOD
    learned = queue.clone().requires_grad_()
    for arguments, message in (
        ((x[0], queue, 1.0, 1), r"x must be \(A, N, D\) = \(any, any, any\) floating point, got \(3, 4\) float32"),
        ((x.long(), queue, 1.0, 1), r"x must be .* got \(2, 3, 4\) int64"),
        ((x, queue[:, 1:], 1.0, 1), r"queue must be \(A, D, K\) = \(2, 4, any\) floating.*got \(2, 3, 9\) float32"),
        ((x[:0], queue[:0], 1.0, 1), "x must be .* with A and D not 0"),
        ((x.half(), queue.half(), 1.0, 1), r"x must be float32, bfloat16 or float64, got \(2, 3, 4\) float16"),
        ((x, queue.bfloat16(), 1.0, 1), r"queue must be float32 for x \(2, 3, 4\) float32, got .* bfloat16"),
        ((x, queue, 0.0, 1), "scale must be above 0 and finite, got 0.0"),
        ((x, queue, float("inf"), 1), "scale must be above 0 and finite, got inf"),
        ((x, queue, 1.0, 0), r"topk must be in 1 \.\.\. K = 9, got 0"),
        ((x, queue, 1.0, 10), r"topk must be in 1 \.\.\. K = 9, got 10"),
        ((x, queue[..., :0], 1.0, 1), r"topk must be in 1 \.\.\. K = 0, got 1"),
        ((x, queue, 1.0, 1, y), "y and y_queue must be given together"),
        ((x, queue, 1.0, 1, y[:, 1:], y_queue), r"y must be \(U, N, E\) = \(any, 3, any\)"),
        ((x, queue, 1.0, 1, y, y_queue[:, 1:]), r"y_queue must be \(E, K\) = \(5, 9\)"),
        ((x, queue, 1.0, 1, y[:0], y_queue), "y must be .* with U and E not 0"),
        ((x, queue, 1.0, 1, y.double(), y_queue.double()), "y and y_queue must have the dtypes of x and queue"),
        ((x, queue.to("meta"), 1.0, 1), "queue must be on x's device cpu, got meta"),
        ((x, learned, 1.0, 1), r"queue must not require a gradient, .* pass queue.detach\(\)"),
        ((x.clone().requires_grad_(), queue, 1.0, 1, y, y_queue), "x must not require a gradient"),
    ):
        for function in (pair_log_sum_exp, pair_log_sum_exp_reference):
            with pytest.raises(ValueError, match=message):
                function(*arguments)
    with torch.no_grad():
        assert torch.equal(pair_log_sum_exp(x, learned, 1.0, 1).pair, pair_log_sum_exp(x, queue, 1.0, 1).pair)


def test_operator_itself_checks_its_arguments():
    x, queue, y, y_queue = GOOD
    base = {"x": x, "queue": queue, "y": y, "y_queue": y_queue, "scale": 1.0, "topk": 2}
    operator = torch.ops.ikem_fast.pair_log_sum_exp
    for changes, message in (
        ({"x": x[0]}, r"x must be \(A, N, D\), A and D not 0, got \(3, 4\)"),
        ({"x": x.half()}, "x must be float32, float64 or bfloat16, got Half"),
        ({"queue": queue.double()}, "queue must be of x's dtype .*got Double beside Float"),
        ({"queue": queue[:, 1:]}, r"queue must be \(A, D, K\) = \(2, 4, any\), got \(2, 3, 9\)"),
        ({"y": None}, "y and y_queue must be given together"),
        ({"y": y[:, 1:]}, r"y must be \(U, N, E\) = \(any, 3, any\), U and E not 0, got \(2, 2, 5\)"),
        ({"y_queue": y_queue[1:]}, r"y_queue must be \(E, K\) = \(5, 9\), got \(4, 9\)"),
        ({"y": y.double(), "y_queue": y_queue.double()}, "y and y_queue must have the dtypes of x and queue"),
        ({"scale": -1.0}, "scale must be above 0 and finite"),
        ({"topk": 10}, r"topk must be in 1 \.\.\. K = 9, got 10"),
    ):
        with pytest.raises(ValueError, match=message):
            operator(**{**base, **changes})
    single, pair, neighbours, mined = operator(**base)
    with pytest.raises(ValueError, match=r"pair_gradient must be \(4, 3\) Float, got \(3, 3\) Float"):
        torch.ops.ikem_fast.pair_log_sum_exp_backward(
            x, queue, y, y_queue, 1.0, single, pair, neighbours, single, pair[1:], mined
        )


def test_without_the_compiled_part_says_what_to_do(monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_problem", "ikem_fast's compiled part is missing: build it")
    with pytest.raises(_extension.ExtensionError, match="compiled part is missing"):
        pair_log_sum_exp(*GOOD[:2], 1.0, 1)
    assert pair_log_sum_exp_reference(*GOOD[:2], 1.0, 1).single.shape == (2, 3)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_cuda_agrees_with_definition(sizes, dtype):
    for topk in sorted({1, min(3, sizes[3])}):
        inputs = make(sizes, dtype)
        result, gradient = with_gradient(
            pair_log_sum_exp, *(None if value is None else value.cuda() for value in inputs), topk=topk
        )
        wanted, wanted_gradient = with_gradient(pair_log_sum_exp_reference, *inputs, topk=topk)
        for name in ("single", "pair", "mined"):
            assert relative_error(getattr(result, name).cpu(), getattr(wanted, name)) < 1e-4
        assert relative_error(gradient.cpu(), wanted_gradient) < (1e-3 if dtype == torch.float32 else 2e-2)
