"""The datasets that can be prepared, one file each; a new one is a file like those and a line in ``_READERS``."""

from __future__ import annotations

import difflib

from ikem_fast.data.readers import ntu_rgb_d, nw_ucla, synthetic, utd_mhad
from ikem_fast.data.readers.base import DataError, Protocol, Reader, Sample

_READERS = (
    ntu_rgb_d.READER,
    nw_ucla.READER,
    utd_mhad.READER,
    synthetic.READER,
)

READERS: dict[str, Reader] = {reader.kind: reader for reader in _READERS}

__all__ = ["READERS", "DataError", "Protocol", "Reader", "Sample", "get"]


def get(kind: str) -> Reader:
    """The reader of a dataset by its name; a DataError names the nearest one there is."""
    if kind in READERS:
        return READERS[kind]
    close = difflib.get_close_matches(str(kind), READERS, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise DataError(f"kind must be one of {', '.join(READERS)}, got {kind!r}{hint}")
