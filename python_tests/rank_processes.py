"""Runs a file's checks on several gloo processes, started once for all of them.

The file defines functions ``check_...(group)``, which every rank calls in the same order, and ends with
``rank_processes.main(globals())``. A test asks ``run(file, world_size, folder)`` for what became of each.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed


def run(file: str | Path, world_size: int, folder: Path) -> dict[str, list[str]]:
    """The errors of every check of a file, by its name without ``check_``; empty lists where all went well."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), str(rank), str(world_size), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    outputs = [rank.communicate()[0] for rank in ranks]
    errors: dict[str, list[str]] = {}
    for rank, output in enumerate(outputs):
        results = folder / f"rank_{rank}.json"
        assert results.exists(), f"rank {rank} died:\n{output}"
        for name, error in json.loads(results.read_text()).items():
            errors.setdefault(name, []).extend([f"on rank {rank}:\n{error}"] if error else [])
    return errors


def names(file: str | Path) -> list[str]:
    """The checks of a file, without importing it."""
    lines = Path(file).read_text().splitlines()
    return [line.split("(")[0].removeprefix("def check_") for line in lines if line.startswith("def check_")]


def main(content: Mapping[str, Any]) -> None:
    """Runs the checks that a file's globals hold, as the rank that the command line names."""
    rank, world_size, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / 'store'}",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=60),
    )
    checks = {name.removeprefix("check_"): check for name, check in content.items() if name.startswith("check_")}
    errors = dict.fromkeys(checks, "not reached")
    for name, check in checks.items():
        torch.manual_seed(0)
        try:
            check(distributed.group.WORLD)
            distributed.barrier()
            errors[name] = ""
        except Exception:
            errors[name] = traceback.format_exc()
            break  # ranks are no longer in step
    (folder / f"rank_{rank}.json").write_text(json.dumps(errors))
    if not any(errors.values()):
        distributed.destroy_process_group()
