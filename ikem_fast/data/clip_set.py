"""Prepared clips on disk: the folder's format, and the view of it that training and evaluation read.

A prepared folder holds ``clips.npy`` (N, 3, T, V, M) float32, ``samples.csv`` with one row per clip in the same order,
and ``dataset.json``, which is written last: a folder without it is not finished.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ikem_fast import layouts
from ikem_fast.data.readers.base import DataError
from ikem_fast.layouts import Layout

FORMAT = "ikem_fast clips"
FORMAT_VERSION = 1
CLIPS_FILE = "clips.npy"
SAMPLES_FILE = "samples.csv"
DATASET_FILE = "dataset.json"
SAMPLE_COLUMNS = (
    *("name", "label", "subject", "camera", "setup", "replication"),  # from the file's name
    *("num_frames", "valid_frames", "split"),  # from its content, and from the protocol
)
SPLITS = ("train", "test")
# Far beyond what recordings have; a damaged table must neither fill the memory nor overflow.
_MAX_CELL = 1000
_MAX_NUMBER = 2**31 - 1


@dataclass
class Batch:
    """Some clips of a ``ClipSet``.

    Attributes:
        clips: (B, 3, T, V, M) float32, metres.
        num_frames: (B,) int64, frames of the recording each clip was resampled from (F, or L, see ``ClipSet.batch``).
        labels: (B,) int64, from 0.
        indices: (B,) int64, positions in the ``ClipSet`` the batch was taken from.
    """

    clips: Tensor
    num_frames: Tensor
    labels: Tensor
    indices: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: str | torch.device) -> Batch:
        """The same batch on a device; copied asynchronously to a GPU."""
        device = torch.device(device)
        tensors = (self.clips, self.num_frames, self.labels, self.indices)
        if device.type == "cuda":
            tensors = tuple(tensor.pin_memory() if tensor.device.type == "cpu" else tensor for tensor in tensors)
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in tensors))


@dataclass(frozen=True)
class Fitting:
    """How stored clips are brought to another skeleton and number of persons as they are read.

    Attributes:
        joints: (V,) int64, the stored joint that is each joint of the fitted clips.
        num_persons: M of the fitted clips, at least that of the stored ones; persons that are added are zero.
    """

    joints: np.ndarray
    num_persons: int

    def __call__(self, clips: np.ndarray) -> np.ndarray:
        """Stored clips (B, 3, T, V', M') as fitted ones (B, 3, T, V, M), a new array."""
        fitted = np.zeros((*clips.shape[:3], len(self.joints), self.num_persons), dtype=clips.dtype)
        fitted[..., : clips.shape[4]] = clips[..., self.joints, :]
        return fitted


class ClipSet:
    """Prepared clips, memory-mapped, with what is known of each; all of a folder or a selection of it.

    Attributes:
        folder: where they lie.
        metadata: the content of ``dataset.json``.
        layout: the skeleton.
        class_names: one per label.
        names: one per clip.
        labels: (N,) int64, from 0.
        num_frames: (N,) int64, F, the frames of the recording.
        valid_frames: (N,) int64, L, those of them the first person was detected in.
        splits: (N,) of ``"train"`` and ``"test"``.
        table: the columns of ``samples.csv`` as (N,) arrays of text.
        rows: (N,) int64, where each clip lies in ``clips.npy``.
        file_clips: all of ``clips.npy``, read-only and memory-mapped, as they are stored.
        fitting: what is done to clips as they are read, see ``fitted``; None = nothing.
    """

    def __init__(
        self,
        folder: Path,
        metadata: dict[str, Any],
        layout: Layout,
        file_clips: np.ndarray,
        table: dict[str, np.ndarray],
        rows: np.ndarray,
        fitting: Fitting | None = None,
    ) -> None:
        self.folder = folder
        self.metadata = metadata
        self.layout = layout
        self.class_names = tuple(metadata["class_names"])
        self.table = table
        self.rows = rows
        self.names = [str(name) for name in table["name"]]
        self.labels = table["label"].astype(np.int64)
        self.num_frames = table["num_frames"].astype(np.int64)
        self.valid_frames = table["valid_frames"].astype(np.int64)
        self.splits = table["split"]
        self.file_clips = file_clips
        self.fitting = fitting

    @classmethod
    def open(cls, folder: str | Path) -> ClipSet:
        """The clips of a prepared folder.

        Raises:
            DataError: the folder is not there or not finished, or one of its files is damaged or does not fit the
                others; the message names the file and says what was expected.
        """
        folder = Path(folder)
        metadata = _read_metadata(folder)
        try:
            layout = layouts.from_dict(metadata["layout"])
        except layouts.LayoutError as error:
            raise DataError(f"{folder / DATASET_FILE}: layout: {error}") from None
        clips = _open_clips(folder / CLIPS_FILE, metadata["num_frames"], layout.num_joints)
        table = _read_table(folder / SAMPLES_FILE, len(metadata["class_names"]))
        if len(table["name"]) != len(clips):
            raise DataError(
                f"{folder}: {SAMPLES_FILE} must have one row per clip, got {len(table['name'])} rows for "
                f"{len(clips)} clips in {CLIPS_FILE}"
            )
        return cls(folder, metadata, layout, clips, table, np.arange(len(clips)))

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        kind, protocol = self.metadata["kind"], self.metadata["protocol"]
        return f"ClipSet({str(self.folder)!r}: {len(self)} clips of {kind}, {protocol})"

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def clip_shape(self) -> tuple[int, int, int, int]:
        """(3, T, V, M) of each clip as it is read."""
        channels, frames, joints, persons = self.file_clips.shape[1:]
        if self.fitting is not None:
            joints, persons = len(self.fitting.joints), self.fitting.num_persons
        return channels, frames, joints, persons

    @property
    def num_persons(self) -> int:
        return self.clip_shape[3]

    @property
    def clip_length(self) -> int:
        """T, the frames of each clip."""
        return self.clip_shape[1]

    @property
    def clips(self) -> np.ndarray:
        """(N, 3, T, V, M) float32, read-only: the memory-mapped file, or a copy in memory for a selection with gaps or
        fitted clips.
        """
        if self.fitting is not None:
            return self.fitting(self.file_clips[self.rows])
        if len(self) and np.array_equal(self.rows, np.arange(self.rows[0], self.rows[0] + len(self))):
            return self.file_clips[self.rows[0] : self.rows[0] + len(self)]
        return self.file_clips[self.rows]

    def split(self, name: str) -> ClipSet:
        """The clips of one split, ``"train"`` or ``"test"``; a DataError names the splits that have clips."""
        selected = self.splits == name
        if not selected.any():
            there = ", ".join(f"'{split}'" for split in SPLITS if (self.splits == split).any()) or "none"
            raise DataError(f"{self.folder} has no clips of split {name!r}; splits with clips: {there}")
        return self.subset(np.flatnonzero(selected))

    def subset(self, indices: Sequence[int] | np.ndarray | Tensor) -> ClipSet:
        """The clips at some positions, in the order given."""
        indices = self.check_indices(indices)
        table = {column: values[indices] for column, values in self.table.items()}
        return ClipSet(
            self.folder, self.metadata, self.layout, self.file_clips, table, self.rows[indices], self.fitting
        )

    def fitted(self, layout: Layout, num_persons: int | None = None) -> ClipSet:
        """The same clips for encoders of another skeleton; nothing is copied, clips are fitted as they are read.

        Args:
            layout: the skeleton to fit them to; its joints are taken as ``layouts.map_joints`` says.
            num_persons: persons to fill up to with zeros, as for a person who is absent. More persons than that stay.
                None = as they are.

        Raises:
            LayoutError: nothing stands in for some joints.
        """
        if self.fitting is not None:
            raise ValueError(f"clips must be as they are stored, got clips that are fitted to {self.layout.name}")
        joints = np.array(layouts.map_joints(self.layout, layout), dtype=np.int64)
        fitting = Fitting(joints, max(self.num_persons, num_persons or 1))
        return ClipSet(self.folder, self.metadata, layout, self.file_clips, self.table, self.rows, fitting)

    def batch(
        self,
        indices: Sequence[int] | np.ndarray | Tensor,
        *,
        device: str | torch.device = "cpu",
        file_frame_count: bool = True,
    ) -> Batch:
        """The clips at some positions as tensors.

        Args:
            indices: B positions, 0 to ``len(self) - 1``.
            device: where the tensors shall be.
            file_frame_count: ``num_frames`` is the file's F; otherwise L, the frames the clip was made of (quirk Q6).

        Raises:
            DataError: a coordinate is not finite: the file was damaged.
        """
        indices = self.check_indices(indices)
        num_frames = self.num_frames if file_frame_count else self.valid_frames
        clips = np.ascontiguousarray(self.file_clips[self.rows[indices]])
        check_finite(self.folder / CLIPS_FILE, self.rows[indices], clips)
        batch = Batch(
            clips=torch.from_numpy(clips if self.fitting is None else np.ascontiguousarray(self.fitting(clips))),
            num_frames=torch.from_numpy(num_frames[indices]),
            labels=torch.from_numpy(self.labels[indices]),
            indices=torch.from_numpy(indices),
        )
        return batch if torch.device(device).type == "cpu" else batch.to(device)

    def in_batches(
        self, batch_size: int, *, device: str | torch.device = "cpu", file_frame_count: bool = True
    ) -> Iterator[tuple[slice, Batch]]:
        """All clips in order, ``batch_size`` at a time: which positions they are, and what ``batch`` gives of them."""
        for start in range(0, len(self), batch_size):
            stop = min(start + batch_size, len(self))
            yield slice(start, stop), self.batch(range(start, stop), device=device, file_frame_count=file_frame_count)

    def check_indices(self, indices: Sequence[int] | np.ndarray | Tensor) -> np.ndarray:
        """Positions in this set as a new (B,) int64 array; ValueError and IndexError say what is wrong with others."""
        if isinstance(indices, Tensor):
            indices = indices.cpu().numpy()
        array = np.asarray(indices)
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ValueError(f"indices must be (B,) whole numbers, got {array.shape} {array.dtype}")
        if array.size and (array.min() < 0 or array.max() >= len(self)):
            wrong = array.min() if array.min() < 0 else array.max()
            raise IndexError(f"indices must be 0 to {len(self) - 1}, got {wrong}")
        return array.astype(np.int64)


def check_finite(path: Path, rows: np.ndarray, clips: np.ndarray) -> None:
    """A DataError where a coordinate of the clips (B, 3, T, V, M) in some rows of a file is not finite."""
    if not np.isfinite(clips).all():
        index = tuple(np.argwhere(~np.isfinite(clips))[0])
        raise DataError(
            f"{path}: damaged: coordinates must be finite, as they are when they are prepared, got {clips[index]} in "
            f"row {rows[index[0]]}: prepare the recordings again into another folder"
        )


def read_dataset_file(folder: Path) -> dict[str, Any]:
    """``dataset.json`` of a finished folder, its format and version checked."""
    path = folder / DATASET_FILE
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise DataError(f"{path}: format must be {FORMAT!r}; this is no folder of prepared clips")
    if metadata.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {metadata.get('format_version')!r}: "
            "prepare the recordings again with this version of ikem_fast"
        )
    return metadata


def _read_metadata(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; prepare one with `python -m ikem_fast.data prepare`")
    try:
        (folder / DATASET_FILE).stat()
    except FileNotFoundError:
        raise DataError(
            f"{folder}: no {DATASET_FILE}, so this is no finished folder of prepared clips; "
            "run the same `python -m ikem_fast.data prepare` command again to finish an interrupted one"
        ) from None
    except OSError as error:
        raise DataError(f"{folder / DATASET_FILE}: {error.strerror}") from None
    metadata = read_dataset_file(folder)
    expected = {
        "kind": str,
        "protocol": str,
        "layout": dict,
        "num_frames": int,
        "centring": bool,
        "rotation": bool,
        "class_names": list,
    }
    for key, kind in expected.items():
        if not isinstance(metadata.get(key), kind):
            raise DataError(f"{folder / DATASET_FILE}: {key} must be a {kind.__name__}, got {metadata.get(key)!r}")
    if not metadata["class_names"] or not all(isinstance(name, str) for name in metadata["class_names"]):
        raise DataError(f"{folder / DATASET_FILE}: class_names must be a non-empty list of names")
    return metadata


def _open_clips(path: Path, num_frames: int, num_joints: int) -> np.ndarray:
    try:
        clips = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # a damaged header makes numpy raise errors of many kinds
        raise DataError(f"{path}: truncated or no .npy file: {error or type(error).__name__}") from None
    expected = f"(N, 3, {num_frames}, {num_joints}, M) float32 in C order"
    order = "C" if clips.flags.c_contiguous else "Fortran"
    if clips.dtype != np.dtype("<f4") or clips.ndim != 5 or order != "C":
        raise DataError(f"{path}: must be {expected}, got {clips.shape} {clips.dtype} in {order} order")
    if clips.shape[1:4] != (3, num_frames, num_joints) or 0 in clips.shape:
        raise DataError(f"{path}: must be {expected}, got {clips.shape}")
    size = clips.offset + clips.nbytes
    if path.stat().st_size != size:
        raise DataError(f"{path}: must have {size} bytes, got {path.stat().st_size}")
    return clips


def _read_table(path: Path, num_classes: int) -> dict[str, np.ndarray]:
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not a CSV file: {error}") from None
    if not lines or tuple(lines[0]) != SAMPLE_COLUMNS:
        raise DataError(f"{path}: line 1: columns must be {','.join(SAMPLE_COLUMNS)}")
    seen: set[str] = set()
    for number, cells in enumerate(lines[1:], start=2):
        if len(cells) != len(SAMPLE_COLUMNS):
            raise DataError(f"{path}: line {number}: must have {len(SAMPLE_COLUMNS)} cells, got {len(cells)}")
        row = dict(zip(SAMPLE_COLUMNS, cells, strict=True))
        reason = _find_row_problem(row, num_classes)
        if row["name"] in seen:
            reason = f"{row['name']} is given twice"
        if reason:
            raise DataError(f"{path}: line {number}: {reason}")
        seen.add(row["name"])
    columns = zip(*lines[1:], strict=True) if len(lines) > 1 else [()] * len(SAMPLE_COLUMNS)
    return {column: np.array(values, dtype=np.str_) for column, values in zip(SAMPLE_COLUMNS, columns, strict=True)}


def _find_row_problem(row: dict[str, str], num_classes: int) -> str | None:
    for column, cell in row.items():
        if len(cell) > _MAX_CELL:
            return f"{column} must have at most {_MAX_CELL} characters, got {len(cell)}"
    if not row["name"] or "\0" in row["name"]:
        return f"name must be the name of a recording, got {row['name']!r}"
    for column in ("label", "num_frames", "valid_frames"):
        if not (row[column].isascii() and row[column].isdigit()):
            return f"{column} must be a whole number, got {row[column]!r}"
        if int(row[column]) > _MAX_NUMBER:
            return f"{column} must be at most {_MAX_NUMBER}, got {row[column]}"
    if int(row["label"]) >= num_classes:
        return f"label must be 0 to {num_classes - 1}, got {row['label']}"
    if not 1 <= int(row["valid_frames"]) <= int(row["num_frames"]):
        return f"valid_frames must be 1 to num_frames ({row['num_frames']}), got {row['valid_frames']}"
    if row["split"] not in SPLITS:
        return f"split must be {' or '.join(SPLITS)}, got {row['split']!r}"
    return None
