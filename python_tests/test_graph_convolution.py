"""Graph convolution: the compiled operator against its plain definition."""

from __future__ import annotations

import pytest
import torch

from ikem_fast import layouts, ops
from ikem_fast.ops import graph_convolution, graph_convolution_reference, graph_edges

DTYPES = [torch.float64, torch.float32, torch.bfloat16]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
# Relative to the largest magnitude. In bfloat16 the gradient that reaches y is rounded before the products, in the
# twin only their results are.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2.0**-7}
# Graph, S, B, T, C_in, C_out, stride: the encoder's, and such that leave a rest in every block and pair.
SIZES = [
    ("ntu-rgb+d", 2, 3, 50, 3, 16, 1),
    ("ntu-rgb+d", 1, 2, 50, 16, 16, 1),
    ("ntu-rgb+d", 2, 1, 50, 16, 32, 1),
    ("ntu-rgb+d", 1, 2, 13, 64, 256, 1),
    ("identity", 2, 2, 50, 16, 32, 2),
    ("identity", 1, 2, 13, 64, 256, 1),
    ("nw-ucla", 3, 2, 7, 5, 7, 1),
    ("utd-mhad", 1, 1, 1, 33, 48, 3),
    ("dense", 2, 2, 5, 4, 9, 2),
    ("one joint", 1, 3, 4, 1, 1, 1),
    ("no edges", 1, 2, 3, 4, 5, 1),
    ("identity", 1, 1, 9, 17, 40, 4),
]
NAMES = ("y", "mean", "variance", "of x", "of weight", "of bias", "of importance")


def computed(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def graph(name):
    if name == "identity":
        return torch.eye(25).unsqueeze(0)
    if name == "dense":
        return torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    if name == "one joint":
        return torch.ones(1, 1, 1)
    if name == "no edges":
        return torch.zeros(2, 4, 4)
    return layouts.get(name).adjacency()


def inputs(sizes, dtype=torch.float64, seed=0):
    """x, weight, bias, importance, adjacency, edges."""
    name, streams, batch, frames, in_channels, out_channels, _ = sizes
    adjacency = graph(name)
    partitions, joints, _ = adjacency.shape
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(streams, batch, frames, joints, in_channels).to(dtype)
    weight = draw(streams, partitions, out_channels, in_channels) / (partitions * in_channels) ** 0.5
    importance = 1 + 0.3 * draw(streams, partitions, joints, joints)
    rest = (weight, draw(streams, partitions, out_channels), importance, adjacency)
    return x, *(values.to(computed(dtype)) for values in rest), graph_edges(adjacency)


def results(function, x, weight, bias, importance, adjacency, edges, stride=1, statistics=True):
    """y, mean, variance and the gradients of a weighted sum of all of them."""
    leaves = [values.detach().requires_grad_() for values in (x, weight, bias, importance)]
    made = function(*leaves, adjacency, edges, stride=stride, statistics=statistics)
    generator = torch.Generator().manual_seed(1)
    loss = 0
    for index, values in enumerate(made):
        # Weights that bfloat16 holds; those of the statistics are of the weight of the sum over y.
        weights = torch.randn(values.shape, generator=generator, dtype=torch.float64).bfloat16().to(values.dtype)
        loss = loss + (weights * values).sum() * (1 if index == 0 else made[0][..., 0].numel() ** 0.5)
    return *(values.detach() for values in made), *torch.autograd.grad(loss, leaves)


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
    expected = results(graph_convolution_reference, *given, stride=sizes[-1])
    ours = results(graph_convolution, *given, stride=sizes[-1])
    assert ours[0].dtype == ours[3].dtype == dtype
    assert all(values.dtype == computed(dtype) for values in (*ours[1:3], *ours[4:]))
    assert_agree(ours, expected, TOLERANCE[dtype])
    off_the_edges = (given[4] == 0).expand_as(ours[6])
    assert not ours[6][off_the_edges].any()


@by_dtype
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[4], SIZES[6], SIZES[8]], ids=str)
def test_every_instruction_set(sizes, dtype, capability):
    given = inputs(sizes, dtype)
    expected = results(graph_convolution_reference, *given, stride=sizes[-1])
    assert_agree(results(graph_convolution, *given, stride=sizes[-1]), expected, TOLERANCE[dtype])


