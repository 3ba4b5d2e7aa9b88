"""Recordings of a made-up moving body in NTU's own text format and file names, to try everything without a dataset.

Every performer has a body, a posture and a way of moving of their own; every performance is recorded by three cameras
at once, each with the errors of a depth sensor: noise that grows with distance, jitter, limbs mistaken where the body
hides them, and now and then frames without any detection.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ikem_fast.atomic import atomic_open, leftovers, write_json
from ikem_fast.data.kinematics import NUM_JOINTS, POSE_FIELDS, Body, Pose, place_joints
from ikem_fast.data.motions import ACTIONS, Action, Timing
from ikem_fast.data.pipeline import Summary, prepare
from ikem_fast.data.readers import DataError, ntu_rgb_d
from ikem_fast.data.readers import synthetic as synthetic_reader

KIND = "synthetic"
DEFAULT_NUM_ACTIONS = 12
FRAMES_PER_SECOND = 30
MAX_SUBJECTS = 40
MAX_CAMERAS = 3
# Begins with a dot: no recording, so readers pass it over.
_MARKER_FILE = ".synthetic.json"
# Changes whenever the same parameters give other files.
_GENERATOR_VERSION = 1

_CAMERA_ANGLES = np.deg2rad((45.0, 0.0, -45.0))
_LIMB_JOINTS = {"left": (5, 6, 7, 21, 22, 13, 14, 15), "right": (9, 10, 11, 23, 24, 17, 18, 19)}
_TRANSLATION_FIELDS = [POSE_FIELDS.index("rise"), POSE_FIELDS.index("advance")]
_STILL_FIELDS = [*_TRANSLATION_FIELDS, POSE_FIELDS.index("yaw")]


def performers(num_subjects: int) -> list[int]:
    """Performer numbers, alternately of the training and of the test split of NTU-60's cross-subject protocol."""
    split = {True: [], False: []}
    for number in range(1, MAX_SUBJECTS + 1):
        split[number in ntu_rgb_d.XSUB_60_TRAINING].append(number)
    return [number for pair in zip(split[True], split[False], strict=True) for number in pair][:num_subjects]


def write(
    folder: str | Path,
    *,
    num_subjects: int = 10,
    num_repetitions: int = 2,
    num_cameras: int = 3,
    num_actions: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> int:
    """Writes the recordings as ``SsssCcccPpppRrrrAaaa.skeleton`` files; interrupted, the same call goes on.

    Args:
        folder: new, empty, or begun by the same call.
        num_subjects: 2 to 40 performers.
        num_repetitions: how often each performs every action.
        num_cameras: 1 to 3.
        num_actions: the first so many of ``ikem_fast.data.motions.ACTIONS``; 12 by default.
        seed: the same seed gives the same files.
        progress: show a progress bar.

    Returns:
        The number of files: actions x subjects x cameras x repetitions.

    Raises:
        DataError: a number out of range, or a folder that holds something else.
        OSError: the folder cannot be written to.
    """
    num_actions = DEFAULT_NUM_ACTIONS if num_actions is None else num_actions
    for name, value, smallest, largest in (
        ("num_subjects", num_subjects, 2, MAX_SUBJECTS),
        ("num_repetitions", num_repetitions, 1, 99),
        ("num_cameras", num_cameras, 1, MAX_CAMERAS),
        ("num_actions", num_actions, 2, len(ACTIONS)),
        ("seed", seed, 0, 2**63 - 1),
    ):
        if not smallest <= value <= largest:
            raise DataError(f"{name} must be {smallest} to {largest}, got {value}")
    parameters = {
        "generator_version": _GENERATOR_VERSION,
        "num_subjects": num_subjects,
        "num_repetitions": num_repetitions,
        "num_cameras": num_cameras,
        "num_actions": num_actions,
        "seed": seed,
    }
    folder = Path(folder)
    _begin_folder(folder, parameters)
    num_files = num_actions * num_subjects * num_repetitions * num_cameras
    with tqdm(total=num_files, unit="file", desc="write recordings", mininterval=0.5, disable=not progress) as bar:
        for performer in performers(num_subjects):
            for action in range(num_actions):
                for repetition in range(1, num_repetitions + 1):
                    _write_performance(folder, seed, performer, action, repetition, num_cameras)
                    bar.update(num_cameras)
    return num_files


def prepare_synthetic(
    out: str | Path,
    *,
    raw: str | Path | None = None,
    num_subjects: int = 10,
    num_repetitions: int = 2,
    num_cameras: int = 3,
    num_actions: int | None = None,
    seed: int = 0,
    progress: bool = False,
    **preparation: Any,
) -> Summary:
    """Writes synthetic recordings and prepares them as any others: ``write``, then ``ikem_fast.data.prepare``.

    Args:
        out: folder to prepare.
        raw: folder for the text files, ``out/raw`` by default.

    The other arguments are those of ``write`` and (``preparation``) of ``ikem_fast.data.prepare``; interrupted, the
    same call goes on.
    """
    out = Path(out)
    raw = out / "raw" if raw is None else Path(raw)
    num_actions = DEFAULT_NUM_ACTIONS if num_actions is None else num_actions
    try:
        write(
            raw,
            num_subjects=num_subjects,
            num_repetitions=num_repetitions,
            num_cameras=num_cameras,
            num_actions=num_actions,
            seed=seed,
            progress=progress,
        )
    except OSError as error:
        raise DataError(
            f"{error.filename or raw}: {error.strerror}; when that is mended, run the same command again to continue"
        ) from error
    return prepare(synthetic_reader.make_reader(num_actions), raw, out, progress=progress, **preparation)


def _begin_folder(folder: Path, parameters: dict[str, Any]) -> None:
    """Makes the folder, or makes sure that it was begun with the same parameters."""
    marker = folder / _MARKER_FILE
    if marker.exists():
        try:
            earlier = json.loads(marker.read_text(encoding="utf-8"))
        except (ValueError, RecursionError):
            earlier = None
        if earlier != parameters:
            raise DataError(
                f"{folder} holds synthetic recordings of other parameters ({earlier}, not {parameters}): "
                "give another folder, or remove it"
            )
        return
    # Of an earlier call that was killed while it wrote the marker.
    begun = leftovers(folder, _MARKER_FILE)
    if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - set(begun)):
        raise DataError(f"{folder} must be a new or empty folder for the synthetic recordings")
    folder.mkdir(parents=True, exist_ok=True)
    write_json(marker, parameters)


