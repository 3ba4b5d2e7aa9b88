"""``pretrain`` and ``distill``: open the data, make or continue the run folder, build the method, train it."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ikem_fast.atomic import leftovers
from ikem_fast.data import ClipSet
from ikem_fast.data.preparation import Preparation
from ikem_fast.engine import checkpoints, randomness
from ikem_fast.engine.config import (
    EVALUATION_SECTIONS,
    Config,
    differences,
    load_config,
    resolve_quirks,
    save_config,
    to_dict,
    validate,
)
from ikem_fast.engine.loop import clips_of_statistics, count_steps, train
from ikem_fast.engine.run_log import LOG_NAME, TENSORBOARD_FOLDER
from ikem_fast.engine.world import World, is_restart, joined
from ikem_fast.layouts import Layout, list_differences
from ikem_fast.layouts import from_dict as layout_from_dict
from ikem_fast.methods import IKEM, RelationalDistillation

CONFIG_NAME = "config.yaml"
# What a run may change when it goes on: none of it has a part in the losses, rounding aside.
_MAY_CHANGE = (
    *("max_steps", "device", "threads", "capture", "logging.", "evaluation."),
    *(f"{section}." for section in EVALUATION_SECTIONS),
    *("distributed.queue", "distributed.timeout_minutes"),
)


class RunError(ValueError):
    """A run folder or a request that does not fit together; the message says what differs and what to do."""


def pretrain(
    data_folder: str | Path, out: str | Path, config: Config, *, restart: bool = False, progress: bool = True
) -> Path:
    """Pretrains IKEM on the training split of a prepared folder (docs/method.md sections 5 and 6).

    A run folder that already holds a checkpoint is continued if data and configuration agree with it. Under
    ``torchrun`` all processes train one run together (docs/distributed.md).

    Args:
        data_folder: what ``python -m ikem_fast.data prepare`` wrote.
        out: the run folder; made if it does not exist.
        config: see ``ikem_fast.engine.config.load_config``.
        restart: delete the run that the folder holds and start over; not in a process that ``torchrun`` restarted.
        progress: whether to show a progress bar and a line on what is run.

    Returns:
        The run folder.

    Raises:
        RunError: the folder holds a run that differs in configuration or data, or another process trains in it.
        ConfigError, CheckpointError, NonFiniteError, TrainingInterrupted: see ``ikem_fast.engine.loop.train``.
        RankError: another process ended before its time, or the processes do not fit together.
    """
    validate(config)
    out = Path(out)
    with joined() as world:
        clip_set = ClipSet.open(data_folder)
        _run(out, "pretrain", config, clip_set, {}, lambda: new_ikem(clip_set, config), restart, progress, world)
    return out


def distill(
    data_folder: str | Path | None,
    teacher_run: str | Path,
    out: str | Path,
    config: Config | None = None,
    *,
    restart: bool = False,
    progress: bool = True,
) -> Path:
    """Distils a pretraining run into students of fewer modalities (docs/method.md section 7).

    Args:
        data_folder: what ``python -m ikem_fast.data prepare`` wrote; None = what the teacher was trained on.
        teacher_run: run folder of a finished or unfinished pretraining, which is only read.
        out: the run folder; made if it does not exist, continued if it holds a run that agrees.
        config: its section ``model`` must describe the teacher; None = the teacher's configuration.
        restart: delete the run that the folder holds and start over.
        progress: whether to show a progress bar and a line on what is run.

    Returns:
        The run folder.

    Raises:
        RunError, CheckpointError: the teacher's run is missing or no pretraining, or its encoders do not fit the
            configuration or the data; and as ``pretrain``.
    """
    out, teacher_run = Path(out), Path(teacher_run)
    with joined() as world:
        _distill(data_folder, teacher_run, out, config, restart, progress, world)
    return out


def _distill(
    data_folder: str | Path | None,
    teacher_run: Path,
    out: Path,
    config: Config | None,
    restart: bool,
    progress: bool,
    world: World,
) -> None:
    teacher_checkpoint = world.from_writer(lambda: checkpoints.load_of_run(teacher_run))
    teacher = build_teacher(teacher_run, teacher_checkpoint)
    if out.resolve() == teacher_run.resolve():
        raise RunError(f"out must be another folder than the teacher's run, got {out} for both")
    config = load_config(teacher_checkpoint["config"]) if config is None else config
    validate(config)
    clip_set = ClipSet.open(teacher_checkpoint["data"]["folder"] if data_folder is None else data_folder)
    check_teacher(teacher, teacher_run, config, clip_set)
    extra = {"teacher": {"run": str(teacher_run.resolve()), "step": teacher_checkpoint["step"]}}
    _run(out, "distill", config, clip_set, extra, lambda: new_distillation(teacher, config), restart, progress, world)


def build_teacher(teacher_run: Path, checkpoint: Mapping[str, Any]) -> IKEM:
    """The module of a run's checkpoint, in eval mode. Raises RunError where the run is no pretraining."""
    teacher = checkpoints.build_method(teacher_run / checkpoints.FOLDER / checkpoints.LAST, checkpoint).eval()
    if not isinstance(teacher, IKEM):
        raise RunError(f"teacher must be a run of 'pretrain', got {teacher_run}, a run of {checkpoint['kind']!r}")
    return teacher