def test_definition_is_a_convolution_to_groups_and_a_sum_over_partitions():
    sizes = ("nw-ucla", 1, 2, 5, 4, 6, 1)
    x, weight, bias, importance, adjacency, edges = inputs(sizes)
    groups = torch.einsum("btvc,koc->btvko", x[0], weight[0]) + bias[0]
    expected = torch.einsum("btvko,kvw->btwo", groups, (adjacency * importance[0]))
    y, mean, variance = graph_convolution(x, weight, bias, importance, adjacency, edges)
    torch.testing.assert_close(y[0], expected)
    torch.testing.assert_close(mean[0], expected.mean(dim=(0, 1, 2)))
    torch.testing.assert_close(variance[0], expected.var(dim=(0, 1, 2), correction=0))


@pytest.mark.parametrize("name", ["dense", "identity", "nw-ucla"])
def test_gradients(name):
    given = inputs((name, 2, 2, 3, 2, 3, 2))
    leaves = [values.requires_grad_() for values in given[:4]]

    def run(*values):
        return graph_convolution(*values, *given[4:], stride=2)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=name != "dense")


@by_dtype
@pytest.mark.parametrize("name", ["nw-ucla", "identity"])
def test_operator_is_well_formed(name, dtype):
    given = inputs((name, 2, 2, 5, 3, 4, 2), dtype)
    forward = torch.ops.ikem_fast.graph_convolution.default
    differentiable = [*(values.clone().requires_grad_() for values in given[:4]), *given[4:]]
    torch.library.opcheck(forward, (*differentiable, 2, True, None, None, True))
    torch.library.opcheck(forward, (*given, 2, False, None, None, True))
    y, mean, _ = forward(*given, 2, True, None, None, True)
    torch.library.opcheck(forward, (*given, 2, False, mean, torch.ones_like(mean), False))
    backward = torch.ops.ikem_fast.graph_convolution_backward.default
    for of_mean, of_variance, with_x_gradient in ((mean, mean, True), (None, None, False), (None, mean, False)):
        torch.library.opcheck(backward, (*given, 2, y, mean, y.square(), of_mean, of_variance, with_x_gradient))


def test_compiles():
    given = inputs(SIZES[6], torch.float32)
    compiled = torch.compile(graph_convolution, backend="aot_eager", fullgraph=True)
    assert_agree(results(compiled, *given), results(graph_convolution, *given), 0.0)


@by_dtype
def test_gradients_that_are_not_wanted(dtype):
    given = inputs(("nw-ucla", 2, 2, 9, 16, 20, 2), dtype)
    y, mean, variance = graph_convolution(*given, stride=2)
    backward = torch.ops.ikem_fast.graph_convolution_backward
    complete = backward(*given, 2, y, mean, y, mean, variance, True)
    partial = backward(*given, 2, y, mean, y, mean, variance, False)
    assert partial[0].shape == (0,)
    assert all(torch.equal(one, other) for one, other in zip(complete[1:], partial[1:], strict=True))
    for wanted in range(4):
        leaves = [values.detach().requires_grad_(index == wanted) for index, values in enumerate(given[:4])]
        graph_convolution(*leaves, *given[4:], stride=2)[0].sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [index == wanted for index in range(4)]
    with torch.no_grad():
        made = graph_convolution(*[values.clone().requires_grad_() for values in given[:4]], *given[4:], stride=2)
    assert all(torch.equal(one, other) for one, other in zip(made, (y, mean, variance), strict=True))
    assert not made[0].requires_grad


@by_dtype
def test_gradients_through_one_result_alone(dtype):
    given = inputs(("nw-ucla", 2, 2, 9, 16, 20, 1), dtype)
    for chosen in range(3):
        gradients = []
        for function in (graph_convolution, graph_convolution_reference):
            leaves = [values.detach().requires_grad_() for values in given[:4]]
            made = function(*leaves, *given[4:])[chosen]
            weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(2)).to(made.dtype)
            gradients.append(torch.autograd.grad((weights * made).sum(), leaves))
        # The variance's gradients of the bias nearly cancel: rounding is measured by all gradients.
        scale = max(float(values.double().abs().max()) for values in gradients[1])
        for one, other in zip(*gradients, strict=True):
            assert float((one.double() - other.double()).abs().max()) <= 4 * TOLERANCE[dtype] * scale


