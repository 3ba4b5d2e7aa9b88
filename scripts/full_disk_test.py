"""Fills the disk at one write of a command after another, and repeats the command when there is room again.

    python scripts/full_disk_test.py             # the first, a middle and the last write of each kind to each file
    python scripts/full_disk_test.py --brief     # one write to each file
    python scripts/full_disk_test.py --every     # every write there is

Needs Linux and a C compiler: full_disk.c, which is loaded into the process, refuses all writes from a given one on, as
a full disk does. Each command (pretrain, distill, evaluate linear and knn, data prepare) is first done with room, which
shows the writes that it makes and the end it comes to. A case passes if the command ends with a message that says that
there is no space left, and without a traceback, if the run's last checkpoint can be loaded then, and if the same
command, with room again, comes to the same end bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import crash_test
import torch

from ikem_fast import train
from ikem_fast.data import __main__ as data_commands
from ikem_fast.engine import checkpoints
from ikem_fast.engine.config import save_config
from ikem_fast.evaluation import load_scores

FULL = os.strerror(errno.ENOSPC)
SOURCE = Path(__file__).with_name("full_disk.c")


@dataclass(frozen=True)
class Command:
    """A command of the package.

    Attributes:
        name: of the command.
        arguments: its arguments, given the folder to write.
        main: runs it.
        begin: makes what must be in the folder before.
        check: raises if a folder is not like the one to expect.
    """

    name: str
    arguments: Callable[[Path], list[str]]
    main: Callable[[list[str]], int]
    begin: Callable[[Path], object]
    check: Callable[[Path, Path], object]

    def call(self, folder: Path) -> tuple[int, str]:
        """Exit status of the command and what it said."""
        said = io.StringIO()
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            status = self.main(self.arguments(folder))
        return status, said.getvalue()


class Disk:
    """The disk that fills up, below one folder.

    Args:
        trace: file in which it notes all writes.
    """

    def __init__(self, trace: Path) -> None:
        self._trace = trace
        self._full_after = ctypes.CDLL(None).full_disk_after

    def make_room(self) -> None:
        self._full_after(-1)

    def fill_after(self, count: int) -> None:
        """Lets so many writes pass from now on, and refuses those after."""
        self._trace.write_text("")
        self._full_after(count)

    def writes(self) -> list[str]:
        """Writes since then, in order: the kind of file and what was done to it."""
        lines = [line.split(" ", 1) for line in self._trace.read_text().splitlines()]
        return [f"{_kind_of(path)} ({call})" for call, path in lines]


def _kind_of(path: str) -> str:
    """A file's name without what differs between files of a kind."""
    name = re.sub(r"^\.(.+)\.[^.]+\.tmp$", r"\1", Path(path).name)
    for pattern, kind in ((r"^events\.out\..*", "events"), (r"^S\d.*skeleton", "recording"), (r"\d{4}\.pt", "N.pt")):
        name = re.sub(pattern, kind, name)
    return name


