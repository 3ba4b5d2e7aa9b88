"""``python -m ikem_fast.predict``: tables, JSON, CSV and features of recordings, and one line for a mistake."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest

import ikem_fast
from ikem_fast.inference import save_model
from ikem_fast.predict import main


@pytest.fixture(scope="module")
def model(trained_runs):
    return ikem_fast.load(trained_runs.student)


@pytest.fixture
def files(trained_runs):
    return sorted(trained_runs.raw.glob("*.skeleton"))[:3]


def run(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_table(trained_runs, model, files, capsys):
    status, out, err = run(capsys, *files, "--run", trained_runs.student, "--device", "cpu")
    assert (status, err) == (0, "")
    title, headings, _, *lines = out.splitlines()
    assert title == "judged by all"
    assert headings.split() == ["file", "class", "probability", "%", "next", "best", "probability", "%"]
    for line, file, ((first, share), (second, rest)) in zip(lines, files, model.classify(files).top(2), strict=True):
        assert line.split() == [str(file), *first.split(), f"{100 * share:.1f}", *second.split(), f"{100 * rest:.1f}"]


def test_json_and_csv(trained_runs, model, files, capsys):
    options = ("--run", trained_runs.student, "--view", "joint", "--top", 3, "--device", "cpu")
    expected = model.classify(files, view="joint").top(3)
    written = json.loads(run(capsys, *files, *options, "--json")[1])
    assert written["view"] == "joint"
    assert written["skipped"] == []
    assert [entry["file"] for entry in written["files"]] == list(map(str, files))
    assert [entry["name"] for entry in written["files"]] == [file.stem for file in files]
    for entry, classes in zip(written["files"], expected, strict=True):
        assert [(each["name"], each["probability"]) for each in entry["classes"]] == classes
    rows = list(csv.DictReader(io.StringIO(run(capsys, *files, *options, "--csv")[1])))
    assert list(rows[0]) == ["file", "class", "probability", "class 2", "probability 2", "class 3", "probability 3"]
    for row, classes in zip(rows, expected, strict=True):
        assert (row["class 3"], float(row["probability 3"])) == classes[2]


def test_features_of_a_folder(trained_runs, model, tmp_path, capsys):
    status, out, err = run(capsys, trained_runs.raw, "--run", trained_runs.student, "--embed", tmp_path / "out.npz")
    assert (status, err) == (0, f"features of 32 recordings written to {tmp_path}/out.npz\n")
    assert len(out.splitlines()) == 3 + 32
    embeddings = model.embed(trained_runs.raw)
    with np.load(tmp_path / "out.npz") as file:
        np.testing.assert_allclose(file["features"], embeddings.features, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(file["fused"], embeddings.fused, rtol=1e-4, atol=1e-6)
        assert file["sample_names"].tolist() == list(embeddings.sample_names)
        assert file["files"].tolist() == list(embeddings.sources)
        assert file["modalities"].tolist() == ["joint", "angular_velocity"]


def test_features_without_heads(trained_runs, files, tmp_path, capsys):
    teacher = ("--run", trained_runs.teacher)
    status, out, err = run(capsys, *files, *teacher)
    assert (status, out) == (2, "")
    assert "was not evaluated: no actions can be named; `evaluate linear` trains linear heads" in err
    status, out, _ = run(capsys, *files, *teacher, "--embed", tmp_path / "out.npz")
    assert (status, out) == (0, "")
    with np.load(tmp_path / "out.npz") as file:
        assert file["features"].shape == (3, 3, 8)


def test_exported_model(trained_runs, model, files, tmp_path, capsys):
    save_model(model, tmp_path / "model.safetensors")
    of_run = run(capsys, *files, "--run", trained_runs.student)
    assert run(capsys, *files, "--model", tmp_path / "model.safetensors") == of_run


def test_unusable_recordings(trained_runs, files, tmp_path, capsys):
    damaged = tmp_path / "damaged.skeleton"
    damaged.write_text("2\n1\n")
    arguments = (files[0], damaged, "--run", trained_runs.student)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(f"error: {damaged}: ")
    assert err.count("\n") == 1
    status, out, err = run(capsys, *arguments, "--on-error", "skip", "--json")
    assert status == 0
    assert err.startswith(f"left out: {damaged}: ")
    written = json.loads(out)
    assert [entry["file"] for entry in written["files"]] == [str(files[0])]
    assert [entry["file"] for entry in written["skipped"]] == [str(damaged)]


def test_mistakes_are_one_line(trained_runs, files, tmp_path, capsys):
    of_run = ("--run", trained_runs.student)
    for arguments, message in (
        ((files[0], "--run", tmp_path), "holds no run"),
        ((files[0], "--model", tmp_path / "no.safetensors"), "neither the folder of a run nor an exported model"),
        ((tmp_path / "no.skeleton", *of_run), "no.skeleton: No such file"),
        ((tmp_path, *of_run), "holds no recording .skeleton of the model's skeleton 'ntu-rgb+d' (25 joints)"),
        (
            (tmp_path / "a.mat", *of_run),
            "must have the model's skeleton 'ntu-rgb+d' (25 joints), got one of 'utd-mhad'",
        ),
        ((files[0], *of_run, "--view", "elbow"), "view must be one of joint, angular_velocity, all"),
        ((files[0], *of_run, "--part", "pupil"), "must be 'student' or 'teacher'"),
        ((files[0], *of_run, "--top", "0"), "--top must be at least 1"),
        ((files[0], *of_run, "--device", "abacus"), "device must be 'auto', 'cpu' or 'cuda[:N]', got 'abacus'"),
        ((files[0], *of_run, "--kind", "nwucla"), "did you mean 'nw-ucla'"),
        ((files[0], *of_run, "--embed", tmp_path / "no" / "out.npz"), "No such file or directory"),
    ):
        status, out, err = run(capsys, *arguments)
        assert message in err
        assert err.count("\n") == 1
        assert (status, out) == (2, "")
    with pytest.raises(SystemExit):
        main([str(files[0])])
    assert "one of the arguments --run --model is required" in capsys.readouterr().err
