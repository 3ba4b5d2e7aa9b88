"""Kills runs with SIGKILL at random moments, repeats the command each time, and compares the end with a run left alone.

    python scripts/crash_test.py                      # pretrain, distill and data prepare, 20 kills each; some minutes
    python scripts/crash_test.py --only distill --kills 100 --seed 7

Each attempt is a process that is forked from this one, so that it does not take seconds to import everything. Half of
the moments are random in time, for the others a phase is awaited, such as the writing of a checkpoint, and the process
killed some way into it. The seed decides on what is tried; what a kill hits depends on the machine too.

A run passes if all losses and accuracies in log.jsonl, the TensorBoard events, every tensor and value of every
checkpoint and the resolved configuration are bit for bit those of the run that nobody killed (times apart), and if
after each kill the last checkpoint is readable. A preparation passes if its folder holds the same files with the same
bytes.
"""

from __future__ import annotations

import argparse
import faulthandler
import functools
import logging
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch

from ikem_fast import engine
from ikem_fast.data import journal, pipeline, synthetic
from ikem_fast.engine import checkpoints, loop, run_log, runs
from ikem_fast.engine.step import TrainingStep

# What a process does while a function runs; the innermost one counts.
PHASES: dict[str, tuple[tuple[Any, str], ...]] = {
    "start": (),
    "training step": ((TrainingStep, "__call__"),),
    "checkpoint": ((checkpoints, "save"), (checkpoints, "_link"), (checkpoints, "keep")),
    "log": ((run_log.RunLog, "write"), (run_log.RunLog, "position")),
    "kNN accuracy": ((loop, "extract"), (loop, "evaluate_knn")),
    "run folder": ((runs, "_open_folder"), (runs, "_locked")),
    "recordings": ((synthetic, "_write_performance"), (synthetic, "_begin_folder")),
    "clips": ((journal.ClipWriter, "append"),),
    "journal": ((journal.ClipWriter, "checkpoint"), (journal.ClipWriter, "_resume")),
    "table": ((pipeline._Job, "finish"),),
}
NAMES = tuple(PHASES)
_HANG_SECONDS = 600.0


class Failed(Exception):
    """A run that did not come to the same end; the message says how it differs."""


class Monitor:
    """Shared memory in which a process says what it is doing, and how often it began to."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 8 * (1 + len(NAMES)))

    def _read(self, index: int) -> int:
        return struct.unpack_from("q", self._memory, 8 * index)[0]

    def _write(self, index: int, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * index, value)

    @property
    def phase(self) -> str:
        return NAMES[self._read(0)]

    def count(self, phase: str) -> int:
        return self._read(1 + NAMES.index(phase))

    def reaches(self, phase: str, count: int) -> Callable[[], bool]:
        """Whether the process has begun something so often, to be asked again and again."""
        return lambda: self.count(phase) >= count

    def clear(self) -> None:
        for index in range(1 + len(NAMES)):
            self._write(index, 0)

    def watch(self) -> None:
        """Makes this process write down what it does."""
        for number, name in enumerate(NAMES):
            for owner, attribute in PHASES[name]:
                setattr(owner, attribute, self._watched(getattr(owner, attribute), number))

    def _watched(self, function: Callable[..., Any], number: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapped(*arguments: Any, **options: Any) -> Any:
            before = self._read(0)
            self._write(0, number)
            self._write(1 + number, self._read(1 + number) + 1)
            try:
                return function(*arguments, **options)
            finally:
                self._write(0, before)

        return wrapped


class Process:
    """A process that is forked to do some work; its exit status is 0 if it gets to the end of it.

    Args:
        work: what to do.
        monitor: where the process says what it is doing.
        output: file for what it prints.
    """

    def __init__(self, work: Callable[[], Any], monitor: Monitor, output: Path) -> None:
        monitor.clear()
        self.monitor = monitor
        self._output = output
        self._pid = os.fork()
        if self._pid == 0:
            self._do(work, monitor)

    def _do(self, work: Callable[[], Any], monitor: Monitor) -> NoReturn:
        status = 1
        try:
            descriptor = os.open(self._output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            faulthandler.enable()
            monitor.watch()
            work()
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stderr.flush()
            os._exit(status)

    def ends(self, seconds: float = _HANG_SECONDS, until: Callable[[], bool] = lambda: False) -> bool:
        """Waits for the end of the work, a time, or what ``until`` says; true at the end of the work."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not until():
            ended, status = os.waitpid(self._pid, os.WNOHANG)
            if ended:
                self._check(status)
                return True
            time.sleep(0.0002)
        return False

    def kill(self) -> bool:
        """Kills the process; false if it had come to the end of its work just before."""
        os.kill(self._pid, signal.SIGKILL)
        status = os.waitpid(self._pid, 0)[1]
        if os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
            return True
        self._check(status)
        return False

    def _check(self, status: int) -> None:
        if status:
            status = os.waitstatus_to_exitcode(status)
            raise Failed(f"ended with status {status}:\n{self._output.read_text()[-3000:]}")


