"""Writes clips one after another into a file that becomes a ``.npy``, with a journal of what is in it.

``clips.npy.partial`` only ever grows, and ``progress.jsonl`` says what it holds: the parameters in the first line, then
one line per recording in their fixed order. The clips reach the disk before the journal's lines about them, so whatever
an interruption leaves behind, cutting both back to what they share gives a state the next run can go on from.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ikem_fast.atomic import sync_folder
from ikem_fast.data.clip_set import CLIPS_FILE, DATASET_FILE
from ikem_fast.data.readers import DataError

PARTIAL_FILE = CLIPS_FILE + ".partial"
JOURNAL_FILE = "progress.jsonl"
# Work goes to disk this often: what a killed run has to do again.
RECORDINGS_PER_CHECKPOINT = 256
_HEADER_BYTES = 128


@dataclass(frozen=True)
class Outcome:
    """What became of a recording: its frame counts, or why there is no clip of it."""

    name: str
    num_frames: int = 0
    valid_frames: int = 0
    error: str | None = None

    def to_line(self) -> str:
        return json.dumps([self.name, self.num_frames, self.valid_frames, self.error]) + "\n"


class ClipWriter:
    """The clips and the journal of a folder in the making. Use ``ClipWriter.open``.

    Attributes:
        outcomes: of the recordings done so far, in order; filled with those of an interrupted run at the beginning.
    """

    def __init__(self, folder: Path, clip_shape: tuple[int, ...], journal: IO[str], clips: IO[bytes]) -> None:
        self.folder = folder
        self.outcomes: list[Outcome] = []
        self._clip_shape = clip_shape
        self._clip_bytes = 4 * int(np.prod(clip_shape))
        self._journal = journal
        self._clips = clips
        self._pending = ""

    @classmethod
    @contextlib.contextmanager
    def open(
        cls, folder: Path, clip_shape: tuple[int, ...], parameters: dict[str, Any], names: Sequence[str]
    ) -> Iterator[ClipWriter]:
        """Begins or goes on; what is appended before the block ends, in whatever way, is kept.

        Args:
            folder: an existing folder.
            clip_shape: (3, T, V, M).
            parameters: what the clips depend on.
            names: all recordings that will be appended, in their order.

        Raises:
            DataError: another process is at it or has just finished, or an earlier one had other parameters.
            OSError: the folder cannot be written to, or its disk is full.
        """
        with open(folder / JOURNAL_FILE, "a+", encoding="utf-8", errors="replace", newline="") as journal:
            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{folder}: another process is preparing it now") from None
            if (folder / DATASET_FILE).exists():
                raise DataError(f"{folder}: another process has finished preparing it meanwhile")
            partial = folder / PARTIAL_FILE
            if (folder / CLIPS_FILE).exists() and not partial.exists():
                os.replace(folder / CLIPS_FILE, partial)  # an earlier run was killed while it finished
            with open(partial, "r+b" if partial.exists() else "w+b") as clips:
                writer = cls(folder, clip_shape, journal, clips)
                writer._resume(parameters, names)
                try:
                    yield writer
                except BaseException:
                    # The reason why the block ended is worth more than that its last clips could not be kept.
                    with contextlib.suppress(OSError):
                        writer.checkpoint()
                    raise

    def _resume(self, parameters: dict[str, Any], names: Sequence[str]) -> None:
        self._journal.seek(0)
        lines = self._journal.read().split("\n")[:-1]  # the last one is empty, or was being written
        outcomes = list(_read_outcomes(lines[1:]))
        if outcomes:
            check_same_parameters(self.folder, "begun", self._read_parameters(lines[0]), parameters)
        room = max(0, os.fstat(self._clips.fileno()).st_size - _HEADER_BYTES) // self._clip_bytes
        for outcome, name in zip(outcomes, names, strict=False):
            room -= outcome.error is None
            if room < 0 or outcome.name != name:
                break
            self.outcomes.append(outcome)
        self._keep_lines(json.dumps(parameters) + "\n" + "".join(outcome.to_line() for outcome in self.outcomes))
        self._clips.truncate(_HEADER_BYTES + self._clip_bytes * self.num_clips)
        self._clips.seek(0, os.SEEK_END)

    def _keep_lines(self, text: str) -> None:
        """Makes the journal's content this text, which is how it begins already where an earlier run wrote it.

        Then it is only cut: were it written anew, being killed in between would lose what was done.
        """
        self._journal.seek(0)
        if self._journal.read(len(text)) == text:
            self._journal.seek(len(text.encode()))
            self._journal.truncate()
        else:
            self._journal.seek(0)
            self._journal.truncate()
            self._journal.write(text)
            self._journal.flush()

    def _read_parameters(self, line: str) -> dict[str, Any]:
        try:
            return dict(json.loads(line))
        except (ValueError, TypeError, RecursionError):
            path = self.folder / JOURNAL_FILE
            raise DataError(f"{path}: line 1: damaged; remove {self.folder} and begin again") from None

    @property
    def num_clips(self) -> int:
        return sum(outcome.error is None for outcome in self.outcomes)

    @property
    def clip_bytes(self) -> int:
        return self._clip_bytes

    def append(self, outcome: Outcome, clip: np.ndarray | None) -> None:
        """Adds the next recording, with its clip of the shape given to ``open`` where there is one."""
        if clip is not None:
            self._clips.write(np.ascontiguousarray(clip, dtype="<f4").data)
        self.outcomes.append(outcome)
        self._pending += outcome.to_line()
        if len(self.outcomes) % RECORDINGS_PER_CHECKPOINT == 0:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Brings to disk first the clips, then the journal's lines about them."""
        self._clips.flush()
        os.fsync(self._clips.fileno())
        self._journal.write(self._pending)
        self._journal.flush()
        os.fsync(self._journal.fileno())
        self._pending = ""

    def finish(self) -> None:
        """Gives the file of clips its header and its name. The journal stays until ``remove_journal``."""
        self.checkpoint()
        self._clips.seek(0)
        self._clips.write(_npy_header((self.num_clips, *self._clip_shape)))
        self._clips.flush()
        os.fsync(self._clips.fileno())
        os.replace(self.folder / PARTIAL_FILE, self.folder / CLIPS_FILE)
        sync_folder(self.folder)


