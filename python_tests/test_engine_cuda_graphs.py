"""What training asks of ``torch.cuda`` to capture and replay, and in which order, without a GPU."""

from __future__ import annotations

import inspect
import warnings
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch

from ikem_fast.engine import cuda_graphs
from ikem_fast.engine.cuda_graphs import CudaGraphs


class PretendedCuda:
    """As much of ``torch.cuda`` as graphs use, noting down what is done."""

    def __init__(self, capture_end=lambda: None):
        self.done = []
        self.random_state = "random state before"
        self.mode = 0
        self.streams = [SimpleNamespace(name="current", wait_stream=lambda other: self.note(f"wait for {other.name}"))]
        self.default_generators = [
            SimpleNamespace(
                clone_state=lambda: self.random_state, graphsafe_set_state=lambda state: self.note(f"back to {state}")
            )
        ]
        self._capture_end = capture_end

    def note(self, text):
        self.done.append(text)

    def Stream(self, device):
        name = SimpleNamespace(name="its own", device=device, device_index=0)
        name.wait_stream = lambda other: self.note(f"its own waits for {other.name}")
        return name

    def current_stream(self, device=None):
        return self.streams[-1]

    @contextmanager
    def stream(self, stream):
        self.streams.append(stream)
        try:
            yield
        finally:
            del self.streams[self.streams.index(stream) :]

    def device(self, device):
        return nullcontext()

    def get_sync_debug_mode(self):
        return self.mode

    def set_sync_debug_mode(self, mode):
        self.mode = mode

    def graph_pool_handle(self):
        return (0, 1)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.note("replay"))

    def graph(self, *args, **kwargs):
        given = inspect.signature(torch.cuda.graph).bind(*args, **kwargs).arguments
        assert given["pool"] == (0, 1)
        return self._capture(given["stream"], given["capture_error_mode"])

    @contextmanager
    def _capture(self, stream, mode):
        self.note(f"capture, {mode}")
        self.streams.append(stream)
        try:
            yield
        finally:
            self._capture_end()
            self.streams.pop()


@pytest.fixture
def pretended(monkeypatch):
    def pretend(**options):
        cuda = PretendedCuda(**options)
        ended = SimpleNamespace(_cuda_endAllocateToPool=lambda device, pool: cuda.note(f"end {pool} on {device}"))
        monkeypatch.setattr(cuda_graphs, "torch", SimpleNamespace(cuda=cuda, _C=ended, device=torch.device))
        return cuda, CudaGraphs(torch.device("cuda", 0))

    return pretend


def test_warm_up_is_in_order_with_what_is_before_and_after(pretended):
    cuda, graphs = pretended()
    assert graphs.warm_up(lambda: cuda.note(f"work on {cuda.current_stream().name}")) is None
    assert cuda.done == ["its own waits for current", "work on its own", "wait for its own"]


def test_rehearsal_finds_what_waits(pretended):
    cuda, graphs = pretended()
    cuda.mode = 1

    def work():
        assert cuda.mode == "warn"
        warnings.warn("something else", stacklevel=1)
        if waits:
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        return "result"

    waits = False
    assert graphs.rehearse(work) == ("result", None)
    waits = True
    result, problem = graphs.rehearse(work)
    assert result == "result"
    assert __file__ in problem
    assert problem.endswith(" waits for the device")
    assert cuda.mode == 1


def test_capture_and_replay(pretended):
    cuda, graphs = pretended()
    replay = graphs.capture(lambda: f"values made on {cuda.current_stream().name}")
    assert cuda.done == ["capture, thread_local"]
    assert [replay(), replay()] == ["values made on its own"] * 2
    assert cuda.done[1:] == ["replay", "replay"]
    assert cuda.current_stream().name == "current"


def test_capture_that_fails_leaves_nothing_behind(pretended):
    def end():
        raise RuntimeError("failed due to a previous error")

    def work():
        raise ValueError("the cause")

    cuda, graphs = pretended(capture_end=end)
    with pytest.raises(RuntimeError, match="previous error"):
        graphs.capture(work)
    assert cuda.done == ["capture, thread_local", "back to random state before", "end (0, 1) on 0"]
    assert cuda.current_stream().name == "current"
