"""Runs some steps of training under torch's profiler, by the loop that trains."""

from __future__ import annotations

import copy
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ikem_fast
from ikem_fast import ceilings
from ikem_fast.ceilings import Ceilings, wait_for
from ikem_fast.data import ClipSet, synthetic
from ikem_fast.engine import checkpoints, randomness
from ikem_fast.engine.config import Config, resolve_device, validate
from ikem_fast.engine.interruption import TrainingInterrupted
from ikem_fast.engine.loop import train
from ikem_fast.engine.runs import build_teacher, check_teacher, new_distillation, new_ikem
from ikem_fast.engine.step import WARM_UP_STEPS
from ikem_fast.floors import Work
from ikem_fast.hardware import cpu_name
from ikem_fast.methods.ikem import STAGES
from ikem_fast.profiling.phases import Phase
from ikem_fast.profiling.traces import Times, read_times
from ikem_fast.profiling.work import kind_of, work_of_step

# Steps before any that counts: those that a capture takes, the capture itself, and one more.
WARM_UP = WARM_UP_STEPS + 2
# What is occasional is looked at once; kNN on so many batches of training and as many of test clips.
KNN_BATCHES = 2
# Performers, each of whom performs twelve actions twice before three cameras.
_NUM_SUBJECTS = 4


class ProfileError(ValueError):
    """A request that cannot be profiled; the message says what was expected."""


@dataclass(frozen=True)
class Profile:
    """Some steps of training, looked at.

    Attributes:
        about: what was run and on what, by name.
        times: of the phases.
        plain_step_seconds: of a step while nobody looked, in the same run.
        work: the least work of each phase.
        ceilings: of the device.
        trace: as ``torch.profiler`` exports it, JSON.
    """

    about: dict[str, Any]
    times: Times
    plain_step_seconds: float
    work: dict[Phase, Work]
    ceilings: Ceilings
    trace: bytes


class _Recorder:
    """Called after every step of training: some are timed while nobody looks, then as many are recorded.

    Args:
        device: that is trained on.
        steps: of each kind.
        nvtx: record nothing but let Nsight know when to: ``nsys profile --capture-range=cudaProfilerApi``.
    """

    def __init__(self, device: torch.device, steps: int, nvtx: bool) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        # The first step with a profiler is slow, as it sets itself up; it is left out.
        schedule = torch.profiler.schedule(wait=0, warmup=1, active=1)
        self.profiler = None if nvtx else torch.profiler.profile(activities=activities, schedule=schedule)
        self.seconds = 0.0  # of all steps that were timed
        self._device = device
        self._steps = steps
        self._running = False

    @property
    def num_steps(self) -> int:
        return WARM_UP + self._steps + 1 + self._steps

    def __call__(self, step: int) -> None:
        since = step - WARM_UP
        if since not in (0, self._steps, self._steps + 1):
            return
        wait_for(self._device)
        if since == 0:
            self._begin = time.perf_counter()
        elif since == self._steps:
            self.seconds = time.perf_counter() - self._begin
            self._running = True
            if self.profiler is not None:
                self.profiler.start()
        elif self.profiler is not None:
            self.profiler.step()
        else:
            torch.cuda.profiler.start()

    def stop(self) -> None:
        if self._running and self.profiler is not None:
            self.profiler.stop()
        elif self._running:
            wait_for(self._device)
            torch.cuda.profiler.stop()


