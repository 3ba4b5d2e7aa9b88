"""The memory that a call needs beyond its inputs, and what the C library does with memory that is freed.

    python benchmarks/memory.py MODULE PROFILE NUMBER WAY THREADS

prints the bytes for one way of a module's case of that number: in a process of its own, since on the CPU they are told
by the high-water mark of the process's resident memory.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

# Memory returns to the system as soon as it is freed, so that the high-water mark is what was held at once.
_RETURNING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of mallopt(3)


def keep_freed_memory() -> str:
    """Lets the process keep what it frees, and says so: otherwise each call gives its memory back to the system, and
    page faults of the next call outweigh what is measured, for every side.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1)):
        return "the C library's own settings"
    return "freed memory stays with the process"


def return_freed_memory() -> None:
    """Gives the system what the process has kept until now, for a case or a process that needs much."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: str) -> int:
    """What can be had at once."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return 1024 * int(re.search(r"MemAvailable:\s*(\d+) kB", Path("/proc/meminfo").read_text()).group(1))


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
    return max(0, _resident_bytes("VmHWM") - before)


def _resident_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_in_process(module: str, profile: str, number: int, way: str, threads: int) -> int | None:
    """``peak_beyond`` of a call on the CPU, in a process of its own; ``None`` where that ran out of memory.

    Args:
        module: a file's name without its ending, such as ``bench_info_nce``.
        profile: "small" or "full".
        number: of the case in ``cases(profile, "cpu")``.
        way: one of the case's.
        threads: of the CPU.

    Raises:
        RuntimeError: it failed otherwise; the message is its last line.
    """
    import ikem_fast

    return_freed_memory()
    # The same package as here, wherever that came from.
    paths = [str(Path(ikem_fast.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, **_RETURNING, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, __file__, module, profile, str(number), way, str(threads)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode == 0:
        return int(result.stdout.split()[-1])
    last = (result.stderr.strip() or "no message").splitlines()[-1]
    if result.returncode == -9 or re.search("MemoryError|out of memory|allocate memory|not enough memory", last):
        return None
    raise RuntimeError(f"the memory of {module}, case {number}, {way}, could not be measured: {last}")


def peak_of_case(case, way: str, device: str) -> int:
    """Bytes that a second call needs, when libraries have loaded, beyond the inputs and what the first one left."""
    generator = torch.Generator(device).manual_seed(0)
    case.ways[way](case.inputs(way, generator))
    inputs = case.inputs(way, generator)
    return peak_beyond(lambda: case.ways[way](inputs), device)


def _register_package() -> None:
    """Lets ``benchmarks`` be imported without the repository on the path, where ikem_fast may lie unbuilt."""
    folder = Path(__file__).resolve().parent
    sys.path[:] = [path for path in sys.path if Path(path).resolve() != folder]
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


def main(module: str, profile: str, number: str, way: str, threads: str) -> None:
    _register_package()
    torch.set_num_threads(int(threads))
    cases = importlib.import_module(f"benchmarks.{module}").cases(profile, "cpu")
    print(peak_of_case(cases[int(number)], way, "cpu"))


if __name__ == "__main__":
    main(*sys.argv[1:])
