"""What several ranks do to run folders, for test_engine_distributed.py: ``distributed_runs.py WHAT CLIPS FOLDER``.

Every rank runs all of it; what must be the same on all is asserted on all.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from engine_helpers import TINY, assert_same_run, tiny_config, write_clips

from ikem_fast import engine
from ikem_fast.engine import checkpoints, runs
from ikem_fast.engine.world import joined
from ikem_fast.methods import IKEM
from ikem_fast.train import main

PLAIN = ("model.dropout=0.0", "distill.dropout=0.0")


def last(run):
    return checkpoints.load(run / "checkpoints" / "last.pt")


@contextlib.contextmanager
def interfere(at_call, action):
    """Calls ``action`` in the ``at_call``-th step."""
    original, calls = IKEM.contrast, 0

    def contrast(self, *arguments):
        nonlocal calls
        calls += 1
        step = original(self, *arguments)
        return (action(step) or step) if calls == at_call else step

    with mock.patch.object(IKEM, "contrast", contrast):
        yield


def refused(world, error, match, *arguments, **options):
    """Training ends in an error, which every rank has."""
    with pytest.raises(error, match=match) as raised:
        engine.pretrain(*arguments, **options, progress=False)
    assert len(set(world.gather_all(str(raised.value)))) == 1


def straight_and_continued(world, clips, folder):
    """A run with dropout; the same in two pieces; the same again, stopped by a signal to rank 1 alone."""
    straight = engine.pretrain(clips, folder / "straight", tiny_config(), progress=False)
    pieces = folder / "pieces"
    engine.pretrain(clips, pieces, tiny_config("max_steps=5"), progress=False)
    engine.pretrain(clips, pieces, tiny_config(), progress=False)
    stopped = folder / "stopped"
    with interfere(2, lambda _: os.kill(os.getpid(), signal.SIGTERM) if world.rank == 1 else None):
        with pytest.raises(engine.TrainingInterrupted) as interrupted:
            engine.pretrain(clips, stopped, tiny_config(), progress=False)
        assert interrupted.value.code == 128 + signal.SIGTERM
        assert "stopped by SIGTERM" in str(interrupted.value)
    engine.pretrain(clips, stopped, tiny_config(), progress=False)
    if world.is_writer:
        states = last(straight)["random_states_of_other_ranks"]
        assert len(states) == world.size - 1
        assert not torch.equal(states[0]["torch"], last(straight)["random_state"]["torch"])
        for run in (pieces, stopped):
            assert_same_run(run, straight)
            for one, other in zip(last(run)["random_states_of_other_ranks"], states, strict=True):
                assert torch.equal(one["torch"], other["torch"])


def as_one_process(world, clips, folder):
    """Runs that must equal those of one process."""
    engine.pretrain(clips, folder / "synchronised", tiny_config(*PLAIN), progress=False)
    sharded = tiny_config(*PLAIN, "distributed.queue=sharded")
    engine.pretrain(clips, folder / "sharded", replace(sharded, max_steps=5), progress=False)
    if world.is_writer:
        assert last(folder / "sharded")["model"]["queue"].shape == (2, 4, 12)
    engine.pretrain(clips, folder / "sharded", tiny_config(*PLAIN, "max_steps=7"), progress=False)
    engine.pretrain(clips, folder / "sharded", sharded, progress=False)
    for name, queue in (("student", "whole"), ("sharded_student", "sharded")):
        config = tiny_config(*PLAIN, f"distributed.queue={queue}")
        engine.distill(None, folder / "one", folder / name, config, progress=False)
    engine.pretrain(clips, folder / "chain", tiny_config(*PLAIN, "max_steps=3"), progress=False)
    engine.pretrain(
        clips, folder / "per_rank", tiny_config(*PLAIN, "batch_statistics=per_rank", "max_steps=4"), progress=False
    )


def errors(world, clips, folder):
    """Errors that one rank finds and all end with."""
    run, config = folder / "errors", tiny_config()
    engine.pretrain(clips, run, tiny_config("max_steps=3"), progress=False)
    spoil = lambda step: replace(step, losses={name: loss * float("nan") for name, loss in step.losses.items()})  # noqa: E731
    with interfere(1, lambda step: spoil(step) if world.rank == 1 else None):
        message = (
            r"loss single/joint is nan in epoch 2, step 4; the last good checkpoint is .*last\.pt \(epoch 2, step 3\)"
        )
        refused(world, engine.NonFiniteError, message, clips, run, config)

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for module, name, error, message in (
        (
            checkpoints,
            "atomic_open",
            engine.CheckpointError,
            r"cannot write checkpoint .*No space left on device; .*usable",
        ),
        (
            engine.run_log.RunLog,
            "_write_events",
            engine.LogError,
            r"cannot write .*No space left .*\(epoch 2, step 3\)",
        ),
        (engine.config, "atomic_open", engine.RunError, "cannot be written: No space left on device"),
    ):
        with mock.patch.object(module, name, side_effect=full) if world.is_writer else contextlib.nullcontext():
            refused(world, error, message, clips, run, config)
    with runs._locked(run) if world.is_writer else contextlib.nullcontext():
        world.agree(None)  # locked before the other rank asks
        refused(world, engine.RunError, "another process is training in", clips, run, config)
    for overrides, error, message in (
        (["pretrain.batch_size=3"], engine.ConfigError, "a multiple of the number of processes, 2, got 3"),
        (["queue_size=13", "queue=sharded"], engine.RunError, "13 keys cannot be shared equally by 2 processes"),
        (["device=cuda:1"], engine.ConfigError, "device must be 'auto', 'cuda' or 'cpu' on several processes"),
        (["batch_statistics=per_rank"], engine.RunError, r"distributed\.batch_statistics is 'per_rank', not 'synch"),
        (["pretrain.accumulate_steps=2"], engine.RunError, r"pretrain\.accumulate_steps is 2, not 1"),
    ):
        refused(world, error, message, clips, run, tiny_config(*overrides))
    own_clips = write_clips(folder / "other_clips", seed=1) if world.rank == 1 else clips
    with pytest.raises(engine.RunError, match=r"all ranks must have the same clips, got others in .* on rank [01]"):
        engine.pretrain(own_clips, run, config, progress=False)

    def other_weights(*arguments):
        method = new_ikem(*arguments)
        method.exchange_heads[0].bias.data[0, 0] += world.rank
        return method

    new_ikem = runs.new_ikem
    with mock.patch.object(runs, "new_ikem", other_weights):
        refused(world, engine.RankError, "ranks start from different weights", clips, folder / "weights", config)

    arguments = ["pretrain", "--data", clips, "--out", run, "--config", "cpu-small", *TINY, "bach_size=3"]
    with contextlib.redirect_stderr(io.StringIO()) as shown:
        assert main([str(argument) for argument in arguments]) == 2
    assert shown.getvalue().startswith("error (rank 0): ") is world.is_writer
    assert shown.getvalue().count("\n") == (1 if world.is_writer else 0)

    engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    if world.is_writer:
        assert last(run)["step"] == 4
        shutil.rmtree(run)


def go_on(world, clips, folder):
    engine.pretrain(clips, folder / "chain", tiny_config(*PLAIN), progress=False)
    engine.pretrain(
        clips, folder / "per_rank", tiny_config(*PLAIN, "batch_statistics=per_rank", "max_steps=6"), progress=False
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    what = {"two": (as_one_process, straight_and_continued, errors), "four": (go_on,)}[sys.argv[1]]
    with joined() as the_world:
        for each in what:
            each(the_world, Path(sys.argv[2]), Path(sys.argv[3]))
