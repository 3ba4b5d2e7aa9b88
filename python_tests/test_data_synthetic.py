"""The synthetic recordings: a plausible body that does what the actions say, in files the NTU reader takes."""

from __future__ import annotations

import filecmp
import os
import shutil
from dataclasses import fields

import numpy as np
import pytest

from ikem_fast import layouts
from ikem_fast.data import ClipSet, DataError, kinematics, motions, prepare, prepare_synthetic, synthetic
from ikem_fast.data.__main__ import main
from ikem_fast.data.kinematics import Body, Pose, place_joints
from ikem_fast.data.motions import ACTIONS, Timing
from ikem_fast.data.readers import ntu_rgb_d

NTU = layouts.get("ntu-rgb+d")
JOINT = {name: number for number, name in enumerate(NTU.joint_names)}
BODY = Body.draw(np.random.default_rng(0))


def move(name, side="right", num_frames=91, repeats=1):
    """(F, 25, 3) joints of each person doing an action over three seconds, without any noise."""
    action = next(action for action in ACTIONS if action.name == name)
    seconds = np.linspace(0, 3, num_frames)
    poses = [Pose.rest(num_frames) for _ in range(action.num_persons)]
    action.move(poses, Timing(seconds, seconds / 3, 1.0, 0.0, repeats), side)
    return [place_joints(BODY, pose) for pose in poses]


def test_the_body_stands_on_the_ground_with_its_joints_where_ntu_has_them():
    joints = place_joints(BODY, Pose.rest(1))[0]
    height = dict(zip(NTU.joint_names, joints[:, 1], strict=True))
    assert height["head"] > height["neck"] > height["spine_shoulder"] > height["spine_mid"] > height["spine_base"]
    assert height["spine_base"] > height["knee_left"] > height["ankle_left"] > 0
    assert min(height.values()) == pytest.approx(0, abs=1e-12)
    assert 1.35 < height["head"] < 2
    for left in (name for name in NTU.joint_names if name.endswith("_left")):
        mirrored = joints[JOINT[left.replace("_left", "_right")]] * (-1, 1, 1)
        np.testing.assert_allclose(joints[JOINT[left]], mirrored, atol=1e-12)
        assert joints[JOINT[left], 0] < 0
    assert joints[JOINT["foot_left"], 2] < joints[JOINT["ankle_left"], 2]  # toes to the camera


@pytest.mark.parametrize("name", motions.ACTION_NAMES)
def test_bones_keep_their_lengths_in_every_action(name):
    for joints in move(name):
        lengths = np.linalg.norm(joints - joints[:, list(NTU.bone_parents)], axis=2)
        # Two hand joints hang on others in the body than in the layout's bones.
        rigid = [joint for joint in range(25) if joint not in (21, 22, 23, 24)]
        np.testing.assert_allclose(lengths[:, rigid], lengths[:1, rigid].repeat(len(lengths), 0), atol=1e-9)


def test_actions_do_what_their_names_say():
    def height(joints, name):
        return joints[:, JOINT[name], 1]

    right, left = move("wave right hand")[0], move("wave left hand")[0]
    assert height(right, "hand_right").max() > height(right, "shoulder_right").max()
    assert height(right, "hand_left").max() < height(right, "spine_mid").min()
    np.testing.assert_allclose(right[:, JOINT["hand_right"]] * (-1, 1, 1), left[:, JOINT["hand_left"]], atol=1e-9)

    hands = move("clap")[0]
    gap = np.linalg.norm(hands[:, JOINT["hand_left"]] - hands[:, JOINT["hand_right"]], axis=1)[20:70]
    assert gap.min() < 0.15
    assert gap.max() > 0.3

    sitting = move("sit down")[0]
    assert height(sitting, "spine_base")[-1] < 0.65 * height(sitting, "spine_base")[0]
    assert sitting[-1, JOINT["knee_left"], 2] < sitting[-1, JOINT["hip_left"], 2] - 0.2  # knees to the front
    np.testing.assert_allclose(move("stand up")[0], sitting[::-1], atol=1e-9)

    kicking = move("kick")[0]
    assert np.ptp(height(kicking, "foot_right")) > 0.4
    assert np.ptp(height(move("kick", side="left")[0], "foot_left")) > 0.4
    assert height(move("jump")[0], "foot_left").max() > 0.2
    assert height(move("bow")[0], "head").min() < 0.85 * height(move("bow")[0], "head").max()
    assert move("punch")[0][:, JOINT["hand_right"], 2].min() < -0.4

    forwards, backwards = (move(f"arm circles {way}")[0] for way in ("forwards", "backwards"))
    np.testing.assert_allclose(forwards, backwards[::-1], atol=1e-9)
    assert height(forwards, "hand_left").max() > height(forwards, "head").max()
    quarter = len(forwards) // 4
    assert forwards[quarter, JOINT["hand_left"], 2] > 0.2  # first backwards and up
    assert backwards[quarter, JOINT["hand_left"], 2] < -0.2