def remove_journal(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / JOURNAL_FILE).unlink()


def check_same_parameters(folder: Path, state: str, earlier: dict[str, Any], parameters: dict[str, Any]) -> None:
    """A DataError that names what differs from an earlier run on the folder, if anything does."""
    long = ("layout", "recordings_sha256")
    differences = [
        key if key in long else f"{key} was {earlier.get(key)!r} and is {value!r}"
        for key, value in parameters.items()
        if earlier.get(key) != value
    ]
    if differences:
        raise DataError(
            f"{folder} was {state} with other parameters ({'; '.join(differences)}): give another folder, or remove it"
        )


def _read_outcomes(lines: Sequence[str]) -> Iterator[Outcome]:
    """Those of the journal's lines that are whole; a power failure can leave rubbish after them."""
    for line in lines:
        try:
            outcome = Outcome(*json.loads(line))
        except (ValueError, TypeError, RecursionError):
            return
        counts = (outcome.num_frames, outcome.valid_frames)
        smallest = 1 if outcome.error is None else 0
        if not all(type(count) is int and count >= smallest for count in counts) or not (
            outcome.error is None or isinstance(outcome.error, str)
        ):
            return
        yield outcome


def _npy_header(shape: tuple[int, ...]) -> bytes:
    """A header of the same length for every shape, as the number of clips is known only at the end."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}"
    magic = b"\x93NUMPY\x01\x00"
    length = _HEADER_BYTES - len(magic) - 2
    return magic + struct.pack("<H", length) + text.ljust(length - 1).encode("ascii") + b"\n"
