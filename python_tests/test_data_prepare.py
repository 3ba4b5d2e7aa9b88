"""Preparation as a whole: what it writes, what it refuses, and that interruptions leave no trace."""

from __future__ import annotations

import csv
import dataclasses
import fcntl
import filecmp
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import yaml
from skeleton_text import make_lines, make_text

from ikem_fast import layouts
from ikem_fast.data import ClipSet, DataError, journal, map_ahead, pipeline, prepare, prepare_clip, readers
from ikem_fast.data.__main__ import main

GOLDEN = Path(__file__).parent / "golden"
NTU = layouts.get("ntu-rgb+d")


@pytest.fixture
def source(tmp_path):
    """Six NTU recordings in two folders: performers 1 (training) and 3, actions 1 to 3, one action beyond NTU-60."""
    folder = tmp_path / "source"
    (folder / "more").mkdir(parents=True)
    frames = {"S001C001P001R001A001": [1], "S001C002P003R001A002": [1, 2, 0, 1], "S002C001P001R002A003": [2] * 9}
    for seed, (name, bodies) in enumerate(frames.items()):
        (folder / f"{name}.skeleton").write_text(make_text(bodies, seed=seed))
    (folder / "more" / "S001C003P003R001A001.skeleton").write_text(make_text([1] * 70, seed=7).replace("\n", "\r\n"))
    (folder / "more" / "S018C001P001R001A061.skeleton").write_text(make_text([1], seed=8))
    (folder / ".hidden").write_text("passed over")
    return folder


def read_csv(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_writes_clips_table_and_description(source, tmp_path):
    summary = prepare("ntu-rgb+d", source, tmp_path / "out")
    assert (summary.num_train, summary.num_test, summary.num_excluded, summary.bad_files) == (2, 2, 1, [])
    assert sorted(os.listdir(tmp_path / "out")) == ["bad_files.csv", "clips.npy", "dataset.json", "samples.csv"]

    rows = read_csv(tmp_path / "out" / "samples.csv")
    assert [row["name"] for row in rows] == sorted(row["name"] for row in rows)
    assert rows[1] == {
        "name": "S001C002P003R001A002",
        "label": "1",
        "subject": "3",
        "camera": "2",
        "setup": "1",
        "replication": "1",
        "num_frames": "4",
        "valid_frames": "3",
        "split": "test",
    }
    clips = np.load(tmp_path / "out" / "clips.npy", mmap_mode="r")
    assert (clips.shape, clips.dtype, clips.flags.c_contiguous) == ((4, 3, 50, 25, 2), np.float32, True)
    xyz = make_lines([1, 2, 0, 1], seed=1)[1]
    np.testing.assert_array_equal(clips[1], prepare_clip(xyz, NTU)[0])

    metadata = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert metadata["kind"] == "ntu-rgb+d"
    assert metadata["protocol"] == "ntu60-xsub"
    assert (metadata["num_frames"], metadata["centring"], metadata["rotation"]) == (50, True, True)
    assert len(metadata["class_names"]) == 60
    assert metadata["counts"] == {"clips": 4, "train": 2, "test": 2, "missing": 0, "excluded": 1, "bad_files": 0}


def test_agrees_with_the_reference_vectors(tmp_path):
    prepare("ntu-rgb+d", GOLDEN / "raw", tmp_path / "out")
    clip_set = ClipSet.open(tmp_path / "out")
    with np.load(GOLDEN / "preprocess.npz") as vectors:
        for index, name in enumerate(clip_set.names):
            expected = vectors[f"position/{name}.skeleton"]
            assert np.abs(clip_set.clips[index] - expected).max() <= 5e-6 * np.abs(expected).max()
    assert clip_set.num_frames.tolist() == [61, 40, 75, 33]
    assert clip_set.valid_frames.tolist() == [61, 40, 70, 33]


@pytest.mark.parametrize("protocol", ["ntu60-xview", "ntu120-xsub", "ntu120-xset"])
def test_protocols(source, tmp_path, protocol):
    prepare("ntu-rgb+d", source, tmp_path / "out", protocol=protocol)
    split = {row["name"]: row["split"] for row in read_csv(tmp_path / "out" / "samples.csv")}
    training = {
        "ntu60-xview": {"S001C002P003R001A002", "S001C003P003R001A001"},
        "ntu120-xsub": {"S001C001P001R001A001", "S002C001P001R002A003", "S018C001P001R001A061"},
        "ntu120-xset": {"S002C001P001R002A003", "S018C001P001R001A061"},
    }[protocol]
    assert {name for name, part in split.items() if part == "train"} == training
    assert len(split) == (4 if protocol == "ntu60-xview" else 5)


def test_options_are_applied_and_recorded(source, tmp_path):
    prepare("ntu-rgb+d", source, tmp_path / "out", num_frames=7, centre=False, rotate=False)
    clip_set = ClipSet.open(tmp_path / "out")
    assert [clip_set.metadata[key] for key in ("num_frames", "centring", "rotation")] == [7, False, False]
    xyz = make_lines([1])[1]
    np.testing.assert_array_equal(clip_set.clips[0][..., 0], np.repeat(xyz[..., 0].astype(np.float32), 7, axis=1))


@pytest.mark.parametrize("suffix", ["", ".skeleton"])
def test_missing_list_with_its_heading(source, tmp_path, suffix):
    listing = tmp_path / "missing.txt"
    listing.write_text(
        f"The following 2 samples\nhave no skeletons:\n\nS001C001P001R001A001{suffix}\n\nS009C001P001R001A001\n"
    )
    summary = prepare("ntu-rgb+d", source, tmp_path / "out", missing=listing)
    assert (summary.num_clips, summary.num_missing) == (3, 1)
    assert "1 recordings left out by the list of missing skeletons" in str(summary)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("S001C001P001R001A001\nS001C001P001R001A999\n", "line 2: must be a sample name, got 'S001C001P001R001A999'"),
        ("only\na heading\n", "holds no sample name"),
        (None, "No such file"),
    ],
)
def test_bad_missing_lists(source, tmp_path, text, reason):
    listing = tmp_path / "missing.txt"
    if text is not None:
        listing.write_text(text)
    with pytest.raises(DataError, match=f"missing list {listing}: .*{reason}"):
        prepare("ntu-rgb+d", source, tmp_path / "out", missing=listing)