def _write_performance(folder: Path, seed: int, performer: int, action: int, repetition: int, num_cameras: int) -> None:
    setup = 1 + performer % 17
    paths = [
        folder / f"S{setup:03d}C{camera:03d}P{performer:03d}R{repetition:03d}A{action + 1:03d}.skeleton"
        for camera in range(1, num_cameras + 1)
    ]
    if all(path.exists() for path in paths):
        return
    generator = np.random.default_rng((seed, 1, performer, action, repetition))
    persons = _perform(ACTIONS[action], seed, performer, generator)
    for camera, path in enumerate(paths):
        sensor = np.random.default_rng((seed, 2, performer, action, repetition, camera))
        detections = _record(persons, setup, camera, sensor)
        with atomic_open(path, durable=False) as file:
            file.write(_to_text(detections))


@dataclass(frozen=True)
class _Performer:
    """A body, how far it moves in each angle (a factor), and how it stands (an angle for each)."""

    body: Body
    reach: np.ndarray
    posture: np.ndarray

    @classmethod
    def draw(cls, generator: np.random.Generator) -> _Performer:
        posture = generator.normal(0, 0.12, len(POSE_FIELDS))
        posture[_STILL_FIELDS] = 0
        return cls(Body.draw(generator), generator.uniform(0.65, 1.25, len(POSE_FIELDS)), posture)


def _perform(action: Action, seed: int, number: int, generator: np.random.Generator) -> list[np.ndarray]:
    """(F, 25, 3) joints of each person, around the origin of the ground, facing the middle camera more or less."""
    habits = np.random.default_rng((seed, 0, number))
    persons = [_Performer.draw(habits)]
    tempo = habits.uniform(0.8, 1.25) * generator.uniform(0.85, 1.18)
    persons += [_Performer.draw(generator) for _ in range(action.num_persons - 1)]

    duration = action.seconds / tempo * generator.uniform(0.8, 1.3)
    before, after = generator.uniform(0.05, 1.2, 2)
    num_frames = min(int((before + duration + after) * FRAMES_PER_SECOND), ntu_rgb_d.MAX_FRAMES)
    seconds = np.arange(num_frames) / FRAMES_PER_SECOND - before
    timing = Timing(
        seconds,
        seconds / duration,
        tempo,
        phase=generator.uniform(0, 2 * np.pi),
        repeats=int(generator.integers(1, action.most_repeats, endpoint=True)),
    )
    poses = [Pose.rest(num_frames) for _ in persons]
    action.move(poses, timing, "right" if generator.random() < 0.75 else "left")
    heading = generator.uniform(-0.6, 0.6)
    return [
        _stand(place_joints(person.body, _personal(pose, person, generator)), place, len(persons), heading)
        for place, (person, pose) in enumerate(zip(persons, poses, strict=True))
    ]


def _personal(pose: Pose, person: _Performer, generator: np.random.Generator) -> Pose:
    """The pose as this person strikes it this time: reach, posture, fidgeting, limbs apart, hinges bent one way."""
    num_frames, num_fields = pose.values.shape
    # Arms that go round whole turns keep their angle: three turns with more reach would not be three turns.
    turns = np.abs(pose.values).max(axis=0) >= 2 * np.pi * 0.95
    reach = person.reach * generator.uniform(0.9, 1.1, num_fields)
    fidget = 0.1 * _slow_noise((num_frames, num_fields), generator)
    fidget[:, _TRANSLATION_FIELDS] *= 0.2
    posture = person.posture + generator.normal(0, 0.06, num_fields) * (person.posture != 0)
    pose = Pose(pose.values * np.where(turns, 1.0, reach) + posture + fidget)
    for side in ("left", "right"):
        pose[f"{side}_shoulder_spread"] += 0.15
        pose[f"{side}_hip_spread"] += 0.08
        for hinge in ("elbow", "knee"):
            pose[f"{side}_{hinge}"] = np.maximum(pose[f"{side}_{hinge}"], 0.05)
    pose["rise"] = np.maximum(pose["rise"], 0)
    return pose


