"""The loops over tiles of the queue, with their steps in plain PyTorch here and with the kernels on a GPU."""

import math

import pytest
import torch

from ikem_fast import ops
from ikem_fast.ops import _queue_tiles

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
TILES = ["", "8", "24", "1000"]
# float32 and float64 to rounding; the others as exact as factors of bfloat16 make them.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2e-2}


def random(*shape, dtype, device, seed, length=1.0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * length / math.sqrt(shape[-1])
    return values.to(device, dtype)


def assert_near(actual, expected, tolerance):
    largest = expected.abs().amax().item() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual.double().cpu(), expected.double().cpu(), rtol=tolerance, atol=tolerance * (1 + largest)
    )


def rounded(queue, dtype):
    return queue.to(dtype).double()


def queue_reference(x, queue, positive, scale):
    """Log-sum-exp, best and gradient in float64."""
    x = x.double().requires_grad_()
    logits = scale * (x @ queue)
    all_logits = torch.cat([positive.double().unsqueeze(2), logits], dim=2)
    log_sum_exp = all_logits.logsumexp(dim=2)
    (gradient,) = torch.autograd.grad(log_sum_exp.sum(), x, allow_unused=True)
    return log_sum_exp.detach(), logits.detach().amax(dim=2), gradient


QUEUE_CASES = [
    # B, R, D, K
    (1, 1, 1, 1),
    (2, 3, 5, 7),
    (1, 5, 16, 1030),
    (3, 4, 8, 600),
    (1, 1, 3, 4099),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2,
                                    (torch.bfloat16, torch.float32)])  # fmt: skip
