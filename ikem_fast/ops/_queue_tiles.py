"""``queue_log_sum_exp`` and ``pair_log_sum_exp`` on CUDA: tile by tile of the queue, library products with a fused step
between them.

A tile is cut into segments of columns, which the library multiplies as matrices of a batch: a sum over a tile's columns
has few results, and would keep few multiprocessors busy in one piece. What belongs to a tile's columns therefore lies
segment by segment, (..., segments, rows, segment size). Nothing waits for the device, so that a CUDA graph can hold all
of it; sums are made in a fixed order.

Each step also is there in plain PyTorch: the definition of what the kernel does, which runs on any device.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from ikem_fast import _extension
from ikem_fast.ops._checks import computed_dtype, has_kernel

# Of a tile's similarities, to stay in the second-level cache of an H100 or H200 (50 MB) with what is made of them.
_SIMILARITY_BYTES = 24 << 20
_MOST_COLUMNS = 32768  # kMaxSoftmaxColumns in csrc/cuda/queue_log_sum_exp.h
_FEWEST_COLUMNS = 256
# Blocks of 128 x 128 results that a product should have, to keep most of a GPU's multiprocessors busy.
_WANTED_BLOCKS = 96
_MOST_SEGMENTS = 16
_SEGMENT_MULTIPLE = 8
_MOST_STREAMS = 32  # kMaxPairStreams in csrc/cuda/pair_log_sum_exp.h
# Rows times slots of the statistics: blocks of threads at work on them.
_WANTED_ROWS_AND_SLOTS = 512
_MOST_SLOTS = 8


class Tiling(NamedTuple):
    """How a queue is cut.

    Attributes:
        segments: of a tile.
        segment_size: columns of a segment, a multiple of 8.
    """

    segments: int
    segment_size: int

    @property
    def columns(self) -> int:
        return self.segments * self.segment_size

    def starts(self, queue_size: int) -> Iterator[tuple[int, int]]:
        """First column of every tile, and how many of its columns the queue has."""
        for start in range(0, queue_size, self.columns):
            yield start, min(self.columns, queue_size - start)


def choose_tiling(rows: int, queue_size: int, blocks: int | None = None) -> Tiling:
    """A tiling for ``rows`` rows of similarities in all, ``queue_size`` at least 1.

    Args:
        rows: above 0.
        queue_size: K.
        blocks: of 128 x 128 results that a product over a tile's columns has; ``None`` where there is no such product.

    The environment variable IKEM_FAST_QUEUE_TILE sets the number of columns of a tile, for tests.
    """
    most = max(_FEWEST_COLUMNS, min(_MOST_COLUMNS, _SIMILARITY_BYTES // (4 * rows)))
    most = min(_requested_columns() or most, _MOST_COLUMNS)
    columns = math.ceil(queue_size / math.ceil(queue_size / most))
    segments = 1
    while (
        blocks is not None
        and segments < _MOST_SEGMENTS
        and segments * blocks < _WANTED_BLOCKS
        and columns // (2 * segments) >= _FEWEST_COLUMNS
    ):
        segments *= 2
    return Tiling(segments, math.ceil(columns / segments / _SEGMENT_MULTIPLE) * _SEGMENT_MULTIPLE)


def _requested_columns() -> int | None:
    requested = os.environ.get("IKEM_FAST_QUEUE_TILE", "")
    if not requested:
        return None
    if not requested.isdecimal() or int(requested) < 1:
        raise ValueError(f"IKEM_FAST_QUEUE_TILE must be a number above 0, got '{requested}'")
    return int(requested)


_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def _as_kernel(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """Runs a function without autograd, and without autocast, which would round the factors of its products."""

    @functools.wraps(function)
    def run(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*args, **kwargs)

    return run


@_as_kernel
def queue_log_sum_exp(
    x: Tensor, queue: Tensor, positive: Tensor, scale: float, with_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator ``ikem_fast::queue_log_sum_exp``."""
    batch, rows, size = x.shape
    queue_size = queue.shape[2]
    computed = computed_dtype(x)
    log_sum_exp = positive.to(computed, copy=True, memory_format=torch.contiguous_format)
    best = torch.full_like(log_sum_exp, -math.inf)
    gradient = x.new_zeros((batch, rows, size) if with_gradient else (0,), dtype=computed)
    if queue_size == 0 or batch * rows == 0:
        return log_sum_exp, best, gradient
    tiling = choose_tiling(batch * rows, queue_size, batch * _blocks(rows) * _blocks(size) if with_gradient else None)
    tiles = _Tiles(queue, tiling, x.dtype)
    left = _for_segments(x, tiling)
    positive = log_sum_exp.clone()
    state = x.new_empty((3, batch, rows), dtype=computed)
    shares = x.new_empty((batch, tiling.segments, rows, tiling.segment_size)) if with_gradient else None
    for start, num_columns in tiling.starts(queue_size):
        tile = tiles.at(start)
        similarity = _multiply(left, tile, computed).view(batch, tiling.segments, rows, tiling.segment_size)
        softmax_tile(similarity, positive, scale, start, num_columns, state, log_sum_exp, best, shares)
        del similarity
        if shares is None:
            continue
        products = _multiply(shares.flatten(0, 1), tile.transpose(1, 2), computed)
        is_last = start + num_columns == queue_size
        add_products(
            gradient,
            products.view(batch, tiling.segments, rows, size),
            factor=state[2],
            divisor=state[1] if is_last else None,
            first=start == 0,
            scale=scale if is_last else 1.0,
        )
    return log_sum_exp, best, gradient