def test_running_is_walking_at_another_speed():
    def zero_crossings(joints):
        difference = joints[:, JOINT["knee_left"], 1] - joints[:, JOINT["knee_right"], 1]
        signs = np.sign(difference[np.abs(difference) > 0.02])
        return np.count_nonzero(np.diff(signs))

    walking, running = move("walk in place")[0], move("run in place")[0]
    assert zero_crossings(running) == pytest.approx(2 * zero_crossings(walking), abs=1)
    assert np.ptp(running[:, JOINT["knee_left"], 1]) == pytest.approx(
        np.ptp(walking[:, JOINT["knee_left"], 1]), rel=0.05
    )


def test_bodies_differ():
    bodies = [Body.draw(np.random.default_rng(seed)) for seed in range(3)]
    for field in fields(kinematics.Body):
        assert len({getattr(body, field.name) for body in bodies}) == 3


def test_performers_are_of_both_splits_whatever_their_number():
    for number in (2, 3, 10, 40):
        chosen = synthetic.performers(number)
        assert len(set(chosen)) == number
        training = sum(performer in ntu_rgb_d.XSUB_60_TRAINING for performer in chosen)
        assert training == (number + 1) // 2


SMALL = {"num_subjects": 2, "num_repetitions": 1, "num_cameras": 3, "num_actions": 12}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "raw"
    assert synthetic.write(folder, **SMALL) == 72
    return folder


def test_files_are_those_of_ntu(raw):
    names = sorted(name for name in os.listdir(raw) if not name.startswith("."))
    samples = [ntu_rgb_d.parse_name(name) for name in names]
    assert None not in samples
    assert {sample.label for sample in samples} == set(range(12))
    assert {sample.camera for sample in samples} == {1, 2, 3}
    assert {sample.subject for sample in samples} == {1, 3}
    num_bodies = {}
    for name, sample in zip(names, samples, strict=True):
        xyz = ntu_rgb_d.read(raw / name, NTU)
        assert 20 <= xyz.shape[1] <= 300
        assert np.abs(xyz).max() < 6
        assert xyz[2][xyz[2] != 0].min() > 1
        num_bodies.setdefault(sample.label, set()).add(int(xyz.any(axis=(0, 1, 2)).sum()))
    assert num_bodies == {label: {ACTIONS[label].num_persons} for label in range(12)}
    assert sum(action.num_persons == 2 for action in ACTIONS[:12]) == 2


def test_the_same_seed_gives_the_same_files(raw, tmp_path):
    synthetic.write(tmp_path / "again", **SMALL)
    synthetic.write(tmp_path / "other", **SMALL, seed=1)
    names = sorted(os.listdir(raw))
    assert filecmp.cmpfiles(raw, tmp_path / "again", names, shallow=False) == (names, [], [])
    assert len(filecmp.cmpfiles(raw, tmp_path / "other", names, shallow=False)[1]) == len(names)