def attempts(
    start: Callable[[], Process], phases: tuple[str, ...], kills: int, seconds: float, generator: random.Random
) -> Iterator[str | None]:
    """Starts some work so often that so many processes are killed; gives the phase of each kill, and None for each end.

    Args:
        start: makes a process for the work.
        phases: that the work goes through.
        kills: how many processes to kill.
        seconds: that the work takes when it is left alone.
        generator: of the moments.
    """
    done, begun = 0, False
    while done < kills or begun:
        process = start()
        if done == kills:
            ended = process.ends()
            if not ended and process.kill():
                raise Failed(f"did not end within {_HANG_SECONDS:.0f} s")
        elif generator.random() < 0.5:
            ended = process.ends(generator.uniform(0, 0.4 * seconds))
        else:
            ended = process.ends(seconds, process.monitor.reaches(generator.choice(phases), generator.randint(1, 12)))
            # Some way into it, which the process does not know of.
            ended = ended or process.ends(generator.choice((0.0, 0.0005, 0.002, 0.01)))
        begun = not ended and process.kill()
        done += begun
        yield process.monitor.phase if begun else None


# ---- what is compared ------------------------------------------------------------------------------------------------

# Times differ between runs, and with them the length of the log's lines.
_OF_THE_CLOCK = ("seconds", "clips_per_second", "log_position")


