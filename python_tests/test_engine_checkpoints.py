"""Checkpoints and run folders: damage, full disks, and requests that do not fit what is there."""

from __future__ import annotations

import errno
import os
import pickle
import shutil

import pytest
import torch
from engine_helpers import TINY, last, tiny_config, write_clips

from ikem_fast import engine
from ikem_fast.engine import checkpoints, run_log
from ikem_fast.engine.checkpoints import CheckpointError
from ikem_fast.engine.runs import fingerprint
from ikem_fast.methods import IKEM, RelationalDistillation

pytestmark = pytest.mark.usefixtures("one_thread")


def test_loaded_run_gives_the_trained_module(run):
    method, checkpoint = engine.load_run(run)
    assert isinstance(method, IKEM)
    assert not method.training
    assert method.config() == checkpoint["method"]
    for name, tensor in method.state_dict().items():
        assert torch.equal(tensor, checkpoint["model"][name]), name


def test_loading_a_run_leaves_the_random_state_alone(run):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    engine.load_run(run)
    assert torch.equal(torch.rand(3), expected)


def test_distillation_run_loads(run, tmp_path):
    engine.distill(None, run, tmp_path / "student", tiny_config("max_steps=1"), progress=False)
    method, checkpoint = engine.load_run(tmp_path / "student")
    assert isinstance(method, RelationalDistillation)
    assert checkpoint["kind"] == "distill"


@pytest.mark.parametrize("length", [0, 100, 0.5, 0.999])
def test_truncated_checkpoint_is_explained_and_the_one_before_named(run, clips, length):
    content = last(run).read_bytes()
    last(run).write_bytes(content[: length if isinstance(length, int) else int(length * len(content))])
    usable = r"previous\.pt \(epoch 1, step 2\) is usable: copy it to .*last\.pt to go on"
    with pytest.raises(CheckpointError, match=rf"last\.pt is damaged.*{usable}"):
        engine.load_run(run)
    with pytest.raises(CheckpointError, match=usable):
        engine.pretrain(clips, run, tiny_config(), progress=False)
    shutil.copy(run / "checkpoints" / "previous.pt", last(run))
    assert engine.load_run(run)[1]["step"] == 2


def test_flipped_bytes_are_noticed(run):
    # In the values of a tensor, where only a checksum can tell.
    values = checkpoints.load(last(run))["model"]["queue"].numpy().tobytes()
    content = last(run).read_bytes()
    assert content.count(values) == 1
    damaged = bytes(byte ^ 0xFF for byte in values)
    last(run).write_bytes(content.replace(values, damaged))
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged .*checksum.*previous\.pt"):
        engine.load_run(run)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: path.write_text("hello", encoding="utf-8"), "is damaged"),
        (lambda path: path.write_bytes(pickle.dumps(os.getcwd, protocol=2)), "is damaged or no checkpoint"),
        (lambda path: torch.save({"weights": os.getcwd}, path), "holds more than plain values and tensors"),
        (lambda path: torch.save({"weights": torch.ones(2)}, path), "was not written by this package"),
        (lambda path: torch.save([1, 2], path), "was not written by this package"),
        (
            lambda path: torch.save({"format": checkpoints.FORMAT, "format_version": 9}, path),
            f"version {checkpoints.FORMAT_VERSION}, got 9",
        ),
        (
            lambda path: torch.save(
                {"format": checkpoints.FORMAT, "format_version": checkpoints.FORMAT_VERSION, "kind": 3}, path
            ),
            "must hold 'kind' as str, got int",
        ),
        (
            lambda path: torch.save(
                {"format": checkpoints.FORMAT, "format_version": checkpoints.FORMAT_VERSION, "kind": "pretrain"}, path
            ),
            "must hold 'method' as dict, got nothing",
        ),
    ],
)
def test_file_that_is_no_checkpoint_is_explained(tmp_path, write, message):
    write(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=message):
        checkpoints.load(tmp_path / "last.pt")


def test_missing_checkpoint_is_explained(tmp_path):
    with pytest.raises(CheckpointError, match=r"last\.pt does not exist"):
        checkpoints.load(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="holds no run"):
        engine.load_run(tmp_path)


