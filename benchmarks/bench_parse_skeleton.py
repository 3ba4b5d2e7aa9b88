"""Reading a recording of NTU RGB+D, a text file, from the disk's cache to coordinates.

The baseline is a reader as it is usually written: line by line, split and converted to numbers.
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import CALL, EAGER, OURS, Case
from benchmarks.clips import JOINTS, PERSONS
from ikem_fast import _extension, floors
from ikem_fast.data.readers.ntu_rgb_d import MAX_FRAMES

DEVICES = ("cpu",)
FILES = 8  # that calls take turns with
FRAMES = {"small": 40, "full": 80}
BODY = "72057594037931101 0 1 1 1 1 0 0.0123 -0.2345 2"
# What a joint's line has after its coordinates.
REST = "251.2378 203.9412 965.1034 537.5021 -0.2134873 0.0374661 0.9712346 -0.0612233 2"


@functools.cache
def written(frames: int) -> tuple[tempfile.TemporaryDirectory, list[Path]]:
    """A folder of files, each of two bodies in all frames; it is removed when the process ends."""
    folder = tempfile.TemporaryDirectory(prefix="benchmark_skeletons_")
    paths = [Path(folder.name) / f"S001C001P001R001A{number + 1:03}.skeleton" for number in range(FILES)]
    for number, path in enumerate(paths):
        xyz = np.random.default_rng(number).normal(0, 1, (frames, PERSONS, JOINTS, 3))
        lines = [str(frames)]
        for bodies in xyz:
            lines.append(str(PERSONS))
            for joints in bodies:
                lines += [BODY, str(JOINTS), *(" ".join(f"{value:.7f}" for value in p) + f" {REST}" for p in joints)]
        path.write_text("\n".join(lines) + "\n", encoding="ascii")
    return folder, paths


def read_lines(path: Path) -> np.ndarray:
    """(3, F, V, M) float64, zero where a body is absent."""
    with path.open(encoding="ascii") as file:
        frames = int(file.readline())
        xyz = np.zeros((3, frames, JOINTS, PERSONS))
        for frame in range(frames):
            for body in range(int(file.readline())):
                file.readline()
                for joint in range(int(file.readline())):
                    values = file.readline().split()
                    if body < PERSONS:
                        xyz[:, frame, joint, body] = [float(value) for value in values[:3]]
    return xyz


def parse(path: Path) -> np.ndarray:
    return _extension.require().parse_skeleton(str(path), JOINTS, PERSONS, MAX_FRAMES)[0]


def make_case(frames: int) -> Case:
    def draw(generator: torch.Generator) -> Path:
        return written(frames)[1][int(torch.randint(FILES, (1,), generator=generator))]

    size = written(frames)[1][0].stat().st_size
    return Case(
        op="parse_skeleton",
        phase=CALL,
        sizes={"frames": frames, "persons": PERSONS},
        draw=draw,
        ways={EAGER: read_lines, OURS: parse},
        expected=read_lines,
        tolerance={EAGER: 0.0, OURS: 0.0},
        floor=floors.parse_skeleton(size, frames, JOINTS, PERSONS),
        clips=1,
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(FRAMES[profile])]


def test_parse_skeleton(measure, case, way):
    measure(case, way)
