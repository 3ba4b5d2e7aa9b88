"""Clips of one skeleton for encoders of another: the mapping by hand, and the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, write_clip_set

from ikem_fast import engine, layouts, train
from ikem_fast.data import ClipSet, DataError, open_source
from ikem_fast.evaluation import evaluate_run, load_scores
from ikem_fast.layouts import LayoutError

STICK = {
    "name": "stick",
    "joints": ["hip", "spine", "left", "right", "head"],
    "bones": {"hip": "spine", "left": "spine", "right": "spine", "head": "spine"},
    "center": "spine",
    "chest_normal": ["hip", "left", "right"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Clips of three skeletons, and a run on those of NW-UCLA."""
    folder = tmp_path_factory.mktemp("transfer")
    for name in ("nw-ucla", "utd-mhad", "ntu-rgb+d"):
        write_clip_set(folder / name, layout=name)
    config = small_config("logging.knn_every_epochs=0", "model.modalities=[joint,bone]")
    engine.pretrain(folder / "nw-ucla", folder / "run", config, progress=False)
    config = small_config("logging.knn_every_epochs=0", "model.modalities=[joint,bone]", "seed=3")
    engine.pretrain(folder / "ntu-rgb+d", folder / "ntu run", config, progress=False)
    return folder


def test_joints_are_taken_by_name_and_by_what_stands_in():
    kinect1, kinect2 = layouts.get("nw-ucla"), layouts.get("ntu-rgb+d")
    mapping = layouts.map_joints(kinect1, kinect2)
    taken = {joint: kinect1.joint_names[number] for joint, number in zip(kinect2.joint_names, mapping, strict=True)}
    same = {joint: joint for joint in kinect1.joint_names if joint in kinect2.joint_names}
    assert len(same) == 17
    assert taken == {
        **same,
        "spine_base": "hip_center",
        "spine_mid": "spine",
        "neck": "shoulder_center",
        "spine_shoulder": "shoulder_center",
        "hand_tip_left": "hand_left",
        "thumb_left": "hand_left",
        "hand_tip_right": "hand_right",
        "thumb_right": "hand_right",
    }
    back = layouts.map_joints(kinect2, kinect1)
    assert kinect2.joint_names[back[kinect1.joint_names.index("shoulder_center")]] == "spine_shoulder"
    # The same joints in another order.
    order = layouts.map_joints(layouts.get("utd-mhad"), kinect1)
    assert [layouts.get("utd-mhad").joint_names[number] for number in order] == list(kinect1.joint_names)


def test_a_layout_of_ones_own_takes_part_both_ways():
    stick = layouts.from_dict(
        {
            **STICK,
            "stand_ins": {
                "hip": ["pelvis", "hip_center"],
                "left": ["shoulder_left"],
                "right": ["shoulder_right"],
                # The opposite direction: joints of a layout that cannot be changed.
                **{joint: ["spine"] for joint in layouts.get("nw-ucla").joint_names if joint not in ("head", "spine")},
            },
        }
    )
    kinect = layouts.get("nw-ucla")
    taken = [kinect.joint_names[number] for number in layouts.map_joints(kinect, stick)]
    assert taken == ["hip_center", "spine", "shoulder_left", "shoulder_right", "head"]
    assert set(layouts.map_joints(stick, kinect)) == {1, 4}
    assert layouts.from_dict(stick.to_dict()).stand_ins == stick.stand_ins
    plain = layouts.from_dict(STICK)
    assert plain == stick
    assert "stand_ins" not in plain.to_dict()
    with pytest.raises(
        LayoutError, match="nothing in layout 'nw-ucla' stands in for hip, left, right of layout 'stick'"
    ):
        layouts.map_joints(kinect, plain)


def test_a_layout_kept_without_stand_ins_has_those_of_the_package():
    kept = layouts.get("ntu-rgb+d").to_dict()
    del kept["stand_ins"]
    old = layouts.from_dict(kept)
    assert not old.stand_ins
    kinect1 = layouts.get("nw-ucla")
    assert layouts.map_joints(kinect1, old) == layouts.map_joints(kinect1, layouts.get("ntu-rgb+d"))


@pytest.mark.parametrize(
    ("stand_ins", "message"),
    [
        (["hip"], "stand_ins must map joint names to lists"),
        ({"hip": "pelvis"}, "stand_ins: hip must be a non-empty list of joint names, got 'pelvis'"),
        ({"hip": []}, "must be a non-empty list"),
        ({"hip": ["pelvis", "pelvis"]}, "must list different joints"),
        ({"hip": ["hip"]}, "other than itself"),
        ({"pelvis": ["hipp"]}, "names 'hipp', .* did you mean 'hip'"),
    ],
)
def test_wrong_stand_ins_are_named(stand_ins, message):
    with pytest.raises(LayoutError, match=message):
        layouts.from_dict({**STICK, "stand_ins": stand_ins})