@pytest.fixture
def damaged(source):
    """The source with four kinds of bad files."""
    lines, _ = make_lines([1, 1])
    (source / "README.txt").write_text("no recording")
    (source / "S003C001P001R001A001.skeleton").write_text("\n".join(lines[:20]))
    lines[4] = lines[4].replace(lines[4].split()[1], "nan")
    (source / "more" / "S003C001P001R001A002.skeleton").write_text("\n".join(lines))
    undetected = make_lines([1])[0]
    undetected[4] = " ".join(["0"] * 12)
    (source / "S003C001P001R001A003.skeleton").write_text("\n".join(undetected))
    (source / "S003C001P001R001A004.skeleton").mkdir()
    (source / "S003C001P001R001A005.skeleton").symlink_to(source / "nowhere")
    return source


def test_skip_leaves_bad_files_out_and_names_them(damaged, tmp_path):
    summary = prepare("ntu-rgb+d", damaged, tmp_path / "out", on_error="skip")
    assert summary.num_clips == 4
    rows = read_csv(tmp_path / "out" / "bad_files.csv")
    assert [(row["file"], row["line"]) for row in rows] == [
        ("README.txt", ""),
        ("S003C001P001R001A001.skeleton", "21"),
        ("S003C001P001R001A003.skeleton", ""),
        ("S003C001P001R001A005.skeleton", ""),
        ("more/S003C001P001R001A002.skeleton", "5"),
    ]
    assert [row["reason"].split(";")[0] for row in rows] == [
        "unknown file name",
        "the file ends before a joint in frame 1 of 2",
        "the joint 'spine_base' of the first person is zero in all 1 frames",
        "No such file or directory",
        "joint line: coordinate y must be finite, got 'nan'",
    ]
    assert "more/S003C001P001R001A002.skeleton: line 5: joint line" in str(summary)
    assert ClipSet.open(tmp_path / "out").metadata["counts"]["bad_files"] == 5
    without = tmp_path / "without"
    shutil.rmtree(damaged / "S003C001P001R001A004.skeleton")
    for row in rows:
        (damaged / row["file"]).unlink()
    prepare("ntu-rgb+d", damaged, without)
    for name in ("clips.npy", "samples.csv"):
        assert filecmp.cmp(tmp_path / "out" / name, without / name, shallow=False)


