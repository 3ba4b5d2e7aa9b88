"""Where training takes stored clips from: all of them on the device, or a stream of batches from the file.

``open_source`` chooses by size. Both sources give the same clips bit for bit, made for ``ikem_fast.ops.clip_views``::

    for batch in source.batches(order.split(128)):
        parameters = draw_views(seed, epoch, batch.samples, source.clip_length, augmentation)
        views = clip_views(batch.clips, batch.num_frames, batch.indices, parameters, source.clip_set.layout)
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ikem_fast.data.clip_file import ClipFile
from ikem_fast.data.clip_set import ClipSet
from ikem_fast.data.memory import free_memory
from ikem_fast.data.readers import DataError
from ikem_fast.ranges import phase

PLACES = ("auto", "resident", "stream")
DTYPES = (torch.float32, torch.float16)
PREFETCH = 2  # batches a stream loads ahead of the one in use

Positions = Sequence[int] | np.ndarray | Tensor  # of clips in a ClipSet


@dataclass(frozen=True)
class StoredBatch:
    """A batch of B clips as they are stored, to be read by ``ikem_fast.ops.clip_views``.

    Attributes:
        clips: (N, 3, T, V, M), all clips of the source, or (B, 3, T, V, M), the batch alone, in metres; float32 or
            float16.
        num_frames: (N,) or (B,) int64, frames of each recording in ``clips`` (F, or L, see ``open_source``).
        indices: (B,) int64, the rows of ``clips`` that are the batch; None for all of them in order.
        samples: (B,) int64, the clips' rows in ``clips.npy``, which random numbers are drawn from: the same for a clip
            in every selection and in either source.
    """

    clips: Tensor
    num_frames: Tensor
    indices: Tensor | None
    samples: Tensor


def open_source(
    clip_set: ClipSet,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    place: str = "auto",
    file_frame_count: bool = True,
    resident_share: float = 0.5,
) -> ResidentClips | StreamingClips:
    """A source of a set's clips on a device.

    Args:
        clip_set: N clips.
        device: ``"cpu"`` or a CUDA device.
        dtype: what the clips are stored as, float32 or float16 (rounded to nearest even).
        place: ``"resident"`` copies all clips to the device once; ``"stream"`` reads each batch from the file while
            those before it are in use; ``"auto"`` is resident if the clips take at most ``resident_share`` of the
            device's free memory.
        file_frame_count: ``num_frames`` is the file's F; otherwise L, the frames the clip was made of (quirk Q6).
        resident_share: above 0, at most 1.

    Raises:
        ValueError: an argument that is none of the above.
        DataError: ``"resident"`` with too little memory; ``clips.npy`` is gone, truncated or cannot be read, or has a
            coordinate that is not finite or beyond float16's 65504 m (raised while batches are taken, in a stream).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be torch.float32 or torch.float16, got {dtype!r}")
    if place not in PLACES:
        raise ValueError(f"place must be one of {', '.join(PLACES)}, got {place!r}")
    if not 0 < resident_share <= 1:
        raise ValueError(f"resident_share must be above 0 and at most 1, got {resident_share}")
    device = _check_device(device)
    if place != "stream":
        needed, free = _num_bytes(clip_set, dtype), free_memory(device)
        if place == "resident" and needed > free:
            raise DataError(
                f"{clip_set.folder}: place must be 'stream' or 'auto', got 'resident': {len(clip_set)} clips as "
                f"{_name(dtype)} need {_format_bytes(needed)}, and {device} has {_format_bytes(free)} free"
            )
        if place == "resident" or needed <= resident_share * free:
            return ResidentClips(clip_set, device, dtype, file_frame_count)
    return StreamingClips(clip_set, device, dtype, file_frame_count)


class _Source:
    """What both sources know.

    Attributes:
        clip_set: the clips' ``ClipSet``.
        device: where the tensors of the batches are.
        dtype: of the clips.
        place: ``"resident"`` or ``"stream"``.
    """

    place: str

    def __init__(self, clip_set: ClipSet, device: torch.device, dtype: torch.dtype, file_frame_count: bool) -> None:
        self.clip_set = clip_set
        self.device = device
        self.dtype = dtype
        self._frame_counts = clip_set.num_frames if file_frame_count else clip_set.valid_frames

    @property
    def clip_length(self) -> int:
        """T, the frames of each clip."""
        return self.clip_set.clip_length

    def _empty(self, num_clips: int, **options) -> Tensor:
        return torch.empty((num_clips, *self.clip_set.clip_shape), dtype=self.dtype, **options)

    def describe(self) -> str:
        """The source in words, for the log."""
        how = "resident on" if self.place == "resident" else f"streamed from {self.clip_set.folder} to"
        size = _format_bytes(_num_bytes(self.clip_set, self.dtype))
        return f"{len(self.clip_set)} clips {how} {self.device} as {_name(self.dtype)}, {size}"


