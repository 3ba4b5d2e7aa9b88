"""Graph convolution of several streams: the compiled operator against its plain definition."""

from __future__ import annotations

import pytest
import torch

from ikem_fast import layouts, ops
from ikem_fast.nn.stgcn_reference import GraphConvolution
from ikem_fast.ops import graph_convolution, graph_convolution_reference, graph_edges

# Of results and gradients, how far they may be off, relative to the largest magnitude. With bfloat16, x and y are
# rounded to 8 bits, and so are what is gathered and the gradient of y before they are multiplied.
NUMBERS = [(torch.float64, 1e-12), (torch.float32, 4e-6), (torch.bfloat16, 2.0**-6)]
NAMES = ("y", "mean", "variance", "of x", "of weight", "of bias", "of importance")
# S, B, T, joints, C_in, C_out, partitions, stride
SIZES = [
    (1, 1, 1, 1, 1, 1, 1, 1),
    (2, 3, 5, 25, 16, 16, 3, 1),
    (2, 3, 7, 25, 3, 16, 3, 1),
    (1, 2, 9, 25, 16, 32, 3, 2),
    (2, 1, 13, 20, 64, 70, 3, 1),
    (2, 2, 7, 25, 16, 32, 1, 2),
    (1, 3, 7, 7, 5, 7, 3, 3),
    (3, 1, 1, 25, 33, 1, 3, 1),
    (1, 2, 27, 6, 8, 130, 2, 1),
    (1, 1, 3, 3, 100, 40, 4, 4),
]
by_numbers = pytest.mark.parametrize("numbers", NUMBERS, ids=lambda n: str(n[0]).removeprefix("torch."))


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def graph(num_joints, num_partitions, seed=0):
    """A skeleton's graph where one has these sizes, the identity, or a sparse graph with joints nothing leads to."""
    if num_partitions == 3 and num_joints in (20, 25):
        layout = layouts.get("ntu-rgb+d" if num_joints == 25 else "nw-ucla")
        return torch.as_tensor(layout.adjacency(), dtype=torch.float64)
    if num_partitions == 1:
        return torch.eye(num_joints, dtype=torch.float64)[None]
    generator = torch.Generator().manual_seed(seed)
    adjacency = torch.rand(num_partitions, num_joints, num_joints, generator=generator, dtype=torch.float64)
    return adjacency * (torch.rand(adjacency.shape, generator=generator) < 0.3)


def inputs(sizes, dtype=torch.float64, seed=0):
    streams, batch, frames, joints, in_channels, out_channels, partitions, _ = sizes
    generator = torch.Generator().manual_seed(seed)
    given = {
        "x": torch.randn(streams, batch, frames, joints, in_channels, generator=generator) + 0.5,
        "weight": torch.randn(streams, partitions, out_channels, in_channels, generator=generator)
        / max(in_channels, 1) ** 0.5,
        "bias": torch.randn(streams, partitions, out_channels, generator=generator),
        "importance": torch.rand(streams, partitions, joints, joints, generator=generator) + 0.5,
        "adjacency": graph(joints, partitions),
    }
    given = {name: value.to(dtype if name == "x" else computed(dtype)) for name, value in given.items()}
    return (*given.values(), graph_edges(given["adjacency"]))


def results(function, given, stride=1, *, upstream_of=("y", "mean", "variance"), seed=1, with_x=True):
    """y, mean, variance, and the gradients for random gradients of those in ``upstream_of``."""
    *differentiable, adjacency, edges = given
    differentiable = [value.detach().requires_grad_(with_x or i > 0) for i, value in enumerate(differentiable)]
    outputs = function(*differentiable, adjacency, edges, stride=stride)
    generator = torch.Generator().manual_seed(seed)
    upstream = []
    for name, output in zip(NAMES, outputs, strict=False):
        gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        # Those of the statistics are shared by all values.
        gradient = gradient if name == "y" else gradient * max(outputs[0].shape[1:4].numel(), 1)
        upstream.append(gradient.to(output.dtype))
    chosen = [(o, g) for name, o, g in zip(NAMES, outputs, upstream, strict=False) if name in upstream_of]
    wanted = [value for value in differentiable if value.requires_grad]
    gradients = torch.autograd.grad([o for o, _ in chosen], wanted, [g for _, g in chosen])
    return [*(output.detach() for output in outputs), *gradients]


def exactly(given):
    """The same numbers in float64."""
    return [value.double() if value.is_floating_point() else value for value in given]


