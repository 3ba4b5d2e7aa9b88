"""Folders and files that cannot be read or written, two runs in one folder, and lists of what differs."""

from __future__ import annotations

import ctypes
import errno
import multiprocessing
import os
import shutil
import sys
from contextlib import contextmanager

import pytest
from engine_helpers import TINY, assert_same_run, last, tiny_config, write_clips

from ikem_fast import engine, layouts, train
from ikem_fast.data import ClipSet, DataError, prepare
from ikem_fast.engine import checkpoints, runs
from ikem_fast.engine.checkpoints import CheckpointError
from ikem_fast.layouts import LayoutError, list_differences

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- permissions -----------------------------------------------------------------------------------------------------

_MAY_PASS_OVER = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: what root does not ask permission by


@contextmanager
def permissions_bind():
    """Within the block permissions hold for this thread even if it is root's; skips the test where that cannot be."""
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("permissions do not bind root")
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # version 3 of the interface, this thread
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted and inheritable, twice
    if library.capget(header, sets):
        pytest.skip(f"capabilities cannot be read: {os.strerror(ctypes.get_errno())}")
    before = sets[0]
    sets[0] = before & ~_MAY_PASS_OVER
    if library.capset(header, sets):
        pytest.skip(f"capabilities cannot be laid down: {os.strerror(ctypes.get_errno())}")
    try:
        yield
    finally:
        sets[0] = before
        library.capset(header, sets)


@contextmanager
def mode(path, bits):
    before = path.stat().st_mode
    path.chmod(bits)
    try:
        with permissions_bind():
            yield
    finally:
        path.chmod(before)


def test_permissions_bind_in_these_tests(tmp_path):
    (tmp_path / "file").write_text("a")
    with mode(tmp_path / "file", 0o000), pytest.raises(PermissionError):
        (tmp_path / "file").read_text()


@pytest.mark.parametrize(
    ("name", "bits", "reason"),
    [
        (".", 0o000, "Permission denied|no such folder"),
        ("dataset.json", 0o000, r"dataset\.json: Permission denied"),
        ("samples.csv", 0o000, r"samples\.csv: Permission denied"),
        ("clips.npy", 0o000, r"clips\.npy: Permission denied"),
    ],
)
def test_prepared_folders_that_may_not_be_read(tmp_path, name, bits, reason):
    folder = write_clips(tmp_path / "clips")
    with mode(folder / name, bits), pytest.raises(DataError, match=reason):
        ClipSet.open(folder)


