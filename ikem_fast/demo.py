"""``python -m ikem_fast.train demo``: everything once on synthetic recordings, from text files to a report page."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ikem_fast import engine
from ikem_fast.data import synthetic
from ikem_fast.data.pipeline import Summary, prepare
from ikem_fast.data.readers import Reader
from ikem_fast.data.readers.synthetic import make_reader
from ikem_fast.evaluation.commands import accuracy_table, read_evaluation
from ikem_fast.evaluation.running import evaluate_run
from ikem_fast.evaluation.tables import format_table
from ikem_fast.report import write_report

PRESET = "demo"
# A third of the usual 50 frames: the synthetic actions are told apart as well, in a third of the time.
NUM_FRAMES = 16
# The first ten actions are those of one person.
NUM_ACTIONS = 10
_RAW, _CLIPS, _TEACHER, _STUDENT, _PAGE = "recordings", "clips", "pretrain", "distill", "report.html"
_FOLDERS = (_RAW, _CLIPS, _TEACHER, _STUDENT)


class DemoError(ValueError):
    """The demo cannot run into the folder it was given."""


class _Phases:
    """Runs and times the steps, with a line before and after each."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done: list[tuple[str, float]] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        print(f"[{len(self.done) + 1}/{self.total}] {name} ...", flush=True)
        begin = time.perf_counter()
        yield
        seconds = time.perf_counter() - begin
        self.done.append((name, seconds))
        print(f"[{len(self.done)}/{self.total}] {name}: {seconds:.1f} s", flush=True)


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    keep: bool = False,
    overrides: Sequence[str] = (),
    progress: bool = True,
    num_subjects: int = 20,
    num_repetitions: int = 1,
) -> Path:
    """Prepares synthetic recordings, pretrains, distils, evaluates, and writes a report; prints times and a table.

    Args:
        out: new or empty folder, or one of an earlier demo, which is replaced.
        seed: of recordings, weights and orders.
        keep: keep the text recordings; prepared clips, runs and page always stay.
        overrides: ``key=value`` texts on top of the preset ``demo``.
        progress: show progress bars.
        num_subjects: performers, half of whom are only tested on.
        num_repetitions: how often each performs every action.

    Returns:
        the path of the report page.

    Raises:
        DemoError: ``out`` holds something that no demo has written.
        ConfigError: an unknown or wrong override.
    """
    begin = time.perf_counter()
    config = engine.load_config(PRESET, [f"seed={seed}", *overrides])
    out = Path(out)
    _clear(out)
    raw, clips, teacher, student = (out / name for name in _FOLDERS)
    phases = _Phases(total=6)
    with phases.phase("synthetic recordings, prepared"):
        print(_prepare(raw, clips, num_subjects, num_repetitions, seed, progress))
    with phases.phase("pretraining, both stages"):
        engine.pretrain(clips, teacher, config, progress=progress)
    with phases.phase("distillation"):
        engine.distill(clips, teacher, student, config, progress=progress)
    settings = {"untrained": True, "progress": progress}
    with phases.phase("linear evaluation"):
        evaluate_run("linear", student, **settings)
    with phases.phase("nearest neighbours"):
        evaluate_run("knn", student, **settings)
    with phases.phase("report page"):
        page = write_report(
            [teacher, student], out / _PAGE, title="IKEM demo on synthetic recordings", phases=phases.done
        )
    if not keep:
        shutil.rmtree(raw)
    table = accuracy_table(*(read_evaluation(student, kind)["encoders"] for kind in ("linear", "knn")))
    print(f"\n{format_table(table)}\n")
    print(f"everything took {time.perf_counter() - begin:.0f} s; open {page.resolve()} in a browser")
    return page


def _prepare(raw: Path, clips: Path, num_subjects: int, num_repetitions: int, seed: int, progress: bool) -> Summary:
    synthetic.write(
        raw,
        num_subjects=num_subjects,
        num_repetitions=num_repetitions,
        num_actions=NUM_ACTIONS,
        seed=seed,
        progress=progress,
    )
    return prepare(_one_person_reader(), raw, clips, num_frames=NUM_FRAMES, progress=progress)


def _one_person_reader() -> Reader:
    """The synthetic set's reader with room for one person: a second, always absent, would take half of the time."""
    reader = make_reader(NUM_ACTIONS)

    def read_first_person(*arguments) -> np.ndarray:
        return reader.read(*arguments)[..., :1]

    return replace(reader, num_persons=1, read=read_first_person)


def _clear(out: Path) -> None:
    """Makes ``out`` ready; what is there must be an earlier demo's."""
    known = {*_FOLDERS, _PAGE}
    if out.exists() and not out.is_dir():
        raise DemoError(f"--out must be a folder, got the file {out}")
    strange = sorted(path.name for path in out.iterdir() if path.name not in known) if out.exists() else []
    if strange:
        raise DemoError(f"--out must be new, empty or an earlier demo's folder; {out} holds {', '.join(strange[:3])}")
    for name in _FOLDERS:
        shutil.rmtree(out / name, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