def assert_agree(ours, expected, tolerance, names=NAMES):
    for name, one, other in zip(names, ours, expected, strict=True):
        assert one.shape == other.shape, name
        if not other.numel() or torch.equal(one.double(), other.double()):
            continue
        scale = float(other.double().abs().max())
        error = float((one.double() - other.double()).abs().max())
        assert error <= tolerance * scale, f"{name} is off by {error:.1e} of {scale:.1e}"


@by_numbers
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_operator_agrees_with_definition(sizes, numbers):
    dtype, tolerance = numbers
    given = inputs(sizes, dtype)
    ours = results(graph_convolution, given, sizes[-1])
    assert_agree(ours, results(graph_convolution_reference, exactly(given), sizes[-1]), tolerance)
    assert [value.dtype for value in ours] == [dtype, *[computed(dtype)] * 2, dtype, *[computed(dtype)] * 3]
    same_numbers = results(graph_convolution_reference, given, sizes[-1])
    assert_agree(ours, same_numbers, 2 * tolerance)
    assert [value.dtype for value in ours] == [value.dtype for value in same_numbers]


@by_numbers
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[2], SIZES[6], SIZES[8]], ids=str)
def test_every_instruction_set(sizes, numbers, capability):
    dtype, tolerance = numbers
    given = inputs(sizes, dtype)
    expected = results(graph_convolution_reference, exactly(given), sizes[-1])
    assert_agree(results(graph_convolution, given, sizes[-1]), expected, tolerance)


# Rests of rows, columns and inner numbers in the blocks of products, narrow and wide, and of frames in tiles.
@pytest.mark.parametrize("out_channels", [1, 15, 16, 17, 33, 48, 49, 80, 129])
@by_numbers
def test_channels_with_a_rest_in_every_block(out_channels, numbers, capability):
    dtype, tolerance = numbers
    for frames, joints, in_channels in ((1, 5, 16), (6, 5, 17), (17, 1, 2), (19, 3, 31)):
        given = inputs((1, 1, frames, joints, in_channels, out_channels, 2, 1), dtype)
        assert_agree(results(graph_convolution, given), results(graph_convolution_reference, exactly(given)), tolerance)


def test_definition_is_the_encoders_graph_convolution():
    layer = GraphConvolution(4, 6).double()
    torch.nn.init.normal_(layer.bias)
    x, _, _, importance, adjacency, edges = inputs((1, 5, 3, 25, 4, 6, 3, 1))
    expected = layer(x[0].permute(0, 3, 1, 2), adjacency * importance[0]).permute(0, 2, 3, 1)
    weight, bias = layer.weight.view(1, 3, 6, 4), layer.bias.view(1, 3, 6)
    for function in (graph_convolution, graph_convolution_reference):
        y, mean, variance = function(x, weight, bias, importance, adjacency, edges)
        torch.testing.assert_close(y[0], expected)
        torch.testing.assert_close(mean[0], expected.mean(dim=(0, 1, 2)))
        torch.testing.assert_close(variance[0], expected.var(dim=(0, 1, 2), correction=0))


def test_identity_is_a_strided_projection():
    x, weight, bias, _, adjacency, edges = inputs((2, 3, 7, 25, 16, 32, 1, 2))
    y, _, _ = graph_convolution(x, weight, bias, torch.ones(2, 1, 25, 25).double(), adjacency, edges, stride=2)
    expected = torch.einsum("sbtvc,soc->sbtvo", x[:, :, ::2], weight[:, 0]) + bias[:, 0, None, None, None]
    torch.testing.assert_close(y, expected)


def test_edges():
    adjacency = torch.zeros(2, 3, 3)
    for partition, start, end in ((0, 2, 1), (1, 0, 1), (0, 0, 1), (1, 2, 0)):
        adjacency[partition, start, end] = 0.5
    edges = graph_edges(adjacency)
    assert edges.dtype == torch.int32
    assert edges.tolist() == [[1, 2, 0], [0, 0, 1], [0, 2, 1], [1, 0, 1]]
    assert len(graph_edges(graph(25, 3))) == 73
    assert graph_edges(torch.zeros(3, 4, 4)).shape == (0, 3)
    with pytest.raises(ValueError, match=r"adjacency must be \(P, V, V\), got \(4, 3, 4\) float32"):
        graph_edges(torch.zeros(4, 3, 4))


