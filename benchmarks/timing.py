"""How calls are timed: on a CPU by the clock, on a GPU by CUDA events, in rows of calls launched singly or as a graph.

On a GPU a row's calls have samples of their own, and their results are kept until the row ends, so that no call finds
its memory in the caches. All samples are drawn anew before each row, outside the timing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ikem_fast.engine.cuda_graphs import CudaGraphs

LONGEST_ROW = 16
ROW_SECONDS = 0.01  # about how long a row is


def timer_of(device: str) -> Callable[[], float]:
    """A clock in seconds of which two readings enclose what is timed: the second waits for the device."""
    return cuda_timer() if device == "cuda" else time.perf_counter


def cuda_timer() -> Callable[[], float]:
    """A clock that gives 0 at a first reading, and at the next the seconds between two CUDA events."""
    started: list[torch.cuda.Event] = []

    def read_cuda_events() -> float:
        event = torch.cuda.Event(enable_timing=True)
        if not started:
            torch.cuda.synchronize()
            event.record()
            started.append(event)
            return 0.0
        event.record()
        event.synchronize()
        return started.pop().elapsed_time(event) / 1e3

    return read_cuda_events


def row_length(seconds: float) -> int:
    """Calls of a row on a GPU, by how long one takes."""
    return max(1, min(LONGEST_ROW, int(ROW_SECONDS / max(seconds, 1e-9))))


def put(values: Any, places: Any) -> None:
    """Copies the tensors of nested tuples, lists, mappings and dataclasses to those at fixed places in memory."""
    if isinstance(places, Tensor):
        with torch.no_grad():
            places.copy_(values)
    elif isinstance(places, tuple | list):
        for value, place in zip(values, places, strict=True):
            put(value, place)
    elif isinstance(places, Mapping):
        for name, place in places.items():
            put(values[name], place)
    elif dataclasses.is_dataclass(places):
        for field in dataclasses.fields(places):
            put(getattr(values, field.name), getattr(places, field.name))


def launched_row(way: Callable, places: Sequence) -> Callable[[], list]:
    """One call of a way after another, each launched from Python."""
    return lambda: [way(place) for place in places]


def captured_row(way: Callable, places: Sequence) -> Callable[[], list]:
    """The same calls in one CUDA graph.

    Raises:
        RuntimeError: the calls cannot be captured, mostly because one of them waits for the device.
    """
    graphs = CudaGraphs(torch.device("cuda", torch.cuda.current_device()))
    # Libraries load and compilers run before the capture, which what waits would break.
    _, waits = graphs.rehearse(lambda: way(places[0]))
    if waits is not None:
        raise RuntimeError(waits)
    return graphs.capture(lambda: [way(place) for place in places])