def new_ikem(clip_set: ClipSet, config: Config) -> IKEM:
    """An untrained module for clips of a set's skeleton."""
    return IKEM(clip_set.layout, **dataclasses.asdict(config.model), quirks=resolve_quirks(config))


def new_distillation(teacher: IKEM, config: Config) -> RelationalDistillation:
    """A teacher with untrained students."""
    section = config.distill
    return RelationalDistillation.from_teacher(
        teacher,
        student_modalities=section.student_modalities,
        queue_size=section.queue_size,
        temperature=section.temperature,
        topk=section.topk,
        dropout=section.dropout,
        precision=config.model.precision,
        quirks=resolve_quirks(config),
    )


def check_teacher(teacher: IKEM, teacher_run: Path, config: Config, clip_set: ClipSet) -> None:
    """Raises RunError with a list of all in which teacher, configuration and clips do not agree."""
    wrong = []
    for name in ("modalities", "hidden_channels", "feature_size", "embedding_size", "queue_size"):
        of_teacher = list(teacher.modalities) if name == "modalities" else getattr(teacher, name)
        given = getattr(config.model, name)
        if given != of_teacher:
            wrong.append(f"model.{name} must be {of_teacher!r} as in the teacher, got {given!r}")
    if wrong:
        wrong[-1] += " (leave the configuration out to take the teacher's)"
    differing = list_differences(clip_set.layout, teacher.layout)
    if differing:
        of_data, of_teacher = (f"{each.name} ({each.num_joints} joints)" for each in (clip_set.layout, teacher.layout))
        wrong.append(
            f"data and teacher must have the same skeleton, got {of_data} in {clip_set.folder} and {of_teacher} in "
            f"{teacher_run}: {', '.join(differing)}"
        )
    if wrong:
        raise RunError(f"{teacher_run} cannot teach this run: {'; '.join(wrong)}")


