"""The processor that this process runs on. Neither torch nor the compiled part is needed."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """Its model as the system names it, such as "AMD EPYC 9655 96-Core Processor", else its architecture."""
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        listed = ""
    found = re.search(r"^model name\s*: (.*\S)", listed, re.MULTILINE)
    return found.group(1) if found else platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
