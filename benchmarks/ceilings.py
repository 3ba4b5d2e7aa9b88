"""What the machine can do at best (``ikem_fast.ceilings``), measured at the start of a run and again at its end."""

from __future__ import annotations

import functools

from ikem_fast.ceilings import Ceilings, measure

__all__ = ["Ceilings", "at_start", "measure"]


@functools.cache
def at_start(device: str, threads: int) -> Ceilings:
    """Measured at the first call for a device and a number of threads, which torch must have now; later as then."""
    return measure(device)