def test_fewer_subjects_or_actions_leave_the_other_files_as_they_are(raw, tmp_path):
    synthetic.write(tmp_path / "few", num_subjects=2, num_repetitions=1, num_cameras=2, num_actions=3)
    names = sorted(name for name in os.listdir(tmp_path / "few") if not name.startswith("."))
    assert len(names) == 12
    assert filecmp.cmpfiles(raw, tmp_path / "few", names, shallow=False) == (names, [], [])


def test_cameras_see_one_performance_from_three_sides(raw):
    seen = [ntu_rgb_d.read(raw / f"S002C00{camera}P001R001A001.skeleton", NTU) for camera in (1, 2, 3)]
    length = min(xyz.shape[1] for xyz in seen)
    assert len({xyz.shape[1] for xyz in seen}) == 1
    headings = []
    for xyz in seen:
        u = (xyz[:, :length, NTU.shoulders[1], 0] - xyz[:, :length, NTU.shoulders[0], 0]).mean(axis=1)
        headings.append(np.degrees(np.arctan2(u[2], u[0])))
    assert 25 < headings[0] - headings[1] < 65 or 25 < headings[1] - headings[0] < 65
    assert 25 < abs(headings[2] - headings[1]) < 65
    assert abs(headings[2] - headings[0]) > 60
    arm = [np.linalg.norm(xyz[:, :, 8, 0] - xyz[:, :, 9, 0], axis=0).mean() for xyz in seen]
    assert max(arm) - min(arm) < 0.05


def test_interrupted_writing_goes_on(raw, tmp_path):
    shutil.copytree(raw, tmp_path / "raw")
    names = sorted(os.listdir(raw))
    for name in names[5:40]:
        (tmp_path / "raw" / name).unlink()
    synthetic.write(tmp_path / "raw", **SMALL)
    assert filecmp.cmpfiles(raw, tmp_path / "raw", names, shallow=False) == (names, [], [])
    with pytest.raises(DataError, match="holds synthetic recordings of other parameters"):
        synthetic.write(tmp_path / "raw", **SMALL, seed=3)


def test_prepared_like_any_other_recordings(raw, tmp_path):
    out = tmp_path / "out"
    summary = prepare_synthetic(out, **SMALL)
    assert (summary.kind, summary.protocol, summary.num_train, summary.num_test) == ("synthetic", "xsub", 36, 36)
    assert prepare_synthetic(out, **SMALL).already_done
    clip_set = ClipSet.open(out)
    assert clip_set.class_names == motions.ACTION_NAMES[:12]
    assert set(clip_set.split("train").table["subject"]) == {"1"}
    assert prepare("synthetic", raw, tmp_path / "direct", protocol="xview").num_train == 48
    np.testing.assert_array_equal(ClipSet.open(tmp_path / "direct").clips, clip_set.clips)
    with pytest.raises(DataError, match="raw holds synthetic recordings of other parameters"):
        prepare_synthetic(out, **SMALL, seed=5)


def test_command(tmp_path, capsys):
    command = ["prepare", "synthetic", str(tmp_path / "out"), "--raw", str(tmp_path / "text")]
    command += ["--subjects", "2", "--repetitions", "1", "--cameras", "1", "--actions", "2", "--seed", "9"]
    assert main(command) == 0
    assert "4 clips of synthetic, xsub: 2 train, 2 test" in capsys.readouterr().out
    assert len(os.listdir(tmp_path / "text")) == 5
    assert main([*command, "--actions", "30"]) == 1
    assert "error: num_actions must be 2 to 17, got 30" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_subjects": 1}, "num_subjects must be 2 to 40, got 1"),
        ({"num_repetitions": 0}, "num_repetitions must be 1 to 99, got 0"),
        ({"num_cameras": 4}, "num_cameras must be 1 to 3, got 4"),
        ({"seed": -1}, "seed must be 0 to"),
    ],
)
def test_bad_arguments(tmp_path, arguments, reason):
    with pytest.raises(DataError, match=reason):
        synthetic.write(tmp_path / "raw", **arguments)
    assert not (tmp_path / "raw").exists()


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match="must be a new or empty folder for the synthetic recordings"):
        synthetic.write(tmp_path)
    assert os.listdir(tmp_path) == ["notes.txt"]