def test_fail_names_the_first_bad_file_and_goes_on_when_it_is_mended(damaged, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"1 bad file in .*\n    README.txt: unknown file name; expected Ssss"):
        prepare("ntu-rgb+d", damaged, out)
    (damaged / "README.txt").unlink()
    bad = damaged / "S003C001P001R001A001.skeleton"
    with pytest.raises(DataError, match=r"1 bad file in .*\n    S003C001P001R001A001.skeleton: line 21: the file ends"):
        prepare("ntu-rgb+d", damaged, out)
    assert [row["file"] for row in read_csv(out / "bad_files.csv")] == [bad.name]
    with pytest.raises(DataError, match=r"dataset.json"):
        ClipSet.open(out)
    bad.write_text(make_text([1]))
    with pytest.raises(DataError, match=r"S003C001P001R001A002.skeleton: line 5"):
        prepare("ntu-rgb+d", damaged, out)
    summary = prepare("ntu-rgb+d", damaged, out, on_error="skip")
    assert (summary.num_clips, summary.num_resumed) == (5, 5)
    assert not (out / "progress.jsonl").exists()


def test_nothing_usable(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(DataError, match="holds no usable recording Ssss"):
        prepare("ntu-rgb+d", source, tmp_path / "out", on_error="skip")
    (source / "notes").write_text("")
    with pytest.raises(DataError, match=r"1 files of other names \(the first is notes\)"):
        prepare("ntu-rgb+d", source, tmp_path / "out", on_error="skip")
    (source / "S001C001P001R001A001.skeleton").write_text("0\n")
    with pytest.raises(DataError, match=r"none of the 1 recordings .*\n.*line 1: frame count must be 1 to 300, got 0"):
        prepare("ntu-rgb+d", source, tmp_path / "out", on_error="skip")
    assert main(["prepare", "ntu-rgb+d", str(source), str(tmp_path / "out"), "--on-error", "skip"]) == 1


def test_samples_of_one_name_are_refused(source, tmp_path):
    shutil.copy(source / "S001C001P001R001A001.skeleton", source / "more")
    with pytest.raises(DataError, match=r"S001C001P001R001A001.skeleton and more/S001C001P001R001A001.skeleton have"):
        prepare("ntu-rgb+d", source, tmp_path / "out")


def test_linked_folders_are_searched_once(source, tmp_path):
    (source / "more" / "back").symlink_to(source)
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "data").symlink_to(source)
    assert prepare("ntu-rgb+d", tmp_path / "linked", tmp_path / "out").num_clips == 4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"kind": "ntu"}, "kind must be one of"),
        ({"protocol": "xsub"}, r"protocol of ntu-rgb\+d must be one of ntu60-xsub, .*, got 'xsub'"),
        ({"on_error": "ignore"}, "on_error must be 'fail' or 'skip', got 'ignore'"),
        ({"num_frames": 0}, "num_frames must be a whole number of at least 1, got 0"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
    ],
)
def test_bad_arguments(source, tmp_path, arguments, reason):
    with pytest.raises(DataError, match=reason):
        prepare(**{"kind": "ntu-rgb+d", "source": source, "out": tmp_path / "out", **arguments})
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_prepared_into(source, tmp_path):
    with pytest.raises(DataError, match="out must not lie in the source folder"):
        prepare("ntu-rgb+d", source, source / "out")
    with pytest.raises(DataError, match="source must be a folder of recordings"):
        prepare("ntu-rgb+d", source / "none", tmp_path / "out")
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    with pytest.raises(DataError, match=r"out must be a new or empty folder, .* holds thesis.tex"):
        prepare("ntu-rgb+d", source, other)
    with pytest.raises(DataError, match="out must be a folder, got the file"):
        prepare("ntu-rgb+d", source, other / "thesis.tex")
    assert os.listdir(other) == ["thesis.tex"]


