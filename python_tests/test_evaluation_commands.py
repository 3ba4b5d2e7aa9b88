"""``evaluate`` on runs: what it prints, what it writes, and its answers to mistakes."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, write_clip_set

from ikem_fast import engine, train
from ikem_fast.evaluation import evaluate_run, load_scores
from ikem_fast.evaluation.commands import read_evaluation


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A pretraining and a distillation run of two steps each."""
    folder = tmp_path_factory.mktemp("runs")
    clips = write_clip_set(folder / "clips").folder
    engine.pretrain(clips, folder / "teacher", small_config(), progress=False)
    engine.distill(None, folder / "teacher", folder / "student", small_config(), progress=False)
    return folder


def test_linear_of_a_distillation_run(runs, capsys):
    arguments = ["evaluate", "linear", "--run", str(runs / "student"), "--untrained", "--quiet", "epochs=3"]
    assert train.main([*arguments, "linear.milestones=[2]"]) == 0
    printed = capsys.readouterr().out
    assert "linear evaluation, last epoch" in printed
    written = read_evaluation(runs / "student", "linear")
    assert [entry["encoders"] for entry in written["encoders"]] == ["student", "teacher", "untrained"]
    assert [row["name"] for row in written["encoders"][0]["rows"]] == ["joint", "motion", "bone", "all"]
    assert [row["name"] for row in written["encoders"][1]["rows"]][-2:] == ["joint+motion+bone", "all"]
    assert written["settings"]["epochs"] == 3
    for entry in written["encoders"]:
        counts = np.array(entry["confusion"]["counts"])
        assert counts.shape == (3, 3)
        assert np.trace(counts) / counts.sum() == pytest.approx(entry["rows"][-1]["top1"])
        assert len(entry["history"]["all"]) == 3
        assert entry["reported"] == "last epoch"
    with open(runs / "student" / "evaluation" / "linear.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 4 + 8 + 8
    assert float(lines[3]["top-1 %"]) == pytest.approx(written["encoders"][0]["rows"][-1]["top1"])
    scores = load_scores(runs / "student" / "evaluation" / "linear_scores.npz")
    assert scores.sample_names[:4] == ("clip006", "clip007", "clip008", "clip015")
    accuracy = (scores.logits["teacher/all"].argmax(axis=1) == scores.labels).mean()
    assert accuracy == pytest.approx(written["encoders"][1]["rows"][-1]["top1"])


def test_knn_of_a_pretraining_run(runs, capsys):
    random_state = torch.get_rng_state()
    assert train.main(["evaluate", "knn", "--run", str(runs / "teacher"), "--untrained", "--quiet", "k=[1,3]"]) == 0
    assert torch.equal(torch.get_rng_state(), random_state)
    written = read_evaluation(runs / "teacher", "knn")
    assert [entry["encoders"] for entry in written["encoders"]] == ["pretrained", "untrained"]
    assert list(written["encoders"][0]["rows"][-1]["accuracy"]) == ["1", "3"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["encoders", "view", "k=1", "%", "k=3", "%"]
    assert len(lines) == 3 + 2 * 8 + 1
    assert json.loads((runs / "teacher" / "evaluation" / "knn.json").read_text())["run"]["kind"] == "pretrain"


def test_same_seed_gives_the_same_numbers(runs):
    settings = {"overrides": ["epochs=2", "linear.milestones=[]"], "progress": False}
    first, _ = evaluate_run("linear", runs / "teacher", **settings)
    again, _ = evaluate_run("linear", runs / "teacher", **settings)
    assert first == again


def test_best_epoch_is_labelled(tmp_path, runs):
    config = small_config("quirks.best_epoch_on_test=true")
    engine.pretrain(runs / "clips", tmp_path / "run", config, progress=False)
    table, _ = evaluate_run("linear", tmp_path / "run", overrides=["epochs=2", "linear.milestones=[]"], progress=False)
    assert table.columns[2] == "top-1 % (best on test)"
    assert all(row[2] == row[4] for row in table.rows)
    entry = read_evaluation(tmp_path / "run", "linear")["encoders"][0]
    assert entry["reported"] == "best epoch on the test set"


def test_mistakes_are_named(tmp_path, runs, capsys):
    other = write_clip_set(tmp_path / "other", layout="utd-mhad").folder
    run = ["--run", str(runs / "teacher")]
    for arguments, message in (
        (["--run", str(tmp_path)], "holds no run"),
        ([*run, "--data", str(other)], "must have the run's skeleton 'nw-ucla', got 'utd-mhad'"),
        ([*run, "--data", str(tmp_path)], "dataset.json"),
        ([*run, "epoch=2"], "epochs"),
    ):
        assert train.main(["evaluate", "linear", "--quiet", *arguments]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