def differences(one: Any, other: Any, where: str = "") -> list[str]:
    """In which nested values of tensors differ, bit for bit."""
    if isinstance(one, dict) and isinstance(other, dict):
        if list(one) != list(other):
            return [f"{where}: other keys: {sorted(map(str, set(one) ^ set(other)))}"]
        return [
            d for key in one if key not in _OF_THE_CLOCK for d in differences(one[key], other[key], f"{where}/{key}")
        ]
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            return [f"{where}: {len(one)} and {len(other)} entries"]
        return [
            d
            for number, pair in enumerate(zip(one, other, strict=True))
            for d in differences(*pair, f"{where}/{number}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape and _bytes(one) == _bytes(other)
        return [] if same else [f"{where}: other values"]
    return [] if type(one) is type(other) and one == other else [f"{where}: {one!r} and {other!r}"]


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def read_events(run: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's values of a run by tag and step, as it shows them: later ones replace those before them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / run_log.TENSORBOARD_FOLDER), size_guidance={"scalars": 0}).Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def compare_runs(run: Path, expected: Path) -> int:
    """Raises Failed if a run did not come to the same end as another; returns the number of log lines compared."""
    lines = [list(run_log.read_log(folder)) for folder in (run, expected)]
    problems = differences(*lines, "log.jsonl")
    names = [sorted(path.name for path in (folder / checkpoints.FOLDER).iterdir()) for folder in (run, expected)]
    problems += differences(*names, "checkpoints")
    for name in names[1] if names[0] == names[1] else ():
        problems += differences(
            *(checkpoints.load(folder / checkpoints.FOLDER / name) for folder in (run, expected)), name
        )
    if (run / runs.CONFIG_NAME).read_bytes() != (expected / runs.CONFIG_NAME).read_bytes():
        problems.append(f"{runs.CONFIG_NAME} differs")
    events = [read_events(folder) for folder in (run, expected)]
    for of_run in events:
        of_run.pop("train/clips_per_second", None)
    problems += differences(
        *({tag: list(of_run[tag].items()) for tag in sorted(of_run)} for of_run in events), "events"
    )
    hidden = sorted(path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock")
    problems += [f"{name} was left behind" for name in hidden]
    if problems:
        raise Failed("; ".join(problems[:10]))
    return len(lines[1])


def compare_folders(folder: Path, expected: Path) -> int:
    """Raises Failed unless both folders hold the same files with the same bytes; returns their number."""
    files = [
        {str(path.relative_to(each)): path.read_bytes() for path in sorted(each.rglob("*")) if path.is_file()}
        for each in (folder, expected)
    ]
    # Recordings that a kill cut off; they are passed over, as all files whose names begin with a dot.
    for name in [name for name in files[0] if name.startswith("raw/.S") and name.endswith(".tmp")]:
        del files[0][name]
    if files[0] != files[1]:
        differing = sorted(name for name in {**files[0], **files[1]} if files[0].get(name) != files[1].get(name))
        raise Failed(f"{', '.join(differing[:10])} differ")
    return len(files[1])


# ---- what is killed --------------------------------------------------------------------------------------------------


def settings(epochs: int) -> engine.Config:
    """A run of some seconds that writes all the time."""
    sizes = ("model.hidden_channels=2", "model.feature_size=8", "model.embedding_size=4", "model.queue_size=16")
    recipes = [
        *(f"{kind}.{setting}" for kind in ("pretrain", "distill") for setting in (f"epochs={epochs}", "batch_size=8")),
        *("pretrain.milestones=[1]", f"pretrain.cross_epoch={1 + epochs // 2}", "distill.milestones=[1]"),
        *("model.modalities=[joint,motion,bone]", "model.dropout=0.2", "distill.student_modalities=[joint]"),
    ]
    writing = (
        "log_every_steps=2",
        "knn_every_epochs=2",
        "save_every_epochs=1",
        "keep_every_epochs=2",
        "tensorboard=true",
    )
    return engine.load_config(
        "cpu-small", [*sizes, *recipes, *(f"logging.{setting}" for setting in writing), "threads=1"]
    )


def prepare(out: Path) -> None:
    """Writes and prepares some recordings, with a journal entry after every few of them."""
    journal.RECORDINGS_PER_CHECKPOINT = 8
    synthetic.prepare_synthetic(
        out, num_subjects=4, num_repetitions=2, num_cameras=3, num_actions=4, seed=1, num_frames=12, workers=2
    )


TRAINING = ("start", "training step", "checkpoint", "log", "kNN accuracy", "run folder")
PREPARING = ("start", "recordings", "clips", "journal", "table")


class Trial:
    """One command, killed again and again.

    Args:
        name: of the command.
        work: does it, given the folder to write.
        phases: that it goes through.
        compare: raises Failed if a folder is not as another one.
        folder: for all that is written.
    """

    def __init__(
        self,
        name: str,
        work: Callable[[Path], Any],
        phases: tuple[str, ...],
        compare: Callable[[Path, Path], int],
        folder: Path,
    ) -> None:
        self.name, self.work, self.phases, self.compare, self.folder = name, work, phases, compare, folder
        self.expected = folder / "left_alone"
        self.monitor = Monitor()
        self.seconds = 0.0

    def _start(self, out: Path) -> Process:
        return Process(lambda: self.work(out), self.monitor, self.folder / "output.txt")

    def leave_alone(self) -> Path:
        """The folder of the command that nobody kills."""
        self.folder.mkdir(parents=True)
        begin = time.monotonic()
        self._start(self.expected).ends()
        self.seconds = time.monotonic() - begin
        return self.expected

    def run(self, kills: int, generator: random.Random) -> str:
        """Kills the command so many times; returns what happened in a paragraph."""
        hits: Counter[str] = Counter()
        ends = compared = readable = 0
        out = self.folder / "killed"
        begin = time.monotonic()
        for phase in attempts(lambda: self._start(out), self.phases, kills, self.seconds, generator):
            if phase is not None:
                hits[phase] += 1
                readable += self._check_checkpoint(out)
                continue
            compared += self.compare(out, self.expected)
            ends += 1
            shutil.rmtree(out)
        in_phases = ", ".join(f"{phase} {count}" for phase, count in hits.most_common())
        text = f"{self.name}: {sum(hits.values())} kills ({in_phases}); {ends} times the end, each the same"
        if self.phases is TRAINING:
            text += f" ({compared} log lines, all checkpoints); last checkpoint readable after {readable} kills"
            text += f", not there yet after {sum(hits.values()) - readable}"
        else:
            text += f" ({compared} files)"
        return f"{text}; {time.monotonic() - begin:.0f} s, {self.seconds:.1f} s when left alone"

    def _check_checkpoint(self, out: Path) -> bool:
        last = out / checkpoints.FOLDER / checkpoints.LAST
        if self.phases is TRAINING and last.exists():
            checkpoints.load(last)
            return True
        return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="of each command (default: %(default)s)")
    parser.add_argument("--only", choices=("pretrain", "distill", "prepare"), help="a single command")
    parser.add_argument("--epochs", type=int, default=12, help="of pretrain and distill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # which says whenever a run went on
    generator = random.Random(arguments.seed)
    config = settings(arguments.epochs)
    with tempfile.TemporaryDirectory(prefix="ikem_fast_crash_") as name:
        work = Path(name)
        preparing = Trial("data prepare", prepare, PREPARING, compare_folders, work / "prepare")
        clips = work / "prepare" / "left_alone"
        pretraining = Trial(
            "pretrain",
            lambda out: engine.pretrain(clips, out, config, progress=False),
            TRAINING,
            compare_runs,
            work / "pretrain",
        )
        distilling = Trial(
            "distill",
            lambda out: engine.distill(clips, work / "pretrain" / "left_alone", out, config, progress=False),
            TRAINING,
            compare_runs,
            work / "distill",
        )
        # Each needs what those before it make.
        trials = {"prepare": preparing, "pretrain": pretraining, "distill": distilling}
        wanted = len(trials) if arguments.only is None else list(trials).index(arguments.only) + 1
        for kind, trial in list(trials.items())[:wanted]:
            try:
                trial.leave_alone()
                if arguments.only not in (None, kind):
                    continue
                print(trial.run(arguments.kills, generator), flush=True)
            except (Failed, checkpoints.CheckpointError) as error:
                print(f"{trial.name} FAILED (seed {arguments.seed}): {error}", flush=True)
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
