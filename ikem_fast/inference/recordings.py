"""What a trained model can be used on: files, folders, arrays and prepared clips, all as batches of clips."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ikem_fast import layouts
from ikem_fast.data.clip_set import ClipSet
from ikem_fast.data.listing import BadFile, reason_of, walk
from ikem_fast.data.map_ahead import default_workers, map_ahead
from ikem_fast.data.preparation import Preparation
from ikem_fast.data.readers import READERS, DataError, Reader, get
from ikem_fast.data.readers.base import check_recording
from ikem_fast.layouts import Layout
from ikem_fast.ops._checks import describe

ON_ERROR = ("fail", "skip")


@dataclass
class ClipBatch:
    """Some clips on their way through the encoders.

    Attributes:
        clips: (B, 3, T, V, M) float32.
        num_frames: (B,) int64.
        names: B names, of files without folder and suffix, as in a prepared set.
        sources: B paths of the files; the names where there are no files.
    """

    clips: Tensor
    num_frames: Tensor
    names: list[str]
    sources: list[str]


@dataclass(frozen=True)
class _Item:
    """One recording that is still to be read."""

    name: str
    source: str
    path: Path | None
    array: np.ndarray | None


# A recording with its clip (3, T, V, M) and its frame count.
_Prepared = tuple[_Item, np.ndarray, int]


@dataclass
class ClipReader:
    """Makes batches of clips of whatever a user has.

    Attributes:
        layout: the model's skeleton.
        preparation: what is done to recordings; None where nobody knows, so that only prepared clips can be used.
        file_frame_count: quirk Q6.
        reader: of recordings' files; None finds it by their suffix.
        on_error: ``"fail"`` or ``"skip"`` recordings that cannot be used.
        skipped: those that were skipped so far.
    """

    layout: Layout
    preparation: Preparation | None
    file_frame_count: bool
    reader: Reader | str | None = None
    on_error: str = "fail"
    skipped: list[BadFile] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.on_error not in ON_ERROR:
            raise ValueError(f"on_error must be 'fail' or 'skip', got {self.on_error!r}")
        if isinstance(self.reader, str):
            self.reader = get(self.reader)

    def batches(self, clips: object, num_frames: object, batch_size: int) -> Iterator[ClipBatch]:
        """The clips in their order. ``clips`` and ``num_frames`` are as in ``Model.embed``."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        prepared = isinstance(clips, ClipSet) or (isinstance(clips, Tensor | np.ndarray) and clips.ndim == 5)
        if num_frames is not None and (isinstance(clips, ClipSet) or not prepared):
            raise ValueError("num_frames is for prepared clips (N, 3, T, V, M) alone; what else there is has its own")
        if isinstance(clips, ClipSet):
            return self._of_clip_set(clips, batch_size)
        if prepared:
            return self._of_tensor(torch.as_tensor(clips), num_frames, batch_size)
        return self._of_items(self._list_items(clips), batch_size)

    # ---- prepared clips

    def _of_clip_set(self, clip_set: ClipSet, batch_size: int) -> Iterator[ClipBatch]:
        if clip_set.layout != self.layout:
            raise ValueError(f"data set {clip_set.folder} must have {self._skeleton()}, got {_named(clip_set.layout)}")
        if self.preparation is not None:
            different = self.preparation.differences(Preparation.of_clips(clip_set))
            if different:
                raise ValueError(f"data set {clip_set.folder} must be prepared as the model's: {', '.join(different)}")
        for positions, batch in clip_set.in_batches(batch_size, file_frame_count=self.file_frame_count):
            names = list(clip_set.names[positions])
            yield ClipBatch(batch.clips, batch.num_frames, names, names)

    def _of_tensor(self, clips: Tensor, num_frames: object, batch_size: int) -> Iterator[ClipBatch]:
        number, joints = len(clips), self.layout.num_joints
        if clips.shape[1] != 3 or clips.shape[3] != joints or not clips.is_floating_point():
            raise ValueError(f"clips must be (N, 3, T, {joints}, M) floating point, got {describe(clips)}")
        if num_frames is None:
            raise ValueError(f"num_frames must be ({number},) frames of the recordings that the clips are of, got none")
        num_frames = torch.as_tensor(num_frames)
        if num_frames.shape != (number,) or num_frames.dtype.is_floating_point or bool((num_frames < 1).any()):
            raise ValueError(f"num_frames must be ({number},) whole numbers above 0, got {describe(num_frames)}")
        clips, num_frames = clips.detach().float().cpu(), num_frames.long().cpu()
        if not bool(clips.isfinite().all()):
            raise ValueError("clips must be finite, got a coordinate that is none")
        names = [f"clip {index}" for index in range(number)]
        for start in range(0, number, batch_size):
            rows = slice(start, start + batch_size)
            yield ClipBatch(clips[rows], num_frames[rows], names[rows], names[rows])

    # ---- recordings

    def _list_items(self, clips: object) -> Iterator[_Item]:
        if self.preparation is None:
            raise ValueError(
                "recordings cannot be prepared as the model's data set was, for nobody knows how: the run's checkpoint "
                "is of an earlier version and its data set is gone; name the set with data=, or give prepared clips"
            )
        many = isinstance(clips, Iterable) and not isinstance(clips, str | np.ndarray | Tensor)
        for number, entry in enumerate(clips if many else [clips]):
            if isinstance(entry, str | Path):
                for path in self.find(entry):
                    yield _Item(path.stem, str(path), path, None)
            elif isinstance(entry, np.ndarray | Tensor):
                array = entry.detach().cpu().numpy() if isinstance(entry, Tensor) else entry
                if array.ndim != 4 or array.shape[0] != 3 or array.dtype.kind not in "iuf":
                    raise ValueError(f"a recording must be (3, F, V, M) numbers, got {array.shape} {array.dtype}")
                yield _Item(f"recording {number}", f"recording {number}", None, array)
            else:
                raise ValueError(
                    "clips must be paths, arrays (3, F, V, M), a ClipSet, or prepared clips (N, 3, T, V, M), "
                    f"got {type(entry).__name__}"
                )

    def find(self, path: str | Path) -> Iterator[Path]:
        """The recordings at a path: the file itself, or all below a folder, in the order of their names.

        Raises:
            DataError: there is nothing, or the recordings are of another skeleton.
        """
        path = Path(path)
        if not path.is_dir():
            self.reader_of(path)
            yield path
            return
        suffixes = {reader.suffix for reader in self._readers() if self._fits(reader)}
        found = [path / name for name in walk(path) if Path(name).suffix in suffixes]
        if not found:
            raise DataError(f"{path} holds no recording {' or '.join(sorted(suffixes))} of {self._skeleton()}")
        yield from found

    def reader_of(self, path: Path) -> Reader:
        """The reader for a file.

        Raises:
            DataError: no reader is for files of this name, or it reads another skeleton than the model's.
        """
        readers = [reader for reader in self._readers() if reader.suffix == path.suffix]
        if not readers:
            suffixes = sorted({reader.suffix for reader in self._readers()})
            raise DataError(f"{path}: a recording's name must end with {', '.join(suffixes)}, got '{path.suffix}'")
        fitting = [reader for reader in readers if self._fits(reader)]
        if not fitting:
            layout = layouts.get(readers[0].layout)
            raise DataError(f"{path}: a recording must have {self._skeleton()}, got one of {_named(layout)}")
        return fitting[0]

    def _readers(self) -> Sequence[Reader]:
        return tuple(READERS.values()) if self.reader is None else (self.reader,)

    def _fits(self, reader: Reader) -> bool:
        # Recordings of the model's own dataset have its skeleton also where that came from a user's file.
        own = self.preparation is not None and reader.kind == self.preparation.kind
        return own or layouts.get(reader.layout) == self.layout

    def _of_items(self, items: Iterator[_Item], batch_size: int) -> Iterator[ClipBatch]:
        usable = self._usable(map_ahead(self._prepare, items, default_workers()))
        while batch := list(islice(usable, batch_size)):
            named, clips, num_frames = zip(*batch, strict=True)
            yield ClipBatch(
                torch.from_numpy(np.stack(clips)),
                torch.tensor(num_frames),
                [item.name for item in named],
                [item.source for item in named],
            )

    def _usable(self, prepared: Iterator[_Prepared | BadFile]) -> Iterator[_Prepared]:
        for clip in prepared:
            if not isinstance(clip, BadFile):
                yield clip
            elif self.on_error == "fail":
                raise DataError(str(clip))
            else:
                self.skipped.append(clip)

    def _prepare(self, item: _Item) -> _Prepared | BadFile:
        """Runs in a thread."""
        try:
            if item.path is not None:
                xyz = self.reader_of(item.path).read(item.path, self.layout)
            else:
                xyz = check_recording(item.array.astype(np.float64))
            clip, detected = self.preparation.apply(xyz, self.layout)
        except (ValueError, OSError) as error:
            return BadFile.from_message(item.source, reason_of(error, item.source))
        return item, clip, xyz.shape[1] if self.file_frame_count else detected

    def _skeleton(self) -> str:
        return f"the model's skeleton {_named(self.layout)}"


def _named(layout: Layout) -> str:
    return f"'{layout.name}' ({layout.num_joints} joints)"