def test_second_derivatives_are_refused():
    given = inputs(("nw-ucla", 1, 2, 5, 3, 3, 1))
    leaves = [values.requires_grad_() for values in given[:4]]
    loss = graph_convolution(*leaves, *given[4:])[0].square().sum()
    (first,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@by_dtype
@pytest.mark.parametrize("activation", [True, False])
@pytest.mark.parametrize("sizes", [SIZES[1], SIZES[4], SIZES[6]], ids=str)
def test_inference(sizes, activation, dtype):
    given = inputs(sizes, dtype)
    scale, shift = (torch.randn(sizes[1], sizes[5], dtype=computed(dtype)) for _ in range(2))
    settings = {"stride": sizes[-1], "statistics": False, "output_scale": scale, "output_shift": shift}
    ours = graph_convolution(*given, output_activation=activation, **settings)
    expected = graph_convolution_reference(*given, output_activation=activation, **settings)
    assert bool((ours[0] < 0).any()) is not activation
    assert_agree(ours, expected, TOLERANCE[dtype])
    plain = graph_convolution(*given, stride=sizes[-1], statistics=False)
    assert torch.equal(plain[0], graph_convolution(*given, stride=sizes[-1])[0])
    assert plain[1].shape == plain[2].shape == (0,)


@by_dtype
def test_statistics_of_a_large_mean(dtype):
    x, weight, _, _, adjacency, edges = inputs(("identity", 2, 8, 30, 4, 16, 1), dtype)
    bias = torch.full((2, 1, 16), 1000.0, dtype=computed(dtype))
    importance = torch.ones(2, 1, 25, 25, dtype=computed(dtype))
    _, mean, variance = graph_convolution(x, weight, bias, importance, adjacency, edges)
    _, small_mean, exact = graph_convolution_reference(x, weight, 0 * bias, importance, adjacency, edges)
    torch.testing.assert_close(mean.double(), small_mean.double() + 1000, rtol=1e-6, atol=0)
    # What float32 leaves of values around 1000.
    torch.testing.assert_close(variance.double(), exact.double(), rtol=1e-4, atol=1e-7)


@by_dtype
def test_no_sequences(dtype):
    given = inputs(("nw-ucla", 2, 0, 5, 4, 6, 2), dtype)
    for function in (graph_convolution, graph_convolution_reference):
        made = results(function, *given, stride=2)
        assert made[0].shape == (2, 0, 3, 20, 6)
        assert made[3].shape == (2, 0, 5, 20, 4)
        for values in made[1:3]:
            assert values.shape == (2, 6)
            assert not values.any()
        assert not any(values.any() for values in made[3:])


@by_dtype
def test_strided_inputs(dtype):
    given = inputs(("nw-ucla", 2, 3, 7, 16, 18, 1), dtype)
    expected = results(graph_convolution, *given)
    x, weight, bias, importance, adjacency, edges = given
    channels_first = x.permute(0, 4, 1, 2, 3).contiguous().permute(0, 2, 3, 4, 1)
    wide = torch.cat([x, x], dim=1)[:, 3:]
    rest = [values.mT.contiguous().mT for values in (weight, bias, importance, adjacency)]
    assert not any(values.is_contiguous() for values in (channels_first, wide, *rest))
    for other in (channels_first, wide):
        assert_agree(results(graph_convolution, other, *rest, edges), expected, 0.0)


@by_dtype
def test_number_of_threads(dtype):
    given = inputs(("ntu-rgb+d", 3, 5, 20, 16, 33, 1), dtype)
    before = torch.get_num_threads()
    try:
        by_threads = {}
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            by_threads[threads] = results(graph_convolution, *given)
            assert_agree(results(graph_convolution, *given), by_threads[threads], 0.0)
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3, 7):
        # The statistics' rounding moves the gradients, of which bfloat16 are rounded to the other side.
        assert_agree(by_threads[threads], by_threads[1], TOLERANCE[dtype])
        assert torch.equal(by_threads[threads][0], by_threads[1][0])