def test_fitted_clips(folders):
    clips = ClipSet.open(folders / "nw-ucla")
    kinect2 = layouts.get("ntu-rgb+d")
    fitted = clips.fitted(kinect2, num_persons=2).split("test")
    stored = clips.split("test")
    assert fitted.layout == kinect2
    assert (fitted.clip_shape, fitted.num_persons) == ((3, 16, 25, 2), 2)
    batch, plain = fitted.batch([2, 0]), stored.batch([2, 0])
    assert torch.equal(batch.clips[:, :, :, 20, 0], plain.clips[:, :, :, 2, 0])  # spine_shoulder <- shoulder_center
    assert torch.equal(batch.clips[:, :, :, 24, 0], plain.clips[:, :, :, 11, 0])  # thumb_right <- hand_right
    assert torch.equal(batch.clips[:, :, :, 13, 0], plain.clips[:, :, :, 13, 0])  # knee_left
    assert not batch.clips[..., 1].any()
    assert torch.equal(batch.num_frames, plain.num_frames)
    np.testing.assert_array_equal(fitted.clips[[2, 0]], batch.clips.numpy())
    with pytest.raises(ValueError, match="fitted to ntu-rgb"):
        fitted.fitted(kinect2)
    assert clips.fitted(clips.layout, num_persons=None).num_persons == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["resident", "stream"])
def test_training_sources_read_fitted_clips(folders, place, dtype):
    fitted = ClipSet.open(folders / "utd-mhad").fitted(layouts.get("nw-ucla"), num_persons=3).split("train")
    source = open_source(fitted, place=place, dtype=dtype)
    for positions, batch in zip(([5, 1, 1], [0]), source.batches([[5, 1, 1], [0]]), strict=True):
        clips = batch.clips if batch.indices is None else batch.clips[batch.indices]
        assert torch.equal(clips, fitted.batch(positions).clips.to(dtype))


@pytest.mark.parametrize(
    ("protocol", "settings"),
    [
        ("linear", ["epochs=2", "linear.milestones=[]"]),
        ("knn", ["k=[1]"]),
        ("semi", ["epochs=1", "semi.milestones=[]", "fractions=[0.5]"]),
        ("finetune", ["epochs=1", "finetune.milestones=[]"]),
    ],
)
def test_command(folders, capsys, protocol, settings):
    arguments = ["--data", str(folders / "nw-ucla"), "--protocol", protocol, "--quiet", *settings]
    assert train.main(["evaluate", "transfer", "--run", str(folders / "ntu run"), *arguments]) == 0
    assert "joint" in capsys.readouterr().out
    folder = folders / "ntu run" / "evaluation"
    written = json.loads((folder / f"transfer_{protocol}_nw-ucla.json").read_text())
    assert written["data"]["layout"] == "nw-ucla"
    assert written["data"]["joints"]["thumb_left"] == "hand_left"
    assert not (folder / f"{protocol}.json").exists()
    assert not (folder / "linear_heads.safetensors").exists()
    if protocol == "linear":
        names = load_scores(folder / "transfer_linear_nw-ucla_scores.npz").sample_names
        assert list(names) == ClipSet.open(folders / "nw-ucla").split("test").names


def test_the_same_clips_in_another_order_of_joints_give_the_same_numbers(folders, tmp_path):
    clips = ClipSet.open(folders / "nw-ucla")
    other = layouts.get("utd-mhad")
    reordered = write_clip_set(tmp_path / "reordered", layout="utd-mhad")
    mapping = layouts.map_joints(clips.layout, other)
    np.save(reordered.folder / "clips.npy", np.ascontiguousarray(clips.file_clips[..., list(mapping), :]))
    evaluate_run("knn", folders / "run", out=tmp_path / "own", progress=False)
    evaluate_run("knn", folders / "run", data=reordered.folder, transfer=True, out=tmp_path / "moved", progress=False)
    own = json.loads((tmp_path / "own" / "knn.json").read_text())
    moved = json.loads((tmp_path / "moved" / "transfer_knn_nw-ucla.json").read_text())
    assert moved["encoders"] == own["encoders"]


def test_mistakes(folders, tmp_path, capsys):
    options = {"data": folders / "utd-mhad", "transfer": True, "out": tmp_path, "progress": False}
    with pytest.raises(ValueError, match="persons must be at least 1, got 0"):
        evaluate_run("knn", folders / "run", persons=0, **options)
    metadata = json.loads((folders / "utd-mhad" / "dataset.json").read_text())
    turned = write_clip_set(tmp_path / "turned", layout="utd-mhad").folder
    (turned / "dataset.json").write_text(json.dumps({**metadata, "rotation": False}))
    with pytest.raises(DataError, match="rotation is True there and False here"):
        evaluate_run("knn", folders / "run", **{**options, "data": turned})
    arguments = ["evaluate", "knn", "--run", str(folders / "run"), "--data", str(folders / "utd-mhad"), "--quiet"]
    assert train.main(arguments) == 2
    assert "`evaluate transfer` fits one skeleton to another" in capsys.readouterr().err