def _run(
    out: Path,
    kind: str,
    config: Config,
    clip_set: ClipSet,
    extra: Mapping[str, Any],
    new_method: Callable[[], IKEM | RelationalDistillation],
    restart: bool,
    progress: bool,
    world: World,
) -> None:
    # Whatever can be found wrong is found before a file is made, and before a run that is there is deleted.
    train_set = clip_set.split("train")
    test_set = clip_set.split("test") if "test" in set(clip_set.splits) else None
    count_steps(train_set, kind, config, world.size)
    world.device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = {
        "folder": str(Path(clip_set.folder).resolve()),
        "fingerprint": fingerprint(train_set),
        "num_classes": clip_set.num_classes,
        # So that the run can be used on recordings when the folder is gone.
        "preparation": Preparation.of_clips(clip_set).to_dict(),
    }
    for rank, of_rank in enumerate(world.gather_all(data["fingerprint"])):
        if of_rank != data["fingerprint"]:
            raise RunError(f"all ranks must have the same clips, got others in {data['folder']} on rank {rank}")
    randomness.seed_everything(config.seed)
    method = new_method()
    if config.distributed.queue == "sharded" and method.queue_size % world.size:
        raise RunError(
            f"queues of {method.queue_size} keys cannot be shared equally by {world.size} processes: choose another "
            "queue_size or distributed.queue=whole"
        )
    if restart and is_restart():
        restart = False
        world.show(f"--restart was for the first attempt: this one goes on with what {out} holds")

    with ExitStack() as stack:
        world.on_writer(lambda: stack.enter_context(_locked(out)))
        checkpoint = world.from_writer(
            lambda: _open_folder(out, kind, config, clip_set.layout, data, extra, restart, world.size)
        )
        if progress and world.is_writer:
            _announce(out, kind, config, method, train_set, checkpoint, world.size)
        train(
            method,
            train_set,
            kind=kind,
            config=config,
            run_folder=out,
            test_set=test_set,
            checkpoint=checkpoint,
            extra={"data": data, **extra},
            progress=progress,
            world=world,
        )


def _open_folder(
    out: Path,
    kind: str,
    config: Config,
    layout: Layout,
    data: Mapping[str, Any],
    extra: Mapping[str, Any],
    restart: bool,
    num_ranks: int,
) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any; the folder is ready for the run then."""
    header = f"Resolved configuration of: {kind} on {data['folder']}"
    if "teacher" in extra:
        header += f", taught by {extra['teacher']['run']}"
    try:
        checkpoint = None if restart else _checkpoint_to_continue(out, kind, config, layout, data, extra, num_ranks)
    except OSError as error:
        raise RunError(f"run folder {out} cannot be read: {error.strerror or error}") from error
    try:
        if checkpoint is None:
            _clear(out)
        # Of files that a killed process did not finish writing, or linking.
        begun = [path for end in ("tmp", "link") for path in (out / checkpoints.FOLDER).glob(f".*.{end}")]
        for leftover in [*begun, *leftovers(out, CONFIG_NAME)]:
            leftover.unlink()
        save_config(config, out / CONFIG_NAME, header)
    except OSError as error:
        raise RunError(f"run folder {out} cannot be written: {error.strerror or error}") from error
    return checkpoint


def _announce(
    out: Path,
    kind: str,
    config: Config,
    method: torch.nn.Module,
    train_set: ClipSet,
    checkpoint: Any,
    num_ranks: int,
) -> None:
    batch_size = getattr(config, kind).batch_size
    trained = sum(parameter.numel() for parameter in method.parameters() if parameter.requires_grad)
    start = f"going on after epoch {checkpoint['epoch']}, step {checkpoint['step']}" if checkpoint else "new run"
    print(
        f"{kind}: {len(train_set)} clips, {len(train_set) // batch_size} steps of {batch_size} an epoch, "
        f"{trained / 1e6:.2f} M trained parameters, {start}, in {out}"
        + (f", on {num_ranks} processes" if num_ranks > 1 else ""),
        file=sys.stderr,
        flush=True,
    )


def fingerprint(clip_set: ClipSet) -> str:
    """A digest that tells two sets of clips apart: every name, label and length, and 16 clips of them in full."""
    digest = hashlib.sha256()
    digest.update(json.dumps([list(clip_set.names), clip_set.layout.to_dict()]).encode())
    for values in (clip_set.labels, clip_set.num_frames, clip_set.valid_frames):
        digest.update(np.asarray(values, dtype=np.int64).tobytes())
    some = np.unique(np.linspace(0, len(clip_set) - 1, 16).round().astype(np.int64))
    digest.update(clip_set.batch(some).clips.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _checkpoint_to_continue(
    out: Path,
    kind: str,
    config: Config,
    layout: Layout,
    data: Mapping[str, Any],
    extra: Mapping[str, Any],
    num_ranks: int,
) -> dict[str, Any] | None:
    """The run's last checkpoint if there is one and it agrees with what is asked for; None for a new run."""
    folder = out / checkpoints.FOLDER
    path = folder / checkpoints.LAST
    if not path.exists() and not list(folder.glob("*.pt")):
        return None
    checkpoint = checkpoints.load(path)
    wrong = []
    if checkpoint["kind"] != kind:
        wrong.append(f"the command is {kind}, not {checkpoint['kind']}")
    with checkpoints.using(path, "configuration"):
        for key, (old, new) in differences(checkpoint["config"], to_dict(config)).items():
            if not _change_is_harmless(key, new, kind, checkpoint, config, num_ranks):
                wrong.append(f"{key} is {new!r}, not {old!r}")
    with checkpoints.using(path, "layout"):
        wrong += list_differences(layout, layout_from_dict(checkpoint["method"].get("layout")))
    if data["fingerprint"] != checkpoint["data"]["fingerprint"]:
        wrong.append(f"the clips of {data['folder']} are not those of {checkpoint['data']['folder']}")
    if checkpoint["kind"] == kind and extra.get("teacher") != checkpoint.get("teacher"):
        wrong.append(f"the teacher is {_in_words(extra.get('teacher'))}, not {_in_words(checkpoint.get('teacher'))}")
    if not wrong:
        return checkpoint
    if checkpoint["step"] == 0:
        return None  # nothing was trained yet, so nothing can be lost
    raise RunError(
        f"{out} holds a run that cannot be continued like this: {'; '.join(wrong)}. "
        "Give the run's own settings to continue it, another --out, or --restart to delete it and start over"
    )


