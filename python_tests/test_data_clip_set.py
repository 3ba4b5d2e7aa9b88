"""Prepared folders as training sees them, and what is said of damaged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from skeleton_text import make_text

from ikem_fast.data import ClipSet, DataError, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Clips of performers 1 (training) and 3 (test), two actions, 1 to 4 frames of which one has no detection."""
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "source").mkdir()
    number = 0
    for performer in (3, 1):
        for action in (1, 2):
            number += 1
            text = make_text([1] * number + [0], seed=number)
            name = f"S001C001P{performer:03d}R001A{action:03d}.skeleton"
            (folder / "source" / name).write_text(text)
    prepare("ntu-rgb+d", folder / "source", folder / "out", num_frames=6)
    return folder / "out"


@pytest.fixture
def copy(prepared, tmp_path):
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_attributes(prepared):
    clip_set = ClipSet.open(prepared)
    assert len(clip_set) == 4
    assert clip_set.names == [f"S001C001P00{performer}R001A00{action}" for performer in (1, 3) for action in (1, 2)]
    assert clip_set.labels.tolist() == [0, 1, 0, 1]
    assert clip_set.num_frames.tolist() == [4, 5, 2, 3]
    assert clip_set.valid_frames.tolist() == [3, 4, 1, 2]
    assert clip_set.splits.tolist() == ["train", "train", "test", "test"]
    assert {array.dtype for array in (clip_set.labels, clip_set.num_frames, clip_set.valid_frames)} == {np.dtype("i8")}
    assert clip_set.num_classes == len(clip_set.class_names) == 60
    assert clip_set.layout.name == "ntu-rgb+d"
    assert (clip_set.clip_length, clip_set.num_persons) == (6, 2)
    assert clip_set.table["subject"].tolist() == ["1", "1", "3", "3"]
    assert isinstance(clip_set.clips, np.memmap)
    assert not clip_set.clips.flags.writeable
    assert repr(clip_set) == f"ClipSet('{prepared}': 4 clips of ntu-rgb+d, ntu60-xsub)"


def test_splits_and_subsets_keep_everything_in_line(prepared):
    clip_set = ClipSet.open(prepared)
    test = clip_set.split("test")
    assert test.names == clip_set.names[2:]
    np.testing.assert_array_equal(test.clips, clip_set.clips[2:])
    assert isinstance(test.clips, np.memmap)
    picked = clip_set.subset(np.array([3, 0]))
    assert picked.names == [clip_set.names[3], clip_set.names[0]]
    assert picked.labels.tolist() == [1, 0]
    assert picked.rows.tolist() == [3, 0]
    np.testing.assert_array_equal(picked.clips, clip_set.clips[[3, 0]])
    again = test.subset(torch.tensor([1]))
    assert (again.names, again.num_frames.tolist(), again.rows.tolist()) == ([clip_set.names[3]], [3], [3])
    assert len(clip_set.subset([])) == 0
    with pytest.raises(DataError, match=r"has no clips of split 'test'; splits with clips: 'train'"):
        clip_set.split("train").split("test")
    with pytest.raises(DataError, match=r"has no clips of split 'val'; splits with clips: 'train', 'test'"):
        clip_set.split("val")


def test_batches(prepared):
    clip_set = ClipSet.open(prepared)
    batch = clip_set.split("test").batch([1, 0, 1])
    assert [tensor.dtype for tensor in vars(batch).values()] == [torch.float32, *[torch.int64] * 3]
    assert batch.clips.shape == (3, 3, 6, 25, 2)
    assert len(batch) == 3
    np.testing.assert_array_equal(batch.clips.numpy(), clip_set.clips[[3, 2, 3]])
    assert batch.num_frames.tolist() == [3, 2, 3]
    assert batch.labels.tolist() == [1, 0, 1]
    assert batch.indices.tolist() == [1, 0, 1]
    batch.clips += 1  # a batch is a copy: the file is not written to
    assert clip_set.batch([0], file_frame_count=False).num_frames.tolist() == [3]
    assert len(clip_set.batch(torch.tensor([], dtype=torch.int64))) == 0
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in vars(moved).values()} == {"meta"}


@pytest.mark.cuda
def test_batches_on_a_gpu(prepared):
    clip_set = ClipSet.open(prepared)
    batch = clip_set.batch([2, 1], device="cuda")
    torch.cuda.synchronize()
    np.testing.assert_array_equal(batch.clips.cpu().numpy(), clip_set.clips[[2, 1]])
    assert batch.labels.device.type == "cuda"


@pytest.mark.parametrize(
    ("indices", "error", "reason"),
    [
        ([4], IndexError, "indices must be 0 to 3, got 4"),
        ([0, -1], IndexError, "indices must be 0 to 3, got -1"),
        ([[0]], ValueError, r"indices must be \(B,\) whole numbers, got \(1, 1\) int64"),
        ([0.5], ValueError, r"indices must be \(B,\) whole numbers, got \(1,\) float64"),
        ([True, False, True, False], ValueError, r"indices must be \(B,\) whole numbers, got \(4,\) bool"),
    ],
)
def test_bad_indices(prepared, indices, error, reason):
    with pytest.raises(error, match=reason):
        ClipSet.open(prepared).batch(indices)


