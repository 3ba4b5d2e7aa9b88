"""Prepares a folder of recordings: list, read, preprocess, and write them into one memory-mappable file.

Recordings are read by threads (the parser of NTU text runs without the interpreter lock) and written in the order of
their names, so that a folder prepared with interruptions is bit-identical to one prepared at once. Only a few clips per
thread are in memory at a time.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import ikem_fast
from ikem_fast import layouts
from ikem_fast.atomic import atomic_open, leftovers, write_json
from ikem_fast.data import readers
from ikem_fast.data.clip_set import (
    DATASET_FILE,
    FORMAT,
    FORMAT_VERSION,
    SAMPLE_COLUMNS,
    SAMPLES_FILE,
    read_dataset_file,
)
from ikem_fast.data.journal import JOURNAL_FILE, ClipWriter, Outcome, check_same_parameters, remove_journal
from ikem_fast.data.listing import BadFile, Listing, Recording, list_recordings, read_missing_list, reason_of
from ikem_fast.data.map_ahead import default_workers, map_ahead
from ikem_fast.data.preprocess import prepare_clip
from ikem_fast.data.readers import DataError, Protocol, Reader
from ikem_fast.layouts import Layout

BAD_FILES_FILE = "bad_files.csv"
_SHOWN_BAD_FILES = 20
# What ``Summary`` and ``dataset.json`` call the same.
_COUNTS = {"num_train": "train", "num_test": "test", "num_missing": "missing", "num_excluded": "excluded"}


@dataclass
class Summary:
    """What a preparation did.

    Attributes:
        folder: the prepared folder.
        kind: the dataset.
        protocol: name of its protocol.
        num_train: clips in the training split.
        num_test: clips in the test split.
        num_missing: recordings left out because the list of missing skeletons names them.
        num_excluded: recordings that are not part of the protocol.
        bad_files: files that could not be used, in the order of their paths.
        seconds: time taken.
        num_resumed: recordings that an earlier, interrupted run had done.
        already_done: nothing was to be done, as an earlier run had finished with the same parameters.
    """

    folder: Path
    kind: str
    protocol: str
    num_train: int
    num_test: int
    num_missing: int = 0
    num_excluded: int = 0
    bad_files: list[BadFile] = field(default_factory=list)
    seconds: float = 0.0
    num_resumed: int = 0
    already_done: bool = False

    @property
    def num_clips(self) -> int:
        return self.num_train + self.num_test

    def __str__(self) -> str:
        clips = f"{self.num_clips} clips of {self.kind}, {self.protocol}: {self.num_train} train, {self.num_test} test"
        if self.already_done:
            lines = [f"{self.folder} is already prepared: {clips}"]
        else:
            lines = [f"{self.folder}: {clips}; {self.seconds:.1f} s"]
        if self.num_resumed:
            lines.append(f"  {self.num_resumed} recordings were done by an earlier run")
        if self.num_missing:
            lines.append(f"  {self.num_missing} recordings left out by the list of missing skeletons")
        if self.num_excluded:
            lines.append(f"  {self.num_excluded} recordings are not part of {self.protocol}")
        if self.bad_files:
            lines.append(f"  {len(self.bad_files)} bad files left out, listed in {self.folder / BAD_FILES_FILE}:")
            lines.append(_listed(self.bad_files))
        if not self.num_train or not self.num_test:
            lines.append(f"  note: the {'test' if self.num_train else 'training'} split is empty")
        return "\n".join(lines)


def prepare(
    kind: str | Reader,
    source: str | Path,
    out: str | Path,
    *,
    protocol: str | None = None,
    missing: str | Path | None = None,
    layout: str | Path | Layout | None = None,
    num_frames: int = 50,
    centre: bool = True,
    rotate: bool = True,
    workers: int | None = None,
    on_error: str = "fail",
    progress: bool = False,
) -> Summary:
    """Prepares all recordings below a folder as clips (docs/method.md section 1), for ``ClipSet.open``.

    Interrupted at any moment, the same call goes on where it was. Finished, it does nothing. Files whose names begin
    with a dot are passed over; other files that are no recordings count as bad files.

    Args:
        kind: the dataset, one of ``ikem_fast.data.readers.READERS``, or a reader of one's own.
        source: folder of recordings, searched with its subfolders.
        out: folder to make; new, empty, or begun by the same call.
        protocol: which recordings train; the dataset's first by default.
        missing: file with one sample name per line (with or without suffix) to leave out. Lines before the first
            sample name are taken as its heading; a later line that is no sample name is an error.
        layout: name or YAML file of the skeleton the recordings have, where it is not the dataset's own.
        num_frames: T, frames per clip.
        centre: subtract the centre joint.
        rotate: turn the shoulder line parallel to x.
        workers: threads; by default as many as there are CPUs for this process.
        on_error: ``"fail"`` stops at the first bad file, ``"skip"`` leaves bad files out and lists them.
        progress: show a progress bar.

    Raises:
        DataError: a bad file (``"fail"``), nothing usable, a full disk, or a folder that cannot be prepared into.
        layouts.LayoutError: no such layout.
        ExtensionError: NTU text without the package's compiled part.
    """
    reader = kind if isinstance(kind, Reader) else readers.get(kind)
    begin = time.perf_counter()
    protocol = reader.default_protocol if protocol is None else protocol
    if protocol not in reader.protocols:
        raise DataError(f"protocol of {reader.kind} must be one of {', '.join(reader.protocols)}, got {protocol!r}")
    if on_error not in ("fail", "skip"):
        raise DataError(f"on_error must be 'fail' or 'skip', got {on_error!r}")
    if not isinstance(num_frames, int) or num_frames < 1:
        raise DataError(f"num_frames must be a whole number of at least 1, got {num_frames!r}")
    if workers is not None and workers < 1:
        raise DataError(f"workers must be at least 1, got {workers}")
    source, out = Path(source), Path(out)
    if source.resolve() in (out.resolve(), *out.resolve().parents):
        raise DataError(f"out must not lie in the source folder {source}, got {out}")
    job = _Job(
        reader=reader,
        protocol_name=protocol,
        layout=layouts.get(reader.layout if layout is None else layout),
        num_frames=num_frames,
        centre=centre,
        rotate=rotate,
        listing=list_recordings(
            reader,
            source,
            reader.protocols[protocol],
            frozenset() if missing is None else read_missing_list(reader, Path(missing)),
        ),
        out=out,
        skip=on_error == "skip",
        workers=workers or default_workers(),
    )
    try:
        summary = job.run(progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or out}: {error.strerror}; when that is mended, run the same command again to continue"
        ) from error
    summary.seconds = time.perf_counter() - begin
    return summary


@dataclass
class _Job:
    reader: Reader
    protocol_name: str
    layout: Layout
    num_frames: int
    centre: bool
    rotate: bool
    listing: Listing
    out: Path
    skip: bool
    workers: int

    @property
    def protocol(self) -> Protocol:
        return self.reader.protocols[self.protocol_name]

    def parameters(self) -> dict[str, Any]:
        """What the content of the prepared folder depends on, apart from the content of the recordings."""
        names = "\n".join(recording.sample.name for recording in self.listing.recordings)
        return {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "kind": self.reader.kind,
            "protocol": self.protocol_name,
            "num_frames": self.num_frames,
            "centring": self.centre,
            "rotation": self.rotate,
            "num_recordings": len(self.listing.recordings),
            "recordings_sha256": hashlib.sha256(names.encode()).hexdigest(),
            "layout": self.layout.to_dict(),
        }

    def run(self, progress: bool) -> Summary:
        if (self.out / DATASET_FILE).exists():
            return self.summarise_finished()
        self.check_folder()
        self.out.mkdir(parents=True, exist_ok=True)
        clip_shape = (3, self.num_frames, self.layout.num_joints, self.reader.num_persons)
        names = [recording.sample.name for recording in self.listing.recordings]
        with ClipWriter.open(self.out, clip_shape, self.parameters(), names) as writer:
            for begun in leftovers(self.out, BAD_FILES_FILE, SAMPLES_FILE, DATASET_FILE):
                begun.unlink()
            num_resumed = len(writer.outcomes)
            self.check_bad_files(self.listing.unknown_files)
            self.check_bad_files(self.bad_recordings(writer.outcomes))
            self.check_disk_space(writer)
            self.process(writer, progress)
            summary = self.finish(writer)
        remove_journal(self.out)
        summary.num_resumed = num_resumed
        return summary

    def check_folder(self) -> None:
        """The folder may be new, empty, begun by an earlier run, or hold the source."""
        if not self.out.exists() or (self.out / JOURNAL_FILE).exists():
            return
        if not self.out.is_dir():
            raise DataError(f"out must be a folder, got the file {self.out}")
        others = [path.name for path in self.out.iterdir() if path.resolve() != self.listing.source.resolve()]
        if others:
            raise DataError(
                f"out must be a new or empty folder, or one begun by this command: {self.out} holds {min(others)}"
            )

    def check_disk_space(self, writer: ClipWriter) -> None:
        needed = writer.clip_bytes * (len(self.listing.recordings) - len(writer.outcomes))
        free = shutil.disk_usage(self.out).free
        if needed > free:
            raise DataError(f"{self.out}: the clips need {needed / 1e9:.2f} GB more, and the disk has {free / 1e9:.2f}")

    def check_bad_files(self, bad_files: Sequence[BadFile]) -> None:
        """Ends the preparation where bad files are not to be skipped."""
        if not bad_files or self.skip:
            return
        self.write_bad_files(bad_files)
        raise DataError(
            f"{len(bad_files)} bad {'file' if len(bad_files) == 1 else 'files'} in {self.listing.source} "
            f"(on_error 'skip' leaves bad files out and goes on):\n{_listed(bad_files)}"
        )

    def process(self, writer: ClipWriter, progress: bool) -> None:
        recordings = self.listing.recordings
        begin = len(writer.outcomes)
        bar = tqdm(
            total=len(recordings),
            initial=begin,
            unit="clip",
            desc=self.reader.kind,
            mininterval=0.5,
            disable=not progress,
        )
        with bar:
            for recording, (outcome, clip) in zip(recordings[begin:], self.read_all(recordings[begin:]), strict=True):
                if outcome.error is not None:
                    # Not in the journal before this: a file that is mended is read again.
                    self.check_bad_files([BadFile.from_message(recording.file, outcome.error)])
                writer.append(outcome, clip)
                bar.update()

    def read_all(self, recordings: Sequence[Recording]) -> Iterator[tuple[Outcome, np.ndarray | None]]:
        """Reads recordings in threads and gives them in their order."""
        return map_ahead(self.read_one, recordings, self.workers)

    def read_one(self, recording: Recording) -> tuple[Outcome, np.ndarray | None]:
        path = self.listing.source / recording.file
        name = recording.sample.name
        try:
            xyz = self.reader.read(path, self.layout)
            clip, length = prepare_clip(
                xyz, self.layout, self.num_frames, with_centre=self.centre, with_rotation=self.rotate
            )
        except (ValueError, OSError) as error:
            return Outcome(name, error=reason_of(error, path)), None
        return Outcome(name, xyz.shape[1], length), clip

    def bad_recordings(self, outcomes: Sequence[Outcome]) -> list[BadFile]:
        return [
            BadFile.from_message(recording.file, outcome.error)
            for recording, outcome in zip(self.listing.recordings, outcomes, strict=False)
            if outcome.error is not None
        ]

    def write_bad_files(self, bad_files: Sequence[BadFile]) -> None:
        with atomic_open(self.out / BAD_FILES_FILE) as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("file", "line", "reason"))
            writer.writerows((bad.file, bad.line or "", bad.reason) for bad in bad_files)

    def finish(self, writer: ClipWriter) -> Summary:
        """Writes the table and, last of all, the file that makes the folder valid."""
        bad_files = sorted(self.listing.unknown_files + self.bad_recordings(writer.outcomes), key=lambda bad: bad.file)
        self.write_bad_files(bad_files)
        if writer.num_clips == 0:
            raise DataError(
                f"none of the {len(self.listing.recordings)} recordings in {self.listing.source} can be used:\n"
                f"{_listed(bad_files)}"
            )
        writer.finish()
        num_train = 0
        with atomic_open(self.out / SAMPLES_FILE) as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(SAMPLE_COLUMNS)
            for recording, outcome in zip(self.listing.recordings, writer.outcomes, strict=True):
                if outcome.error is not None:
                    continue
                sample = recording.sample
                is_training = self.protocol.is_training(sample)
                num_train += is_training
                table.writerow(
                    [
                        *(sample.name, sample.label, sample.subject, sample.camera, sample.setup, sample.replication),
                        *(outcome.num_frames, outcome.valid_frames, "train" if is_training else "test"),
                    ]
                )
        summary = Summary(
            folder=self.out,
            kind=self.reader.kind,
            protocol=self.protocol_name,
            num_train=num_train,
            num_test=writer.num_clips - num_train,
            num_missing=self.listing.num_missing,
            num_excluded=self.listing.num_excluded,
            bad_files=bad_files,
        )
        counts = {
            "clips": summary.num_clips,
            **{key: getattr(summary, name) for name, key in _COUNTS.items()},
            "bad_files": len(bad_files),
        }
        write_json(
            self.out / DATASET_FILE,
            self.parameters()
            | {
                "class_names": list(self.protocol.class_names),
                "counts": counts,
                "package_version": ikem_fast.__version__,
            },
        )
        return summary

    def summarise_finished(self) -> Summary:
        metadata = read_dataset_file(self.out)
        check_same_parameters(self.out, "prepared", metadata, self.parameters())
        remove_journal(self.out)
        return Summary(
            folder=self.out,
            kind=self.reader.kind,
            protocol=self.protocol_name,
            bad_files=self.read_bad_files(),
            already_done=True,
            **self.read_counts(metadata),
        )

    def read_counts(self, metadata: dict[str, Any]) -> dict[str, int]:
        """The counts of a finished folder, as ``Summary`` has them."""
        counts = metadata.get("counts")
        numbers = [counts.get(key) if isinstance(counts, dict) else None for key in _COUNTS.values()]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise DataError(
                f"{self.out / DATASET_FILE}: counts must have {', '.join(_COUNTS.values())}, got {counts!r}"
            )
        return dict(zip(_COUNTS, numbers, strict=True))

    def read_bad_files(self) -> list[BadFile]:
        path = self.out / BAD_FILES_FILE
        try:
            with open(path, newline="", encoding="utf-8") as file:
                rows = list(csv.reader(file))[1:]
            return [BadFile(file, int(line) if line else None, reason) for file, line, reason in rows]
        except (ValueError, csv.Error) as error:
            raise DataError(f"{path}: damaged: {error}") from None


def _listed(bad_files: Sequence[BadFile]) -> str:
    lines = [f"    {bad}" for bad in bad_files[:_SHOWN_BAD_FILES]]
    if len(bad_files) > _SHOWN_BAD_FILES:
        lines.append(f"    and {len(bad_files) - _SHOWN_BAD_FILES} more")
    return "\n".join(lines)
