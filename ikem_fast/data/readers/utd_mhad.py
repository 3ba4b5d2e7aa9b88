"""UTD-MHAD: ``aA_sS_tT_skeleton.mat`` files, 20 joints of Kinect v1, one person."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from ikem_fast.data.readers.base import Protocol, Reader, Sample, check_recording
from ikem_fast.data.readers.mat_file import read_array
from ikem_fast.layouts import Layout

_NAME = re.compile(r"a([1-9]\d?)_s([1-9]\d{0,3})_t([1-9]\d{0,3})_skeleton\.mat", re.ASCII)

_ACTIONS = """
swipe left; swipe right; wave; clap; throw; arm cross; basketball shoot; draw x; draw circle clockwise;
draw circle counter-clockwise; draw triangle; bowling; boxing; baseball swing; tennis swing; arm curl;
tennis serve; push; knock; catch; pick up and throw; jog; walk; sit to stand; stand to sit; lunge; squat
"""
ACTION_NAMES = tuple(name.strip() for name in _ACTIONS.split(";"))


def parse_name(file_name: str) -> Sample | None:
    """The sample of ``aA_sS_tT_skeleton.mat``: action, subject, trial."""
    match = _NAME.fullmatch(file_name)
    if match is None:
        return None
    action, subject, trial = map(int, match.groups())
    if action > len(ACTION_NAMES):
        return None
    return Sample(Path(file_name).stem, action - 1, subject, replication=trial)


def read(path: Path, layout: Layout) -> np.ndarray:
    """(3, F, V, 1) float64 from the variable ``d_skel``, which is (V, 3, F)."""
    skeleton = read_array(path.read_bytes(), "d_skel")
    if skeleton.ndim == 2:
        skeleton = skeleton[:, :, None]  # MATLAB drops the last axis of a single frame
    if skeleton.ndim != 3 or skeleton.shape[:2] != (layout.num_joints, 3):
        raise ValueError(f"'d_skel' must be ({layout.num_joints}, 3, frames), got {skeleton.shape}")
    return check_recording(skeleton.astype(np.float64).transpose(1, 2, 0)[..., None])


READER = Reader(
    kind="utd-mhad",
    layout="utd-mhad",
    num_persons=1,
    protocols={
        "cross-subject": Protocol("odd subjects train", ACTION_NAMES, lambda sample: sample.subject % 2 == 1),
    },
    suffix=".mat",
    name_pattern="aA_sS_tT_skeleton.mat with action 1 to 27",
    parse_name=parse_name,
    read=read,
)