@pytest.mark.parametrize("sizes", [(2, 2, 3, 4, 3, 5, 2, 1), (1, 2, 5, 3, 2, 3, 1, 2)], ids=str)
def test_gradients(sizes):
    *differentiable, adjacency, edges = inputs(sizes)
    assert torch.autograd.gradcheck(
        lambda *given: graph_convolution(*given, adjacency, edges, stride=sizes[-1]),
        [value.requires_grad_() for value in differentiable],
    )


@by_numbers
@pytest.mark.parametrize("upstream_of", [("y",), ("mean",), ("variance",), ("y", "variance"), ("y", "mean")], ids=str)
def test_gradients_of_some_results(upstream_of, numbers):
    dtype, tolerance = numbers
    given = inputs((2, 2, 5, 7, 6, 5, 3, 1), dtype)
    ours = results(graph_convolution, given, upstream_of=upstream_of)
    assert_agree(ours, results(graph_convolution_reference, exactly(given), upstream_of=upstream_of), tolerance)


@by_numbers
def test_gradients_without_that_of_x(numbers):
    dtype, _ = numbers
    for sizes in (SIZES[1], SIZES[2], SIZES[6]):
        given = inputs(sizes, dtype)
        without = results(graph_convolution, given, sizes[-1], with_x=False)
        with_x = results(graph_convolution, given, sizes[-1])
        del with_x[3]
        assert all(torch.equal(one, other) for one, other in zip(without, with_x, strict=True))


def test_importance_has_no_gradient_where_there_is_no_edge():
    given = inputs(SIZES[1], torch.float32)
    of_importance = results(graph_convolution, given)[-1]
    adjacency = given[4]
    assert of_importance[:, adjacency == 0].count_nonzero() == 0
    assert (of_importance[:, adjacency != 0] != 0).all()


def test_edges_decide():
    x, weight, bias, importance, adjacency, edges = inputs((1, 2, 3, 6, 4, 5, 3, 1))
    some = edges[::2].contiguous()
    given = (x, weight, bias, importance, adjacency, some)
    assert_agree(results(graph_convolution, given), results(graph_convolution_reference, given), 1e-12)
    none = edges[:0]
    y, mean, variance, of_x, *of_parameters = results(graph_convolution, (*given[:-1], none))
    for value in (y, mean, variance, of_x, *of_parameters):
        assert value.count_nonzero() == 0


@by_numbers
def test_operator_is_well_formed(numbers):
    sizes = (2, 2, 5, 4, 3, 5, 2, 2)
    *differentiable, adjacency, edges = inputs(sizes, numbers[0])
    differentiable = [value.requires_grad_() for value in differentiable]
    operator = torch.ops.ikem_fast.graph_convolution.default
    # bfloat16 gradients are sums of rounded ones: not the same bits in every order.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, (*differentiable, adjacency, edges, 2, True, None, None, True), test_utils=tests)
    detached = [value.detach() for value in differentiable]
    torch.library.opcheck(operator, (*detached, adjacency, edges, 2, False, None, None, True), test_utils=tests)
    scale = torch.rand(2, 5).to(detached[1].dtype)
    torch.library.opcheck(operator, (*detached, adjacency, edges, 1, False, scale, scale, False), test_utils=tests)
    y, mean, _ = graph_convolution(*detached, adjacency, edges, stride=2)
    for with_x_gradient in (True, False):
        for of_statistics in (None, torch.ones_like(mean)):
            torch.library.opcheck(
                torch.ops.ikem_fast.graph_convolution_backward.default,
                (*detached, adjacency, edges, 2, y, mean, y, of_statistics, of_statistics, with_x_gradient),
                test_utils=("test_schema", "test_faketensor"),
            )


def test_compiles():
    given = inputs(SIZES[1], torch.float32)
    compiled = torch.compile(graph_convolution, backend="aot_eager", fullgraph=True)
    assert_agree(results(compiled, given), results(graph_convolution, given), 0.0)


@by_numbers
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("out_channels", [5, 16, 32, 100])
def test_scale_and_shift_of_the_result(out_channels, activation, numbers, capability):
    dtype, tolerance = numbers
    given = inputs((2, 2, 9, 7, 6, out_channels, 3, 1), dtype)
    generator = torch.Generator().manual_seed(3)
    scale, shift = (torch.randn(2, out_channels, generator=generator).to(computed(dtype)) for _ in range(2))
    options = {"statistics": False, "output_activation": activation}
    y, mean, variance = graph_convolution(*given, output_scale=scale, output_shift=shift, **options)
    expected, *_ = graph_convolution_reference(
        *exactly(given), output_scale=scale.double(), output_shift=shift.double(), **options
    )
    assert_agree([y], [expected], tolerance, ["y"])
    assert (y.min() == 0) == activation
    assert mean.shape == variance.shape == (0,)


