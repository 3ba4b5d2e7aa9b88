"""A full disk at a write of every kind: a clear end, and nothing lost; the short form of scripts/full_disk_test.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ikem_fast import _extension

SCRIPT = Path(__file__).parent.parent / "scripts" / "full_disk_test.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the scripts are not beside the tests")
@pytest.mark.skipif(
    not sys.platform.startswith("linux") or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason="needs Linux and a C compiler",
)
def test_every_kind_of_file_that_a_command_writes():
    command = [sys.executable, str(SCRIPT), "--brief"]
    environment = {**os.environ, "PYTHONPATH": str(_extension.PACKAGE_FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("pretrain", "evaluate linear", "evaluate knn", "data prepare"):
        assert f"{name}: " in done.stdout