def test_weights_of_another_size_are_explained(run):
    checkpoint = checkpoints.load(last(run))
    checkpoint["method"]["hidden_channels"] = 3
    checkpoints.save(last(run), checkpoint)
    with pytest.raises(
        CheckpointError, match=r"are not those of IKEM with layout 'nw-ucla' .*: hidden_channels is 2, not 3; "
    ):
        engine.load_run(run)


class FullDisk:
    """A file whose disk is full after some bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 200_000])
def test_full_disk_ends_the_run_with_a_usable_checkpoint(run, clips, monkeypatch, room):
    original = checkpoints.atomic_open

    def atomic_open(path, mode):
        from contextlib import contextmanager

        @contextmanager
        def opened():
            with original(path, mode) as file:
                yield FullDisk(file, room)

        return opened()

    monkeypatch.setattr(checkpoints, "atomic_open", atomic_open)
    message = r"cannot write checkpoint .*last\.pt: No space left on device; .*last\.pt \(epoch 2, step 3\) is usable"
    with pytest.raises(CheckpointError, match=message):
        engine.pretrain(clips, run, tiny_config("max_steps=5"), progress=False)
    monkeypatch.undo()
    assert not list((run / "checkpoints").glob(".*"))
    engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    assert engine.load_run(run)[1]["step"] == 4


def test_log_that_cannot_be_written_ends_the_run_with_a_usable_checkpoint(run, clips, monkeypatch):
    def write_events(self, line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(run_log.RunLog, "_write_events", write_events)
    message = r"cannot write .*log\.jsonl: No space left on device; the last good .*last\.pt \(epoch 2, step 3\)"
    with pytest.raises(engine.LogError, match=message):
        engine.pretrain(clips, run, tiny_config(), progress=False)


def test_run_folder_that_cannot_be_made_is_explained(clips, tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(engine.RunError, match="cannot be used: Not a directory"):
        engine.pretrain(clips, tmp_path / "file" / "run", tiny_config(), progress=False)


@pytest.mark.parametrize("module", [engine.config, run_log])
def test_disk_that_is_full_from_the_start_is_explained(run, clips, monkeypatch, module):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = last(run).read_bytes()
    # Where the first file is written: the resolved configuration, or the log's events.
    monkeypatch.setattr(module, "atomic_open" if module is engine.config else "SummaryWriter", refuse)
    with pytest.raises((engine.RunError, engine.LogError), match=r"cannot .*wri.*: No space left on device"):
        engine.pretrain(clips, run, tiny_config("tensorboard=true"), progress=False)
    assert last(run).read_bytes() == before


def test_previous_checkpoint_without_hard_links(run, clips, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    (run / "checkpoints" / "previous.pt").unlink()
    engine.pretrain(clips, run, tiny_config("max_steps=4", "keep_every_epochs=2"), progress=False)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["epoch-0002.pt", "last.pt"]
    assert checkpoints.load(run / "checkpoints" / "epoch-0002.pt")["step"] == 4


def test_differing_configuration_is_refused_with_a_list(run, clips):
    config = tiny_config("pretrain.learning_rate=0.5", "model.dropout=0.1")
    before = last(run).read_bytes()
    message = (
        r"cannot be continued like this: model\.dropout is 0\.1, not 0\.5; pretrain\.learning_rate is 0\.5, not 0\.02"
        r".*--restart"
    )
    with pytest.raises(engine.RunError, match=message):
        engine.pretrain(clips, run, config, progress=False)
    assert last(run).read_bytes() == before


def test_harmless_differences_are_taken(run, clips):
    config = tiny_config(
        *("max_steps=4", "log_every_steps=1", "threads=1", "linear.epochs=90", "distill.learning_rate=1"),
        *("device=auto", "capture=false"),
    )
    config.pretrain.epochs = 5
    engine.pretrain(clips, run, config, progress=False)
    assert engine.load_run(run)[1]["step"] == 4
    assert engine.load_config(run / "config.yaml") == config


def test_fewer_epochs_than_are_done_are_refused(run, clips):
    config = tiny_config("pretrain.epochs=1", "pretrain.cross_epoch=null", "pretrain.milestones=[]")
    with pytest.raises(engine.RunError, match=r"pretrain\.epochs is 1, not 4"):
        engine.pretrain(clips, run, config, progress=False)


def test_other_clips_are_refused(run, tmp_path):
    other = write_clips(tmp_path / "other", seed=1)
    with pytest.raises(engine.RunError, match=r"the clips of .*other are not those of .*clips"):
        engine.pretrain(other, run, tiny_config(), progress=False)


def test_same_clips_elsewhere_are_taken(run, clips, tmp_path):
    moved = shutil.copytree(clips, tmp_path / "moved")
    engine.pretrain(moved, run, tiny_config("max_steps=4"), progress=False)
    assert engine.load_run(run)[1]["data"]["folder"] == str(moved)


def test_fingerprint_sees_every_change(clips, tmp_path):
    from ikem_fast.data import ClipSet

    first = ClipSet.open(clips).split("train")
    assert fingerprint(first) == fingerprint(ClipSet.open(clips).split("train"))
    others = [ClipSet.open(clips).split("test"), ClipSet.open(clips).split("train")]
    others[1].labels = others[1].labels[::-1].copy()
    others.append(ClipSet.open(write_clips(tmp_path / "other", seed=1)).split("train"))
    assert len({fingerprint(clip_set) for clip_set in [first, *others]}) == 4


def test_another_command_in_the_same_folder_is_refused(run, clips, tmp_path):
    teacher = shutil.copytree(run, tmp_path / "teacher")
    with pytest.raises(engine.RunError, match="the command is distill, not pretrain"):
        engine.distill(None, teacher, run, tiny_config(), progress=False)
    with pytest.raises(engine.RunError, match="out must be another folder than the teacher's run"):
        engine.distill(None, run, run, tiny_config(), progress=False)


def test_restart_starts_over_and_spares_other_files(run, clips):
    (run / "notes.txt").write_text("mine", encoding="utf-8")
    (run / "evaluation").mkdir()
    engine.pretrain(clips, run, tiny_config("max_steps=1", "pretrain.learning_rate=0.5"), restart=True, progress=False)
    assert engine.load_run(run)[1]["step"] == 1
    assert (run / "notes.txt").read_text(encoding="utf-8") == "mine"
    assert not (run / "evaluation").exists()
    assert [line["step"] for line in engine.read_log(run)] == [1]


def test_run_that_trained_nothing_yet_may_change_its_configuration(run, clips, tmp_path):
    checkpoint = checkpoints.load(last(run))
    checkpoint["step"] = 0
    checkpoints.save(last(run), checkpoint)
    engine.pretrain(clips, run, tiny_config("max_steps=1", "pretrain.learning_rate=0.5"), progress=False)
    assert engine.load_run(run)[1]["config"]["pretrain"]["learning_rate"] == 0.5


def test_two_processes_in_one_folder_are_refused(run, clips):
    fcntl = pytest.importorskip("fcntl")
    with open(run / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(engine.RunError, match="another process is training in"):
            engine.pretrain(clips, run, tiny_config(), progress=False)


def test_student_of_a_student_is_refused(run, clips, tmp_path):
    student = engine.distill(None, run, tmp_path / "student", tiny_config("max_steps=1"), progress=False)
    with pytest.raises(engine.RunError, match=r"teacher must be a run of 'pretrain', got .*a run of 'distill'"):
        engine.distill(None, student, tmp_path / "second", tiny_config(), progress=False)


def test_teacher_that_does_not_fit_is_refused(run, tmp_path):
    config = engine.load_config("cpu-small", (*TINY, "model.hidden_channels=4", "model.modalities=[joint,bone]"))
    message = r"model\.modalities must be \['joint', 'motion'\] as in the teacher.*hidden_channels must be 2 .* got 4"
    with pytest.raises(engine.RunError, match=message):
        engine.distill(None, run, tmp_path / "student", config, progress=False)
    other = write_clips(tmp_path / "other", layout="utd-mhad")
    with pytest.raises(engine.RunError, match=r"the same skeleton, got utd-mhad .* and nw-ucla"):
        engine.distill(other, run, tmp_path / "student", tiny_config(), progress=False)


def test_teacher_that_trained_on_is_another_teacher(run, clips, tmp_path):
    student = engine.distill(None, run, tmp_path / "student", tiny_config("max_steps=1"), progress=False)
    engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    with pytest.raises(engine.RunError, match=r"the teacher is .*run at step 4, not .*run at step 3"):
        engine.distill(None, run, student, tiny_config(), progress=False)
