"""The command line of training on a rank that something happens to: ``distributed_command.py WHAT ARGUMENTS…``.

``kill``: rank 1 kills itself in its fourth step. ``kill_0``: rank 0 does, and the last rank sleeps in it, as if waiting
for a GPU that waits for others. ``data``: rank 1 cannot read its clips. Only in the first attempt.
"""

from __future__ import annotations

import os
import signal
import sys
import time

from ikem_fast.data import DataError
from ikem_fast.engine import watch
from ikem_fast.methods import IKEM
from ikem_fast.train import main

what, rank, size = sys.argv[1], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
first_attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
original, calls = IKEM.contrast, 0


def contrast(self, *arguments):
    global calls
    calls += 1
    if calls == 4 and first_attempt:
        if (what, rank) in (("kill", 1), ("kill_0", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        if (what, rank) == ("kill_0", size - 1):
            watch._GRACE_SECONDS = 1.0
            time.sleep(600)
        if (what, rank) == ("data", 1):
            raise DataError("clips.npy is gone")
    return original(self, *arguments)


IKEM.contrast = contrast
sys.exit(main(sys.argv[2:]))