@by_numbers
def test_without_statistics(numbers):
    given = inputs(SIZES[3], numbers[0])
    y, mean, variance = graph_convolution(*given, stride=2, statistics=False)
    assert torch.equal(y, graph_convolution(*given, stride=2)[0])
    assert mean.shape == variance.shape == (0,)
    expected = results(graph_convolution, given, 2, upstream_of=("y",))
    ours = results(
        lambda *given, stride: graph_convolution(*given, stride=stride, statistics=False), given, 2, upstream_of=("y",)
    )
    assert all(torch.equal(one, other) for one, other in zip(ours[3:], expected[3:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_variance_far_from_zero(dtype):
    """A mean of ten thousand deviations: nothing cancels."""
    given = list(inputs((2, 4, 30, 25, 16, 16, 1, 1), dtype))
    given[2] = given[2] + 10000.0  # of a projection the bias is the mean
    given[1] = given[1].to(dtype).float()
    given[3] = torch.ones_like(given[3])
    _, mean, variance = graph_convolution(*given)
    _, expected_mean, expected_variance = graph_convolution_reference(*exactly(given))
    # y itself is rounded to float32 first.
    torch.testing.assert_close(mean.double(), expected_mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(variance.double(), expected_variance, rtol=1e-3, atol=0)


@by_numbers
def test_statistics_are_of_what_was_not_rounded(numbers):
    dtype, _ = numbers
    given = inputs((1, 4, 40, 25, 16, 16, 3, 1), dtype)
    _, mean, variance = graph_convolution(*given)
    _, expected_mean, expected_variance = graph_convolution_reference(*given)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(mean, expected_mean, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(variance, expected_variance, rtol=tolerance, atol=tolerance)


@by_numbers
def test_strided_inputs(numbers):
    sizes = (2, 3, 5, 7, 6, 5, 3, 2)
    given = inputs(sizes, numbers[0])
    expected = results(graph_convolution, given, 2)
    x, weight, bias, importance, adjacency, edges = given
    for strided in (
        x.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),  # channels first
        x.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([x, x], dim=-1)[..., :6],
    ):
        assert not strided.is_contiguous()
        assert_agree(results(graph_convolution, (strided, *given[1:]), 2), expected, 0.0)
    others = [value.transpose(-1, -2).contiguous().transpose(-1, -2) for value in (weight, bias, importance, adjacency)]
    wide_edges = torch.cat([edges, edges], dim=1)[:, :3]
    assert_agree(results(graph_convolution, (x, *others, wide_edges), 2), expected, 0.0)
    same = [value[:1].expand(2, *value.shape[1:]) for value in (x, weight, bias, importance)]
    dense = [value.contiguous() for value in same]
    ours = results(graph_convolution, (*same, adjacency, edges), 2)
    assert_agree(ours, results(graph_convolution, (*dense, adjacency, edges), 2), 0.0)


@by_numbers
def test_strided_gradient(numbers):
    *differentiable, adjacency, edges = inputs((2, 3, 5, 7, 6, 5, 3, 1), numbers[0])
    differentiable = [value.requires_grad_() for value in differentiable]
    y, _, _ = graph_convolution(*differentiable, adjacency, edges)
    dense = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    strided = dense.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    first = torch.autograd.grad(y, differentiable, dense, retain_graph=True)
    second = torch.autograd.grad(y, differentiable, strided, retain_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    (of_x, *_) = torch.autograd.grad(y, differentiable, torch.ones(()).to(y.dtype).expand_as(y))
    assert of_x.isfinite().all()


@by_numbers
def test_nothing_to_do(numbers):
    dtype, tolerance = numbers
    for sizes in (
        (2, 0, 5, 4, 3, 5, 2, 1),
        (2, 3, 0, 4, 3, 5, 2, 1),
        (2, 3, 5, 0, 3, 5, 2, 1),
        (0, 3, 5, 4, 3, 5, 2, 1),
        (2, 3, 5, 4, 0, 5, 2, 1),
        (2, 3, 5, 4, 3, 0, 2, 1),
    ):
        given = inputs(sizes, dtype)
        ours = results(graph_convolution, given)
        assert_agree(ours, results(graph_convolution_reference, exactly(given)), tolerance)
        assert all(value.isfinite().all() for value in ours)
    _, mean, variance = graph_convolution(*inputs((2, 0, 5, 4, 3, 5, 2, 1), dtype))
    assert torch.equal(mean, torch.zeros_like(mean))
    assert torch.equal(variance, torch.zeros_like(variance))


@by_numbers
def test_number_of_threads(numbers):
    dtype, tolerance = numbers
    before = torch.get_num_threads()
    for sizes in ((3, 4, 40, 25, 16, 32, 3, 1), (1, 5, 51, 25, 16, 32, 3, 2)):
        given = inputs(sizes, dtype)
        by_threads = {}
        try:
            for threads in (1, 2, 3, 5):
                torch.set_num_threads(threads)
                by_threads[threads] = results(graph_convolution, given, sizes[-1])
                again = results(graph_convolution, given, sizes[-1])
                assert all(torch.equal(one, other) for one, other in zip(by_threads[threads], again, strict=True))
        finally:
            torch.set_num_threads(before)
        for threads in (2, 3, 5):
            assert_agree(by_threads[threads], by_threads[1], tolerance)


def test_what_is_not_a_number_stays_visible():
    given = list(inputs(SIZES[1], torch.float32))
    given[0][1, 2, 3, 4, 5] = torch.nan
    y, mean, variance, *_ = results(graph_convolution, given)
    reached = given[4][:, 4].sum(dim=0) > 0
    assert torch.equal(y[1, 2, 3].isnan(), reached[:, None].expand(-1, y.shape[-1]))
    assert int(y.isnan().sum()) == int(reached.sum()) * y.shape[-1]
    assert mean[1].isnan().all()
    assert variance[1].isnan().all()
    assert mean[0].isfinite().all()


def test_second_derivatives_are_refused():
    *differentiable, adjacency, edges = inputs((1, 1, 3, 4, 3, 5, 2, 1))
    y, _, _ = graph_convolution(differentiable[0].requires_grad_(), *differentiable[1:], adjacency, edges)
    (first,) = torch.autograd.grad(y.square().sum(), differentiable[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


def test_wrong_arguments_are_named():
    x, weight, bias, importance, adjacency, edges = given = inputs((2, 3, 4, 5, 3, 7, 2, 1), torch.float32)

    def replaced(index, value):
        return [*given[:index], value, *given[index + 1 :]]

    scale = torch.ones(2, 7)
    for bad, options, message in (
        (
            replaced(0, x[0]),
            {},
            r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got \(3, 4, 5, 3\) float32",
        ),
        (replaced(0, x.half()), {}, r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got .* float16"),
        (
            replaced(1, weight[:, :, :, :2]),
            {},
            r"weight must be \(S, P, C_out, C_in\) = \(2, 2, 7, 3\) float32 for x .*, got \(2, 2, 7, 2\) float32",
        ),
        (replaced(1, weight.bfloat16()), {}, r"weight must be .* float32 for x .*, got \(2, 2, 7, 3\) bfloat16"),
        (replaced(2, bias[:1]), {}, r"bias must be \(S, P, C_out\) = \(2, 2, 7\) float32 .*, got \(1, 2, 7\)"),
        (replaced(3, importance[0]), {}, r"importance must be \(S, P, V, V\) = \(2, 2, 5, 5\) .*, got \(2, 5, 5\)"),
        (replaced(4, adjacency.double()), {}, r"adjacency must be .* float32 for x .*, got \(2, 5, 5\) float64"),
        (replaced(4, adjacency.clone().requires_grad_()), {}, r"adjacency must not require a gradient"),
        (replaced(5, edges.long()), {}, r"edges must be \(E, 3\) int32, from graph_edges, got .* int64"),
        (replaced(5, edges.to("meta")), {}, "edges must be on x's device cpu, got meta"),
        (replaced(2, bias.to("meta")), {}, "bias must be on x's device cpu, got meta"),
        (given, {"stride": 0}, "stride must be at least 1, got 0"),
        (given, {"output_scale": scale, "statistics": False}, "output_scale and output_shift must be given together"),
        (given, {"output_scale": scale, "output_shift": scale}, "statistics must be False with output_scale, got True"),
        (
            given,
            {"output_scale": scale[:1], "output_shift": scale, "statistics": False},
            r"output_scale must be \(S, C_out\) = \(2, 7\) float32 .*, got \(1, 7\) float32",
        ),
        (
            replaced(1, weight.clone().requires_grad_()),
            {"output_scale": scale, "output_shift": scale, "statistics": False},
            r"weight must not require a gradient with output_scale: use torch.no_grad\(\)",
        ),
    ):
        for function in (graph_convolution, graph_convolution_reference):
            with pytest.raises(ValueError, match=message):
                function(*bad, **options)
    with torch.no_grad():
        graph_convolution(
            *replaced(1, weight.clone().requires_grad_()), output_scale=scale, output_shift=scale, statistics=False
        )


def test_operator_checks_what_the_function_would():
    x, weight, bias, importance, adjacency, edges = given = inputs((2, 3, 4, 5, 3, 7, 2, 1), torch.float32)

    def forward(index=0, value=x, stride=1, statistics=True, scale=None, shift=None):
        arguments = [*given[:index], value, *given[index + 1 :]]
        return torch.ops.ikem_fast.graph_convolution(*arguments, stride, statistics, scale, shift, True)

    def changed(row, column, value):
        copy = edges.clone()
        copy[row, column] = value
        return copy

    scale = torch.ones(2, 7)
    for options, message in (
        ({"value": x[0]}, r"x must be \(S, B, T, V, C\), got \(3, 4, 5, 3\)"),
        ({"value": x.half()}, "x must be float32, bfloat16 or float64, got Half"),
        ({"index": 1, "value": weight[:, :0]}, r"weight must be .* = \(2, 1 or more, any, 3\), got \(2, 0, 7, 3\)"),
        ({"index": 1, "value": weight.double()}, "weight must be Float, got Double"),
        ({"index": 2, "value": bias[:, :1]}, r"bias must be \(S, P, C_out\) = \(2, 2, 7\), got \(2, 1, 7\)"),
        ({"index": 3, "value": importance[..., :4]}, r"importance must be \(S, P, V, V\) = \(2, 2, 5, 5\), got"),
        ({"index": 4, "value": adjacency[:1]}, r"adjacency must be \(P, V, V\) = \(2, 5, 5\), got \(1, 5, 5\)"),
        ({"index": 5, "value": edges[:, :2]}, r"edges must be \(E, 3\), got"),
        ({"index": 5, "value": edges.long()}, "edges must be Int, got Long"),
        (
            {"index": 5, "value": changed(1, 1, 5)},
            r"edges must be \(partition, from, to\) below \(2, 5, 5\), got .*, 5,",
        ),
        ({"index": 5, "value": changed(0, 0, -1)}, r"edges must be .* below .*, got \(-1, .* as edge 0"),
        (
            {"index": 5, "value": edges.flip(0)},
            r"edges must be sorted by \(to, partition, from\), each once, got .* 1$",
        ),
        ({"index": 5, "value": edges.repeat_interleave(2, 0)}, r"edges must be sorted by .*, each once, got .* edge 1"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"scale": scale, "statistics": False}, "output_scale and output_shift must be given together"),
        ({"scale": scale, "shift": scale}, "statistics must be False with output_scale, got True"),
        ({"scale": scale[:, :6], "shift": scale, "statistics": False}, r"output_scale must be \[2, 7\], got \[2, 6\]"),
    ):
        with pytest.raises(ValueError, match=message):
            forward(**options)

    y, mean, _ = forward()
    for changes, message in (
        ({"y_gradient": y[:1]}, r"y_gradient must be \[2, 3, 4, 5, 7\], got \[1, 3, 4, 5, 7\]"),
        ({"y_gradient": y.double()}, "y_gradient must be Float, got Double"),
        ({"mean_gradient": mean[0]}, r"mean_gradient must be \[2, 7\], got \[7\]"),
        ({"variance_gradient": mean.double()}, "variance_gradient must be Float, got Double"),
        ({"variance_gradient": mean, "mean": mean[:1]}, r"mean must be \[2, 7\], got \[1, 7\]"),
        ({"variance_gradient": mean, "y": y[:, :1]}, r"y must be \[2, 3, 4, 5, 7\], got \[2, 1, 4, 5, 7\]"),
    ):
        arguments = {"y": y, "mean": mean, "y_gradient": y, "mean_gradient": None, "variance_gradient": None}
        with pytest.raises(ValueError, match=message):
            torch.ops.ikem_fast.graph_convolution_backward(*given, 1, *{**arguments, **changes}.values(), True)


def test_exported():
    assert {"graph_convolution", "graph_convolution_reference", "graph_edges"} <= set(ops.__all__)