def profile_training(
    kind: str,
    config: Config,
    *,
    scratch: Path,
    data: Path | None = None,
    teacher_run: Path | None = None,
    stage: str | None = None,
    steps: int = 5,
    capture: bool = False,
    nvtx: bool = False,
) -> Profile | float:
    """Trains a few steps, of which the last ``steps`` are recorded, with an evaluation by kNN and a checkpoint after.

    Clips come over and over again where there are fewer than the steps need.

    Args:
        kind: ``"pretrain"`` or ``"distill"``.
        config: the whole configuration; all but its schedule, and how often it logs and saves, is taken.
        scratch: an existing folder for what training writes, all of which is removed.
        data: prepared clips; None for the teacher's, or without one for synthetic ones of two persons and 50 frames.
        teacher_run: of a distillation; None for an untrained teacher.
        stage: ``"single"`` or ``"cross"``, of pretraining; None for the last one of the configuration.
        steps: at least 1.
        capture: whether steps run as a CUDA graph, whose phases cannot be told apart.
        nvtx: record nothing, for Nsight Systems to do it.

    Returns:
        What was found; with ``nvtx`` only the seconds of a step.

    Raises:
        ProfileError: an argument that does not fit the others or the device.
        ConfigError, DataError, CheckpointError, RunError: as ``ikem_fast.engine.pretrain`` and ``distill``.
    """
    if steps < 1:
        raise ProfileError(f"steps must be at least 1, got {steps}")
    if stage is not None and (kind != "pretrain" or stage not in STAGES):
        expected = f"one of {', '.join(STAGES)}" if kind == "pretrain" else "left out for distill"
        raise ProfileError(f"stage must be {expected}, got {stage!r}")
    config = copy.deepcopy(config)
    device = resolve_device(config)
    for name, wanted in (("capture", capture), ("nvtx", nvtx)):
        if wanted and device.type != "cuda":
            raise ProfileError(f"{name} needs a CUDA device, got {device}")
    section = getattr(config, kind)
    if kind == "pretrain":
        stage = stage or ("single" if section.cross_epoch is None else "cross")
        section.cross_epoch = 1 if stage == "cross" else None
    section.epochs, section.milestones = 1, []
    config.capture, config.max_steps = capture, None
    logging = config.logging
    occasions = {
        "reading losses back": f"{logging.log_every_steps} steps",
        "kNN": f"{logging.knn_every_epochs} epochs" if logging.knn_every_epochs else "never",
        "checkpoint": f"{logging.save_every_epochs} epochs",
    }
    logging.knn_every_epochs = logging.save_every_epochs = 1
    logging.keep_every_epochs = 0
    num_knn = KNN_BATCHES * section.batch_size
    logging.knn_max_clips = min(logging.knn_max_clips or num_knn, num_knn)
    validate(config)
    recorder = _Recorder(device, steps, nvtx)
    if config.threads is not None:
        torch.set_num_threads(config.threads)

    with tempfile.TemporaryDirectory(prefix=".profile-", dir=scratch) as temporary:
        folder = Path(temporary)
        teacher = None if teacher_run is None else checkpoints.load_of_run(teacher_run)
        if data is None:
            data = _synthetic_clips(folder) if teacher is None else Path(teacher["data"]["folder"])
        clip_set = ClipSet.open(data)
        randomness.seed_everything(config.seed)
        if kind == "pretrain":
            method = new_ikem(clip_set, config)
        elif teacher is None:
            method = new_distillation(new_ikem(clip_set, config), config)
        else:
            teacher = build_teacher(teacher_run, teacher)
            check_teacher(teacher, teacher_run, config, clip_set)
            method = new_distillation(teacher, config)
        found = ceilings.measure(device)
        train_set = clip_set.split("train")
        # As many as make an epoch of all steps, so that what follows an epoch follows the last of them.
        train_set = train_set.subset(np.resize(np.arange(len(train_set)), recorder.num_steps * section.batch_size))
        run_folder = folder / "run"
        run_folder.mkdir()
        try:
            train(
                method,
                train_set,
                kind=kind,
                config=config,
                run_folder=run_folder,
                test_set=clip_set.split("test") if "test" in set(clip_set.splits) else None,
                progress=False,
                after_step=recorder,
            )
        except TrainingInterrupted:
            raise KeyboardInterrupt from None  # not with words about a checkpoint, which is gone
        finally:
            recorder.stop()
        if recorder.profiler is None:
            return recorder.seconds / steps
        recorder.profiler.export_chrome_trace(str(folder / "trace.json"))
        trace = (folder / "trace.json").read_bytes()
    section = getattr(config, kind)
    work = work_of_step(
        method,
        stage or kind,
        num_clips=section.batch_size,
        clip_shape=clip_set.clip_shape,
        num_parts=section.accumulate_steps,
        streamed=config.storage.place == "stream",
        sgd_momentum=section.sgd_momentum > 0,
        limits_gradients=section.max_gradient_norm is not None,
    )
    about = {
        "command": kind,
        "stage": stage or kind,
        "clips": section.batch_size,
        "data": clip_set.metadata["kind"],
        "clip_shape": list(clip_set.clip_shape),
        "modalities": list(method.modalities),
        "hidden_channels": method.hidden_channels,
        "feature_size": method.feature_size,
        "embedding_size": method.embedding_size,
        "queue_size": method.queue_size,
        "precision": kind_of(method),
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "threads": torch.get_num_threads(),
        "captured": capture,
        "steps": steps,
        "knn_clips": logging.knn_max_clips,
        "occasions": occasions,
        "torch": str(torch.__version__),
        "ikem_fast": ikem_fast.__version__,
    }
    return Profile(about, read_times(json.loads(trace)), recorder.seconds / steps, work, found, trace)


def _synthetic_clips(folder: Path) -> Path:
    out = folder / "clips"
    synthetic.prepare_synthetic(out, num_subjects=_NUM_SUBJECTS)
    return out
