"""Scores are matched by name, and score files and tables are read back as they were written."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from ikem_fast import train
from ikem_fast.evaluation import Scores, fuse_scores, load_scores
from ikem_fast.evaluation.scores import ScoresError, save_scores
from ikem_fast.evaluation.tables import Spread, Table, format_table, write_csv


def some_scores():
    logits = np.array([[2, 1], [0, 1], [1, 0]], dtype=np.float32)
    return Scores(("a", "b", "c"), np.array([0, 1, 1]), {"student/all": logits})


def test_fusion_goes_by_name():
    first = some_scores()
    order = [2, 0, 1]
    second = Scores(
        tuple(first.sample_names[i] for i in order),
        first.labels[order],
        {"teacher/all": np.array([[0, 4], [1, 0], [0, 1]], dtype=np.float32)},
    )
    fused, accuracy = fuse_scores([(first, "student/all"), (second, "teacher/all")], weights=[1, 0.5])
    assert fused.sample_names == ("a", "b", "c")
    np.testing.assert_allclose(fused.logits["fused"], [[2.5, 1], [0, 1.5], [1, 2]])
    assert accuracy == 1.0
    assert fuse_scores([(first, "student/all")])[1] == pytest.approx(2 / 3)


def test_scores_that_do_not_belong_together():
    first = some_scores()
    other_clips = Scores(("a", "b", "d"), first.labels, first.logits)
    other_labels = Scores(first.sample_names, first.labels[::-1], first.logits)
    more_classes = Scores(first.sample_names, first.labels, {"student/all": np.zeros((3, 4), np.float32)})
    for other, message in (
        (other_clips, r"2 are in only one: \['c', 'd'\]"),
        (other_labels, "same labels"),
        (more_classes, "2 classes as part 1, got 4"),
    ):
        with pytest.raises(ScoresError, match=message):
            fuse_scores([(first, "student/all"), (other, "student/all")])
    with pytest.raises(ScoresError, match="it has student/all"):
        fuse_scores([(first, "all")])
    with pytest.raises(ScoresError, match="at least one"):
        fuse_scores([])
    with pytest.raises(ScoresError, match="one number for each of the 1 parts, got 2"):
        fuse_scores([(first, "student/all")], weights=[1, 2])
    twice = Scores(("a", "a", "c"), first.labels, first.logits)
    with pytest.raises(ScoresError, match="3 clips with 2 names"):
        fuse_scores([(twice, "student/all")])


def test_score_files(tmp_path):
    path = tmp_path / "scores.npz"
    save_scores(path, some_scores())
    read = load_scores(path)
    assert read.sample_names == ("a", "b", "c")
    np.testing.assert_array_equal(read.labels, [0, 1, 1])
    np.testing.assert_array_equal(read.logits["student/all"], some_scores().logits["student/all"])
    whole = path.read_bytes()
    for damaged in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ScoresError, match="no readable file of scores"):
            load_scores(path)
    with pytest.raises(ScoresError, match="no readable file of scores"):
        load_scores(tmp_path / "missing.npz")
    np.savez(path, sample_names=np.array(["a", "b"]), labels=np.array([0]))
    with pytest.raises(ScoresError, match=r"labels must be int64, one for each of the 2 names, got \(1,\)"):
        load_scores(path)


def test_table(tmp_path):
    table = Table(("encoders", "top-1 %", "epoch"), (("student", 0.5, 12), ("untrained", None, 3)), "results")
    assert format_table(table).split("\n") == [
        "results",
        "encoders   top-1 %  epoch",
        "---------  -------  -----",
        "student       50.0     12",
        "untrained        -      3",
    ]
    write_csv(tmp_path / "table.csv", table)
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["encoders", "top-1 %", "epoch"],
            ["student", "0.5", "12"],
            ["untrained", "", "3"],
        ]
    with pytest.raises(ValueError, match="2 columns"):
        Table(("a", "b"), ((1,),))


def test_spreads_in_a_table(tmp_path):
    table = Table(("encoders", "top-1 %", "n"), (("student", Spread(0.5, 0.012), 3), ("untrained", 0.25, 1)))
    assert format_table(table).split("\n")[2:] == ["student    50.0 ± 1.2  3", "untrained        25.0  1"]
    write_csv(tmp_path / "table.csv", table)
    with open(tmp_path / "table.csv", newline="") as file:
        assert list(csv.reader(file)) == [
            ["encoders", "top-1 %", "top-1 % (standard deviation)", "n"],
            ["student", "0.5", "0.012", "3"],
            ["untrained", "0.25", "", "1"],
        ]


def test_fuse_command(tmp_path, capsys):
    first = some_scores()
    save_scores(tmp_path / "first.npz", first)
    order = [2, 0, 1]
    logits = {
        "joint": np.array([[0, 4], [1, 0], [0, 1]], dtype=np.float32),
        "late_all": np.array([[0, 0], [0, 0], [0, 0]], dtype=np.float32),
    }
    second = Scores(tuple(first.sample_names[i] for i in order), first.labels[order], logits)
    save_scores(tmp_path / "run=2.npz", second)
    parts = [str(tmp_path / "first.npz"), f"{tmp_path / 'run=2.npz'}:joint=0.5"]
    assert train.main(["evaluate", "fuse", *parts, "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split()[1:] == ["student/all", "1", "66.7", "100.0"]
    assert lines[5].split()[0] == "fused"
    written = json.loads((tmp_path / "out" / "fused.json").read_text())
    assert [part["weight"] for part in written["parts"]] == [1.0, 0.5]
    assert written["fused"] == {"top1": 1.0, "top5": 1.0}
    fused = load_scores(tmp_path / "out" / "fused_scores.npz")
    np.testing.assert_allclose(fused.logits["fused"], [[2.5, 1], [0, 1.5], [1, 2]])
    with open(tmp_path / "out" / "fused.csv", newline="") as file:
        assert [line["weight"] for line in csv.DictReader(file)] == ["1", "0.5", ""]
    for part, message in (
        (str(tmp_path / "run=2.npz"), "has several scores, give one as FILE:ENTRY; it has joint, late_all"),
        (f"{tmp_path / 'first.npz'}:bone", "has no scores 'bone'; it has student/all"),
        (f"{tmp_path / 'first.npz'}=much", "the weight must be a number, got 'much'"),
        (f"{tmp_path / 'first.npz'}=-1", "at least 0, got -1"),
        (f"{tmp_path / 'first.npz'}=0", "weights must not all be 0"),
        (str(tmp_path / "none.npz"), "is no readable file of scores"),
    ):
        assert train.main(["evaluate", "fuse", part]) == 2
        assert message in capsys.readouterr().err
