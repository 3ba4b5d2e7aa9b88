"""Reads clips out of a prepared folder's ``clips.npy`` into memory that is used again and again."""

from __future__ import annotations

import os

import numpy as np
import torch
from torch import Tensor

from ikem_fast.data.clip_set import CLIPS_FILE, ClipSet, check_finite
from ikem_fast.data.readers import DataError

_CHUNK_BYTES = 2**22
_MAX_BUFFERS = 1024  # the most that one system call fills
_MAX_UNTHREADED = 2**14  # values torch converts without waking its threads, which the caller's thread may be using
_FLOAT16_MAX = 65504.0


class ClipFile:
    """The ``clips.npy`` of a clip set, open for reading by system calls; a context manager.

    Not through the memory map that ``ClipSet`` holds, although both read the same cached pages: where the file is cut
    off or its disk fails, a memory map ends the process with SIGBUS and a system call returns an error.

    Attributes:
        path: the file.
        chunk_size: clips that are read at a time.
    """

    def __init__(self, clip_set: ClipSet) -> None:
        file_clips = clip_set.file_clips
        self.path = clip_set.folder / CLIPS_FILE
        self._clip_bytes = file_clips[0].nbytes
        self._start = file_clips.offset
        self._size = file_clips.offset + file_clips.nbytes
        self.chunk_size = max(1, min(_CHUNK_BYTES // self._clip_bytes, _MAX_BUFFERS))
        self._fitting = clip_set.fitting
        self._chunk = torch.empty((self.chunk_size, *file_clips.shape[1:]))  # pages are made when conversions write it

    def __enter__(self) -> ClipFile:
        """Opens the file; a DataError says what is wrong with it."""
        try:
            self._descriptor = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from None
        if os.fstat(self._descriptor).st_size != self._size:
            error = self._size_error()
            os.close(self._descriptor)
            raise error
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)

    def read(self, rows: np.ndarray, out: Tensor) -> None:
        """Reads the clips in some rows of the file, fits them where the clip set does, and rounds them to nearest even
        where they become float16.

        Args:
            rows: (B,) int64, in any order, also repeatedly.
            out: (B, 3, T, V, M) float32 or float16 on the host, contiguous; written.

        Raises:
            DataError: the file is cut off or cannot be read, or a coordinate is not finite or beyond float16's 65504.
        """
        for start in range(0, len(rows), self.chunk_size):
            chunk_rows, chunk = rows[start : start + self.chunk_size], out[start : start + self.chunk_size]
            if out.dtype == torch.float32 and self._fitting is None:
                self._read(chunk_rows, chunk.numpy())
                continue
            read = self._chunk[: len(chunk)]
            self._read(chunk_rows, read.numpy())
            if out.dtype != torch.float32:
                self._check_range(chunk_rows, read.numpy())
            if self._fitting is not None:
                read = torch.from_numpy(self._fitting(read.numpy()))
            pieces = (clips.view(-1).split(_MAX_UNTHREADED) for clips in (read, chunk))
            for source, target in zip(*pieces, strict=True):
                target.copy_(source)

    def _read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Reads in the order of the file, rows that follow one another at once."""
        targets = out.reshape(len(rows), -1).view(np.uint8)
        order = np.argsort(rows, kind="stable")
        runs = np.split(order, np.flatnonzero(np.diff(rows[order]) != 1) + 1)
        starts = [self._start + int(rows[run[0]]) * self._clip_bytes for run in runs]
        try:
            for start, run in zip(starts, runs, strict=True):  # so that a disk fetches them all together
                os.posix_fadvise(self._descriptor, start, len(run) * self._clip_bytes, os.POSIX_FADV_WILLNEED)
            for start, run in zip(starts, runs, strict=True):
                self._fill([targets[number] for number in run], start)
        except OSError as error:
            raise DataError(f"{self.path}: {error.strerror}") from error
        check_finite(self.path, rows, out)

    def _fill(self, targets: list[np.ndarray], position: int) -> None:
        """Reads bytes from a position of the file on until all targets are full; one call may give fewer."""
        while targets:
            count = os.preadv(self._descriptor, targets, position)
            if count == 0:
                raise self._size_error()
            position += count
            while targets and count >= len(targets[0]):
                count -= len(targets.pop(0))
            if count:
                targets[0] = targets[0][count:]

    def _size_error(self) -> DataError:
        size = os.fstat(self._descriptor).st_size
        return DataError(f"{self.path}: must have {self._size} bytes, got {size}: it was changed while in use")

    def _check_range(self, rows: np.ndarray, clips: np.ndarray) -> None:
        if clips.min() >= -_FLOAT16_MAX and clips.max() <= _FLOAT16_MAX:
            return
        beyond = np.argwhere(np.abs(clips) > _FLOAT16_MAX)
        raise DataError(
            f"{self.path}: coordinates must be at most {_FLOAT16_MAX:g} m to be stored as float16, got "
            f"{clips[tuple(beyond[0])]:g} in row {rows[beyond[0, 0]]}: dtype must be float32"
        )