@by_dtype
def test_streams_do_not_touch_each_other(dtype):
    given = inputs(("nw-ucla", 3, 2, 9, 16, 20, 1), dtype)
    together, _, _ = graph_convolution(*given)
    for stream in range(3):
        alone, _, _ = graph_convolution(*(values[stream : stream + 1] for values in given[:4]), *given[4:])
        assert torch.equal(alone[0], together[stream])


@by_dtype
def test_what_is_not_a_number_stays_visible(dtype):
    x, *rest = inputs(("nw-ucla", 2, 2, 8, 16, 16, 1), dtype)
    x[0, 1, 3, 2, 5] = torch.nan
    y, mean, _ = graph_convolution(x, *rest)
    adjacency = rest[3]
    reached = adjacency[:, 2].ne(0).any(dim=0)  # joints that joint 2 has an edge to
    assert 0 < int(reached.sum()) < len(reached)
    assert y[0, 1, 3, reached].isnan().all()
    assert int(y.isnan().sum()) == 16 * int(reached.sum())
    assert mean[0].isnan().all()
    assert mean[1].isfinite().all()


def test_edges_are_sorted_by_where_they_lead():
    adjacency = torch.zeros(2, 3, 3)
    adjacency[1, 2, 0] = adjacency[0, 1, 0] = adjacency[1, 0, 0] = adjacency[0, 0, 2] = 0.5
    assert graph_edges(adjacency).tolist() == [[0, 1, 0], [1, 0, 0], [1, 2, 0], [0, 0, 2]]
    assert graph_edges(layouts.get("ntu-rgb+d").adjacency()).shape == (73, 3)
    with pytest.raises(ValueError, match=r"adjacency must be \(P, V, V\), got \(3, 4\)"):
        graph_edges(torch.zeros(3, 4))


def test_wrong_arguments_are_named():
    x, weight, bias, importance, adjacency, edges = inputs(("nw-ucla", 2, 3, 7, 4, 6, 1), torch.float32)
    given = {
        "x": x, "weight": weight, "bias": bias, "importance": importance, "adjacency": adjacency, "edges": edges,
    }  # fmt: skip
    ones = torch.ones(2, 6)
    for changes, message in (
        ({"x": x[0]}, r"x must be \(S, B, T, V, C\) float32, bfloat16 or float64, got \(3, 7, 20, 4\) float32"),
        ({"x": x.half()}, r"x must be .* got .* float16"),
        ({"weight": weight[:1]}, r"weight must be \(S, P, C_out, C_in\) = \(2, 3, 6, 4\) float32 for x .*, got \(1,"),
        ({"bias": bias.double()}, r"bias must be \(S, P, C_out\) = \(2, 3, 6\) float32 .* float64"),
        ({"importance": importance[:, :, :19]}, r"importance must be \(S, P, V, V\) = \(2, 3, 20, 20\)"),
        ({"adjacency": adjacency[:2]}, r"adjacency must be \(P, V, V\) = \(3, 20, 20\)"),
        ({"adjacency": adjacency.clone().requires_grad_()}, "adjacency must not require a gradient"),
        ({"edges": edges.long()}, r"edges must be \(E, 3\) int32, from graph_edges, got"),
        ({"bias": bias.to("meta")}, "bias must be on x's device cpu, got meta"),
        ({"stride": 0}, "stride must be at least 1, got 0"),
        ({"output_scale": ones}, "output_scale and output_shift must be given together"),
        ({"output_scale": ones, "output_shift": ones}, "statistics must be False with output_scale, got True"),
        (
            {"output_scale": ones, "output_shift": ones, "statistics": False, "x": x.clone().requires_grad_()},
            "x must not require a gradient with output_scale",
        ),
    ):
        for function in (graph_convolution, graph_convolution_reference):
            with pytest.raises(ValueError, match=message):
                function(**{**given, **changes})


def test_edges_out_of_range_or_order_are_refused():
    given = inputs(("nw-ucla", 1, 1, 3, 4, 6, 1), torch.float32)
    edges = given[-1]
    wrong = edges.clone()
    wrong[5, 1] = 20
    for other in (wrong, edges.flip(0)):
        with pytest.raises(ValueError, match="edges must"):
            graph_convolution(*given[:-1], other)


def test_exported():
    assert {"graph_convolution", "graph_convolution_reference", "graph_edges"} <= set(ops.__all__)
