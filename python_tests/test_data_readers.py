"""What the names of recordings say, which of them train, and how each dataset's files are read."""

from __future__ import annotations

import json

import numpy as np
import pytest
import scipy.io

from ikem_fast import layouts
from ikem_fast.data import READERS, DataError, readers
from ikem_fast.data.readers import Sample, ntu_rgb_d, nw_ucla, utd_mhad

KINECT_1 = layouts.get("nw-ucla")


@pytest.mark.parametrize(
    ("kind", "file_name", "expected"),
    [
        ("ntu-rgb+d", "S018C003P106R002A120.skeleton", Sample("S018C003P106R002A120", 119, 106, 3, 18, 2)),
        ("synthetic", "S001C001P001R001A001.skeleton", Sample("S001C001P001R001A001", 0, 1, 1, 1, 1)),
        ("nw-ucla", "a12_s10_e04_v03.json", Sample("a12_s10_e04_v03", 9, 10, 3, None, 4)),
        ("utd-mhad", "a27_s8_t4_skeleton.mat", Sample("a27_s8_t4_skeleton", 26, 8, None, None, 4)),
    ],
)
def test_names(kind, file_name, expected):
    assert READERS[kind].parse_name(file_name) == expected
    assert file_name == expected.name + READERS[kind].suffix


@pytest.mark.parametrize(
    ("kind", "file_name"),
    [
        *(("ntu-rgb+d", name) for name in ("S001C001P001R001A121.skeleton", "S001C001P001R001A000.skeleton")),
        *(("ntu-rgb+d", name) for name in ("S001C001P001R001A001.txt", "s001c001p001r001a001.skeleton", "README")),
        *(
            ("nw-ucla", name)
            for name in ("a07_s01_e00_v01.json", "a10_s01_e00_v01.json", "a1_s1_e0_v1.json", "a٠١_s01_e00_v01.json")
        ),
        *(("utd-mhad", name) for name in ("a28_s1_t1_skeleton.mat", "a01_s1_t1_skeleton.mat", "a1_s1_t1_depth.mat")),
    ],
)
def test_other_names_are_no_samples(kind, file_name):
    assert READERS[kind].parse_name(file_name) is None


def test_labels_of_nw_ucla_skip_the_actions_that_do_not_exist():
    actions = (1, 2, 3, 4, 5, 6, 8, 9, 11, 12)
    assert [nw_ucla.parse_name(f"a{action:02d}_s01_e00_v01.json").label for action in actions] == list(range(10))


def test_the_splits_of_all_protocols():
    """Sizes and members as published: 20 of 40 and 53 of 106 performers, cameras 2 and 3, even setups."""

    def training(kind, protocol, samples):
        return [sample for sample in samples if READERS[kind].protocols[protocol].is_training(sample)]

    subjects = [Sample("", 0, number, 1, 1, 1) for number in range(1, 107)]
    first = {sample.subject for sample in training("ntu-rgb+d", "ntu60-xsub", subjects)}
    second = {sample.subject for sample in training("ntu-rgb+d", "ntu120-xsub", subjects)}
    assert first == {1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38}
    assert second > first
    assert (len(second), sum(second), max(second)) == (53, 2795, 103)
    cameras = [Sample("", 0, 1, number, 1, 1) for number in (1, 2, 3)]
    assert [s.camera for s in training("ntu-rgb+d", "ntu60-xview", cameras)] == [2, 3]
    assert [s.camera for s in training("nw-ucla", "cross-view", cameras)] == [1, 2]
    assert [s.camera for s in training("synthetic", "xview", cameras)] == [2, 3]
    setups = [Sample("", 0, 1, 1, number, 1) for number in range(1, 33)]
    assert [s.setup for s in training("ntu-rgb+d", "ntu120-xset", setups)] == list(range(2, 33, 2))
    for kind in ("nw-ucla", "utd-mhad"):
        odd = training(kind, "cross-subject", subjects)
        assert [sample.subject for sample in odd] == list(range(1, 107, 2))


def test_ntu_60_has_only_the_first_60_actions():
    protocols = READERS["ntu-rgb+d"].protocols
    included = {
        name: [p.is_included(Sample("", label, 1)) for label in (0, 59, 60, 119)] for name, p in protocols.items()
    }
    assert included == {
        "ntu60-xsub": [True, True, False, False],
        "ntu60-xview": [True, True, False, False],
        "ntu120-xsub": [True] * 4,
        "ntu120-xset": [True] * 4,
    }
    assert [len(protocol.class_names) for protocol in protocols.values()] == [60, 60, 120, 120]
    assert (ntu_rgb_d.ACTION_NAMES[22], ntu_rgb_d.ACTION_NAMES[59]) == ("hand waving", "walking apart")


@pytest.mark.parametrize("kind", READERS)
def test_class_names_are_distinct(kind):
    for protocol in READERS[kind].protocols.values():
        assert len(set(protocol.class_names)) == len(protocol.class_names)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(DataError, match=r"kind must be one of ntu-rgb\+d, nw-ucla, .*; did you mean 'nw-ucla'\?"):
        readers.get("nwucla")