def _in_words(teacher: Mapping[str, Any] | None) -> str:
    return "none" if teacher is None else f"{teacher['run']} at step {teacher.get('step')}"


def _change_is_harmless(
    key: str, new: Any, kind: str, checkpoint: Mapping[str, Any], config: Config, num_ranks: int
) -> bool:
    other = "distill." if kind == "pretrain" else "pretrain."
    if checkpoint["kind"] != kind and key.startswith(("pretrain.", "distill.")):
        return True  # that the command is another one is said already
    if key.startswith((*_MAY_CHANGE, other)):
        return True
    if key == f"{kind}.accumulate_steps":
        # The same parts of a batch may be one process's one after another or those of several at a time.
        ranks_before = 1 + len(checkpoint.get("random_states_of_other_ranks", []))
        before = clips_of_statistics(load_config(checkpoint["config"]), kind, ranks_before)
        return clips_of_statistics(config, kind, num_ranks) == before
    # More epochs, or fewer that are not over yet, change nothing in those that were.
    return key == f"{kind}.epochs" and new >= checkpoint["epoch"]


def _clear(out: Path) -> None:
    """Removes the files of a run, and nothing else that may lie in the folder."""
    for path in (out / name for name in (checkpoints.FOLDER, TENSORBOARD_FOLDER, "evaluation", LOG_NAME)):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """The run folder, made if need be, for this process alone; the system lifts the lock however the process ends."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open(out / ".lock", "ab")  # noqa: SIM115 - open as long as the lock is held
    except OSError as error:
        raise RunError(f"run folder {out} cannot be used: {error.strerror or error}") from error
    with file:
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system
            yield
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RunError(f"another process is training in {out}: wait for it or give another --out") from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                raise RunError(f"run folder {out} cannot be locked: {error.strerror or error}") from error
            print(f"note: the file system of {out} has no locks: let no other process train there", file=sys.stderr)
        yield
