"""scripts/learning_study.py: which runs it makes, that they are judged and found again, and its table."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import engine_helpers
import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "learning_study.py"


@pytest.fixture(scope="module")
def learning_study():
    spec = importlib.util.spec_from_file_location("learning_study", SCRIPT)
    module = sys.modules["learning_study"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["learning_study"]


def run_study(clips: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPT, "--data", f"cpu-small={clips}", "--out", out, "--seeds", "1", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


NAMED_BY_VARIANTS = ("model.modalities", "pretrain.cross_epoch", "seed")
SETTINGS = [
    *(text for text in engine_helpers.TINY if not text.startswith(NAMED_BY_VARIANTS)),
    "linear.epochs=2",
    "linear.milestones=[1]",
    "max_steps=1",
]


@pytest.mark.slow
def test_a_study_is_judged_written_down_and_not_done_twice(clips, tmp_path):
    first = run_study(clips, tmp_path / "study", "--only", "joint", "--", *SETTINGS)
    assert first.returncode == 0, first.stderr
    run = tmp_path / "study" / "cpu-small" / "joint" / "seed-0"
    judged = json.loads((run / "judged.json").read_text())
    assert judged["steps"] == 1
    for encoders in ("trained", "untrained"):
        assert judged[encoders].keys() == {"joint"}
        of_joint = judged[encoders]["joint"]
        assert of_joint.keys() == {"linear", "best", "knn", "logistic"}
        # Shares of the five test clips; the best epoch is no worse than the last.
        assert all(round(5 * accuracy, 6) in range(6) for accuracy in of_joint.values())
        assert of_joint["best"] >= of_joint["linear"]
    assert json.loads((tmp_path / "study" / "results.json").read_text()) == {"cpu-small": {"joint": [judged]}}
    table = (tmp_path / "study" / "results.md").read_text()
    assert f"| joint alone | joint | {100 * judged['trained']['joint']['linear']:.1f} |" in table

    before = (run / "checkpoints" / "last.pt").stat().st_mtime_ns
    again = run_study(clips, tmp_path / "study", "--only", "joint", "--", *SETTINGS)
    assert again.returncode == 0, again.stderr
    assert f"{run}: done before" in again.stdout
    assert (run / "checkpoints" / "last.pt").stat().st_mtime_ns == before


def test_a_run_that_fails_ends_the_study_with_its_message(tmp_path):
    result = run_study(tmp_path / "nowhere", tmp_path / "study", "--only", "joint")
    assert result.returncode != 0
    assert "pretrain" in result.stderr
    assert str(tmp_path / "nowhere") in result.stderr
    assert not (tmp_path / "study" / "results.json").exists()


def test_an_unknown_variant_is_refused(clips, tmp_path):
    result = run_study(clips, tmp_path / "study", "--only", "joint", "seven")
    assert result.returncode != 0
    assert "--only must name variants of joint, three," in result.stderr
    assert "got seven" in result.stderr


def test_students_come_with_their_teachers_and_after_them(learning_study, monkeypatch, tmp_path):
    options = learning_study.parse_options(
        ["--data", "a=A", "--data", "b=B", "--out", str(tmp_path), "--seeds", "2", "--only", "student-q3"]
    )
    study = learning_study.Study(options)
    runs = []
    monkeypatch.setattr(study, "train_and_judge", lambda *run: runs.append((run[0], run[1].name, run[2])))
    study.run()
    everywhere = [(preset, seed) for seed in (0, 1) for preset in ("a", "b")]
    assert runs == [(preset, name, seed) for name in ("six", "student-q3") for preset, seed in everywhere]


@pytest.mark.parametrize(
    ("field", "turned"),
    [("partial_momentum_update", "false"), ("redraw_key_weights", "true"), ("teacher_in_training_mode", "false")],
)
def test_quirks_are_turned_round(learning_study, field, turned):
    assert learning_study.turned_round("nw-ucla-small", f"quirks.{field}={{turned}}") == turned


def test_spread(learning_study):
    assert learning_study.spread([70.0]) == "70.0"
    assert learning_study.spread([70.0, 72.0, 74.0]) == "72.0 ± 2.0"