def test_recordings_that_may_not_be_read(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a01_s01_e00_v01.json").write_text("{}")
    with mode(source, 0o000), pytest.raises(DataError, match=r"source.*Permission denied"):
        prepare("nw-ucla", source, tmp_path / "out")
    with (
        mode(source / "a01_s01_e00_v01.json", 0o000),
        pytest.raises(DataError, match=r"a01_s01_e00_v01\.json: Permission denied"),
    ):
        prepare("nw-ucla", source, tmp_path / "out", workers=1)
    (tmp_path / "missing.txt").write_text("a01_s01_e00_v01")
    with mode(tmp_path / "missing.txt", 0o000), pytest.raises(DataError, match=r"missing\.txt.*Permission denied"):
        prepare("nw-ucla", source, tmp_path / "out", missing=tmp_path / "missing.txt")
    (tmp_path / "own.yaml").write_text("")
    with mode(tmp_path / "own.yaml", 0o000), pytest.raises(LayoutError, match=r"own\.yaml.*Permission denied"):
        prepare("nw-ucla", source, tmp_path / "out", layout=tmp_path / "own.yaml")
    with mode(tmp_path / "own.yaml", 0o000), pytest.raises(engine.ConfigError, match=r"own\.yaml.*Permission denied"):
        engine.load_config(tmp_path / "own.yaml")


def test_folder_that_may_not_be_prepared_into(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "a01_s01_e00_v01.json").write_text("{}")
    for made in (False, True):
        parent = tmp_path / f"parent{made}"
        parent.mkdir()
        if made:
            (parent / "out").mkdir()
        with (
            mode(parent / "out" if made else parent, 0o555),
            pytest.raises(DataError, match=r"Permission denied; when that is mended, run the same command again"),
        ):
            prepare("nw-ucla", source, parent / "out", workers=1)


@pytest.mark.parametrize(
    ("name", "bits", "reason"),
    [
        (".", 0o555, "run folder .*run cannot be written: Permission denied"),
        (
            "checkpoints",
            0o555,
            r"cannot write .*last\.pt: Permission denied; .*last\.pt \(.* step 3\) is usable",
        ),
        ("checkpoints", 0o000, r"Permission denied"),
        ("checkpoints/last.pt", 0o000, r"last\.pt cannot be read: Permission denied; .*previous\.pt .* is usable"),
        ("log.jsonl", 0o444, r"cannot write .*log\.jsonl: Permission denied"),
        (".lock", 0o444, "run folder .* cannot be used: Permission denied"),
    ],
)
def test_runs_that_may_not_be_read_or_written(run, clips, name, bits, reason):
    before = last(run).read_bytes()
    with mode(run / name, bits), pytest.raises(Exception, match=reason) as raised:
        engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    assert isinstance(raised.value, engine.RunError | CheckpointError | engine.LogError)
    assert last(run).read_bytes() == before
    engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    assert engine.load_run(run)[1]["step"] == 4


def test_run_folder_that_may_not_be_made(clips, tmp_path):
    with (
        mode(tmp_path, 0o555),
        pytest.raises(engine.RunError, match=r"run folder .* cannot be used: Permission denied"),
    ):
        engine.pretrain(clips, tmp_path / "run", tiny_config("max_steps=1"), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_evaluation_that_may_not_be_written(run, capsys):
    (run / "evaluation").mkdir()
    with mode(run / "evaluation", 0o555):
        status = train.main(["evaluate", "knn", "--run", str(run), "--quiet"])
    said = capsys.readouterr().err
    assert status == 2
    assert "Permission denied" in said
    assert said.count("\n") == 1


# ---- something else in a file's place --------------------------------------------------------------------------------


NAMES = ("log.jsonl", "config.yaml", "checkpoints/last.pt", "checkpoints", "tensorboard", ".lock")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in NAMES for kind in ("folder", "dangling link")),
        # Opening a pipe to append to it waits for whoever reads it, as in any program.
        *((name, "pipe") for name in NAMES if name not in ("log.jsonl", ".lock")),
    ],
)
def test_other_things_in_the_place_of_a_runs_files(run, clips, name, kind):
    """Each ends in a message or is replaced; nothing waits for ever, and nothing is raised that is not explained."""
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    if kind == "folder":
        path.mkdir()
        (path / "something").write_text("")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(run / "nowhere" / "at all")
    explained = None
    try:
        engine.pretrain(clips, run, tiny_config("max_steps=4", "logging.tensorboard=true"), progress=False)
    except (engine.RunError, CheckpointError, engine.LogError) as error:
        explained = str(error)
    if explained is None:
        assert engine.load_run(run)[1]["step"] == 4
    else:
        assert str(run) in explained


def test_prepared_folder_with_other_things_in_the_place_of_its_files(tmp_path):
    whole = write_clips(tmp_path / "whole")
    for name in ("dataset.json", "samples.csv", "clips.npy"):
        for kind in ("folder", "dangling link"):
            folder = shutil.copytree(whole, tmp_path / f"{name}-{kind}")
            (folder / name).unlink()
            if kind == "folder":
                (folder / name).mkdir()
            else:
                (folder / name).symlink_to("nowhere")
            with pytest.raises(DataError, match=str(folder)):
                ClipSet.open(folder)


# ---- two runs in one folder ------------------------------------------------------------------------------------------


def _start(clips, out, barrier, results):
    import torch

    torch.set_num_threads(1)
    config = tiny_config("max_steps=2")
    original = runs._locked
    runs._locked = lambda out: (barrier.wait() and None) or original(out)  # both at the folder at the same moment
    try:
        engine.pretrain(clips, out, config, progress=False)
        results.put("trained")
    except engine.RunError as error:
        results.put(str(error))


