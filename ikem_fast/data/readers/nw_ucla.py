"""Northwestern-UCLA Multiview Action 3D: ``aAA_sSS_eEE_vVV.json`` files, 20 joints of Kinect v1, one person."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np

from ikem_fast.data.readers.base import Protocol, Reader, Sample, check_recording
from ikem_fast.layouts import Layout

_NAME = re.compile(r"a(\d{2})_s(\d{2})_e(\d{2})_v(\d{2})\.json", re.ASCII)

# The dataset has no actions 7 and 10.
_ACTIONS = {
    1: "pick up with one hand",
    2: "pick up with two hands",
    3: "drop trash",
    4: "walk around",
    5: "sit down",
    6: "stand up",
    8: "donning",
    9: "doffing",
    11: "throw",
    12: "carry",
}
_LABELS = {action: label for label, action in enumerate(_ACTIONS)}


def parse_name(file_name: str) -> Sample | None:
    """The sample of ``aAA_sSS_eEE_vVV.json``: action, subject, take, view."""
    match = _NAME.fullmatch(file_name)
    if match is None:
        return None
    action, subject, take, view = map(int, match.groups())
    if action not in _LABELS:
        return None
    return Sample(Path(file_name).stem, _LABELS[action], subject, camera=view, replication=take)


def read(path: Path, layout: Layout) -> np.ndarray:
    """(3, F, V, 1) float64 from the key ``skeletons``, which is (F, V, 3)."""
    try:
        content = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise ValueError(f"line {error.lineno}: not JSON: {error.msg}") from None
    except (
        ValueError,
        RecursionError,
    ) as error:  # no text, numbers of thousands of digits, deep nesting
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(content, dict) or "skeletons" not in content:
        raise ValueError("must be a JSON object with the key 'skeletons'")
    frames = content["skeletons"]
    if not isinstance(frames, list) or not frames:
        raise ValueError("'skeletons' must be a list of at least one frame")
    for number, frame in enumerate(frames, start=1):
        if not isinstance(frame, list) or len(frame) != layout.num_joints:
            raise ValueError(f"frame {number} must be a list of {layout.num_joints} joints, got {_size(frame)}")
    try:
        skeletons = np.array(frames)
    except ValueError:
        skeletons = None
    if (
        skeletons is None
        or skeletons.dtype.kind not in "if"
        or skeletons.shape[1:] != (layout.num_joints, 3)
        # Among numbers, numpy takes true for 1.
        or any(isinstance(value, bool) for frame in frames for joint in frame for value in joint)
    ):
        raise ValueError(f"'skeletons' must be (frames, {layout.num_joints}, 3) numbers")
    xyz = skeletons.astype(np.float64).transpose(2, 0, 1)[..., None]
    return check_recording(xyz)


def _size(frame: object) -> str:
    return f"{len(frame)}" if isinstance(frame, list) else type(frame).__name__


READER = Reader(
    kind="nw-ucla",
    layout="nw-ucla",
    num_persons=1,
    protocols={
        "cross-view": Protocol(
            "views 1 and 2 train, view 3 tests", tuple(_ACTIONS.values()), lambda sample: sample.camera in (1, 2)
        ),
        "cross-subject": Protocol(
            "odd subjects train", tuple(_ACTIONS.values()), lambda sample: sample.subject % 2 == 1
        ),
    },
    suffix=".json",
    name_pattern="aAA_sSS_eEE_vVV.json with action 01-06, 08, 09, 11 or 12",
    parse_name=parse_name,
    read=read,
)