def edit_json(**changes):
    def edit(folder):
        path = folder / "dataset.json"
        metadata = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in (metadata | changes).items() if value is not None}))

    return edit


def edit_table(line, old, new):
    def edit(folder):
        path = folder / "samples.csv"
        lines = path.read_text().splitlines()
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new)
        path.write_text("\n".join(line for line in lines if line) + "\n")

    return edit


def save_clips(**changes):
    def edit(folder):
        clips = np.load(folder / "clips.npy")
        if "shape" in changes:
            clips = np.zeros(changes["shape"], np.float32)
        np.save(folder / "clips.npy", clips.astype(changes.get("dtype", clips.dtype), order=changes.get("order", "C")))

    return edit


def append_bytes(folder):
    (folder / "clips.npy").write_bytes((folder / "clips.npy").read_bytes() + b"more")


def cut(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "dataset.json").unlink(), "no dataset.json, so this is no finished folder"),
        (lambda folder: (folder / "clips.npy").unlink(), "clips.npy: No such file or directory"),
        (lambda folder: (folder / "samples.csv").unlink(), "samples.csv: No such file or directory"),
        (cut("dataset.json", 100), "dataset.json: not JSON"),
        (edit_json(format="other"), "dataset.json: format must be 'ikem_fast clips'"),
        (edit_json(format_version=2), "dataset.json: format_version must be 1, got 2: prepare the recordings again"),
        (edit_json(layout=None), "dataset.json: layout must be a dict, got None"),
        (edit_json(layout={"name": "x"}), "dataset.json: layout: missing joints"),
        (edit_json(num_frames="6"), "dataset.json: num_frames must be a int, got '6'"),
        (edit_json(num_frames=7), r"clips.npy: must be \(N, 3, 7, 25, M\) float32 in C order, got \(4, 3, 6, 25, 2\)"),
        (edit_json(class_names=[]), "dataset.json: class_names must be a non-empty list of names"),
        (edit_json(class_names=["only one"]), "samples.csv: line 3: label must be 0 to 0, got 1"),
        (cut("clips.npy", 10_000), "clips.npy: truncated or no .npy file"),
        (cut("clips.npy", 40), "clips.npy: truncated or no .npy file"),
        (cut("clips.npy", 0), "clips.npy: truncated or no .npy file"),
        (append_bytes, "clips.npy: must have 14528 bytes, got 14532"),
        (save_clips(dtype=np.float64), r"must be .* float32 in C order, got \(4, 3, 6, 25, 2\) float64 in C order"),
        (save_clips(order="F"), r"must be .* float32 in C order, got .* float32 in Fortran order"),
        (save_clips(shape=(4, 3, 6, 20, 2)), r"clips.npy: must be .*, got \(4, 3, 6, 20, 2\)"),
        (save_clips(shape=(4, 3, 6, 25)), r"clips.npy: must be .*, got \(4, 3, 6, 25\)"),
        (save_clips(shape=(5, 3, 6, 25, 2)), "samples.csv must have one row per clip, got 4 rows for 5 clips"),
        (edit_table(1, "camera", "view"), "samples.csv: line 1: columns must be name,label,subject,camera"),
        (edit_table(2, ",train", ""), "samples.csv: line 2: must have 9 cells, got 8"),
        (edit_table(5, ",test", ",tset"), "samples.csv: line 5: split must be train or test, got 'tset'"),
        (edit_table(3, ",1,1,1,1,1,5", ",-1,1,1,1,1,5"), "samples.csv: line 3: label must be a whole number, got '-1'"),
        (edit_table(2, ",4,3,", ",4,5,"), r"samples.csv: line 2: valid_frames must be 1 to num_frames \(4\), got 5"),
        (edit_table(2, ",4,3,", ",4,0,"), r"samples.csv: line 2: valid_frames must be 1 to num_frames \(4\), got 0"),
        (edit_table(3, "A002", "A001"), "samples.csv: line 3: S001C001P001R001A001 is given twice"),
        (lambda folder: (folder / "samples.csv").write_bytes(b"\xff\xfe"), "samples.csv: not a CSV file"),
    ],
)  # fmt: skip
def test_damaged_folders(copy, damage, reason):
    damage(copy)
    with pytest.raises(DataError, match=reason) as caught:
        ClipSet.open(copy)
    assert str(caught.value).startswith(str(copy))


def test_no_folder(tmp_path):
    with pytest.raises(DataError, match=r"none: no such folder; prepare one with `python -m ikem_fast.data prepare`"):
        ClipSet.open(tmp_path / "none")
