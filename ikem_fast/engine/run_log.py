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
import math
import os
import threading
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
        self._hook = _QuietHook()
        try:
            self._file = open(self._path, "ab")  # noqa: SIM115 - open as long as the run
            self._file.truncate(min(position, self._file.tell()))
            self._file.seek(0, 2)
            if tensorboard:
                purge_step = step + 1 if step else None
                self._hook.install()
                self._writer = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=purge_step)
        except OSError as error:
            self.close()
            raise LogError(f"cannot write {self._path}: {error.strerror or error}") from error

    def position(self) -> int:
        """Length of ``log.jsonl`` in bytes, with all lines on the disk, and all events handed to the system.

        A checkpoint that holds the position thus never knows of lines that a power failure, or of events that a killed
        process, takes along. Raises LogError if they cannot be written.
        """
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            if self._writer is not None:
                self._writer.flush()
        except OSError as error:
            raise LogError(f"cannot write {self._path}: {error.strerror or error}") from error
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
        with suppress(OSError, AttributeError):  # there may be no file yet
            self._file.close()
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()
        self._hook.remove()


class _QuietHook:
    """Keeps the thread of TensorBoard's writer from printing the error that it hands over to the next call anyway."""

    def install(self) -> None:
        self._before = threading.excepthook
        threading.excepthook = self

    def remove(self) -> None:
        if threading.excepthook is self:
            threading.excepthook = self._before

    def __call__(self, arguments: threading.ExceptHookArgs) -> None:
        if not (
            isinstance(arguments.exc_value, OSError) and type(arguments.thread).__module__.startswith("tensorboard")
        ):
            self._before(arguments)


def read_log(run_folder: str | Path) -> Iterator[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``; a last line that is still being written is left out.

    Raises:
        LogError: the file cannot be read or a line is damaged; the message names file and line.
    """
    path = Path(run_folder) / LOG_NAME
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed by the block below
    except OSError as error:
        raise LogError(f"cannot read {path}: {error.strerror or error}") from error
    with file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except (ValueError, RecursionError) as error:
                raise LogError(f"{path}: line {number}: damaged: {error}") from error
            problem = _find_problem(line)
            if problem:
                raise LogError(f"{path}: line {number}: damaged: {problem}")
            yield line


def _find_problem(line: Any) -> str | None:
    if not isinstance(line, dict) or line.get("kind") not in list(_FIELDS):
        return f"must be an object whose kind is one of {', '.join(_FIELDS)}"
    for name, kind in _FIELDS[line["kind"]].items():
        value = line.get(name)
        values = value.values() if kind is dict and isinstance(value, dict) else ()
        if isinstance(value, bool) or not isinstance(value, kind) or not all(map(_is_number, values)):
            return f"{name} must be {_IN_WORDS[kind]}, got {value!r}"
        if _is_number(value) and value < 0 and name != "loss":
            return f"{name} must not be negative, got {value!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf


_WHERE = {"epoch": int, "step": int}
# What every line of a kind has; older versions of the package wrote train lines without "contrast_accuracy".
_FIELDS: dict[str, dict[str, Any]] = {
    "train": {
        **_WHERE,
        "stage": str,
        "learning_rate": (int, float),
        "loss": (int, float),
        "losses": dict,
        "clips_per_second": (int, float),
        "seconds": (int, float),
    },
    "knn": {**_WHERE, "accuracy": dict},
    "note": {**_WHERE, "text": str},
}
_IN_WORDS = {int: "a whole number", str: "text", (int, float): "a number", dict: "numbers by name"}