@pytest.mark.parametrize("shape", QUEUE_CASES)
def test_queue_log_sum_exp_equals_the_formula(shape, dtypes, tile, device, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    batch, rows, size, queue_size = shape
    dtype, queue_dtype = dtypes
    x = random(batch, rows, size, dtype=dtype, device=device, seed=1, length=3)
    queue = random(batch, size, queue_size, dtype=queue_dtype, device=device, seed=2)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    positive = random(batch, rows, dtype=computed, device=device, seed=3)
    log_sum_exp, best, gradient = _queue_tiles.queue_log_sum_exp(x, queue, positive, 14.0, True)
    expected = queue_reference(x, rounded(queue, dtype), positive, 14.0)
    # Only what is made of products of shares is rounded to bfloat16.
    for actual, wanted, tolerance in zip(
        (log_sum_exp, best, gradient), expected, (*[min(TOLERANCES[dtype], 2e-5)] * 2, TOLERANCES[dtype]), strict=True
    ):
        assert actual.dtype == computed
        assert_near(actual, wanted, tolerance)
    without = _queue_tiles.queue_log_sum_exp(x, queue, positive, 14.0, False)
    assert torch.allclose(without[0], log_sum_exp, rtol=1e-5)
    assert torch.allclose(without[1], best, rtol=1e-5)  # other tiles, whose products may be rounded differently
    assert without[2].shape == (0,)


@pytest.mark.parametrize("device", DEVICES)
def test_queue_log_sum_exp_of_strided_tensors(device):
    x = random(16, 3, 2, dtype=torch.float32, device=device, seed=1).permute(2, 1, 0)
    positive = random(3, 2, dtype=torch.float32, device=device, seed=3).T
    for queue in (
        random(2, 700, 16, dtype=torch.float32, device=device, seed=2).transpose(1, 2),
        random(2, 16, 1400, dtype=torch.float32, device=device, seed=2)[:, :, ::2],
        random(2, 16, 701, dtype=torch.float32, device=device, seed=2)[:, :, 1:],
    ):
        results = _queue_tiles.queue_log_sum_exp(x, queue, positive, 5.0, True)
        for actual, wanted in zip(results, queue_reference(x, queue.double(), positive, 5.0), strict=True):
            assert_near(actual, wanted, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", ["", "16"])
def test_queue_log_sum_exp_of_huge_logits(device, tile, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    x = random(1, 4, 8, dtype=torch.float32, device=device, seed=1, length=1e3)
    queue = random(1, 8, 100, dtype=torch.float32, device=device, seed=2, length=1e3)
    positive = torch.tensor([[-1e30, -5.0, 1e8, 3e38]], device=device)
    results = _queue_tiles.queue_log_sum_exp(x, queue, positive, 100.0, True)
    expected = queue_reference(x, queue.double(), positive, 100.0)
    assert_near(results[0][:, :3], expected[0][:, :3], 1e-5)
    assert_near(results[1], expected[1], 1e-5)
    assert all(result.isfinite().all() for result in results)


@pytest.mark.parametrize("device", DEVICES)
def test_queue_log_sum_exp_of_nothing(device):
    x, positive = torch.ones(2, 3, 4, device=device), torch.randn(2, 3, device=device)
    log_sum_exp, best, gradient = _queue_tiles.queue_log_sum_exp(x, x.new_empty(2, 4, 0), positive, 1.0, True)
    assert torch.equal(log_sum_exp, positive)
    assert (best == -math.inf).all()
    assert not gradient.any()
    assert gradient.shape == x.shape
    empty = _queue_tiles.queue_log_sum_exp(x[:, :0], x.new_empty(2, 4, 5), positive[:, :0], 1.0, True)
    assert [tuple(result.shape) for result in empty] == [(2, 0), (2, 0), (2, 0, 4)]


def pair_reference(x, queue, y, y_queue, scale, topk):
    """Single, pair, neighbours, mined, the first two and the last as functions of x or y, in float64."""
    s = x @ queue
    neighbours = s.detach().sort(dim=2, descending=True, stable=True).indices[:, :, :topk]
    if y is None:
        first, second = torch.triu_indices(len(x), len(x), 1)
        single, products = s, s[first] * s[second]
        streams = s.unsqueeze(0).expand(len(x), *s.shape)
    else:
        single = y @ y_queue
        products = (s.unsqueeze(1) * single).flatten(0, 1)
        streams = torch.stack([torch.stack([one, *single]) for one in s])
    mined = torch.stack([
        of_stream.gather(2, near.expand(len(of_stream), -1, -1)).permute(1, 2, 0)
        for of_stream, near in zip(streams, neighbours, strict=True)
    ])  # fmt: skip
    return (scale * single).logsumexp(dim=2), (scale * products).logsumexp(dim=2), neighbours, mined


PAIR_CASES = [
    # A, U, N, D, E, K, topk
    (1, 0, 1, 1, 0, 1, 1),
    (3, 0, 4, 5, 0, 37, 1),
    (3, 0, 2, 5, 0, 37, 5),
    (2, 0, 3, 4, 0, 9, 9),
    (6, 0, 5, 16, 0, 1100, 1),
    (6, 0, 5, 16, 0, 1100, 40),
    (2, 3, 4, 5, 7, 61, 1),
    (6, 1, 3, 8, 12, 1100, 3),
    (1, 2, 1, 3, 2, 530, 1),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float32,) * 2, (torch.bfloat16,) * 2,
                                    (torch.bfloat16, torch.float32)])  # fmt: skip
@pytest.mark.parametrize("case", PAIR_CASES)
def test_pair_log_sum_exp_equals_the_formula(case, dtypes, tile, device, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    num_x, num_y, rows, size, y_size, queue_size, topk = case
    dtype, queue_dtype = dtypes
    x = random(num_x, rows, size, dtype=dtype, device=device, seed=1, length=2)
    queue = random(num_x, size, queue_size, dtype=queue_dtype, device=device, seed=2)
    y = random(num_y, rows, y_size, dtype=dtype, device=device, seed=3, length=2) if num_y else None
    y_queue = random(y_size, queue_size, dtype=queue_dtype, device=device, seed=4) if num_y else None
    scale = 8.0
    outputs = _queue_tiles.pair_log_sum_exp(x, queue, y, y_queue, scale, topk)

    exact = [x.double().cpu(), rounded(queue, dtype).cpu()]
    exact += [None, None] if y is None else [y.double().cpu(), rounded(y_queue, dtype).cpu()]
    right = exact[0 if y is None else 2].requires_grad_()
    expected = pair_reference(*exact, scale, topk)
    tolerance = min(TOLERANCES[dtype], 2e-5)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert actual.shape == wanted.shape
    for index in (0, 1, 3):
        assert_near(outputs[index], expected[index].detach(), tolerance)
    if dtype == torch.float64:
        assert torch.equal(outputs[2].cpu(), expected[2])

    gradients = [
        random(*wanted.shape, dtype=torch.float64, device="cpu", seed=5 + i) if wanted.numel() else wanted.detach()
        for i, wanted in enumerate((expected[0], expected[1], expected[3]))
    ]
    # At the neighbours that were found: of nearly equal similarities they may be others.
    s = exact[0] @ exact[1]
    right_similarity = s if y is None else exact[2] @ exact[3]
    at_neighbours = torch.stack([
        torch.stack([one.gather(1, near) for one in (right_similarity if y is None else [s[a], *right_similarity])], 2)
        for a, near in enumerate(outputs[2].cpu())
    ])  # fmt: skip
    total = sum((g * w).sum() for g, w in zip(gradients, (expected[0], expected[1], at_neighbours), strict=True))
    (wanted,) = torch.autograd.grad(total, right)
    gradient = _queue_tiles.pair_log_sum_exp_backward(
        x, queue, y, y_queue, scale, *outputs[:3], *[g.to(device, outputs[0].dtype) for g in gradients]
    )
    assert gradient.dtype == outputs[0].dtype
    assert_near(gradient, wanted, TOLERANCES[dtype])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("topk", [1, 4, 30])
@pytest.mark.parametrize("tile", ["", "8", "16"])
def test_lowest_of_equal_positions_comes_first(topk, tile, device, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    # Whole numbers, most of them more than once; the sign of zero does not count.
    generator = torch.Generator().manual_seed(0)
    queue = torch.randint(-2, 3, (3, 1, 50), generator=generator).float()
    queue[queue == 0] = torch.where(torch.rand(int((queue == 0).sum()), generator=generator) < 0.5, -0.0, 0.0)
    x = torch.tensor([1.0, -1.0]).expand(3, 2).unsqueeze(2)
    _, _, neighbours, mined = _queue_tiles.pair_log_sum_exp(x.to(device), queue.to(device), None, None, 1.0, topk)
    s = x @ queue
    expected = s.sort(dim=2, descending=True, stable=True).indices[:, :, :topk]
    assert torch.equal(neighbours.cpu(), expected)
    for b in range(3):
        for a in range(3):
            assert torch.equal(mined.cpu()[b, :, :, a], s[a].gather(1, expected[b]))


@pytest.mark.parametrize("device", DEVICES)
def test_pair_log_sum_exp_of_no_rows(device):
    x, queue = torch.empty(3, 0, 4, device=device), torch.randn(3, 4, 9, device=device)
    outputs = _queue_tiles.pair_log_sum_exp(x, queue, None, None, 1.0, 2)
    assert [tuple(output.shape) for output in outputs] == [(3, 0), (3, 0), (3, 0, 2), (3, 0, 2, 3)]
    gradient = _queue_tiles.pair_log_sum_exp_backward(x, queue, None, None, 1.0, *outputs[:3], *outputs[:2], outputs[3])
    assert gradient.shape == x.shape


@pytest.mark.parametrize("tile", ["0", "-8", "many"])
def test_a_wrong_tile_is_named(tile, monkeypatch):
    monkeypatch.setenv("IKEM_FAST_QUEUE_TILE", tile)
    with pytest.raises(ValueError, match=f"IKEM_FAST_QUEUE_TILE must be a number above 0, got '{tile}'"):
        _queue_tiles.choose_tiling(8, 100)


@pytest.mark.parametrize("rows", [1, 32, 192, 768, 1152, 6144, 100000])
@pytest.mark.parametrize("queue_size", [1, 7, 255, 4096, 30001, 32768, 1048576])
@pytest.mark.parametrize("blocks", [None, 1, 6, 36, 200])
def test_tilings_fit(rows, queue_size, blocks):
    tiling = _queue_tiles.choose_tiling(rows, queue_size, blocks)
    assert tiling.segment_size % 8 == 0
    assert 1 <= tiling.columns <= 32768
    assert tiling.columns < queue_size + 8 * tiling.segments
    assert 4 * rows * tiling.columns <= 25 << 20 or tiling.columns <= 256
    assert tiling.segments == 1 or (blocks is not None and tiling.segment_size >= 248)
    starts = list(tiling.starts(queue_size))
    assert sum(count for _, count in starts) == queue_size
    assert all(start % 8 == 0 and count >= 1 for start, count in starts)
    # The last tile is hardly narrower than the others, so that padding costs nothing.
    assert len(starts) * tiling.columns - queue_size <= 8 * tiling.segments * len(starts)


def test_autocast_changes_nothing():
    x, queue = torch.randn(2, 3, 16), torch.randn(2, 16, 40)
    plain = _queue_tiles.pair_log_sum_exp(x, queue, None, None, 1.0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = _queue_tiles.pair_log_sum_exp(x, queue, None, None, 1.0, 1)
    assert all(torch.equal(*pair) for pair in zip(plain, autocast, strict=True))


# On a GPU: the kernels against their definitions, repeatability, graphs, memory.


def without_kernels(monkeypatch):
    monkeypatch.setattr(_queue_tiles, "_has_kernels", lambda tensor: False)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 128, 768, 5000), (6, 128, 128, 20000)])
def test_cuda_queue_log_sum_exp_equals_its_definition(shape, dtype, monkeypatch):
    batch, rows, size, queue_size = shape
    x = random(batch, rows, size, dtype=dtype, device="cuda", seed=1)
    queue = random(batch, size, queue_size, dtype=dtype, device="cuda", seed=2)
    positive = random(batch, rows, dtype=torch.float32, device="cuda", seed=3)
    arguments = (x, queue, positive, 14.0, True)
    actual, again = (_queue_tiles.queue_log_sum_exp(*arguments) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(actual, again, strict=True))
    without_kernels(monkeypatch)
    for result, wanted in zip(actual, _queue_tiles.queue_log_sum_exp(*arguments), strict=True):
        assert_near(result, wanted, 1e-2 if dtype == torch.bfloat16 else 2e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_y", [0, 3])
@pytest.mark.parametrize("topk", [1, 7])
def test_cuda_pair_log_sum_exp_equals_its_definition(topk, num_y, dtype, monkeypatch):
    x = random(6, 32, 128, dtype=dtype, device="cuda", seed=1)
    queue = random(6, 128, 20000, dtype=dtype, device="cuda", seed=2)
    y = random(num_y, 32, 256, dtype=dtype, device="cuda", seed=3) if num_y else None
    y_queue = random(256, 20000, dtype=dtype, device="cuda", seed=4) if num_y else None

    def run():
        outputs = _queue_tiles.pair_log_sum_exp(x, queue, y, y_queue, 14.0, topk)
        gradients = [torch.full_like(outputs[i], 0.01 * (i + 1)) for i in (0, 1, 3)]
        gradient = _queue_tiles.pair_log_sum_exp_backward(x, queue, y, y_queue, 14.0, *outputs[:3], *gradients)
        return (*outputs, gradient)

    actual, again = run(), run()
    assert all(torch.equal(*pair) for pair in zip(actual, again, strict=True))
    without_kernels(monkeypatch)
    expected = run()
    # The similarities are the same bits.
    assert torch.equal(actual[2], expected[2])
    assert torch.equal(actual[3], expected[3])
    for index in (0, 1):
        assert_near(actual[index], expected[index], 2e-5)
    assert_near(actual[4], expected[4], 1e-2 if dtype == torch.bfloat16 else 2e-5)


def losses_of(dtype, device, streams=3, rows=16, size=32, queue_size=3000):
    """All four losses of leaves, as a function without arguments, and the leaves."""

    def unit(*shape, dim, seed, requires_grad=False):
        values = torch.nn.functional.normalize(random(*shape, dtype=torch.float32, device=device, seed=seed), dim=dim)
        return values.to(dtype).requires_grad_(requires_grad)

    q = unit(streams, rows, size, dim=2, seed=1, requires_grad=True)
    k = unit(streams, rows, size, dim=2, seed=2)
    queue = unit(streams, size, queue_size, dim=1, seed=3)
    e = unit(streams, rows, streams * size, dim=2, seed=4, requires_grad=True)
    student = unit(2, rows, streams * size, dim=2, seed=5, requires_grad=True)
    teacher_queue = unit(streams * size, queue_size, dim=0, seed=6)

    def total():
        losses = [
            ops.info_nce(q, k, queue, 0.07),
            ops.context_loss(q, k, queue, 0.07, 2),
            ops.exchange_loss(e, k, queue, 0.07),
            ops.relational_distillation_loss(student, k, queue, teacher_queue, 0.07, 1),
        ]
        return torch.stack([loss.float().sum() for loss in losses])

    return total, (q, e, student)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graph_of_the_losses(dtype):
    total, leaves = losses_of(dtype, "cuda")

    def step():
        losses = total()
        return (losses.detach(), *torch.autograd.grad(losses.sum(), leaves))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for leaf in leaves:
            leaf.copy_(leaf.roll(1, dims=1))
    graph.replay()
    for replayed, wanted in zip(captured, step(), strict=True):
        torch.testing.assert_close(replayed, wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_peak_memory(dtype):
    queue = random(6, 128, 32768, dtype=torch.float32, device="cuda", seed=2)
    q = random(6, 128, 128, dtype=dtype, device="cuda", seed=1)
    e = random(1, 768, 768, dtype=dtype, device="cuda", seed=3)
    positive = torch.zeros(1, 768, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = _queue_tiles.pair_log_sum_exp(q, queue, None, None, 14.0, 1)
    _queue_tiles.pair_log_sum_exp_backward(q, queue, None, None, 14.0, *outputs[:3], outputs[0], outputs[1], outputs[3])
    _queue_tiles.queue_log_sum_exp(e, queue.view(1, 768, 32768), positive, 5.0, True)
    _queue_tiles.queue_log_sum_exp(q, queue, positive.view(6, 128), 14.0, True)
    assert torch.cuda.max_memory_allocated() - before < 160e6
