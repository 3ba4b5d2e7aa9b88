"""How much memory is free on a device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now; for the CPU, without swapping and within the limits of the control
    groups (containers) this process is in.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([_available_memory(), *_free_in_control_groups()])


def _available_memory(meminfo: Path = Path("/proc/meminfo")) -> int:
    fields = dict(line.split(":") for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].removesuffix("kB")) * 1024


def _free_in_control_groups(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> Iterator[int]:
    """Bytes left below the limit of every group around this process that has one, in version 1 or 2 of the interface.

    Files that the kernel keeps in memory count as free: it drops them where memory is needed.
    """
    lines = membership.read_text().splitlines() if membership.exists() else []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            folder, limit_file, used_file, prefix = root, "memory.max", "memory.current", ""
        elif "memory" in controllers.split(","):
            folder, limit_file, used_file = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            prefix = "total_"
        else:
            continue
        group = folder / path.lstrip("/")
        for level in (group, *group.parents):
            try:
                limit = (level / limit_file).read_text().strip()
                used = int((level / used_file).read_text())
                statistics = dict(line.split() for line in (level / "memory.stat").read_text().splitlines())
            except OSError:  # the root has no limit, and a container does not see all groups around it
                continue
            if limit != "max":
                files = sum(int(statistics.get(f"{prefix}{state}_file", 0)) for state in ("active", "inactive"))
                yield max(0, int(limit) - used + files)
