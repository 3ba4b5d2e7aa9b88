"""Zip archives, as torch and numpy write them, and the checksums in them that neither looks at."""

from __future__ import annotations

import struct
import zipfile
from pathlib import Path

_END = struct.Struct("<4s6xH10x")  # the last bytes of an archive, with the number of members


def check_archive(path: str | Path, *, compressed: bool = False) -> None:
    """Reads an archive whole and compares the checksums.

    Args:
        path: the file.
        compressed: whether its members may be compressed. Where they may not, reading takes no more memory than the
            file takes on the disk.

    Raises:
        BadZipFile: the file is no archive or is damaged; the message says where.
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.compress_type != zipfile.ZIP_STORED and not compressed:
                    raise zipfile.BadZipFile(f"{member.filename} is compressed")
            _check_directory(Path(path), archive)
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # wrong bytes make zipfile raise errors of many kinds
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from error
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def _check_directory(path: Path, archive: zipfile.ZipFile) -> None:
    """Raises BadZipFile where members are missing from the directory, which no checksum is of, or are in it twice."""
    with open(path, "rb") as file:
        file.seek(-_END.size, 2)
        signature, number = _END.unpack(file.read())
    names = archive.namelist()
    if signature != b"PK\x05\x06" or number != len(names) or len(set(names)) != len(names):
        raise zipfile.BadZipFile(f"its directory lists {len(names)} members, and must list {number} different ones")
