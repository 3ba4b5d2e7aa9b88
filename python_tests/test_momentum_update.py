import pytest
import torch

from ikem_fast import ops

FUNCTIONS = [ops.momentum_update_, ops.momentum_update_reference_]
# Nothing, one value, whole vectors and some more, more than one piece.
SHAPES = [(3, 4), (5,), (), (0, 7), (1,), (16,), (33,), (129, 257)]


def tensors(dtype=torch.float32, device="cpu"):
    return [torch.randn(shape, dtype=torch.float64).to(device, dtype) for shape in SHAPES]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("m", [0.0, 0.9, 0.999, 1.0])
def test_equals_the_formula(function, dtype, m):
    keys, queries = tensors(dtype), tensors(dtype)
    expected = [m * key.double() + (1 - m) * query.double() for key, query in zip(keys, queries, strict=True)]
    function(keys, queries, m)
    # The definition rounds twice, which shows where the two terms cancel.
    tolerance = 4 * torch.finfo(dtype).eps
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted.to(dtype), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_instruction_set_equals_the_definition(dtype, capability):
    keys, queries = tensors(dtype), tensors(dtype)
    expected = [key.clone() for key in keys]
    ops.momentum_update_reference_(expected, queries, 0.99)
    ops.momentum_update_(keys, queries, 0.99)
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_layout_in_memory(function):
    channels_last = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    storage = torch.randn(10, 20)
    keys = [
        channels_last.clone(),
        torch.randn(6, 7).T,
        storage[2:7, ::3],
        torch.randn(4, 5),
        torch.randn(1, 6).expand(1, 6),
        torch.randn(30)[1:],
    ]
    queries = [
        channels_last.mul(2),
        torch.randn(7, 6),
        torch.randn(5, 7),
        torch.randn(5, 4).T,
        torch.randn(2, 6)[1:],
        torch.randn(29),
    ]
    expected = [0.9 * key + 0.1 * query for key, query in zip(keys, queries, strict=True)]
    rest = torch.ones_like(storage, dtype=torch.bool)
    rest[2:7, ::3] = False
    before = storage[rest]
    function(keys, queries, 0.9)
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted)
    assert torch.equal(storage[rest], before)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_mixed_dtypes(function):
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    keys = [torch.randn(9).to(dtype) for dtype in dtypes]
    queries = [torch.randn(9).to(dtype) for dtype in [*dtypes[:3], torch.float64]]
    expected = [0.5 * key.double() + 0.5 * query.double() for key, query in zip(keys, queries, strict=True)]
    function(keys, queries, 0.5)
    for key, wanted, dtype in zip(keys, expected, dtypes, strict=True):
        torch.testing.assert_close(key, wanted.to(dtype), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_parameters_stay_out_of_the_graph(function):
    keys = [torch.nn.Parameter(torch.zeros(3))]
    queries = [torch.nn.Parameter(torch.ones(3))]
    function(keys, queries, 0.75)
    assert keys[0].tolist() == [0.25] * 3
    assert keys[0].grad_fn is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_notices_that_a_key_it_needs_has_changed(function):
    key, x = torch.randn(3), torch.randn(3, requires_grad=True)
    product = (x * key).sum()
    function([key], [torch.randn(3)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_nothing_to_update():
    ops.momentum_update_([], [], 0.5)


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    queries = [torch.randn(size) for size in (70001, 3, 200000)]
    start = [torch.randn_like(query) for query in queries]
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([key.clone() for key in start])
            ops.momentum_update_(results[-1], queries, 0.999)
    finally:
        torch.set_num_threads(before)
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, results[0], strict=True))


def test_operator_is_registered_completely():
    arguments = ([torch.randn(3, 4), torch.randn(5)], [torch.randn(3, 4), torch.randn(5)], 0.9)
    torch.library.opcheck(torch.ops.ikem_fast.momentum_update_.default, arguments)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], [], 1.5), r"m must be in \[0, 1\], got 1.5"),
        (([torch.zeros(2)], [], 0.9), "query_params must be 1 tensors as key_params is, got 0"),
        (
            ([torch.zeros(2)], [torch.zeros(1)], 0.9),
            r"query_params\[0\] must be \(2,\) float32 as key_params is, got \(1,\)",
        ),
    ],
)
def test_wrong_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.zeros(2).half()], [torch.zeros(2).half()], 0.9), r"key_tensors\[0\] must be float32 or float64"),
        (([torch.zeros(2)], [torch.zeros(2).double()], 0.9), r"query_tensors\[0\] must be \[2\] Float as"),
        (([torch.zeros(2)], [torch.zeros(2)], -1.0), r"momentum must be in \[0, 1\], got -1"),
    ],
)
def test_operator_names_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        torch.ops.ikem_fast.momentum_update_(*arguments)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_cuda_equals_the_definition(dtype):
    keys, queries = tensors(dtype, "cuda"), tensors(dtype, "cuda")
    keys += [torch.randn(30, device="cuda").to(dtype)[1:], torch.randn(6, 7, device="cuda").to(dtype).T]
    queries += [torch.randn(29, device="cuda").to(dtype), torch.randn(7, 6, device="cuda").to(dtype)]
    # More than one launch takes.
    keys += list(torch.randn(300, 5, device="cuda").to(dtype))
    queries += list(torch.randn(300, 5, device="cuda").to(dtype))
    expected = [key.clone() for key in keys]
    ops.momentum_update_reference_(expected, queries, 0.99)
    ops.momentum_update_(keys, queries, 0.99)
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted)


@pytest.mark.cuda
def test_cuda_graph():
    keys, queries = tensors(device="cuda"), tensors(device="cuda")
    expected = [key.clone() for key in keys]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.momentum_update_(keys, queries, 0.5)
    for _ in range(2):
        graph.replay()
        ops.momentum_update_reference_(expected, queries, 0.5)
    for key, wanted in zip(keys, expected, strict=True):
        torch.testing.assert_close(key, wanted)
