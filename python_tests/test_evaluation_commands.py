"""``evaluate`` on runs: what it prints, what it writes, and its answers to mistakes."""

from __future__ import annotations

import csv
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, write_clip_set

from ikem_fast import engine, train
from ikem_fast.evaluation import evaluate_run, load_scores, registry
from ikem_fast.evaluation.commands import read_evaluation
from ikem_fast.evaluation.outcomes import Column, Judgement, Outcome
from ikem_fast.evaluation.subjects import SubjectError
from ikem_fast.evaluation.tables import Spread


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
    assert [row["name"] for row in written["encoders"][0]["rows"]] == ["joint", "motion", "bone", "late_all", "all"]
    late_and_fused = ["late_joint+motion+bone", "late_all", "joint+motion+bone", "all"]
    assert [row["name"] for row in written["encoders"][1]["rows"]][-4:] == late_and_fused
    assert written["encoders"][0]["rows"][3]["weights"] == [0.6, 0.6, 0.4]
    assert written["settings"]["epochs"] == 3
    for entry in written["encoders"]:
        counts = np.array(entry["confusion"]["counts"])
        assert counts.shape == (3, 3)
        assert np.trace(counts) / counts.sum() == pytest.approx(entry["rows"][-1]["top1"])
        assert len(entry["history"]["all"]) == 3
        assert entry["reported"] == "last epoch"
        assert entry["batch_size"] == 18  # fewer clips than the recipe's batch
    with open(runs / "student" / "evaluation" / "linear.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 5 + 10 + 10
    assert float(lines[4]["top-1 % (last epoch)"]) == pytest.approx(written["encoders"][0]["rows"][-1]["top1"])
    assert float(lines[4]["best epoch on test %"]) == max(written["encoders"][0]["history"]["all"])
    assert {line["batch size"] for line in lines} == {"18"}
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


@pytest.fixture(scope="module")
def several(runs, tmp_path_factory):
    """Two teachers of other seeds, and a student of each."""
    folder = tmp_path_factory.mktemp("several")
    for seed in (1, 2):
        config = small_config(f"seed={seed}", "model.modalities=[joint,motion,bone]", "logging.knn_every_epochs=0")
        engine.pretrain(runs / "clips", folder / f"teacher{seed}", config, progress=False)
        engine.distill(None, folder / f"teacher{seed}", folder / f"student{seed}", config, progress=False)
    return folder


def test_mean_and_spread_over_runs_and_seeds(several, tmp_path, capsys):
    students = [str(several / f"student{seed}") for seed in (1, 2)]
    settings = ["epochs=2", "linear.milestones=[]", "seeds=[5,6]"]
    out = ["--out", str(tmp_path / "out"), "--quiet", "--untrained"]
    assert train.main(["evaluate", "linear", *out, "--run", *students, *settings]) == 0
    assert "mean ± standard deviation over n runs and seeds" in capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "linear.json").read_text())
    assert [run["evaluation_seeds"] for run in written["runs"]] == [[5, 6], [5, 6]]
    assert [run["seed"] for run in written["runs"]] == [1, 2]
    singles = {}
    for student in students:
        for seed in (5, 6):
            overrides = ["epochs=2", "linear.milestones=[]", f"seeds=[{seed}]"]
            evaluate_run("linear", student, overrides=overrides, progress=False)
            for entry in read_evaluation(student, "linear")["encoders"]:
                singles.setdefault(entry["encoders"], []).append(entry)
    for entry in written["encoders"][:2]:
        of_name = singles[entry["encoders"]]
        for number, row in enumerate(entry["rows"]):
            values = [single["rows"][number]["top1"] for single in of_name]
            assert row["count"] == 4
            assert row["top1"] == pytest.approx(statistics.mean(values))
            assert row["spread"]["top1"] == pytest.approx(statistics.stdev(values))
            assert "weights" not in row["spread"]
        assert np.sum(entry["confusion"]["counts"]) == 4 * 6
    results = [result for result in written["results"] if result["encoders"] == "student"]
    assert [(Path(result["run"]).name, result["seed"]) for result in results] == [
        *(("student1", 5), ("student1", 6), ("student2", 5), ("student2", 6))
    ]
    assert [r["rows"][0]["top1"] for r in results] == [s["rows"][0]["top1"] for s in singles["student"]]
    # Encoders drawn from a seed are the same in both runs, and are judged once.
    assert written["encoders"][2]["encoders"] == "untrained"
    assert written["encoders"][2]["rows"][0]["count"] == 2
    with open(tmp_path / "out" / "linear.csv", newline="") as file:
        line = next(csv.DictReader(file))
    assert (
        float(line["top-1 % (last epoch) (standard deviation)"]) == written["encoders"][0]["rows"][0]["spread"]["top1"]
    )
    assert line["n"] == "4"
    scores = load_scores(tmp_path / "out" / "linear_scores.npz")
    alone = load_scores(several / "student2" / "evaluation" / "linear_scores.npz")
    np.testing.assert_allclose(
        scores.logits["student2/seed6/student/all"], alone.logits["student/all"], rtol=1e-4, atol=1e-5
    )
    assert not (tmp_path / "out" / "linear_heads.safetensors").exists()
    assert (several / "student2" / "evaluation" / "linear_heads.safetensors").exists()


