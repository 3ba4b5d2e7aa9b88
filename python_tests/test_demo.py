"""The demo, in miniature: a few clips and a few steps through everything."""

from __future__ import annotations

import csv

import pytest

from ikem_fast import demo, train
from ikem_fast.data import ClipSet


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "out"
    overrides = [
        *("pretrain.epochs=4", "pretrain.cross_epoch=3", "pretrain.milestones=[]", "pretrain.batch_size=8"),
        *("distill.epochs=2", "distill.milestones=[]", "distill.batch_size=8", "model.queue_size=16"),
        *("model.hidden_channels=2", "model.feature_size=8", "model.embedding_size=4"),
        *("linear.epochs=2", "linear.milestones=[]", "logging.knn_every_epochs=2"),
    ]
    page = demo.run_demo(out, overrides=overrides, num_subjects=2, num_repetitions=1, progress=False)
    return out, page


def test_everything_is_there(finished):
    out, page = finished
    assert page == out / "report.html"
    assert page.stat().st_size > 100_000
    assert sorted(path.name for path in out.iterdir()) == ["clips", "distill", "pretrain", "report.html"]
    clips = ClipSet.open(out / "clips")
    assert clips.num_classes == demo.NUM_ACTIONS
    assert clips.num_persons == 1
    assert clips.clip_length == demo.NUM_FRAMES
    with open(out / "distill" / "evaluation" / "linear.csv", newline="") as file:
        encoders = [line["encoders"] for line in csv.DictReader(file)]
    assert list(dict.fromkeys(encoders)) == ["student", "teacher", "untrained"]


def test_what_no_demo_has_written_is_kept(finished, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert train.main(["demo", "--out", str(tmp_path)]) == 2
    assert "holds thesis.txt" in capsys.readouterr().err
    assert (tmp_path / "thesis.txt").read_text() == "all of it"
    assert train.main(["demo", "--out", str(tmp_path / "thesis.txt")]) == 2
    assert "must be a folder" in capsys.readouterr().err


def test_wrong_settings_are_named_before_anything_is_written(tmp_path, capsys):
    assert train.main(["demo", "--out", str(tmp_path / "out"), "pretrain.epoch=3"]) == 2
    assert "pretrain.epochs" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
