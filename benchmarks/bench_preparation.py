"""From recordings in NTU's text format to clips: preprocessing alone, and a whole folder.

Recordings are made up (``ikem_fast.data.synthetic``). Reading alone is in bench_parse_skeleton.py, views of prepared
clips in bench_clip_views.py. Of a folder, "eager" and "release manner" read text line by line in Python and write one
array with numpy; ours is the command ``prepare`` with as many workers as threads: a table of samples, a journal to
resume from and checks of every file are part of it.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.baselines import eager, release_manner
from benchmarks.bench_parse_skeleton import read_lines
from benchmarks.cases import CALL, EAGER, OURS, RELEASE_MANNER, Case
from benchmarks.clips import FRAMES, JOINTS, LAYOUT, PERSONS
from ikem_fast import floors
from ikem_fast.data import ClipSet, prepare, synthetic
from ikem_fast.data.preprocess import prepare_clip
from ikem_fast.floors import Work

FILES = {"small": 24, "full": 192}  # two performers' recordings of 12 actions, each as often as it takes
RECORDINGS, LENGTH = 16, 80
# The angle at which a body is turned is an arccos.
TOLERANCE = dict.fromkeys((EAGER, OURS, RELEASE_MANNER), 1e-5)


@functools.cache
def recordings(files: int) -> tuple[tempfile.TemporaryDirectory, Path]:
    """A folder of so many text files, which is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark_recordings_")
    raw = Path(folder.name) / "raw"
    synthetic.write(raw, num_subjects=2, num_repetitions=files // 24, num_cameras=1)
    return folder, raw


# ---- preprocessing


def preprocessing_case() -> Case:
    def draw(generator: torch.Generator) -> list[np.ndarray]:
        """Recordings (3, F, V, M) in metres; of every other one the second person is absent."""
        shape = (RECORDINGS, 3, LENGTH, JOINTS, PERSONS)
        xyz = torch.randn(shape, generator=generator, dtype=torch.float64, device=generator.device).cpu()
        xyz[::2, ..., 1] = 0
        return list(xyz.numpy())

    def of(function: Callable) -> Callable[[list[np.ndarray]], list]:
        return lambda drawn: [function(xyz, LAYOUT, FRAMES) for xyz in drawn]

    values = 3 * JOINTS * PERSONS
    return Case(
        op="preprocessing",
        phase=CALL,
        sizes={"clips": RECORDINGS, "frames": LENGTH},
        draw=draw,
        ways={EAGER: of(eager.prepare_clip), OURS: of(prepare_clip), RELEASE_MANNER: of(release_manner.prepare_clip)},
        expected=of(eager.prepare_clip),
        tolerance=TOLERANCE,
        floor=Work(RECORDINGS * values * (8 * LENGTH + 4 * FRAMES)),
        clips=RECORDINGS,
    )


# ---- a folder


def folder_case(files: int) -> Case:
    def draw(generator: torch.Generator) -> tempfile.TemporaryDirectory:
        return tempfile.TemporaryDirectory(prefix="benchmark_prepared_")  # removed when nobody has it any more

    def ours(out: tempfile.TemporaryDirectory) -> np.ndarray:
        prepare("synthetic", recordings(files)[1], Path(out.name) / "clips", workers=torch.get_num_threads())
        return np.array(ClipSet.open(Path(out.name) / "clips").clips)

    def plain(baseline) -> Callable[[tempfile.TemporaryDirectory], np.ndarray]:
        def run(out: tempfile.TemporaryDirectory) -> np.ndarray:
            paths = sorted(recordings(files)[1].glob("*.skeleton"))
            clips = np.stack([baseline.prepare_clip(read_lines(path), LAYOUT, FRAMES)[0] for path in paths])
            np.save(Path(out.name) / "clips.npy", clips)
            return clips

        return run

    return Case(
        op="preparation of a folder",
        phase=CALL,
        sizes={"files": files},
        draw=draw,
        ways={EAGER: plain(eager), OURS: ours, RELEASE_MANNER: plain(release_manner)},
        expected=plain(eager),
        tolerance=TOLERANCE,
        floor=_folder_floor(files),
        clips=files,
    )


def _folder_floor(files: int) -> Work:
    """Text is read, and float32 clips are written."""
    text = sum(path.stat().st_size for path in recordings(files)[1].glob("*.skeleton"))
    return floors.parse_skeleton(text, 0, JOINTS, PERSONS) + Work(4 * files * 3 * FRAMES * JOINTS * PERSONS)


def cases(profile: str, device: str) -> list[Case]:
    return [preprocessing_case(), folder_case(FILES[profile])] if device == "cpu" else []


def test_preparation(measure, case, way, launch):
    measure(case, way)
