"""Zip archives, as torch and numpy write them, and the checksums in them that neither looks at."""

from __future__ import annotations

import zipfile
from pathlib import Path


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
            damaged = archive.testzip()
    except (OSError, zipfile.BadZipFile):
        raise
    except Exception as error:  # wrong bytes make zipfile raise errors of many kinds
        raise zipfile.BadZipFile(str(error) or type(error).__name__) from error
    if damaged is not None:
        raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")