def test_two_runs_that_start_at_the_same_moment(clips, tmp_path):
    """One trains as if it were alone; the other says why it does not, and leaves nothing behind."""
    alone = engine.pretrain(clips, tmp_path / "alone", tiny_config("max_steps=2"), progress=False)
    context = multiprocessing.get_context("fork" if sys.platform.startswith("linux") else "spawn")
    for attempt in range(3):
        out, barrier, results = tmp_path / f"run{attempt}", context.Barrier(2), context.Queue()
        processes = [context.Process(target=_start, args=(clips, out, barrier, results)) for _ in range(2)]
        for process in processes:
            process.start()
        outcomes = sorted(results.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(120)
        assert outcomes[1] == "trained"
        # The slower one may come when the other is done already: then it finds nothing to do.
        assert outcomes[0] == "trained" or f"another process is training in {out}" in outcomes[0]
        assert_same_run(out, alone)
        files = [sorted(str(path.relative_to(each)) for path in each.rglob("*")) for each in (out, alone)]
        assert files[0] == files[1]


def test_restart_beside_a_run_deletes_nothing(run, clips):
    fcntl = pytest.importorskip("fcntl")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with open(run / ".lock", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(engine.RunError, match="another process is training in"):
            engine.pretrain(clips, run, tiny_config(), restart=True, progress=False)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_file_system_without_locks(run, clips, monkeypatch, capsys):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    assert "has no locks: let no other process train there" in capsys.readouterr().err
    assert engine.load_run(run)[1]["step"] == 4


# ---- lists of differences --------------------------------------------------------------------------------------------


def test_run_of_another_layout_and_modalities_is_refused_with_all_differences(run, tmp_path):
    other = write_clips(tmp_path / "other", layout="ntu-rgb+d")
    config = tiny_config("model.modalities=[joint,bone,motion]", "model.hidden_channels=4")
    before = last(run).read_bytes()
    with pytest.raises(engine.RunError) as refused:
        engine.pretrain(other, run, config, progress=False)
    differences = str(refused.value).partition(": ")[2].partition(". Give the run's own settings")[0].split("; ")
    assert differences[:5] == [
        "model.modalities is ['joint', 'bone', 'motion'], not ['joint', 'motion']",
        "model.hidden_channels is 4, not 2",
        "the layout is 'ntu-rgb+d', not 'nw-ucla'",
        "it has 25 joints, not 20",
        differences[4],
    ]
    assert differences[4].startswith("it has more joints: ")
    assert differences[-1].startswith(f"the clips of {other} are not those of ")
    assert last(run).read_bytes() == before


def test_another_command_is_refused_with_all_differences(run, clips, tmp_path):
    teacher = shutil.copytree(run, tmp_path / "teacher")
    config = tiny_config("seed=8")
    with pytest.raises(engine.RunError, match=r"like this: the command is distill, not pretrain; seed is 8, not 7\."):
        engine.distill(clips, teacher, run, config, progress=False)


def test_teacher_is_refused_with_all_differences(run, tmp_path):
    other = write_clips(tmp_path / "other", layout="ntu-rgb+d")
    config = engine.load_config(
        "cpu-small", (*TINY, "model.queue_size=14", "model.modalities=[joint]", "model.context=false")
    )
    with pytest.raises(engine.RunError) as refused:
        engine.distill(other, run, tmp_path / "student", config, progress=False)
    message = str(refused.value)
    assert message.startswith(f"{run} cannot teach this run: ")
    for part in (
        "model.modalities must be ['joint', 'motion'] as in the teacher, got ['joint']",
        "model.queue_size must be 12 as in the teacher, got 14 (leave the configuration out to take the teacher's)",
        f"data and teacher must have the same skeleton, got ntu-rgb+d (25 joints) in {other} and nw-ucla (20 joints)",
        "it has 25 joints, not 20",
    ):
        assert part in message
    assert not (tmp_path / "student").exists()


def test_weights_of_another_module_are_refused_with_sizes_first(run):
    checkpoint = checkpoints.load(last(run))
    checkpoint["method"].update(queue_size=13, embedding_size=5, modalities=["joint", "bone", "motion"])
    with pytest.raises(CheckpointError) as refused:
        checkpoints.build_method(last(run), checkpoint)
    differences = str(refused.value).partition("modalities joint, bone, motion: ")[2].split("; ")
    assert differences[:3] == [
        "number of modalities is 2, not 3",
        "embedding_size is 4, not 5",
        "queue_size is 12, not 13",
    ]
    assert differences[-1].startswith("and ")
    assert differences[-1].endswith(" more")


def edited(**changes):
    return layouts.from_dict({**layouts.get("nw-ucla").to_dict(), **changes})


def test_differences_between_layouts():
    layout = layouts.get("nw-ucla")
    fields = layout.to_dict()
    assert list_differences(layout, edited(graph_edges=fields["graph_edges"][::-1])) == []
    assert list_differences(edited(center="spine"), layout) == ["its center is spine, not shoulder_center"]
    bones = {**fields["bones"], "head": "spine"}
    assert list_differences(edited(bones=bones), layout) == ["its bones differ at 'head'"]
    joints = fields["joints"][::-1]
    assert list_differences(edited(name="own", joints=joints), layout) == [
        "the layout is 'own', not 'nw-ucla'",
        "its joints are in another order",
    ]
