"""Runs that are killed at random moments go on as if nothing had happened: the short form of scripts/crash_test.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ikem_fast import _extension

SCRIPT = Path(__file__).parent.parent / "scripts" / "crash_test.py"


@pytest.mark.skipif(not SCRIPT.exists(), reason="the scripts are not beside the tests")
def test_runs_that_are_killed_come_to_the_same_end():
    command = [sys.executable, str(SCRIPT), "--kills", "3", "--epochs", "3"]
    environment = {**os.environ, "PYTHONPATH": str(_extension.PACKAGE_FOLDER.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("data prepare", "pretrain", "distill"):
        assert f"{name}: 3 kills (" in done.stdout
    assert done.stdout.count("each the same") == 3