def test_what_no_seed_changes_is_computed_once_a_run(several, tmp_path):
    students = [several / f"student{seed}" for seed in (1, 2)]
    table, folder = evaluate_run("knn", students, out=tmp_path, overrides=["seeds=3", "k=[1]"], progress=False)
    written = json.loads((folder / "knn.json").read_text())
    assert [(entry["encoders"], entry["rows"][0]["count"]) for entry in written["encoders"]] == [
        ("student", 2),
        ("teacher", 2),
    ]
    assert table.columns == ("encoders", "view", "k=1 %", "n")
    assert isinstance(table.rows[0][2], Spread)


def test_one_part_alone(several):
    evaluate_run("knn", several / "student1", part="student", progress=False)
    written = read_evaluation(several / "student1", "knn")
    assert [entry["encoders"] for entry in written["encoders"]] == ["student"]


def test_an_evaluation_of_ones_own(runs, capsys):
    def judge(subject, train_set, test_set, settings, seeds, device, progress):
        num_weights = sum(parameter.numel() for parameter in subject.encoders.parameters())
        rows = ({"name": "all", "modalities": list(subject.modalities), "share": num_weights / 1e6 + seeds[0]},)
        return Judgement("sizes", (Column("millions", ("share",)),), (Outcome(rows),))

    registry.register(registry.Evaluation("sizes", "count weights", "knn", judge, seeded=False))
    try:
        with pytest.raises(ValueError, match="there already"):
            registry.register(registry.Evaluation("sizes", "count weights", "knn", judge))
        assert train.main(["evaluate", "sizes", "--run", str(runs / "teacher"), "--quiet", "seed=3"]) == 0
    finally:
        registry.unregister("sizes")
    assert "sizes" in capsys.readouterr().out
    share = read_evaluation(runs / "teacher", "sizes")["encoders"][0]["rows"][0]["share"]
    assert 3 < share < 3.1
    with pytest.raises(ValueError, match=r"kind must be one of linear, .* got 'sizes'"):
        evaluate_run("sizes", runs / "teacher")
    with pytest.raises(ValueError, match="other than fuse and transfer"):
        registry.register(registry.Evaluation("fuse", "no", "knn", judge))


def test_runs_that_do_not_belong_together(runs, several, tmp_path):
    first, second = several / "student1", several / "student2"
    copy = shutil.copytree(first, tmp_path / "copy")
    longer = small_config("seed=2", "model.modalities=[joint,motion,bone]", "pretrain.learning_rate=0.02")
    engine.pretrain(runs / "clips", tmp_path / "longer", longer, progress=False)
    out = tmp_path / "out"
    for folders, options, message in (
        ([first, second], {}, "out must name a folder for the results of 2 runs"),
        ([runs / "student", first], {"out": out}, r"modalities is \['joint', .* and \['joint', 'motion', 'bone'\]"),
        ([first, several / "teacher2"], {"out": out}, "method is relational_distillation and ikem"),
        ([first, copy], {"out": out}, "hold the same encoders"),
        ([several / "teacher1", tmp_path / "longer"], {"out": out}, "pretrain.learning_rate is 0.1 and 0.02"),
        ([several / "teacher1"], {"part": "student"}, "is a run of 'pretrain', which has no student"),
        ([], {}, "at least one run folder"),
    ):
        with pytest.raises(SubjectError, match=message):
            evaluate_run("knn", folders, progress=False, **options)
    assert not out.exists()


def test_settings_among_the_runs(runs, capsys):
    """--run takes all words that follow it, settings too."""
    assert train.main(["evaluate", "knn", "--run", str(runs / "teacher"), "k=[2]", "--quiet"]) == 0
    assert "k=2 %" in capsys.readouterr().out
    assert train.main(["evaluate", "knn", "--run", str(runs / "teacher"), "k=[2]", "kk=3", "--quiet"]) == 2
    assert "unknown key 'kk'" in capsys.readouterr().err


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
