"""The command line of training: what it prints, its exit statuses, and that a signal ends it with a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from engine_helpers import TINY

from ikem_fast import engine
from ikem_fast.engine import checkpoints
from ikem_fast.train import main

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    assert main(["pretrain", "--data", str(clips), "--out", str(out), "--config", "cpu-small", *TINY, "--quiet"]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def run_main(capsys, *arguments):
    """Exit status, stdout and stderr of a command."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def assert_one_line_error(result, *parts):
    status, out, err = result
    assert status == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


def test_pretrain_then_distill_with_the_teachers_data_and_settings(run, tmp_path, capsys):
    status, out, err = run_main(
        capsys, "distill", "--teacher", run, "--out", tmp_path / "student", "epochs=1", "milestones=[]"
    )
    assert (status, out) == (0, f"done: {tmp_path / 'student'}/checkpoints/last.pt (epoch 1, step 2)\n")
    assert "distill epoch 1/1" in err
    of_teacher, of_student = (engine.load_run(folder)[1] for folder in (run, tmp_path / "student"))
    assert of_student["data"] == of_teacher["data"]
    assert of_student["config"]["model"] == of_teacher["config"]["model"]
    assert of_student["config"]["distill"]["epochs"] == 1


def test_run_goes_on_with_its_own_configuration(clips, tmp_path, capsys):
    out = tmp_path / "run"
    first = ("pretrain", "--data", clips, "--out", out, "--config", "cpu-small", *TINY, "max_steps=1", "--quiet")
    assert run_main(capsys, *first)[0] == 0
    status, text, err = run_main(capsys, "pretrain", "max_steps=3", "--data", clips, "log_every_steps=1", "--out", out)
    assert (status, text) == (0, f"done: {out}/checkpoints/last.pt (epoch 2, step 3)\n")
    assert "going on after epoch 1, step 1" in err
    assert [line["step"] for line in engine.read_log(out)] == [2, 3]


def test_restart_takes_the_preset_again(run, clips, capsys):
    again = ("pretrain", "--data", clips, "--out", run, "--config", "cpu-small", *TINY, "seed=8", "max_steps=1")
    assert_one_line_error(run_main(capsys, *again, "--quiet"), "seed is 8, not 7", "--restart")
    assert run_main(capsys, *again, "--quiet", "--restart")[0] == 0
    assert engine.load_run(run)[1]["step"] == 1


def test_mistakes_are_one_line(clips, run, tmp_path, capsys, monkeypatch):
    pretrain = ("pretrain", "--data", clips, "--out", tmp_path / "new")
    assert_one_line_error(
        run_main(capsys, *pretrain, "bach_size=3"), "'bach_size'", "did you mean 'pretrain.batch_size'"
    )
    assert_one_line_error(run_main(capsys, *pretrain, "--config", "cpu-smal"), "did you mean 'cpu-small'")
    # The published recipe is what an unnamed configuration means; it does not fit nine clips.
    assert_one_line_error(run_main(capsys, *pretrain), "pretrain.batch_size must be at most", "9, got 128")
    assert_one_line_error(run_main(capsys, *pretrain, "batch_size=4", "device=abacus"), "device must be", "'abacus'")
    assert not (tmp_path / "new").exists()
    again = ("pretrain", "--data", clips, "--out", run, "--restart")
    assert_one_line_error(run_main(capsys, *again), "9, got 128")
    assert engine.load_run(run)[1]["step"] == 8  # a mistake deletes nothing
    nowhere = tmp_path / "nowhere"
    assert_one_line_error(run_main(capsys, "pretrain", "--data", nowhere, "--out", tmp_path / "new"), str(nowhere))
    assert_one_line_error(run_main(capsys, "distill", "--teacher", nowhere, "--out", tmp_path / "new"), "holds no run")
    (run / "checkpoints" / "last.pt").write_bytes(b"PK\x03\x04")
    assert_one_line_error(run_main(capsys, "distill", "--teacher", run, "--out", tmp_path / "new"), "previous.pt")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert_one_line_error(run_main(capsys, *pretrain), "WORLD_SIZE is set without RANK: start", "with torchrun")
    assert_one_line_error(run_main(capsys, "evaluate", "knn", "--run", run), "evaluate runs on one process", "SIZE=4")


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("prtrain",),
        ("pretrain", "--data", "x"),
        ("pretrain", "--data", "x", "--out", "y", "--speed", "3"),
        ("pretrain", "--data", "x", "--out", "y", "batch_size", "3"),
        ("presets", "seed=3"),
    ],
)
def test_unusable_command_line_shows_its_usage(arguments, capsys):
    status, _, err = run_main(capsys, *arguments)
    if arguments[-2:] == ("batch_size", "3"):
        assert_one_line_error((status, "", err), "override 'batch_size' must have the form key=value")
        return
    assert status == 2
    assert err.startswith("usage: python -m ikem_fast.train")


def test_a_fault_of_the_program_keeps_its_traceback(clips, tmp_path, monkeypatch):
    def fault(*_, **__):
        raise KeyError("a fault, not a mistake")

    monkeypatch.setattr(engine, "pretrain", fault)
    with pytest.raises(KeyError, match="a fault"):
        main(["pretrain", "--data", str(clips), "--out", str(tmp_path / "run"), "--config", "cpu-small"])


def test_config_prints_what_reads_back(tmp_path, capsys):
    status, out, _ = run_main(capsys, "config", "--config", "nw-ucla", "model.topk=2")
    assert status == 0
    (tmp_path / "mine.yaml").write_text(out, encoding="utf-8")
    assert engine.load_config(tmp_path / "mine.yaml") == engine.load_config("nw-ucla", ["model.topk=2"])


def test_presets_are_listed(capsys):
    status, out, _ = run_main(capsys, "presets")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == engine.preset_names()


@pytest.mark.parametrize("kind", ["linear", "knn"])
def test_evaluate_reads_the_runs_data(run, capsys, kind):
    status, out, err = run_main(
        capsys, "evaluate", kind, "--run", run, *(["epochs=2", "milestones=[]"] * (kind == "linear"))
    )
    assert status == 0, err
    for name in ("joint", "motion", "all"):
        assert name in out
    result = json.loads((run / "evaluation" / f"{kind}.json").read_text(encoding="utf-8"))
    assert result["run"]["step"] == 8


def test_sigterm_writes_a_checkpoint_and_the_same_command_goes_on(clips, tmp_path):
    out = tmp_path / "run"
    settings = (*TINY, "pretrain.epochs=500", "threads=1", "knn_every_epochs=0")
    command = [sys.executable, "-m", "ikem_fast.train", "pretrain", "--data", str(clips), "--out", str(out)]
    command += ["--config", "cpu-small", *settings]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        waited_until = time.monotonic() + 120
        log = out / "log.jsonl"
        while not (log.is_file() and log.stat().st_size) and process.poll() is None:
            assert time.monotonic() < waited_until
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in err
    assert f"stopped by SIGTERM; checkpoint written: {out}/checkpoints/last.pt" in err.splitlines()[-1]
    stopped_at = checkpoints.load(out / "checkpoints" / "last.pt")["step"]
    assert stopped_at >= 3
    assert main([*command[3:], f"max_steps={stopped_at + 1}", "--quiet"]) == 0
    assert checkpoints.load(out / "checkpoints" / "last.pt")["step"] == stopped_at + 1