def choose(writes: list[str], how: str) -> list[int]:
    """Numbers of the writes to try."""
    if how == "every":
        return list(range(len(writes)))
    places: dict[str, list[int]] = {}
    for number, write in enumerate(writes):
        kind = write.partition(" (")[0] if how == "brief" else write
        places.setdefault(kind, []).append(number)
    if how == "brief":
        return sorted(numbers[len(numbers) // 2] for numbers in places.values())
    return sorted({numbers[index] for numbers in places.values() for index in (0, len(numbers) // 2, -1)})


def try_out(command: Command, work: Path, disk: Disk, how: str) -> str:
    """Fills the disk at one write of a command after another; returns what was tried in a paragraph."""
    expected, folder = work / "with_room" / "run", work / "full" / "run"
    for parent in (expected.parent, folder.parent):
        parent.mkdir(parents=True)
    command.begin(expected)
    disk.fill_after(sys.maxsize)
    status, said = command.call(expected)
    if status:
        raise crash_test.Failed(f"{command.name}: {said}")
    writes = disk.writes()
    tried: Counter[str] = Counter()
    for number in choose(writes, how):
        disk.make_room()
        shutil.rmtree(folder, ignore_errors=True)
        command.begin(folder)
        disk.fill_after(number)
        status, said = command.call(folder)
        made = disk.writes()
        disk.make_room()
        if len(made) <= number:
            continue  # threads may write in fewer pieces
        where = f"{command.name}, {made[number]}, write {number}"
        if status == 0:
            # Some may fail: a folder is brought to the disk as far as the file system lets one.
            command.check(folder, expected)
            tried[f"{made[number]}: done all the same"] += 1
            continue
        if FULL not in said.strip().splitlines()[-1] or "Traceback" in said:
            raise crash_test.Failed(f"{where}: {said}")
        if (folder / checkpoints.FOLDER / checkpoints.LAST).exists():
            checkpoints.load_run(folder)
        status, said = command.call(folder)
        if status:
            raise crash_test.Failed(f"{where}, with room again: {said}")
        command.check(folder, expected)
        tried[made[number]] += 1
    listed = ", ".join(f"{write} {count}" for write, count in tried.items())
    return f"{command.name}: {tried.total()} of {len(writes)} writes ({listed})"


def compare_evaluations(run: Path, expected: Path) -> None:
    """Raises Failed if the results of evaluations differ."""
    folders = [each / "evaluation" for each in (run, expected)]
    problems = crash_test.differences(*(sorted(path.name for path in folder.iterdir()) for folder in folders), "files")
    for path in () if problems else folders[1].iterdir():
        pair = [folder / path.name for folder in folders]
        if path.name.endswith("_scores.npz"):
            problems += crash_test.differences(*(_plain(load_scores(each)) for each in pair), path.name)
        elif path.suffix == ".json":
            problems += crash_test.differences(*(json.loads(each.read_text())["encoders"] for each in pair), path.name)
        elif path.suffix == ".csv" and pair[0].read_bytes() != pair[1].read_bytes():
            problems.append(f"{path.name} differs")
    if problems:
        raise crash_test.Failed("; ".join(problems[:10]))


def _plain(scores) -> list:
    return [
        scores.sample_names,
        scores.labels.tolist(),
        {name: logits.tolist() for name, logits in scores.logits.items()},
    ]


def try_all(work: Path, trace: Path, how: str) -> None:
    """Tries all commands; prints a paragraph on each."""
    disk = Disk(trace)
    disk.make_room()
    config = work.parent / "config.yaml"
    save_config(crash_test.settings(epochs=2), config)
    clips, trained = work.parent / "clips", work.parent / "trained"
    crash_test.prepare(clips)
    told = ["--config", str(config), "--quiet"]

    def pretrain(run: Path) -> list[str]:
        return ["pretrain", "--data", str(clips), "--out", str(run), *told]

    def distill(run: Path) -> list[str]:
        return ["distill", "--teacher", str(trained), "--out", str(run), *told]

    def evaluate(kind: str) -> Callable[[Path], list[str]]:
        return lambda run: ["evaluate", kind, "--run", str(run), "--quiet", *(["epochs=2"] if kind == "linear" else [])]

    def prepare(out: Path) -> list[str]:
        sizes = ("--subjects", "2", "--repetitions", "1", "--cameras", "3", "--actions", "2", "--frames", "8")
        return ["prepare", "synthetic", str(out), *sizes, "--workers", "1"]

    def copy(run: Path) -> None:
        shutil.copytree(trained, run)

    def nothing(run: Path) -> None:
        pass

    with contextlib.redirect_stdout(io.StringIO()):
        status = train.main(pretrain(trained))
    if status:
        raise crash_test.Failed("pretrain failed with room")
    for command in (
        Command("pretrain", pretrain, train.main, nothing, crash_test.compare_runs),
        *([] if how == "brief" else [Command("distill", distill, train.main, nothing, crash_test.compare_runs)]),
        Command("evaluate linear", evaluate("linear"), train.main, copy, compare_evaluations),
        Command("evaluate knn", evaluate("knn"), train.main, copy, compare_evaluations),
        Command("data prepare", prepare, data_commands.main, nothing, crash_test.compare_folders),
    ):
        print(try_out(command, work / command.name.replace(" ", "_"), disk, how), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--brief", action="store_const", dest="how", const="brief", help="one write to each file")
    how.add_argument("--every", action="store_const", dest="how", const="every", help="every write")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # given to the process that has the disk
    arguments = parser.parse_args()
    if arguments.work is None:
        return start(arguments.how)
    torch.set_num_threads(1)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)  # which says whenever a run went on
    try:
        try_all(arguments.work, Path(os.environ["FULL_DISK_TRACE"]), arguments.how or "some")
    except crash_test.Failed as error:
        print(f"FAILED: {error}", flush=True)
        return 1
    return 0


def start(how: str | None) -> int:
    """Starts this script anew with the disk that fills up."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        sys.exit("a C compiler must be on PATH as cc, gcc or clang")
    with tempfile.TemporaryDirectory(prefix="ikem_fast_full_disk_") as name:
        folder = Path(name).resolve()
        library, work = folder / "full_disk.so", folder / "work"
        subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
        work.mkdir()
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library),
            "FULL_DISK_FOLDER": str(work),
            "FULL_DISK_TRACE": str(folder / "trace"),
        }
        command = [sys.executable, __file__, "--work", str(work), *([] if how is None else [f"--{how}"])]
        return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
