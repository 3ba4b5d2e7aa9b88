"""Starts a file as several ranks of a run, as ``torchrun`` would, but for starting them again or ending them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path


def run(file: str | Path, size: int, *arguments: object) -> list[tuple[int, str]]:
    """Exit status and output of every rank."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(file), *map(str, arguments)],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        return [(rank.wait(300), rank.stdout.read()) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
