"""What a run writes down as it goes: ``log.jsonl``, one JSON object a line, and the same as TensorBoard events.

Three kinds of line::

    {"kind": "train", "epoch": 1, "step": 10, "stage": "single", "learning_rate": 0.1, "loss": 31.2,
     "losses": {"single/joint": 5.2, ...}, "contrast_accuracy": {"single/joint": 0.02, ...}, "steps": 10,
     "clips_per_second": 123.4, "seconds": 12.3}
    {"kind": "knn", "epoch": 5, "step": 40, "accuracy": {"joint": 0.43, ..., "all": 0.5}}
    {"kind": "note", "epoch": 1, "step": 0, "text": "..."}

Losses and the accuracy of the contrast (how often a clip's positive is more similar than every key of the queue) are
means over the last ``steps`` steps, ``seconds`` counts training time since the run began, over all resumes, and
accuracies are fractions. A note is a sentence for whoever looks after the run, such as why its steps are not captured
as a CUDA graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

LOG_NAME = "log.jsonl"
TENSORBOARD_FOLDER = "tensorboard"


class LogError(RuntimeError):
    """The log cannot be written; the message names the file and the reason."""


class RunLog:
    """Appends to a run's log files.

    Args:
        folder: the run folder.
        position: length in bytes of ``log.jsonl`` at the checkpoint the run goes on from, 0 for a new run. What
            follows it was written after that checkpoint and will be written again, so it is cut off.
        step: the checkpoint's step; TensorBoard hides events after it.
        tensorboard: whether to write TensorBoard events.
    """

    def __init__(self, folder: Path, *, position: int = 0, step: int = 0, tensorboard: bool = True) -> None:
        self._path = folder / LOG_NAME
        self._writer = None
        try:
            self._file = open(self._path, "ab")  # noqa: SIM115 - open as long as the run
            self._file.truncate(min(position, self._file.tell()))
            self._file.seek(0, 2)
            if tensorboard:
                purge_step = step + 1 if step else None
                self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge_step)
        except OSError as error:
            raise LogError(f"cannot write {self._path}: {error.strerror or error}") from error

    def position(self) -> int:
        """Length of ``log.jsonl`` in bytes, with all lines on their way to the disk."""
        self._file.flush()
        return self._file.tell()

    def write(self, line: Mapping[str, Any], events: bool = True) -> None:
        """Appends one line, and unless told otherwise its TensorBoard events. Raises LogError if that is impossible."""
        try:
            self._file.write(json.dumps(line).encode() + b"\n")
            self._file.flush()
            if events:
                self._write_events(line)
        except OSError as error:
            raise LogError(f"cannot write {self._path}: {error.strerror or error}") from error

    def _write_events(self, line: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        step = line["step"]
        if line["kind"] == "train":
            for name in ("loss", "learning_rate", "clips_per_second", "epoch"):
                self._writer.add_scalar(f"train/{name}", line[name], step)
            for name, value in line["losses"].items():
                self._writer.add_scalar(f"loss/{name}", value, step)
            for name, value in line["contrast_accuracy"].items():
                self._writer.add_scalar(f"contrast_accuracy/{name}", value, step)
        elif line["kind"] == "note":
            self._writer.add_text("note", line["text"], step)
        else:
            for name, value in line["accuracy"].items():
                self._writer.add_scalar(f"knn/{name}", value, step)

    def close(self) -> None:
        # On a full disk closing fails once more, and would hide the error that says so.
        with suppress(OSError):
            self._file.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()


def read_log(run_folder: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``; a last line that is still being written is left out."""
    with open(Path(run_folder) / LOG_NAME, encoding="utf-8") as file:
        for text in file:
            if text.endswith("\n"):
                yield json.loads(text)
