"""Names for the phases of training, for whoever looks at where time goes: torch's profiler, or Nsight through NVTX.

``python -m ikem_fast.profile`` finds the phases by name, and docs/developer/profiling.md says what each holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.profiler import record_function


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Marks what runs within the block, or the function that this decorates, as a phase of training.

    Under torch's profiler that is a ``record_function``; else, where CUDA is in use, an NVTX range, whose calls return
    at once while nothing like Nsight Systems is attached; else nothing. Nothing is launched on the device and nothing
    waits for it. Of a CUDA graph the phases are seen when it is captured, not when it is replayed.
    """
    if torch.autograd._profiler_enabled():
        with record_function(name):
            yield
    elif torch.cuda.is_initialized():
        torch.cuda.nvtx.range_push(name)
        try:
            yield
        finally:
            torch.cuda.nvtx.range_pop()
    else:
        yield
