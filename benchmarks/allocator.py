"""The C library's allocator as CPU timings want it: memory that is freed stays with the process.

Otherwise each call returns its memory to the system, and page faults of the next call outweigh what is measured.
"""

from __future__ import annotations

import os
import sys

KEEPING = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "8589934592"}


def keep_freed_memory() -> None:
    """Starts the program over with the setting, which the library reads at the start; at once back if it has it."""
    if any(os.environ.get(name) != value for name, value in KEEPING.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEPING})
