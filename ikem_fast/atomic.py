"""Files that appear whole or not at all: written beside their place, flushed to the disk, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def atomic_open(path: str | Path, mode: str = "w", *, durable: bool = True) -> Iterator[IO[Any]]:
    """A new file that takes the place of ``path`` when the block ends, and leaves it as it was when the block raises.

    Args:
        path: where the file shall be; its folder must exist.
        mode: ``"w"`` for UTF-8 text, its line ends written as they are given, or ``"wb"`` for bytes.
        durable: wait until the file is on the disk, so that it is whole even after a power failure. Many small files
            that can be made again go faster without.

    Raises:
        ValueError: another mode.
        OSError: the folder does not exist, cannot be written to or is full.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"mode must be 'w' or 'wb', got {mode!r}")
    path = Path(path)
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with open(descriptor, mode, **text_options) as file:
            yield file
            file.flush()
            # mkstemp makes files that only their owner may read.
            os.fchmod(file.fileno(), 0o666 & ~_umask())
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    if durable:
        sync_folder(path.parent)


def leftovers(folder: str | Path, *names: str) -> list[Path]:
    """What processes that were killed while they wrote files of these names left in a folder: beginnings of them."""
    return [path for name in names for path in Path(folder).glob(f".{glob.escape(name)}.*.tmp")]


def write_json(path: str | Path, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. A NaN or infinity in it is a ValueError."""
    with atomic_open(path) as file:
        json.dump(value, file, indent=2, allow_nan=False, ensure_ascii=False)
        file.write("\n")


def sync_folder(folder: str | Path) -> None:
    """Makes the renames in a folder survive a power failure, where the file system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_umask() -> int:
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


# Reading the umask means setting it for a moment, so it is read once, before threads write files side by side.
_UMASK = _read_umask()


def _umask() -> int:
    return _UMASK
