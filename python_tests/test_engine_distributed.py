"""Runs that several processes train together, and their ends; what the ranks do stands in distributed_runs.py."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import run_ranks
import torch
from distributed_runs import PLAIN, last
from engine_helpers import TINY, assert_same_run, tiny_config

from ikem_fast import engine
from ikem_fast.engine.run_log import read_log

pytestmark = pytest.mark.usefixtures("one_thread")

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(clips, tmp_path_factory):
    """Runs of 1, 2 and 4 processes: ``chain`` and ``per_rank`` began on 2, and went on on 1 and then on 4, or on 4."""
    folder = tmp_path_factory.mktemp("runs")
    one = engine.pretrain(clips, folder / "one", tiny_config(*PLAIN), progress=False)
    engine.distill(None, one, folder / "one_student", tiny_config(*PLAIN), progress=False)
    assert_all_ended_well(run_ranks.run(FOLDER / "distributed_runs.py", 2, "two", clips, folder))
    shutil.copytree(folder / "per_rank", folder / "per_rank_on_1")
    engine.pretrain(clips, folder / "chain", tiny_config(*PLAIN, "max_steps=5"), progress=False)
    assert_all_ended_well(run_ranks.run(FOLDER / "distributed_runs.py", 4, "four", clips, folder))
    return folder


def assert_all_ended_well(ranks):
    for number, (status, output) in enumerate(ranks):
        assert status == 0, f"rank {number}:\n{output}"


def assert_equal_up_to_rounding(run, expected):
    lines = [[line for line in read_log(each) if line["kind"] == "train"] for each in (run, expected)]
    for ours, theirs in zip(*lines, strict=True):
        assert (ours["step"], ours["epoch"], ours["learning_rate"]) == (
            theirs["step"],
            theirs["epoch"],
            theirs["learning_rate"],
        )
        # Encoders this small make of a rounding error in float32 a thousand times as much within a few steps.
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=2e-3)
    ours, theirs = last(run), last(expected)
    assert (ours["step"], ours["epoch"], ours["epoch_done"]) == (theirs["step"], theirs["epoch"], theirs["epoch_done"])
    for name, tensor in theirs["model"].items():
        torch.testing.assert_close(ours["model"][name], tensor, rtol=0.01, atol=0.01, msg=lambda t, n=name: f"{n}: {t}")
    assert torch.equal(ours["model"]["queue_pointer"], theirs["model"]["queue_pointer"])


def notes(run):
    return [line["text"] for line in read_log(run) if line["kind"] == "note"]


# ---- the same run --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["synchronised", "sharded", "chain"])
def test_pretraining_equals_that_of_one_process(folder, name):
    assert_equal_up_to_rounding(folder / name, folder / "one")


@pytest.mark.parametrize("name", ["student", "sharded_student"])
def test_distillation_equals_that_of_one_process(folder, name):
    assert_equal_up_to_rounding(folder / name, folder / "one_student")


def test_change_of_ranks_is_noted(folder):
    assert notes(folder / "chain") == [
        "goes on with 1 process, not 2 as before: dropout is drawn anew",
        "goes on with 4 processes, not 1 as before: dropout is drawn anew",
    ]
    (text,) = notes(folder / "per_rank")
    assert text.endswith("dropout is drawn anew, and batch statistics are of 1 clips, not 2")
    assert notes(folder / "straight") == notes(folder / "stopped") == []


def test_parts_may_take_the_place_of_ranks(folder, clips, tmp_path):
    """With statistics of every rank's own, two parts on one process are two ranks."""
    per_rank = (*PLAIN, "batch_statistics=per_rank")
    run = shutil.copytree(folder / "per_rank_on_1", tmp_path / "run")
    engine.pretrain(clips, run, tiny_config(*per_rank, "pretrain.accumulate_steps=2", "max_steps=6"), progress=False)
    assert last(run)["step"] == 6
    assert notes(run) == ["goes on with 1 process, not 2 as before: dropout is drawn anew"]
    with pytest.raises(engine.RunError, match=r"pretrain\.accumulate_steps is 4, not 2"):
        engine.pretrain(clips, run, tiny_config(*per_rank, "pretrain.accumulate_steps=4"), progress=False)


# ---- ends ----------------------------------------------------------------------------------------------------------


def command(clips, out, *settings):
    arguments = ("pretrain", "--data", clips, "--out", out, "--config", "cpu-small", *TINY, *settings, "--quiet")
    return [str(argument) for argument in arguments]


def test_killed_rank_ends_the_attempt_and_the_next_one_goes_on(folder, clips, tmp_path):
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "last.pt").write_bytes(b"of an old run that --restart deletes")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.run(
        [*torchrun, str(FOLDER / "distributed_command.py"), "kill", *command(clips, out), "--restart"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    end = r"error \(rank 0\): rank 1 ended without a word, as if killed; the last good .*last\.pt \(epoch 1, step 2\)\n"
    assert re.search(end, process.stderr)
    assert "Traceback" not in process.stderr
    assert f"this one goes on with what {out} holds" in process.stderr
    assert process.stdout == f"done: {out}/checkpoints/last.pt (epoch 4, step 8)\n"
    assert_same_run(out, folder / "straight")


def test_all_ranks_end_when_one_is_killed(clips, tmp_path):
    """Also one that hangs, and without torchrun to end them."""
    out = tmp_path / "run"
    first, *others = run_ranks.run(FOLDER / "distributed_command.py", 3, "kill_0", *command(clips, out, "batch_size=6"))
    assert first[0] == -signal.SIGKILL
    for rank, (status, output) in enumerate(others, start=1):
        assert status == 2
        (line,) = [line for line in output.splitlines() if "rank" in line]
        assert line.startswith(
            f"error (rank {rank}): rank 0 ended without a word, as if killed; the last good checkpoint"
        )
        assert "Traceback" not in output
    assert engine.load_run(out)[1]["step"] == 3


def test_error_of_one_rank_ends_all(clips, tmp_path):
    ranks = run_ranks.run(FOLDER / "distributed_command.py", 2, "data", *command(clips, tmp_path / "run"))
    assert [status for status, _ in ranks] == [2, 2]
    reason = r"clips\.npy is gone; the last good checkpoint is .*last\.pt \(epoch 1, step 2\)"
    assert re.search(rf"^error \(rank 0\): rank 1 failed: {reason}", ranks[0][1], re.MULTILINE)
    assert re.search(rf"^error \(rank 1\): {reason}$", ranks[1][1], re.MULTILINE)
    assert not any("Traceback" in output for _, output in ranks)
