"""Finds the recordings below a folder, and reads lists of those to leave out."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ikem_fast.data.readers import DataError, Protocol, Reader, Sample


@dataclass(frozen=True)
class BadFile:
    """A file that cannot be used: its path below the source folder, the line if there is one, and the reason."""

    file: str
    line: int | None
    reason: str

    def __post_init__(self) -> None:
        # A file's name may hold bytes that are no UTF-8, which neither a terminal nor a CSV file takes.
        object.__setattr__(self, "file", self.file.encode("utf-8", "backslashreplace").decode("utf-8"))

    @classmethod
    def from_message(cls, file: str, message: str) -> BadFile:
        """Takes the line out of a message that begins with it."""
        match = re.match(r"line (\d+): ", message)
        return cls(file, int(match[1]), message[match.end() :]) if match else cls(file, None, message)

    def __str__(self) -> str:
        return f"{self.file}: line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


def reason_of(error: Exception, path: str | Path) -> str:
    """Why a file could not be read or used, without its name."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).removeprefix(f"{path}: ")


@dataclass(frozen=True)
class Recording:
    """A sample and the path of its file below the source folder."""

    sample: Sample
    file: str


@dataclass(frozen=True)
class Listing:
    """What a source folder holds.

    Attributes:
        source: the folder.
        recordings: those of the protocol, in the order of their names.
        unknown_files: files that are no recordings of the dataset.
        num_missing: recordings left out because the list of missing skeletons names them.
        num_excluded: recordings that are not part of the protocol.
    """

    source: Path
    recordings: list[Recording]
    unknown_files: list[BadFile]
    num_missing: int
    num_excluded: int


def list_recordings(reader: Reader, source: Path, protocol: Protocol, missing: frozenset[str]) -> Listing:
    """All files below ``source`` whose names do not begin with a dot, sorted into recordings and others.

    Raises:
        DataError: ``source`` cannot be read, two files have the same sample name, or no file is a recording.
    """
    recordings: dict[str, Recording] = {}
    unknown_files: list[BadFile] = []
    num_missing = num_excluded = 0
    for file in walk(source):
        sample = reader.parse_name(os.path.basename(file))
        if sample is None:
            unknown_files.append(BadFile(file, None, f"unknown file name; expected {reader.name_pattern}"))
        elif sample.name in missing:
            num_missing += 1
        elif not protocol.is_included(sample):
            num_excluded += 1
        elif sample.name in recordings:
            raise DataError(f"{source}: {recordings[sample.name].file} and {file} have the same sample name")
        else:
            recordings[sample.name] = Recording(sample, file)
    if not recordings:
        found = (
            f"{len(unknown_files)} files of other names (the first is {unknown_files[0].file}), "
            if unknown_files
            else ""
        )
        raise DataError(
            f"{source} holds no usable recording {reader.name_pattern}: {found}{num_missing} listed as missing, "
            f"{num_excluded} not part of the protocol"
        )
    ordered = [recordings[name] for name in sorted(recordings)]
    return Listing(source, ordered, unknown_files, num_missing, num_excluded)


def walk(source: Path) -> Iterator[str]:
    """Paths below ``source`` of the files in it, sorted folder by folder; links to folders are followed once."""
    if not source.is_dir():
        raise DataError(f"source must be a folder of recordings, got {source}, which is none")

    def fail(error: OSError) -> None:
        raise DataError(f"source: {error.filename}: {error.strerror}")

    visited: set[str] = set()
    for folder, subfolders, files in os.walk(source, followlinks=True, onerror=fail):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.relpath(os.path.join(folder, name), source)


def read_missing_list(reader: Reader, path: Path) -> frozenset[str]:
    """Sample names of a list of missing skeletons, one per line, with or without the suffix of their files.

    The published lists begin with a heading, so lines before the first sample name are passed over. Any later line
    that is neither blank nor a sample name is an error, as is a list without one.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"missing list {path}: {error}") from None
    names: set[str] = set()
    for number, line in enumerate(lines, start=1):
        word = line.strip()
        sample = reader.parse_name(word) or reader.parse_name(word + reader.suffix)
        if sample is not None:
            names.add(sample.name)
        elif word and names:
            raise DataError(f"missing list {path}: line {number}: must be a sample name, got {word[:60]!r}")
    if not names:
        raise DataError(f"missing list {path}: holds no sample name {reader.name_pattern}")
    return frozenset(names)