def test_a_finished_folder_is_left_alone(source, tmp_path):
    out = tmp_path / "out"
    prepare("ntu-rgb+d", source, out)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    summary = prepare("ntu-rgb+d", source, out, workers=3, on_error="skip")
    assert summary.already_done
    assert "is already prepared: 4 clips" in str(summary)
    assert before == {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    with pytest.raises(DataError, match=r"was prepared with other parameters \(num_frames was 50 and is 8\)"):
        prepare("ntu-rgb+d", source, out, num_frames=8)
    (source / "S005C001P001R001A001.skeleton").write_text(make_text([1]))
    with pytest.raises(DataError, match=r"num_recordings was 4 and is 5; recordings_sha256"):
        prepare("ntu-rgb+d", source, out)


def make_many(folder, count=60):
    folder.mkdir()
    for number in range(count):
        performer = (1, 3)[number % 2]
        name = f"S001C001P{performer:03d}R{number // 60 + 1:03d}A{number % 60 + 1:03d}.skeleton"
        text = "x" if number % 17 == 5 else make_text([1] * (number % 4 + 1), seed=number)
        (folder / name).write_text(text)


KILLED = """
import os, signal, sys, dataclasses
from ikem_fast.data import journal, pipeline, readers
journal.RECORDINGS_PER_CHECKPOINT = 4
source, out, limit = sys.argv[1], sys.argv[2], int(sys.argv[3])
reader, count = readers.get("ntu-rgb+d"), 0
def read(path, layout):
    global count
    count += 1
    if count > limit:
        os.kill(os.getpid(), signal.SIGKILL)
    return reader.read(path, layout)
pipeline.prepare(dataclasses.replace(reader, read=read), source, out, on_error="skip", workers=2)
"""


def test_killed_runs_go_on_and_end_bit_identical(tmp_path):
    source, out, whole = tmp_path / "source", tmp_path / "out", tmp_path / "whole"
    make_many(source)
    expected = prepare("ntu-rgb+d", source, whole, on_error="skip")
    done = 0
    for limit in (13, 27):
        killed = subprocess.run([sys.executable, "-c", KILLED, source, out, str(limit)], check=False)
        assert killed.returncode == -signal.SIGKILL
        lines = (out / "progress.jsonl").read_text().count("\n") - 1
        assert lines > done
        assert not (out / "dataset.json").exists()
        done = lines
    with pytest.raises(DataError, match=r"was begun with other parameters \(rotation was True and is False\)"):
        prepare("ntu-rgb+d", source, out, on_error="skip", rotate=False)
    with pytest.raises(DataError, match=r"bad files? in"):
        prepare("ntu-rgb+d", source, out)  # what was skipped before is no longer to be skipped
    summary = prepare("ntu-rgb+d", source, out, on_error="skip")
    assert summary.num_resumed == done
    assert summary.num_clips == expected.num_clips == 56
    assert summary.bad_files == expected.bad_files
    names = sorted(os.listdir(whole))
    assert sorted(os.listdir(out)) == names
    assert filecmp.cmpfiles(out, whole, names, shallow=False) == (names, [], [])


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A run that stopped at its 31st recording, and the finished folder it should become."""
    source, out, whole = tmp_path / "source", tmp_path / "out", tmp_path / "whole"
    make_many(source)
    prepare("ntu-rgb+d", source, whole, on_error="skip")
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "prepare_clip", stop_at(31))
        with pytest.raises(KeyboardInterrupt):
            prepare("ntu-rgb+d", source, out, on_error="skip", workers=1)
    return source, out, whole


def stop_at(count):
    def stopping(*arguments, **options):
        nonlocal count
        count -= 1
        if count <= 0:
            raise KeyboardInterrupt
        return prepare_clip(*arguments, **options)

    return stopping


@pytest.mark.parametrize(
    "damage",
    [
        lambda out: os.truncate(out / "clips.npy.partial", 128 + 30_000 * 7 + 11),
        lambda out: (out / "clips.npy.partial").unlink(),
        lambda out: os.truncate(out / "progress.jsonl", (out / "progress.jsonl").stat().st_size - 9),
        lambda out: os.truncate(out / "progress.jsonl", 5),
        lambda out: (out / "progress.jsonl").write_bytes((out / "progress.jsonl").read_bytes() + b"\x00" * 50 + b"\n"),
        lambda out: (out / "clips.npy.partial").write_bytes((out / "clips.npy.partial").read_bytes() + b"rubbish"),
        lambda out: (out / "clips.npy.partial").rename(out / "clips.npy"),
    ],
    ids=["clips cut", "clips lost", "journal cut", "journal lost", "journal rubbish", "clips rubbish", "renamed"],
)
def test_whatever_an_interruption_leaves_behind_is_mended(interrupted, damage):
    source, out, whole = interrupted
    damage(out)
    prepare("ntu-rgb+d", source, out, on_error="skip")
    names = sorted(os.listdir(whole))
    assert sorted(os.listdir(out)) == names
    assert filecmp.cmpfiles(out, whole, names, shallow=False) == (names, [], [])


def test_what_was_read_before_an_interruption_is_kept(interrupted):
    source, out, _ = interrupted
    assert prepare("ntu-rgb+d", source, out, on_error="skip").num_resumed >= 30


def test_two_processes_do_not_prepare_one_folder(interrupted):
    source, out, _ = interrupted
    with open(out / "progress.jsonl") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="another process is preparing it now"):
            prepare("ntu-rgb+d", source, out, on_error="skip")


def test_a_folder_that_another_process_finished_meanwhile_stays_whole(source, tmp_path):
    prepare("ntu-rgb+d", source, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    with (
        pytest.raises(DataError, match="another process has finished preparing it meanwhile"),
        journal.ClipWriter.open(tmp_path, (3, 50, 25, 2), {}, []),
    ):
        pass
    assert prepare("ntu-rgb+d", source, tmp_path).already_done
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_names_of_files_that_are_no_text(source, tmp_path):
    for folder, name in ((source, b"\xff.txt"), (source / "more", b"\xfe")):
        path = os.fsencode(folder) + b"/" + name
        if name.endswith(b"txt"):
            with open(path, "wb"):
                pass
        else:
            os.mkdir(path)
            shutil.copy(source / "S001C001P001R001A001.skeleton", path + b"/S007C001P001R001A001.skeleton")
    summary = prepare("ntu-rgb+d", source, tmp_path / "out", on_error="skip")
    assert summary.num_clips == 5
    assert [row["file"] for row in read_csv(tmp_path / "out" / "bad_files.csv")] == ["\\udcff.txt"]


def test_a_disk_without_room_is_told_before_the_work(source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(pipeline.shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(DataError, match=r"the clips need 0\.00 GB more, and the disk has 0\.00"):
        prepare("ntu-rgb+d", source, tmp_path / "out")


def test_a_disk_that_fills_up_is_told_and_the_work_goes_on_later(tmp_path):
    source, out, whole = tmp_path / "source", tmp_path / "out", tmp_path / "whole"
    make_many(source)
    prepare("ntu-rgb+d", source, whole, on_error="skip")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, limits[1]))
    try:
        with pytest.raises(DataError, match=f"{out}: File too large; when that is mended, run the same command again"):
            prepare("ntu-rgb+d", source, out, on_error="skip")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    prepare("ntu-rgb+d", source, out, on_error="skip")
    names = sorted(os.listdir(whole))
    assert filecmp.cmpfiles(out, whole, names, shallow=False) == (names, [], [])


def test_a_folder_that_may_not_be_written_to(source, tmp_path):
    if os.geteuid() == 0:
        with pytest.raises(DataError, match=r"/proc/ikem: .*; when that is mended"):
            prepare("ntu-rgb+d", source, "/proc/ikem")
        return
    tmp_path.chmod(0o500)
    with pytest.raises(DataError, match="Permission denied; when that is mended"):
        prepare("ntu-rgb+d", source, tmp_path / "out")


def test_the_number_of_workers_does_not_change_the_result(source, tmp_path):
    for workers in (1, 4):
        prepare("ntu-rgb+d", source, tmp_path / str(workers), workers=workers)
    assert filecmp.cmp(tmp_path / "1" / "clips.npy", tmp_path / "4" / "clips.npy", shallow=False)


def test_few_clips_are_in_memory_at_a_time(tmp_path, monkeypatch):
    """Reading stays a few recordings per worker ahead of writing, however slow the disk is."""
    source = tmp_path / "source"
    make_many(source)
    begun, ahead = [], []
    append, reader = journal.ClipWriter.append, readers.get("ntu-rgb+d")

    def slow_append(writer, outcome, clip):
        ahead.append(len(begun) - len(writer.outcomes))
        append(writer, outcome, clip)

    def read(path, layout):
        begun.append(path)
        return reader.read(path, layout)

    monkeypatch.setattr(journal.ClipWriter, "append", slow_append)
    counting = dataclasses.replace(reader, read=read)
    pipeline.prepare(counting, source, tmp_path / "out", on_error="skip", workers=2)
    assert max(ahead) <= 2 * map_ahead._TASKS_PER_WORKER


def test_a_layout_of_ones_own(tmp_path):
    layout = {
        "name": "stick",
        "joints": ["hip", "chest", "left", "right"],
        "bones": {"chest": "hip", "left": "chest", "right": "chest"},
        "center": "chest",
        "chest_normal": ["hip", "left", "right"],
    }
    (tmp_path / "stick.yaml").write_text(yaml.safe_dump(layout))
    (tmp_path / "source").mkdir()
    for performer in (1, 3):
        text = make_text([1, 1], num_joints=4, seed=performer)
        (tmp_path / "source" / f"S001C001P{performer:03d}R001A001.skeleton").write_text(text)
    out = tmp_path / "out"
    command = ["prepare", "ntu-rgb+d", str(tmp_path / "source"), str(out), "--layout", str(tmp_path / "stick.yaml")]
    assert main(command) == 0
    clip_set = ClipSet.open(out)
    assert clip_set.clips.shape == (2, 3, 50, 4, 2)
    assert clip_set.layout.joint_names == ("hip", "chest", "left", "right")


def test_command(source, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["prepare", "ntu-rgb+d", str(source), str(out), "--frames", "9", "--no-centre", "--no-rotate"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{out}: 4 clips of ntu-rgb+d, ntu60-xsub: 2 train, 2 test;")
    assert "1 recordings are not part of ntu60-xsub" in captured.out
    assert "4/4" in captured.err
    clip_set = ClipSet.open(out)
    assert [clip_set.metadata[key] for key in ("num_frames", "centring", "rotation")] == [9, False, False]
    assert main(command) == 0
    assert "is already prepared" in capsys.readouterr().out
    assert main([*command, "--protocol", "ntu120-xset"]) == 1
    assert "error: " in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--protocol", "xsub"])
    with pytest.raises(SystemExit, match="0"):
        main(["prepare", "ntu-rgb+d", "--help"])
    assert "even setups train (default: ntu60-xsub)" in " ".join(capsys.readouterr().out.split())


def test_interrupted_command(source, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "prepare_clip", stop_at(2))
    assert main(["prepare", "ntu-rgb+d", str(source), str(tmp_path / "out")]) == 130
    assert "interrupted; run the same command again to continue" in capsys.readouterr().err
