"""What benchmarks of whole calls share: ways that take turns, and the memory that one needs.

Ways are timed call by call, each on inputs drawn anew outside the timing, so that a machine's slow moments meet all of
them. Memory is measured in a process of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import cuda_timing
import torch

from ikem_fast import _extension

WARM_UP = 2  # calls that are not counted
# Memory returns to the system as soon as it is freed, so that the high-water mark is what was held at once.
_RETURNING_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def begin(device: str, threads: int) -> None:
    """Prints what a benchmark runs on and sets the CPU's threads; ends the process where the device is not there."""
    if device == "cuda":
        cuda_timing.require_gpu()
        print(cuda_timing.describe_gpu())
        return
    torch.set_num_threads(threads)
    capability = _extension.require().build_info()["cpu_capability"]
    print(f"torch {torch.__version__}, {threads} threads, {capability}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before the run")


def time_in_turns(
    ways: Mapping[str, Callable[[object], object]],
    draw: Callable[[], object],
    repeats: Callable[[str], int],
    device: torch.device,
) -> dict[str, list[float]]:
    """Sorted seconds of each way's calls.

    Args:
        ways: functions of what ``draw`` gives, by name.
        draw: makes a call's inputs; not timed.
        repeats: calls of a way that are counted.
        device: where they run.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in range(max(repeats(name) for name in ways) + WARM_UP):
        for name, way in ways.items():
            if call >= repeats(name) + WARM_UP:
                continue
            inputs = draw()
            elapsed = _time_call(way, inputs, device)
            if call >= WARM_UP:
                seconds[name].append(elapsed)
    return {name: sorted(values) for name, values in seconds.items()}


def _time_call(way: Callable[[object], object], inputs: object, device: torch.device) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        way(inputs)
        return time.perf_counter() - begin
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    way(inputs)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop) / 1e3


def peak_beyond(run: Callable[[], object], device: str) -> int:
    """Bytes at most that ``run`` holds on top of what is held now: on the CPU by the high-water mark of the process's
    resident memory, on a GPU by PyTorch's own count.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident_bytes("VmRSS")
    run()
    return _resident_bytes("VmHWM") - before


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_in_process(script: str, *arguments: object, threads: int) -> int | None:
    """What ``script --peak arguments...`` prints last, in a process of its own; None where that ran out of memory."""
    environment = {**os.environ, **_RETURNING_ALLOCATOR, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, script, "--peak", *(str(argument) for argument in arguments)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return int(result.stdout.split()[-1])
    if result.returncode == -9 or "memory" in result.stderr:
        return None
    raise SystemExit(f"measuring memory ({command}) failed: {result.stderr.strip().splitlines()[-1]}")