class ResidentClips(_Source):
    """All clips of a set on the device, copied there once by ``open_source``."""

    place = "resident"

    def __init__(self, clip_set: ClipSet, device: torch.device, dtype: torch.dtype, file_frame_count: bool) -> None:
        super().__init__(clip_set, device, dtype, file_frame_count)
        self._clips = self._empty(len(clip_set), device=device)
        self._num_frames = torch.from_numpy(self._frame_counts).to(device)
        with ClipFile(clip_set) as file:
            if device.type == "cpu":
                file.read(clip_set.rows, self._clips)
                return
            staging = self._empty(file.chunk_size, pin_memory=True)
            for start in range(0, len(clip_set), file.chunk_size):
                clips = self._clips[start : start + file.chunk_size]
                host = staging[: len(clips)]
                file.read(clip_set.rows[start : start + file.chunk_size], host)
                clips.copy_(host)  # waits for the device: the next chunk goes through the same memory

    def batches(self, batches: Iterable[Positions]) -> Iterator[StoredBatch]:
        """The batches made of the clips at some positions: each ``clips`` is the whole set. Nothing waits for the GPU.

        Raises:
            ValueError, IndexError: positions that ``ClipSet.batch`` does not take either.
        """
        for positions in batches:
            indices = self.clip_set.check_indices(positions)
            numbers = torch.from_numpy(np.stack([indices, self.clip_set.rows[indices]]))
            if self.device.type == "cuda":
                numbers = numbers.pin_memory().to(self.device, non_blocking=True)
            yield StoredBatch(self._clips, self._num_frames, numbers[0], numbers[1])


class StreamingClips(_Source):
    """Batches of a set's clips, read from the file by a thread while those before them are in use.

    On a GPU they pass through pinned memory and are copied on a stream of their own.
    """

    place = "stream"

    def __init__(self, clip_set: ClipSet, device: torch.device, dtype: torch.dtype, file_frame_count: bool) -> None:
        super().__init__(clip_set, device, dtype, file_frame_count)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def batches(self, batches: Iterable[Positions]) -> Iterator[StoredBatch]:
        """The batches made of the clips at some positions: each ``clips`` is a new tensor of the batch alone.

        ``batches`` is read ``PREFETCH`` batches ahead, by the thread that asks for the next one; so much earlier than
        from ``ResidentClips`` come its errors. The reading thread ends with the iterator, also when that is closed or
        dropped early. On a GPU, the stream that is current when a batch is asked for is the one to use it on; to
        capture a CUDA graph meanwhile takes ``capture_error_mode="thread_local"``.

        Raises:
            ValueError, IndexError: positions that ``ClipSet.batch`` does not take either.
            DataError: ``clips.npy`` is gone, truncated or cannot be read, or has a coordinate beyond float16's 65504 m.
        """
        remaining = iter(batches)
        loading: deque[Future] = deque()
        buffers = deque(_PinnedBuffer() for _ in range(PREFETCH))
        with ClipFile(self.clip_set) as file:
            thread = ThreadPoolExecutor(1, thread_name_prefix="ikem_fast clips")
            try:
                while True:
                    for positions in islice(remaining, PREFETCH + 1 - len(loading)):
                        indices = self.clip_set.check_indices(positions)  # a copy: the caller's may change
                        loading.append(thread.submit(self._load, file, indices, buffers))
                    if not loading:
                        return
                    yield _hand_over(*loading.popleft().result())
            finally:
                thread.shutdown(cancel_futures=True)

    @phase("reading ahead")
    def _load(
        self, file: ClipFile, indices: np.ndarray, buffers: deque[_PinnedBuffer]
    ) -> tuple[StoredBatch, torch.cuda.Event | None]:
        """A batch, and the end of its copy to a GPU. Runs in the reading thread."""
        rows = self.clip_set.rows[indices]
        numbers = torch.from_numpy(np.stack([self._frame_counts[indices], rows]))
        if self._stream is None:
            clips = self._empty(len(rows))
            file.read(rows, clips)
            return StoredBatch(clips, numbers[0], None, numbers[1]), None
        buffers.rotate()
        buffer = buffers[0]
        with torch.cuda.stream(self._stream):
            if buffer.copied is not None:
                buffer.copied.synchronize()  # only this thread waits
            if buffer.clips is None or len(buffer.clips) < len(rows):
                buffer.clips = self._empty(len(rows), pin_memory=True)
            host = buffer.clips[: len(rows)]
            file.read(rows, host)
            clips = host.to(self.device, non_blocking=True)
            numbers = numbers.pin_memory().to(self.device, non_blocking=True)
            buffer.copied = torch.cuda.Event(blocking=True)  # whoever synchronises with it sleeps
            buffer.copied.record(self._stream)
        return StoredBatch(clips, numbers[0], None, numbers[1]), buffer.copied


@dataclass
class _PinnedBuffer:
    """Pinned memory that batches pass through on their way to a GPU; ``copied`` is the end of the last copy from it."""

    clips: Tensor | None = None
    copied: torch.cuda.Event | None = None


def _hand_over(batch: StoredBatch, copied: torch.cuda.Event | None) -> StoredBatch:
    """Makes the current stream wait for the copy, and the batch's memory wait for that stream before it is used again.

    What waits is the GPU, not this thread.
    """
    if copied is not None:
        stream = torch.cuda.current_stream(batch.clips.device)
        stream.wait_event(copied)
        for tensor in (batch.clips, batch.num_frames, batch.samples):
            tensor.record_stream(stream)
    return batch


def _check_device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be 'cpu' or a CUDA device, got {device!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be 'cpu' or a CUDA device, got '{device}'")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device must be there: got '{device}' with {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def _num_bytes(clip_set: ClipSet, dtype: torch.dtype) -> int:
    return len(clip_set) * math.prod(clip_set.clip_shape) * dtype.itemsize


def _format_bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
