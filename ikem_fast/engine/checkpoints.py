"""Checkpoints: one file with everything a run needs to go on, written atomically and read as plain values only."""

from __future__ import annotations

import math
import os
import pickle
import platform
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ikem_fast
from ikem_fast import methods
from ikem_fast.archives import check_archive
from ikem_fast.atomic import atomic_open
from ikem_fast.tensors import list_differences, listed

FORMAT = "ikem_fast checkpoint"
FORMAT_VERSION = 2
FOLDER = "checkpoints"
LAST = "last.pt"
PREVIOUS = "previous.pt"
KINDS = ("pretrain", "distill")
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
    try:
        if not path.is_file():
            raise CheckpointError(f"checkpoint {path} does not exist")
        check_archive(path)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint: {first_line(error)}") from error
    except pickle.UnpicklingError as error:
        reason = "holds more than plain values and tensors, which this package neither writes nor loads"
        raise CheckpointError(f"checkpoint {path} {reason}") from error
    except CheckpointError:
        raise
    except Exception as error:  # an archive of something else fails in as many ways as there are archives
        raise CheckpointError(f"checkpoint {path} is damaged or no checkpoint: {first_line(error)}") from error
    # Tensors, which may stand anywhere, compare in their own way: types come first.
    if not isinstance(checkpoint, dict) or not _is_same(checkpoint.get("format"), FORMAT):
        raise CheckpointError(f"checkpoint {path} was not written by this package's training commands")
    if not _is_same(checkpoint.get("format_version"), FORMAT_VERSION):
        found = checkpoint.get("format_version")
        raise CheckpointError(f"checkpoint {path} must have format version {FORMAT_VERSION}, got {found!r}")
    for key, kind in _REQUIRED.items():
        if not isinstance(checkpoint.get(key), kind):
            found = type(checkpoint[key]).__name__ if key in checkpoint else "nothing"
            raise CheckpointError(f"checkpoint {path} must hold {key!r} as {kind.__name__}, got {found}")
    problems = _find_problems(checkpoint)
    if problems:
        raise CheckpointError(f"checkpoint {path} cannot be used: {listed(problems)}")
    return checkpoint


def _is_same(found: Any, expected: str | int) -> bool:
    return type(found) is type(expected) and found == expected


def _find_problems(checkpoint: Mapping[str, Any]) -> list[str]:
    """What is wrong with values that are of the right type."""
    problems = []
    if checkpoint["kind"] not in KINDS:
        problems.append(f"kind must be {' or '.join(KINDS)}, got {checkpoint['kind']!r}")
    for key in ("epoch", "step_in_epoch", "step", "seconds", "log_position"):
        value = checkpoint[key]
        if isinstance(value, bool) or not (0 <= value < math.inf and value < 2**63):
            problems.append(f"{key} must be a number from 0 on, got {value!r}")
    for key in ("folder", "fingerprint"):
        if not isinstance(checkpoint["data"].get(key), str):
            problems.append(f"data must have its {key} as text, got {checkpoint['data'].get(key)!r}")
    if not isinstance(checkpoint["optimizer"].get("state"), dict):
        problems.append("optimizer must have its state")
    names = checkpoint["unlogged_names"]
    if not all(isinstance(name, str) for name in names):
        problems.append(f"unlogged_names must be text, got {names!r}")
    for row in checkpoint["unlogged"]:
        if not isinstance(row, torch.Tensor) or row.shape != (len(names),) or not row.is_floating_point():
            problems.append(f"unlogged must be tensors of {len(names)} values each, one for every name")
            break
    others = checkpoint.get("random_states_of_other_ranks", [])
    if not isinstance(others, list) or not all(isinstance(state, dict) for state in others):
        problems.append("random_states_of_other_ranks must be a list of states")
    teacher = checkpoint.get("teacher")
    if teacher is not None and not (
        isinstance(teacher, dict) and isinstance(teacher.get("run"), str) and isinstance(teacher.get("step"), int)
    ):
        problems.append(f"teacher must say which run it is, at which step, got {teacher!r}")
    return problems


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
    if not os.path.lexists(path):
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
    """A module with the sizes and weights of a checkpoint.

    Raises:
        CheckpointError: the description makes no module, or the weights are not those of such a module; the message
            lists what differs.
    """
    # Random initial weights would only be overwritten, and must not move the caller's random state.
    with torch.random.fork_rng(devices=[]):
        try:
            _check_sizes(checkpoint)
            method = methods.from_config(checkpoint["method"])
        except Exception as error:  # a description of odd values fails in as many ways as there are values
            reason = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(
                f"checkpoint {path} describes no method that could be built: {' '.join(reason.split())}"
            ) from error
    load_weights(method, path, checkpoint)
    return method


def _check_sizes(checkpoint: Mapping[str, Any]) -> None:
    """Raises ValueError for a description of sizes that no tensor of the checkpoint has, before memory is taken."""
    largest = max((size for tensor in checkpoint["model"].values() for size in getattr(tensor, "shape", ())), default=0)
    for name, value in checkpoint["method"].items():
        if isinstance(value, int) and value > largest:
            raise ValueError(f"{name} is {value}, but no tensor has a dimension above {largest}")


def load_weights(
    method: methods.IKEM | methods.RelationalDistillation, path: Path, checkpoint: Mapping[str, Any]
) -> None:
    """Copies all tensors of a checkpoint into a module.

    Raises:
        CheckpointError: they are not exactly those of the module; the message lists the differences.
    """
    expected, found = method.state_dict(), checkpoint["model"]
    # Sizes first: they say in a word what hundreds of shapes come from.
    own, others = _sizes(expected), _sizes(found)
    problems = [f"{name} is {size}, not {own[name]}" for name, size in others.items() if own.get(name, size) != size]
    problems += list_differences(expected, found)
    if not problems:
        problems = [
            f"{name} must be finite"
            for name, tensor in found.items()
            if tensor.is_floating_point() and not tensor.isfinite().all()
        ]
        problems += [
            f"{name} must be a position from 0 to {method.queue_size - 1}, got {found[name].tolist()}"
            for name in expected
            if name.endswith("queue_pointer") and not ((found[name] >= 0) & (found[name] < method.queue_size)).all()
        ]
    if problems:
        raise CheckpointError(
            f"the weights in checkpoint {path} are not those of {type(method).__name__} with layout "
            f"'{method.layout.name}' and modalities {', '.join(method.modalities)}: {listed(problems)}"
        )
    method.load_state_dict(found)


def _sizes(tensors: Mapping[str, Any]) -> dict[str, int]:
    """What the shapes of a method's tensors say of its sizes."""
    places = {"queue": {"number of modalities": 0, "embedding_size": 1, "queue_size": 2}}
    for encoders in ("query_encoders", "teacher_encoders"):
        places[f"{encoders}.graph.adjacency"] = {"number of joints": 2}
        places[f"{encoders}.blocks.0.graph_conv.bias"] = {"hidden_channels": 2}
        places[f"{encoders}.head.0.weight"] = {"feature_size": 2}
    return {
        size: tensors[name].shape[dimension]
        for name, sizes in places.items()
        for size, dimension in sizes.items()
        if isinstance(tensors.get(name), torch.Tensor) and tensors[name].dim() == 3
    }


@contextmanager
def using(path: Path, part: str) -> Iterator[None]:
    """Explains an error within the block as one in a part of a checkpoint."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: its {part}: {first_line(error)}") from error