@_as_kernel
def pair_log_sum_exp(
    x: Tensor, queue: Tensor, y: Tensor | None, y_queue: Tensor | None, scale: float, topk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator ``ikem_fast::pair_log_sum_exp``."""
    num_x, num_rows, _ = x.shape
    num_y = 0 if y is None else y.shape[0]
    num_singles, num_pairs, num_mined = _numbers(num_x, num_y)
    queue_size = queue.shape[2]
    computed = computed_dtype(x)
    single = x.new_empty((num_singles, num_rows), dtype=computed)
    pair = x.new_empty((num_pairs, num_rows), dtype=computed)
    neighbours = x.new_empty((num_x, num_rows, topk), dtype=torch.int64)
    mined = x.new_empty((num_x, num_rows, topk, num_mined), dtype=computed)
    if num_rows == 0:
        return single, pair, neighbours, mined

    tiling = choose_tiling((num_x + num_y) * num_rows, queue_size)
    similarities = _PairSimilarities(x, queue, y, y_queue, tiling)
    slots = max(1, min(_MOST_SLOTS, _WANTED_ROWS_AND_SLOTS // num_rows)) if similarities.has_kernels else 1
    sums = x.new_empty((slots, num_singles + num_pairs, num_rows, 2), dtype=computed)
    if topk == 1:
        best = x.new_empty((slots, num_x, num_rows), dtype=torch.int64)
        best_mined = x.new_empty((slots, num_x, num_rows, num_mined), dtype=computed)
        for start, num_columns in tiling.starts(queue_size):
            statistics_tile(*similarities.at(start), scale, start, num_columns, sums, best, best_mined)
        statistics_finish(sums, best, best_mined, num_y, single, pair, neighbours, mined)
        return single, pair, neighbours, mined

    # More neighbours than one are found in a step of their own, which writes a new list.
    after, before = (neighbours, mined), (torch.empty_like(neighbours), torch.empty_like(mined))
    scratch = torch.empty_like(neighbours)
    for start, num_columns in tiling.starts(queue_size):
        tile = similarities.at(start)
        statistics_tile(*tile, scale, start, num_columns, sums, None, None)
        neighbours_tile(*tile, start, num_columns, *before, *after, scratch)
        del tile
        before, after = after, before
    statistics_finish(sums, None, None, num_y, single, pair, None, None)
    return single, pair, *before


@_as_kernel
def pair_log_sum_exp_backward(
    x: Tensor,
    queue: Tensor,
    y: Tensor | None,
    y_queue: Tensor | None,
    scale: float,
    single: Tensor,
    pair: Tensor,
    neighbours: Tensor,
    single_gradient: Tensor,
    pair_gradient: Tensor,
    mined_gradient: Tensor,
) -> Tensor:
    """The operator ``ikem_fast::pair_log_sum_exp_backward``."""
    num_x, num_rows, _ = x.shape
    num_y = 0 if y is None else y.shape[0]
    right = x if y is None else y
    # y's streams share a queue, and so are more rows of one matrix.
    batch, rows, size = x.shape if y is None else (1, num_y * num_rows, y.shape[2])
    computed = computed_dtype(x)
    gradient = x.new_empty((batch, rows, size), dtype=computed)
    if num_rows == 0:
        return gradient.view(right.shape)

    tiling = choose_tiling((num_x + num_y) * num_rows, queue.shape[2], batch * _blocks(rows) * _blocks(size))
    similarities = _PairSimilarities(x, queue, y, y_queue, tiling)
    given = [value.contiguous() for value in (single, pair, neighbours, single_gradient, pair_gradient, mined_gradient)]
    shape = (num_x, tiling.segments) if y is None else (tiling.segments, num_y)
    tile_gradient = x.new_empty((*shape, num_rows, tiling.segment_size))
    for start, num_columns in tiling.starts(queue.shape[2]):
        tile = similarities.at(start)
        gradient_tile(*tile, scale, start, num_columns, *given, tile_gradient)
        del tile
        left = tile_gradient.view(batch * tiling.segments, rows, tiling.segment_size)
        products = _multiply(left, similarities.last_tile.transpose(1, 2), computed)
        products = products.view(batch, tiling.segments, rows, size)
        add_products(gradient, products, factor=None, divisor=None, first=start == 0, scale=1.0)
    return gradient.view(right.shape)


class _Tiles:
    """The columns of a queue (B, D, K) as right factors (B · segments, D, segment size) in a dtype."""

    def __init__(self, queue: Tensor, tiling: Tiling, dtype: torch.dtype):
        self._queue = queue
        self._tiling = tiling
        # Segments of a single matrix and whole rows of several are matrices of a batch where they are.
        self._is_batch = queue.dtype == dtype and queue.stride(2) == 1 and 1 in (queue.shape[0], tiling.segments)
        self._dtype = dtype
        self._buffer: Tensor | None = None

    def at(self, start: int) -> Tensor:
        """The tile from ``start`` on, which the next call may overwrite; zeros past the queue's end."""
        batch, size, queue_size = self._queue.shape
        segments, segment_size = self._tiling
        if self._is_batch and start + self._tiling.columns <= queue_size:
            tile = self._queue[:, :, start : start + self._tiling.columns]
            return tile.unflatten(2, (segments, segment_size)).transpose(1, 2).flatten(0, 1)
        if self._buffer is None:
            self._buffer = self._queue.new_empty((batch, segments, size, segment_size), dtype=self._dtype)
        pack_tile(self._buffer, self._queue, start)
        return self._buffer.flatten(0, 1)


class _PairSimilarities:
    """The similarities s_a (A, segments, N, segment size) and, with y, g_u (segments, U, N, segment size) of tiles."""

    def __init__(self, x: Tensor, queue: Tensor, y: Tensor | None, y_queue: Tensor | None, tiling: Tiling):
        self._computed = computed_dtype(x)
        self._x_shape = (x.shape[0], tiling.segments, x.shape[1], tiling.segment_size)
        self._x_left = _for_segments(x, tiling)
        self._x_tiles = _Tiles(queue, tiling, x.dtype)
        self._has_y = y is not None and y_queue is not None
        if y is not None and y_queue is not None:
            self._y_shape = (tiling.segments, *y.shape[:2], tiling.segment_size)
            self._y_left = _for_segments(y.reshape(1, -1, y.shape[2]), tiling)
            self._y_tiles = _Tiles(y_queue.unsqueeze(0), tiling, x.dtype)
        num_streams = x.shape[0] + (0 if y is None else y.shape[0])
        self.has_kernels = _has_kernels(x) and num_streams <= _MOST_STREAMS
        # The tile of the queue that gradients are multiplied with, y's if there is y.
        self.last_tile = x

    def at(self, start: int) -> tuple[Tensor, Tensor | None]:
        self.last_tile = self._x_tiles.at(start)
        x_similarity = _multiply(self._x_left, self.last_tile, self._computed).view(self._x_shape)
        if not self._has_y:
            return x_similarity, None
        self.last_tile = self._y_tiles.at(start)
        return x_similarity, _multiply(self._y_left, self.last_tile, self._computed).view(self._y_shape)


def _numbers(num_x: int, num_y: int) -> tuple[int, int, int]:
    """Singles, pairs and mined similarities."""
    return (num_y, num_x * num_y, 1 + num_y) if num_y else (num_x, num_x * (num_x - 1) // 2, num_x)


def _blocks(size: int) -> int:
    return math.ceil(size / 128)


def _for_segments(x: Tensor, tiling: Tiling) -> Tensor:
    """(B · segments, R, D): a left factor for every segment of a tile."""
    return x.contiguous().unsqueeze(1).expand(-1, tiling.segments, -1, -1).flatten(0, 1)


def _multiply(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """The products of a batch of matrices, added up in ``dtype``."""
    if left.dtype == dtype:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=dtype)
    return torch.bmm(left.to(dtype), right.to(dtype))


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and has_kernel(tensor)


def _pairs_have_kernels(x_similarity: Tensor, num_y: int) -> bool:
    return _has_kernels(x_similarity) and x_similarity.shape[0] + num_y <= _MOST_STREAMS


# Steps. Each runs its kernel or, where there is none, says in plain PyTorch what the kernel does. Running values may be
# in other units than the kernel's.


def pack_tile(tile: Tensor, queue: Tensor, start: int) -> None:
    """``tile`` (B, segments, D, segment size): the columns of ``queue`` (B, D, K) from ``start`` on, then zeros."""
    if _has_kernels(tile):
        torch.ops.ikem_fast._pack_queue_tile_(tile, queue, start)
        return
    batch, segments, size, segment_size = tile.shape
    columns = tile.new_zeros((batch, size, segments * segment_size))
    part = queue[:, :, start : start + columns.shape[2]]
    columns[:, :, : part.shape[2]] = part
    tile.copy_(columns.unflatten(2, (segments, segment_size)).transpose(1, 2))


def add_products(
    sums: Tensor, products: Tensor, factor: Tensor | None, divisor: Tensor | None, first: bool, scale: float
) -> None:
    """``sums = scale / divisor · (factor · sums + products)``: sums (B, R, D), products (B, segments, R, D)."""
    if _has_kernels(sums):
        torch.ops.ikem_fast._add_products_(sums, products, factor, divisor, first, scale)
        return
    added = products.sum(dim=1)
    if not first:
        added += sums if factor is None else sums * factor.unsqueeze(2)
    sums.copy_(scale * added if divisor is None else scale * added / divisor.unsqueeze(2))


def softmax_tile(
    similarity: Tensor,
    positive: Tensor,
    scale: float,
    start: int,
    num_columns: int,
    state: Tensor,
    log_sum_exp: Tensor,
    best: Tensor,
    shares: Tensor | None,
) -> None:
    """Adds a tile's columns to the log-sum-exp of every row, which begins with ``positive``.

    Args:
        similarity: (B, segments, R, segment size), not scaled.
        positive: (B, R), scaled.
        scale: of the similarities.
        start: the tile's first column; with 0, running values need not hold anything.
        num_columns: of the tile that are in the queue.
        state: (3, B, R) running maximum, sum relative to it, and the factor that turns sums relative to the maximum
            before the tile into such relative to the one after it.
        log_sum_exp: (B, R) so far.
        best: (B, R) largest scaled similarity so far.
        shares: like ``similarity``, exp(scale · similarity - maximum), zeros past the queue's end; ``None`` if not
            needed.
    """
    if _has_kernels(similarity):
        torch.ops.ikem_fast._queue_log_sum_exp_tile_(
            similarity, positive, scale, start, num_columns, state, log_sum_exp, best, shares
        )
        return
    logits = scale * similarity.transpose(1, 2).flatten(2)
    logits[:, :, num_columns:] = -math.inf
    largest = logits.amax(dim=2)
    before, sum_before = (positive, torch.ones_like(positive)) if start == 0 else (state[0].clone(), state[1])
    state[0] = torch.maximum(before, largest)
    exponentials = (logits - state[0].unsqueeze(2)).exp()
    state[2] = (before - state[0]).exp()
    state[1] = sum_before * state[2] + exponentials.sum(dim=2)
    log_sum_exp.copy_(state[0] + state[1].log())
    best.copy_(largest if start == 0 else torch.maximum(best, largest))
    if shares is not None:
        shares.copy_(exponentials.unflatten(2, (shares.shape[1], -1)).transpose(1, 2))


def statistics_tile(
    x_similarity: Tensor,
    y_similarity: Tensor | None,
    scale: float,
    start: int,
    num_columns: int,
    sums: Tensor,
    positions: Tensor | None,
    mined: Tensor | None,
) -> None:
    """Adds a tile's columns to the log-sum-exps of similarities and their products, and to the largest s_a.

    Args:
        x_similarity: (A, segments, N, segment size).
        y_similarity: (segments, U, N, segment size) or ``None``.
        scale: of similarities and products.
        start: the tile's first column; with 0, running values need not hold anything.
        num_columns: of the tile that are in the queue.
        sums: (slots, singles and pairs, N, 2) running maximum and sum relative to it, each slot's over its own part of
            every tile; the definition uses the first slot alone.
        positions: (slots, A, N) where s_a is largest, the lowest of equal ones; ``None`` if not needed.
        mined: (slots, A, N, mined) the similarities there.
    """
    if _pairs_have_kernels(x_similarity, 0 if y_similarity is None else y_similarity.shape[1]):
        torch.ops.ikem_fast._pair_statistics_tile_(
            x_similarity, y_similarity, scale, start, num_columns, sums, positions, mined
        )
        return
    x, y = _streams(x_similarity, y_similarity, num_columns)
    logits = scale * torch.cat([x if y is None else y, _products(x, y)])
    maximum, total = sums[0].unbind(2)
    new_maximum = logits.amax(dim=2) if start == 0 else torch.maximum(maximum, logits.amax(dim=2))
    new_total = (logits - new_maximum.unsqueeze(2)).exp().sum(dim=2)
    if start > 0:
        new_total += total * (maximum - new_maximum).exp()
    sums[0] = torch.stack([new_maximum, new_total], dim=2)
    if positions is not None and mined is not None:
        kept, kept_mined = positions[0].unsqueeze(2), mined[0].unsqueeze(2)
        neighbours_tile(
            x_similarity, y_similarity, start, num_columns, kept.clone(), kept_mined.clone(), kept, kept_mined, kept
        )


def statistics_finish(
    sums: Tensor,
    positions: Tensor | None,
    mined_of_slots: Tensor | None,
    num_y: int,
    single: Tensor,
    pair: Tensor,
    neighbours: Tensor | None,
    mined: Tensor | None,
) -> None:
    """Brings the slots together: single (singles, N), pair (pairs, N), neighbours (A, N, 1), mined (A, N, 1, mined)."""
    num_x = pair.shape[0] // num_y if num_y else single.shape[0]
    if _has_kernels(sums) and num_x + num_y <= _MOST_STREAMS:
        torch.ops.ikem_fast._pair_statistics_finish_(
            sums, positions, mined_of_slots, num_y, single, pair, neighbours, mined
        )
        return
    maximum, total = sums[0].unbind(2)
    log_sum_exp = maximum + total.log()
    single.copy_(log_sum_exp[: single.shape[0]])
    pair.copy_(log_sum_exp[single.shape[0] :])
    if positions is not None and mined_of_slots is not None and neighbours is not None and mined is not None:
        neighbours.copy_(positions[0].unsqueeze(2))
        mined.copy_(mined_of_slots[0].unsqueeze(2))


def neighbours_tile(
    x_similarity: Tensor,
    y_similarity: Tensor | None,
    start: int,
    num_columns: int,
    positions_before: Tensor,
    mined_before: Tensor,
    positions: Tensor,
    mined: Tensor,
    scratch: Tensor,
) -> None:
    """Merges a tile's columns with the neighbours found before it, the lowest of equal positions first.

    Args:
        x_similarity: (A, segments, N, segment size).
        y_similarity: (segments, U, N, segment size) or ``None``.
        start: the tile's first column; as many of ``positions_before`` count.
        num_columns: of the tile that are in the queue.
        positions_before: (A, N, topk), descending by s_a.
        mined_before: (A, N, topk, mined).
        positions: like ``positions_before``, of which up to ``start + num_columns`` are written.
        mined: like ``mined_before``.
        scratch: (A, N, topk) int64.
    """
    if _pairs_have_kernels(x_similarity, 0 if y_similarity is None else y_similarity.shape[1]):
        torch.ops.ikem_fast._pair_neighbours_tile_(
            x_similarity, y_similarity, start, num_columns,
            positions_before, mined_before, positions, mined, scratch,
        )  # fmt: skip
        return
    x, y = _streams(x_similarity, y_similarity, num_columns)
    num_x, _, topk = positions.shape
    for a in range(num_x):
        streams = torch.stack(list(x) if y is None else [x[a], *y], dim=2)
        num_before = min(start, topk)
        all_mined = torch.cat([mined_before[a, :, :num_before], streams], dim=1)
        columns = torch.arange(start, start + num_columns, device=x.device).expand(x.shape[1], -1)
        all_positions = torch.cat([positions_before[a, :, :num_before], columns], dim=1)
        # A stable sort keeps equal values in the order of their positions.
        order = all_mined[:, :, a if y is None else 0].sort(dim=1, descending=True, stable=True).indices[:, :topk]
        positions[a, :, : order.shape[1]] = all_positions.gather(1, order)
        mined[a, :, : order.shape[1]] = all_mined.gather(1, order.unsqueeze(2).expand(-1, -1, streams.shape[2]))


def gradient_tile(
    x_similarity: Tensor,
    y_similarity: Tensor | None,
    scale: float,
    start: int,
    num_columns: int,
    single: Tensor,
    pair: Tensor,
    neighbours: Tensor,
    single_gradient: Tensor,
    pair_gradient: Tensor,
    mined_gradient: Tensor,
    gradient: Tensor,
) -> None:
    """``gradient``, of y's similarities or, without y, of x's, in their layout; zeros past the queue's end.

    Args:
        x_similarity: (A, segments, N, segment size).
        y_similarity: (segments, U, N, segment size) or ``None``.
        scale: of similarities and products.
        start: the tile's first column.
        num_columns: of the tile that are in the queue.
        single: (singles, N), pair: (pairs, N), neighbours: (A, N, topk), as forward found them.
        single_gradient: (singles, N), pair_gradient: (pairs, N), mined_gradient: (A, N, topk, mined).
        gradient: of any dtype.
    """
    if _pairs_have_kernels(x_similarity, 0 if y_similarity is None else y_similarity.shape[1]):
        torch.ops.ikem_fast._pair_gradient_tile_(
            x_similarity, y_similarity, scale, start, num_columns,
            single, pair, neighbours, single_gradient, pair_gradient, mined_gradient, gradient,
        )  # fmt: skip
        return
    x, y = _streams(x_similarity, y_similarity, num_columns)
    right = x if y is None else y
    shares = scale * single_gradient.unsqueeze(2) * (scale * right - single.unsqueeze(2)).exp()
    pair_shares = scale * pair_gradient.unsqueeze(2) * (scale * _products(x, y) - pair.unsqueeze(2)).exp()
    if y is None:
        first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
        shares.index_add_(0, first, pair_shares * x[second])
        shares.index_add_(0, second, pair_shares * x[first])
    else:
        shares += (pair_shares.unflatten(0, (len(x), len(y))) * x.unsqueeze(1)).sum(dim=0)
    padded = shares.new_zeros((*shares.shape[:2], x_similarity.shape[1] * x_similarity.shape[3]))
    padded[:, :, :num_columns] = shares
    is_here = (neighbours >= start) & (neighbours < start + num_columns)
    column = (neighbours - start).clamp(0, num_columns - 1)
    of_mined = (mined_gradient if y is None else mined_gradient[..., 1:]) * is_here.unsqueeze(3)
    for a in range(len(x)):
        padded.scatter_add_(2, column[a].expand(len(right), -1, -1), of_mined[a].permute(2, 0, 1))
    cut = padded.unflatten(2, (-1, x_similarity.shape[3]))
    gradient.copy_(cut.transpose(1, 2) if y is None else cut.permute(2, 0, 1, 3))


def _streams(x_similarity: Tensor, y_similarity: Tensor | None, num_columns: int) -> tuple[Tensor, Tensor | None]:
    """s_a (A, N, columns) and g_u (U, N, columns) without what is past the queue's end."""
    x = x_similarity.transpose(1, 2).flatten(2)[:, :, :num_columns]
    return x, None if y_similarity is None else y_similarity.permute(1, 2, 0, 3).flatten(2)[:, :, :num_columns]


def _products(x: Tensor, y: Tensor | None) -> Tensor:
    """s_a s_b (pairs, N, columns) of a < b, or s_a g_u in the order of a · U + u."""
    if y is not None:
        return (x.unsqueeze(1) * y).flatten(0, 1)
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return x[first] * x[second]


if _extension.cuda_available():
    for _function in (queue_log_sum_exp, pair_log_sum_exp, pair_log_sum_exp_backward):
        torch.library.impl(f"ikem_fast::{_function.__name__}", "cuda", _function)
