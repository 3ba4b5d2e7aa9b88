"""Finetuning and semi-supervised evaluation: what is trained on, what is learned, and what stays as it is."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from evaluation_helpers import small_config, small_ikem, write_clip_set

from ikem_fast import engine, train
from ikem_fast.data import ClipSet
from ikem_fast.engine.config import FinetuneConfig
from ikem_fast.evaluation import Subject, evaluate_run, finetune, load_scores
from ikem_fast.evaluation.commands import read_evaluation
from ikem_fast.evaluation.finetuning import FinetunedEncoders, fuse_views, predict
from ikem_fast.evaluation.semi import check_classes, choose_labelled
from ikem_fast.methods import RelationalDistillation
from ikem_fast.quirks import Quirks

FEW = FinetuneConfig(epochs=2, batch_size=8, milestones=[], test_every_epochs=1)


@pytest.fixture(scope="module")
def clip_set(tmp_path_factory):
    return write_clip_set(tmp_path_factory.mktemp("data") / "prepared", num_clips=36)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    clips = write_clip_set(folder / "clips", num_clips=36).folder
    config = small_config("model.modalities=[joint,motion,bone]", "logging.knn_every_epochs=0")
    engine.pretrain(clips, folder / "teacher", config, progress=False)
    engine.distill(None, folder / "teacher", folder / "student", config, progress=False)
    return folder


def subject_of(method, part=None):
    return Subject("pretrained", method, part)


def test_finetuning_learns_the_classes_and_leaves_the_run_as_it_is(clip_set):
    method = small_ikem(modalities=("joint", "motion", "bone"), hidden_channels=4, dropout=0.0)
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    random_state = torch.get_rng_state()
    settings = FinetuneConfig(epochs=20, batch_size=4, milestones=[16], augment=False, test_every_epochs=8)
    result = finetune(subject_of(method), clip_set.split("train"), clip_set.split("test"), settings, seed=1)
    assert torch.equal(torch.get_rng_state(), random_state)
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert [row.name for row in result.rows] == ["joint", "motion", "bone", "all"]
    assert result.rows[-1].weights == (0.6, 0.6, 0.4)
    assert result.rows[-1].top1 > 0.7  # of three classes
    assert result.tested_epochs == (8, 16, 20)
    for row in result.rows:
        assert row.top1 == result.history[row.name][-1]
        assert row.best_top1 == max(result.history[row.name])
        assert result.history[row.name][result.tested_epochs.index(row.best_epoch)] == row.best_top1
    trained = result.module.encoders.state_dict()
    for name, tensor in method.query_encoders.state_dict().items():
        # Weights and running statistics moved: batch norms were in training mode.
        if not name.startswith("head.") and tensor.is_floating_point() and "graph." not in name:
            assert not torch.equal(trained[name], tensor), name
    assert int(trained["blocks.0.graph_norm.num_batches_tracked"][0]) == 20 * (24 // 4)
    test = clip_set.split("test")
    torch.testing.assert_close(predict(result.module, test, batch_size=5)[1], result.scores["motion"])


def test_modalities_do_not_learn_from_each_other(clip_set):
    sets = clip_set.split("train"), clip_set.split("test")
    method = small_ikem(modalities=("joint", "bone"))
    other = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in other.query_encoders.parameters():
            parameter[0] *= 2
    first, second = (finetune(subject_of(each), *sets, FEW, seed=4) for each in (method, other))
    assert torch.equal(first.scores["bone"], second.scores["bone"])
    assert not torch.equal(first.scores["joint"], second.scores["joint"])


def test_same_seed_same_numbers(clip_set):
    method = small_ikem(modalities=("joint", "motion"))
    sets = clip_set.split("train"), clip_set.split("test")
    first, again, other = (finetune(subject_of(method), *sets, FEW, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.scores["all"], again.scores["all"])
    assert not torch.equal(first.scores["all"], other.scores["all"])
    streamed = finetune(subject_of(method), *sets, FEW, seed=1, storage_place="stream")
    assert torch.equal(first.scores["all"], streamed.scores["all"])


def test_fewer_clips_than_a_batch(clip_set):
    method = small_ikem(modalities=("joint", "motion"))
    few = clip_set.split("train").subset([0, 4, 8])
    result = finetune(subject_of(method), few, clip_set.split("test"), FinetuneConfig(epochs=1, milestones=[]))
    assert (result.num_clips, result.batch_size) == (3, 3)
    with pytest.raises(ValueError, match="must hold clips, got 0 and"):
        finetune(subject_of(method), few.subset([]), clip_set.split("test"), FEW)


def test_students_and_their_teacher(clip_set):
    sets = clip_set.split("train"), clip_set.split("test")
    distillation = RelationalDistillation.from_teacher(small_ikem())
    student = finetune(subject_of(distillation, "student"), *sets, FEW)
    assert [row.name for row in student.rows] == ["joint", "motion", "bone", "all"]
    teacher = FinetunedEncoders(subject_of(distillation, "teacher"), 3)
    batch = sets[1].batch(range(4))
    features = distillation.eval().features(batch.clips, batch.num_frames, part="teacher")
    with torch.no_grad():
        teacher.eval()
        expected = teacher.encoders.head(features)
        torch.testing.assert_close(teacher(teacher.derive(batch.clips, batch.num_frames)), expected)


def test_early_fusion_student(clip_set):
    quirks = Quirks(early_fusion_student=True)
    teacher = small_ikem(modalities=("joint", "motion", "bone"), quirks=quirks)
    distillation = RelationalDistillation.from_teacher(teacher).eval()
    module = FinetunedEncoders(subject_of(distillation, "student"), 3).eval()
    batch = clip_set.batch(range(4))
    with torch.no_grad():
        expected = module.encoders.head(distillation.features(batch.clips, batch.num_frames))
        torch.testing.assert_close(module(module.derive(batch.clips, batch.num_frames)), expected)
    sets = clip_set.split("train"), clip_set.split("test")
    result = finetune(subject_of(distillation, "student"), *sets, FEW)
    assert [row.name for row in result.rows] == ["early_fusion"]


def test_scores_are_fused_by_weights():
    logits = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    views = {"joint": ("joint",), "all": ("bone", "joint", "motion")}
    scores = fuse_views(logits, ("joint", "motion", "bone"), views, {"all": (0.4, 0.6, 0.5)})
    torch.testing.assert_close(scores["joint"], logits[0])
    torch.testing.assert_close(scores["all"], 0.4 * logits[2] + 0.6 * logits[0] + 0.5 * logits[1])


def test_labelled_clips_are_a_part_of_every_class():
    labels = np.repeat([0, 1, 2], [100, 30, 7])
    np.random.default_rng(0).shuffle(labels)
    counts = {fraction: [max(1, round(fraction * n)) for n in (100, 30, 7)] for fraction in (0.01, 0.05, 0.1, 1.0)}
    assert counts[0.01] == [1, 1, 1]
    assert counts[0.1] == [10, 3, 1]
    smaller = set()
    for fraction, expected in counts.items():
        chosen = choose_labelled(labels, fraction, seed=5)
        assert np.bincount(labels[chosen]).tolist() == expected
        assert chosen.tolist() == sorted(set(chosen.tolist()))
        assert smaller <= set(chosen.tolist())
        smaller = set(chosen.tolist())
        assert np.array_equal(chosen, choose_labelled(labels, fraction, seed=5))
    assert len(smaller) == len(labels)
    assert not np.array_equal(choose_labelled(labels, 0.1, seed=5), choose_labelled(labels, 0.1, seed=6))
    with pytest.raises(ValueError, match="above 0 and at most 1, got 0"):
        choose_labelled(labels, 0, seed=0)


def test_a_class_without_training_clips_is_named(clip_set):
    train_set, test_set = clip_set.split("train"), clip_set.split("test")
    check_classes(train_set, test_set)
    with pytest.raises(ValueError, match="got none of action 1"):
        check_classes(train_set.subset(np.flatnonzero(train_set.labels != 1)), test_set)


@pytest.mark.parametrize("frozen", ["false", "true"])
def test_semi_supervised_command(runs, capsys, frozen):
    folder = runs / "student"
    settings = [f"frozen={frozen}", "fractions=[0.01,0.5]", "epochs=2", "semi.milestones=[]", "linear.epochs=3"]
    assert train.main(["evaluate", "semi", "--run", str(folder), *settings, "--quiet", "seeds=2"]) == 0
    printed = capsys.readouterr().out
    assert ("linear heads on frozen encoders" if frozen == "true" else "finetuned encoders") in printed
    written = read_evaluation(folder, "semi")
    assert [entry["encoders"] for entry in written["encoders"]] == ["student", "teacher"]
    rows = written["encoders"][0]["rows"]
    views = ["joint", "motion", "bone", *(["late_all"] if frozen == "true" else []), "all"]
    assert [(row["name"], row["fraction"]) for row in rows] == [(view, f) for f in (0.01, 0.5) for view in views]
    train_set = ClipSet.open(runs / "clips").split("train")
    half = sum(round(0.5 * count) for count in np.bincount(train_set.labels).tolist())
    assert {row["num_clips"] for row in rows} == {3, half}
    assert {row["batch_size"] for row in rows if row["fraction"] == 0.01} == {3}
    assert {row["count"] for row in rows} == {2}
    assert "fraction" not in rows[0]["spread"]
    scores = load_scores(folder / "evaluation" / "semi_scores.npz")
    logits = scores.logits["seed1/teacher/all@0.5"]
    value = next(r for r in written["results"] if r["encoders"] == "teacher" and r["seed"] == 1)["rows"][-1]["top1"]
    assert (logits.argmax(axis=1) == scores.labels).mean() == pytest.approx(value)


def test_finetune_command(runs, capsys):
    folder = runs / "teacher"
    before = (folder / "checkpoints" / "last.pt").read_bytes()
    settings = ["epochs=2", "finetune.milestones=[]", "test_every_epochs=0"]
    assert train.main(["evaluate", "finetune", "--run", str(folder), "--quiet", "--untrained", *settings]) == 0
    assert "finetuned on all 24 labels, last epoch of 2" in capsys.readouterr().out
    written = json.loads((folder / "evaluation" / "finetune.json").read_text())
    assert [entry["encoders"] for entry in written["encoders"]] == ["pretrained", "untrained"]
    entry = written["encoders"][0]
    assert (entry["tested_epochs"], entry["batch_size"], entry["reported"]) == ([2], 24, "last epoch")
    assert np.sum(entry["confusion"]["counts"]) == 12
    assert written["settings"]["learning_rate"] == 0.1
    assert (folder / "checkpoints" / "last.pt").read_bytes() == before
    again, _ = evaluate_run("finetune", folder, overrides=settings, untrained=True, progress=False)
    assert [row[2] for row in again.rows] == [row["top1"] for e in written["encoders"] for row in e["rows"]]
