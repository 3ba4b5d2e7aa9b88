import pytest
import torch

from ikem_fast import ops

FUNCTIONS = [ops.enqueue_, ops.enqueue_reference_]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]


def one_by_one(queue, keys, start):
    """Where the keys come to lie if they are enqueued one after the other."""
    queue = queue.clone()
    for i in range(keys.shape[1]):
        queue[:, :, (start + i) % queue.shape[2]] = keys[:, i].to(queue.dtype)
    return queue


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_keys", [0, 1, 3, 7, 8, 20, 150])
@pytest.mark.parametrize("start", [0, 4, 6, -2, 1000])
def test_wraps_around_for_any_batch(function, num_keys, start):
    queue, keys = torch.randn(2, 5, 7), torch.randn(2, num_keys, 5)
    pointer = torch.tensor([start])
    expected = one_by_one(queue, keys, start)
    function(queue, keys, pointer)
    assert torch.equal(queue, expected)
    assert pointer.tolist() == [(start + num_keys) % 7]


@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("queue_dtype", DTYPES)
def test_keys_are_converted(key_dtype, queue_dtype):
    queue, keys = torch.randn(2, 37, 100).to(queue_dtype), torch.randn(2, 70, 37).to(key_dtype)
    pointer = torch.tensor([55])
    expected = one_by_one(queue, keys, 55)
    ops.enqueue_(queue, keys, pointer)
    assert torch.equal(queue, expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_views_of_larger_tensors(function):
    storage = torch.randn(3, 50, 2, 40)
    queue = storage[1:, 3:36, 0, ::2]
    keys = torch.randn(33, 2, 11).permute(1, 2, 0)
    expected_storage = storage.clone()
    expected_storage[1:, 3:36, 0, ::2] = one_by_one(queue, keys, 15)
    function(queue, keys, torch.tensor([15]))
    assert torch.equal(storage, expected_storage)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_single_queue_is_filled_in_place(function):
    queue, keys, pointer = torch.zeros(5, 7), torch.randn(3, 5), torch.tensor([5])
    function(queue, keys, pointer)
    assert torch.equal(queue[:, [5, 6, 0]], keys.T)
    assert not queue[:, 1:5].any()


def test_ranks_go_in_one_after_another():
    together, apart = torch.zeros(2, 4, 9), torch.zeros(2, 4, 9)
    ranks = [torch.randn(2, 4, 4) for _ in range(3)]
    ops.enqueue_(together, torch.cat(ranks, dim=1), torch.tensor([2]))
    pointer = torch.tensor([2])
    for keys in ranks:
        ops.enqueue_(apart, keys, pointer)
    assert torch.equal(together, apart)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("num_keys", [0, 1, 3, 7, 12, 13, 40])
@pytest.mark.parametrize("start", [0, 2, 4, 5, 8, 11, -1, 1000])
def test_parts_of_a_queue_take_the_keys_that_belong_there(function, num_keys, start):
    whole, keys = torch.randn(2, 5, 12), torch.randn(2, num_keys, 5)
    expected = one_by_one(whole, keys, start)
    for first_column, columns in ((0, 4), (4, 4), (8, 4), (0, 1), (11, 1), (3, 7), (0, 12)):
        part, pointer = whole[:, :, first_column : first_column + columns].clone(), torch.tensor([start])
        function(part, keys, pointer, first_column, 12)
        assert torch.equal(part, expected[:, :, first_column : first_column + columns])
        assert pointer.tolist() == [(start + num_keys) % 12]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_keys_that_need_gradients_leave_no_graph(function):
    queue, pointer = torch.zeros(1, 2, 3), torch.tensor([0])
    function(queue, torch.ones(1, 2, 2, requires_grad=True), pointer)
    assert not queue.requires_grad
    assert queue.sum() == 4


@pytest.mark.parametrize("function", FUNCTIONS)
def test_backward_notices_that_a_queue_it_needs_has_changed(function):
    queue, x = torch.randn(2, 3), torch.randn(1, 2, requires_grad=True)
    product = (x @ queue).sum()
    function(queue, torch.randn(1, 2), torch.tensor([0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_same_queue_for_any_number_of_threads():
    before = torch.get_num_threads()
    keys, queue = torch.randn(3, 500, 100), torch.zeros(3, 100, 700)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(queue.clone())
            ops.enqueue_(results[-1], keys, torch.tensor([400]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], one_by_one(queue, keys, 400))
    assert all(torch.equal(result, results[0]) for result in results)


def test_operator_is_registered_completely():
    arguments = (torch.randn(2, 5, 7), torch.randn(2, 3, 5), torch.tensor([6]))
    torch.library.opcheck(torch.ops.ikem_fast.enqueue_.default, arguments)
    torch.library.opcheck(torch.ops.ikem_fast.enqueue_.default, arguments, {"first_column": 3, "queue_size": 10})


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 4), torch.tensor([0])),
            r"keys must be \(S, N, D\) = \(2, any, 5\) floating point, got \(2, 3, 4\)",
        ),
        (
            (torch.zeros(5, 7), torch.zeros(1, 3, 5), torch.tensor([0])),
            r"keys must be \(N, D\) = \(any, 5\) floating point, got \(1, 3, 5\)",
        ),
        (
            (torch.zeros(7), torch.zeros(3, 5), torch.tensor([0])),
            r"queue must be \(S, D, K\) = \(any, any, any\) floating point, got \(7,\)",
        ),
        (
            (torch.zeros(2, 5, 0), torch.zeros(2, 3, 5), torch.tensor([0])),
            r"queue must have at least one column, got \(2, 5, 0\) float32",
        ),
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor(0)),
            r"pointer must be \(1,\) int64, got \(\) int64",
        ),
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor([0]).int()),
            r"pointer must be \(1,\) int64, got \(1,\) int32",
        ),
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 5, device="meta"), torch.tensor([0])),
            "keys must be on the queue's device cpu, got meta",
        ),
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor([0]), 0, 6),
            "queue_size must be at least the queue's 7 columns, got 6",
        ),
        (
            (torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor([0]), 1),
            r"first_column must be in 0 \.\.\. queue_size - columns = 0, got 1",
        ),
        (
            (torch.zeros(5, 7), torch.zeros(3, 5), torch.tensor([0]), -1, 10),
            r"first_column must be in 0 \.\.\. queue_size - columns = 3, got -1",
        ),
    ],
)
def test_wrong_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_operator_checks_the_columns_too():
    queue, keys, pointer = torch.zeros(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor([0])
    with pytest.raises(ValueError, match="queue_size must be at least the queue's 7 columns, got 6"):
        torch.ops.ikem_fast.enqueue_(queue, keys, pointer, 0, 6)
    with pytest.raises(ValueError, match=r"first_column must be in 0 \.\.\. queue_size - columns = 3, got 4"):
        torch.ops.ikem_fast.enqueue_(queue, keys, pointer, 4, 10)


def test_an_expanded_queue_is_refused():
    with pytest.raises(ValueError, match="queue must not be expanded"):
        ops.enqueue_(torch.zeros(1, 5, 7).expand(2, 5, 7), torch.zeros(2, 3, 5), torch.tensor([0]))


@pytest.mark.cuda
@pytest.mark.parametrize("key_dtype", DTYPES)
@pytest.mark.parametrize("queue_dtype", DTYPES)
def test_cuda_equals_the_definition(key_dtype, queue_dtype):
    for streams, num_keys, size, columns, start in ((2, 70, 37, 100, 55), (1, 150, 64, 128, -3), (3, 0, 5, 7, 6)):
        queue = torch.randn(streams, size, 2 * columns, device="cuda").to(queue_dtype)[:, :, ::2]
        keys = torch.randn(num_keys, streams, size, device="cuda").to(key_dtype).transpose(0, 1)
        pointer = torch.tensor([start], device="cuda")
        expected = one_by_one(queue, keys, start)
        ops.enqueue_(queue, keys, pointer)
        assert torch.equal(queue, expected)
        assert pointer.tolist() == [(start + num_keys) % columns]


@pytest.mark.cuda
def test_cuda_parts_of_a_queue():
    whole = torch.randn(2, 37, 120, device="cuda")
    for num_keys, start in ((0, 3), (50, 100), (70, 20), (300, -3)):
        keys = torch.randn(2, num_keys, 37, device="cuda")
        expected = one_by_one(whole, keys, start)
        for first_column in (0, 40, 80):
            part = whole[:, :, first_column : first_column + 40].contiguous()
            pointer = torch.tensor([start], device="cuda")
            ops.enqueue_(part, keys, pointer, first_column, 120)
            assert torch.equal(part, expected[:, :, first_column : first_column + 40])
            assert pointer.tolist() == [(start + num_keys) % 120]


@pytest.mark.cuda
def test_cuda_graph_moves_the_pointer_at_every_replay():
    queue, keys = torch.zeros(2, 4, 7, device="cuda"), torch.randn(2, 3, 4, device="cuda")
    pointer = torch.tensor([0], device="cuda")
    ops.enqueue_(queue, keys, pointer)
    queue.zero_()
    pointer.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.enqueue_(queue, keys, pointer)
    expected = torch.zeros_like(queue)
    for step in range(4):
        keys.normal_()
        expected = one_by_one(expected, keys, 3 * step)
        graph.replay()
        assert torch.equal(queue, expected)
        assert pointer.tolist() == [3 * (step + 1) % 7]
