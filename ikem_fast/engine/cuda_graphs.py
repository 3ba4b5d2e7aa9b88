"""What training needs of CUDA graphs: kernels recorded once, then launched again and again as a whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import torch

Result = TypeVar("Result")
_SYNCHRONIZING = "synchronizing CUDA operation"  # how torch puts it


class CudaGraphs:
    """Captures functions on a CUDA device. Their kernels run on a stream of its own, in order with the caller's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Result]) -> Result:
        """Runs a function on the stream that it will be captured on."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def rehearse(self, function: Callable[[], Result]) -> tuple[Result, str | None]:
        """``warm_up`` with an eye on what waits for the device; second, where that is, if anywhere.

        It cannot be captured, and torch's memory and random numbers may not get over a capture that breaks at it.
        """
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                result = self.warm_up(function)
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        waits = [warning for warning in caught if _SYNCHRONIZING in str(warning.message)]
        return result, f"{waits[0].filename}:{waits[0].lineno} waits for the device" if waits else None

    def capture(self, function: Callable[[], Result]) -> Callable[[], Result]:
        """Calls a function to record its kernels, which do not run; what is returned runs them and gives its result.

        The result is the same tensors each time, so that the next run overwrites it. Of random numbers, those of
        torch's default generator go on from run to run as if the function had been called.

        Raises:
            Exception: whatever the capture fails with. Kernels can then be launched as before.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._stream.device):
            generator = torch.cuda.default_generators[self._stream.device_index]
            random_state = generator.clone_state()
            pool = torch.cuda.graph_pool_handle()
            try:
                # Only this thread's calls are watched: another one may be reading clips ahead. The stream is entered
                # here as well because torch.cuda.graph does not leave it when a capture fails.
                recording = torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local")
                with torch.cuda.stream(self._stream), recording:
                    result = function()
            except Exception:
                # A broken capture can leave the generator and the allocator as if it were still going on.
                generator.graphsafe_set_state(random_state)
                with suppress(AttributeError, RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
                raise

        def replay() -> Result:
            graph.replay()
            return result

        return replay


def open_graphs(device: torch.device) -> CudaGraphs | None:
    """The device's graphs; None for a CPU, which has none."""
    return CudaGraphs(device) if device.type == "cuda" else None
