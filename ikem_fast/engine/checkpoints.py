"""Checkpoints: one file with everything a run needs to go on, written atomically and read as plain values only."""

from __future__ import annotations

import os
import pickle
import platform
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ikem_fast
from ikem_fast import methods
from ikem_fast.atomic import atomic_open

FORMAT = "ikem_fast checkpoint"
FORMAT_VERSION = 2
FOLDER = "checkpoints"
LAST = "last.pt"
PREVIOUS = "previous.pt"
_REQUIRED: dict[str, type] = {
    "kind": str,
    "method": dict,
    "model": dict,
    "optimizer": dict,
    "random_state": dict,
    "epoch": int,
    "epoch_done": bool,
    "step_in_epoch": int,
    "step": int,
    "seconds": float,
    "log_position": int,
    "unlogged": list,
    "unlogged_names": list,
    "config": dict,
    "data": dict,
    "versions": dict,
}


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, written or used; the message names the file and what to do."""


def versions() -> dict[str, str]:
    """Versions that a checkpoint records."""
    return {
        "ikem_fast": ikem_fast.__version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def save(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Writes a checkpoint of plain values and tensors; ``path`` holds the old or the new one, never half of one.

    Raises:
        CheckpointError: the file cannot be written (disk full, no permission).
    """
    complete = {"format": FORMAT, "format_version": FORMAT_VERSION, **checkpoint}
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_open(path, "wb") as file:
            torch.save(complete, file)
    except (OSError, RuntimeError) as error:
        # torch's writer reports a failed write as a RuntimeError that hides the OSError it came from.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        reason = cause.strerror if isinstance(cause, OSError) and cause.strerror else first_line(error)
        raise CheckpointError(f"cannot write checkpoint {path}: {reason}{_usable_beside(path)}") from error


def rotate_and_save(folder: Path, checkpoint: Mapping[str, Any]) -> Path:
    """Writes ``last.pt``; the file of that name before it stays as ``previous.pt``."""
    last = folder / LAST
    if last.exists():
        # At no moment is there no last.pt. Where there are no hard links there is no previous.pt; last.pt is complete.
        _link(last, folder / PREVIOUS)
    save(last, checkpoint)
    return last


def keep(last: Path, kept: Path, checkpoint: Mapping[str, Any]) -> None:
    """Keeps a checkpoint that was just written under a second name, without writing it again where that is possible."""
    if not _link(last, kept):
        save(kept, checkpoint)


def _link(path: Path, name: Path) -> bool:
    """Makes ``name`` a second name of a file, in place of what it was; False where there are no hard links."""
    temporary = name.with_name(f".{name.name}.link")
    try:
        temporary.unlink(missing_ok=True)
        os.link(path, temporary)
        os.replace(temporary, name)
    except OSError:
        return False
    finally:
        temporary.unlink(missing_ok=True)
    return True


def load(path: str | Path) -> dict[str, Any]:
    """Reads and checks a checkpoint, its tensors on the CPU.

    Raises:
        CheckpointError: missing, damaged, no checkpoint of this package, or of a later format. For a damaged
            ``last.pt`` the message names the newest readable checkpoint beside it.
    """
    path = Path(path)
    try:
        return _load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_usable_beside(path)}") from error


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist")
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except pickle.UnpicklingError as error:
        if zipfile.is_zipfile(path):
            reason = "holds more than plain values and tensors, which this package neither writes nor loads"
        else:
            reason = "is damaged or no checkpoint"
        raise CheckpointError(f"checkpoint {path} {reason}") from error
    except (
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
    ) as error:
        # Bytes that are no torch archive fail in as many ways as there are bytes.
        raise CheckpointError(f"checkpoint {path} is damaged or cut short: {first_line(error)}") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"checkpoint {path} was not written by this package's training commands")
    if checkpoint.get("format_version") != FORMAT_VERSION:
        found = checkpoint.get("format_version")
        raise CheckpointError(f"checkpoint {path} must have format version {FORMAT_VERSION}, got {found!r}")
    for key, kind in _REQUIRED.items():
        if not isinstance(checkpoint.get(key), kind):
            found = type(checkpoint[key]).__name__ if key in checkpoint else "nothing"
            raise CheckpointError(f"checkpoint {path} must hold {key!r} as {kind.__name__}, got {found}")
    return checkpoint


def _check_sums(path: Path) -> None:
    """Raises BadZipFile where a checksum is wrong: torch writes them but does not look at them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} is wrong")


def describe(path: Path, checkpoint: Mapping[str, Any]) -> str:
    """A checkpoint's file and how far it is, for messages."""
    return f"{path} (epoch {checkpoint['epoch']}, step {checkpoint['step']})"


def _usable_beside(path: Path) -> str:
    """In words, the newest readable checkpoint in the same folder, for error messages."""
    readable = []
    for other in sorted(path.parent.glob("*.pt")):
        try:
            readable.append((other, _load(other)))
        except CheckpointError:
            continue
    if not readable:
        return ""
    other, checkpoint = max(readable, key=lambda pair: (pair[1]["step"], pair[0].name == LAST))
    usable = f"; {describe(other, checkpoint)} is usable"
    return usable if other.name == LAST else f"{usable}: copy it to {path.parent / LAST} to go on from there"


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its kind."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def load_of_run(run_folder: str | Path) -> dict[str, Any]:
    """The last checkpoint of a run.

    Raises:
        CheckpointError: the folder holds no run or its checkpoint is unusable.
    """
    path = Path(run_folder) / FOLDER / LAST
    if not path.is_file():
        raise CheckpointError(f"{run_folder} holds no run: {path} does not exist{_usable_beside(path)}")
    return load(path)


def load_run(run_folder: str | Path) -> tuple[methods.IKEM | methods.RelationalDistillation, dict[str, Any]]:
    """The trained module of a run, in eval mode on the CPU, and its checkpoint.

    Raises:
        CheckpointError: the folder holds no run or its checkpoint is unusable.
    """
    checkpoint = load_of_run(run_folder)
    return build_method(Path(run_folder) / FOLDER / LAST, checkpoint).eval(), checkpoint


def build_method(path: Path, checkpoint: Mapping[str, Any]) -> methods.IKEM | methods.RelationalDistillation:
    """A module with the sizes and weights of a checkpoint."""
    # Random initial weights would only be overwritten, and must not move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        try:
            method = methods.from_config(checkpoint["method"])
            method.load_state_dict(checkpoint["model"])
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"checkpoint {path} does not fit its own description: {reason}") from error
    return method