def _stand(joints: np.ndarray, place: int, num_persons: int, heading: float) -> np.ndarray:
    """Turns a person to the middle camera, or two persons to each other at arm's length, all turned by ``heading``."""
    if num_persons == 2:
        sign = 1 if place == 0 else -1
        joints = _turn(joints, -sign * np.pi / 2) - sign * np.array((0.45, 0.0, 0.0))
    return _turn(joints, heading)


def _turn(joints: np.ndarray, angle: float) -> np.ndarray:
    """Rotates (..., 3) about y, counter-clockwise."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return joints @ np.array(((cosine, 0, sine), (0, 1, 0), (-sine, 0, cosine))).T


def _tilt_matrix(angle: float) -> np.ndarray:
    """What a camera that looks down by ``angle`` makes of (..., 3) points, to multiply from the right."""
    cosine, sine = np.cos(angle), np.sin(angle)
    return np.array(((1, 0, 0), (0, cosine, -sine), (0, sine, cosine)))


def _slow_noise(shape: tuple[int, ...], generator: np.random.Generator) -> np.ndarray:
    """Noise of variance 1 along the first axis, made of three slow sines for each of the others."""
    hertz = generator.uniform(0.1, 0.8, (3, *shape[1:]))
    phase = generator.uniform(0, 2 * np.pi, (3, *shape[1:]))
    seconds = np.arange(shape[0]).reshape(-1, *[1] * len(shape)) / FRAMES_PER_SECOND
    return np.sqrt(2 / 3) * np.sin(2 * np.pi * hertz * seconds + phase).sum(axis=1)


def _record(
    persons: list[np.ndarray], setup: int, camera: int, generator: np.random.Generator
) -> list[list[np.ndarray]]:
    """What a camera makes of the scene: for each frame the (25, 3) joints of each body it has detected."""
    place = np.random.default_rng((setup, camera))
    height, distance = place.uniform(0.6, 1.3), place.uniform(2.3, 3.8)
    angle = _CAMERA_ANGLES[camera] + place.uniform(-0.12, 0.12)
    tilt = place.uniform(-0.1, 0.25)
    offset = np.array((generator.uniform(-0.3, 0.3), -height, distance))
    seen = [_measure((_turn(joints, angle) + offset) @ _tilt_matrix(tilt), generator) for joints in persons]
    if generator.random() < 0.5:
        seen.reverse()  # the order of bodies in a file says nothing

    frames = [list(bodies) for bodies in zip(*seen, strict=True)]
    if generator.random() < 0.08:  # nobody detected for a moment
        length = int(generator.integers(1, 5))
        begin = int(generator.integers(1, len(frames) - length))
        frames[begin : begin + length] = [[] for _ in range(length)]
    if len(persons) == 2 and generator.random() < 0.15:  # one of two lost for longer
        length = int(generator.integers(3, len(frames) // 3))
        begin = int(generator.integers(0, len(frames) - length))
        for bodies in frames[begin : begin + length]:
            del bodies[1:]
    return frames


def _measure(joints: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Adds a depth sensor's errors to (F, 25, 3) joints in the camera's frame."""
    num_frames = len(joints)
    deviation = 0.004 + 0.003 * max(0.0, joints[..., 2].mean() - 2.0)
    measured = joints + generator.normal(0, deviation, joints.shape)
    measured += 0.012 * _slow_noise(joints.shape, generator)
    for limb in _LIMB_JOINTS.values():
        # A limb behind the spine is partly hidden, and for some moments guessed wrongly.
        depth = (joints[:, limb, 2].mean(axis=1) - joints[:, 1, 2]).mean()
        hidden = float(np.clip(depth / 0.15, 0, 1))
        measured[:, limb] += hidden * 0.03 * _slow_noise((num_frames, len(limb), 3), generator)
        for _ in range(generator.poisson(0.3 + 1.5 * hidden)):
            length = int(generator.integers(3, 10))
            begin = int(generator.integers(0, num_frames))
            wrong = generator.choice(limb, size=3, replace=False)
            stretch = measured[begin : begin + length]
            stretch[:, wrong] += generator.normal(0, 0.08, (3, 3))
    return measured


# Fields that this sensor does not measure are zero, those of states say "tracked".
_JOINT_LINE = "%.5f %.5f %.5f 0 0 0 0 0 0 0 0 2\n"
_BODY_TEXT = "%d 0 1 0 1 0 0 0 0 2\n" + f"{NUM_JOINTS}\n" + _JOINT_LINE * NUM_JOINTS


def _to_text(frames: list[list[np.ndarray]]) -> str:
    """The NTU text of the bodies of each frame."""
    parts = [f"{len(frames)}\n"]
    for bodies in frames:
        parts.append(f"{len(bodies)}\n")
        for number, joints in enumerate(bodies, start=1):
            parts.append(_BODY_TEXT % (number, *joints.ravel().tolist()))
    return "".join(parts)