def write_nw_ucla(path, skeletons):
    path.write_text(json.dumps({"file_name": path.stem, "skeletons": skeletons, "label": 1}))
    return path


@pytest.mark.parametrize("num_frames", [1, 5])
def test_nw_ucla(tmp_path, num_frames):
    skeletons = np.random.default_rng(0).normal(size=(num_frames, 20, 3))
    xyz = nw_ucla.read(write_nw_ucla(tmp_path / "a.json", skeletons.tolist()), KINECT_1)
    assert (xyz.shape, xyz.dtype) == ((3, num_frames, 20, 1), np.float64)
    np.testing.assert_array_equal(xyz[..., 0].transpose(1, 2, 0), skeletons)


def broken(frames=2, joints=20, **changes):
    skeletons = np.zeros((frames, joints, 3)).tolist()
    for (frame, joint), value in changes.get("at", {}).items():
        skeletons[frame][joint] = value
    return skeletons


@pytest.mark.parametrize(
    ("skeletons", "reason"),
    [
        ([], "'skeletons' must be a list of at least one frame"),
        (None, "'skeletons' must be a list of at least one frame"),
        (broken(joints=25), "frame 1 must be a list of 20 joints, got 25"),
        ([*broken(), 7], "frame 3 must be a list of 20 joints, got int"),
        (broken(at={(1, 4): [1, 2]}), r"'skeletons' must be \(frames, 20, 3\) numbers"),
        (broken(at={(1, 4): [1, 2, "3"]}), r"'skeletons' must be \(frames, 20, 3\) numbers"),
        (broken(at={(1, 4): [1, 2, None]}), r"'skeletons' must be \(frames, 20, 3\) numbers"),
        (broken(at={(1, 4): [0, float("nan"), 0]}), "coordinate y of joint 5 in frame 2 must be finite, got nan"),
        (broken(at={(0, 19): [float("inf"), 0, 0]}), "coordinate x of joint 20 in frame 1 must be finite, got inf"),
    ],
)
def test_damaged_nw_ucla(tmp_path, skeletons, reason):
    with pytest.raises(ValueError, match=reason):
        nw_ucla.read(write_nw_ucla(tmp_path / "a.json", skeletons), KINECT_1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"skeletons":\n[[[1, 2', "line 2: not JSON"),
        (b"", "line 1: not JSON"),
        (b"[1]", "must be a JSON object with the key 'skeletons'"),
        (b"{}", "must be a JSON object with the key 'skeletons'"),
        (b'{"skeletons": "\xff\xfe"}', "not JSON"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_nw_ucla_file(tmp_path, text, reason):
    (tmp_path / "a.json").write_bytes(text)
    with pytest.raises(ValueError, match=reason):
        nw_ucla.read(tmp_path / "a.json", KINECT_1)


@pytest.mark.parametrize("num_frames", [1, 6])
def test_utd_mhad(tmp_path, num_frames):
    skeleton = np.random.default_rng(0).normal(size=(20, 3, num_frames))
    scipy.io.savemat(tmp_path / "a.mat", {"d_skel": skeleton.squeeze()})
    xyz = utd_mhad.read(tmp_path / "a.mat", layouts.get("utd-mhad"))
    assert (xyz.shape, xyz.dtype) == ((3, num_frames, 20, 1), np.float64)
    np.testing.assert_array_equal(xyz[..., 0].transpose(2, 0, 1), skeleton)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"other": np.zeros(3)}, "has no variable 'd_skel'"),
        ({"d_skel": np.zeros((25, 3, 4))}, r"'d_skel' must be \(20, 3, frames\), got \(25, 3, 4\)"),
        ({"d_skel": np.zeros((20, 3, 0))}, "no frames"),
        ({"d_skel": "text"}, "'d_skel' must be an array of numbers"),
        ({"d_skel": np.full((20, 3, 2), np.nan)}, "coordinate x of joint 1 in frame 1 must be finite, got nan"),
    ],
)
def test_damaged_utd_mhad(tmp_path, content, reason):
    scipy.io.savemat(tmp_path / "a.mat", content)
    with pytest.raises(ValueError, match=reason):
        utd_mhad.read(tmp_path / "a.mat", layouts.get("utd-mhad"))


def test_truncated_or_scrambled_mat_files_end_in_a_named_error(tmp_path):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"d_skel": np.random.default_rng(0).normal(size=(20, 3, 4))}, do_compression=True)
    content = path.read_bytes()
    generator = np.random.default_rng(1)
    refused = 0
    for trial in range(60):
        damaged = bytearray(content[: len(content) * trial // 60])
        for position in generator.integers(0, max(1, len(damaged)), 3) if trial % 2 and damaged else ():
            damaged[position] ^= 0xFF
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            utd_mhad.read(path, layouts.get("utd-mhad"))
        refused += 1
    assert refused == 60
