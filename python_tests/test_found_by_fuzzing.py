"""What fuzz, crash and disk tests found once, each as a plain case."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress

import numpy as np
import pytest
import scipy.io
import torch
import yaml
from engine_helpers import last, tiny_config, write_clips
from skeleton_text import make_lines, make_text

from ikem_fast import _extension, engine, layouts, load_reference
from ikem_fast.archives import check_archive
from ikem_fast.atomic import leftovers
from ikem_fast.data import READERS, ClipSet, DataError, journal, prepare, synthetic
from ikem_fast.data.listing import read_missing_list
from ikem_fast.engine import ConfigError, checkpoints, load_config, run_log
from ikem_fast.engine.checkpoints import CheckpointError
from ikem_fast.evaluation import Scores, load_scores
from ikem_fast.evaluation.scores import ScoresError, save_scores
from ikem_fast.layouts import LayoutError
from ikem_fast.reference import ReferenceCheckpointError
from ikem_fast.yaml_size import check_size

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- recordings and prepared folders ---------------------------------------------------------------------------------


def test_true_is_no_coordinate(tmp_path):
    skeletons = np.zeros((2, 20, 3)).tolist()
    skeletons[1][3][0] = True
    (tmp_path / "a.json").write_text(json.dumps({"skeletons": skeletons}))
    with pytest.raises(ValueError, match=r"'skeletons' must be \(frames, 20, 3\) numbers"):
        READERS["nw-ucla"].read(tmp_path / "a.json", layouts.get("nw-ucla"))


_WITH_COMMA = """
import locale, sys
from ikem_fast import _extension
locale.setlocale(locale.LC_ALL, "de_DE.UTF-8")
assert locale.localeconv()["decimal_point"] == ","
print(_extension.require().parse_skeleton(sys.argv[1], 25, 2, 300)[0][:, 0, 0, 0].tolist())
"""


@pytest.mark.skipif(shutil.which("localedef") is None, reason="needs localedef")
def test_numbers_in_a_process_that_writes_commas(tmp_path):
    """Numbers too small for a double were read up to the point: 1.5e-400 as 1."""
    made = ["localedef", "-i", "de_DE", "-f", "UTF-8", str(tmp_path / "de_DE.UTF-8")]
    if subprocess.run(made, capture_output=True, check=False).returncode:
        pytest.skip("the locale's source is not installed")
    lines, _ = make_lines([1])
    lines[4] = "1.5e-400 -2.5 0.5 0 0 0 0 0 0 0 0 0"
    (tmp_path / "a.skeleton").write_text("\n".join(lines))
    package_folder = str(_extension.PACKAGE_FOLDER.parent)
    environment = {**os.environ, "LOCPATH": str(tmp_path), "PYTHONPATH": package_folder}
    command = [sys.executable, "-c", _WITH_COMMA, str(tmp_path / "a.skeleton")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [0.0, -2.5, 0.5]


def test_numbers_of_thousands_of_digits(tmp_path):
    (tmp_path / "a.json").write_text("9" * 5000)
    with pytest.raises(ValueError, match="not JSON: Exceeds the limit"):
        READERS["nw-ucla"].read(tmp_path / "a.json", layouts.get("nw-ucla"))


def test_matlab_file_on_which_scipy_ends_the_process(tmp_path):
    """An element that claims another type than it has, and more bytes than there are."""
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"d_skel": np.zeros((20, 3, 2))})
    content = bytearray(path.read_bytes())
    for position in range(128, len(content) - 970):
        for value in (0, 0xFF):
            path.write_bytes(content[:position] + bytes([value]) + content[position + 1 :])
            xyz = None
            with suppress(ValueError):
                xyz = READERS["utd-mhad"].read(path, layouts.get("utd-mhad"))
            assert xyz is None or xyz.shape == (3, 2, 20, 1)


def test_names_with_thousands_of_digits(tmp_path):
    name = f"a1_s{'9' * 5000}_t1_skeleton"
    assert READERS["utd-mhad"].parse_name(f"{name}.mat") is None
    (tmp_path / "missing.txt").write_text(name)
    with pytest.raises(DataError, match="holds no sample name"):
        read_missing_list(READERS["utd-mhad"], tmp_path / "missing.txt")


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("clip00,0", "clip00," + "9" * 5000, "line 2: label must have at most 1000 characters, got 5000"),
        (",20,20,", ",99999999999,20,", "line 2: num_frames must be at most 2147483647, got 99999999999"),
        ("clip00,", ",", "line 2: name must be the name of a recording, got ''"),
        ("clip00,", "clip01\0,", r"line 2: name must be .* got 'clip01\\x00'|line contains NUL"),
    ],
)
def test_cells_of_a_table_that_are_far_too_long(tmp_path, old, new, reason):
    folder = write_clips(tmp_path / "clips")
    text = (folder / "samples.csv").read_text()
    (folder / "samples.csv").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=rf"samples\.csv: .*{reason}"):
        ClipSet.open(folder)


@pytest.mark.parametrize("text", [b"(" * 3000, b"{'descr'\0", b"{'descr': '<f4', 'fortran_order': 0, 'shape': (1e9,)}"])
def test_headers_that_numpy_fails_on_in_its_own_ways(tmp_path, text):
    folder = write_clips(tmp_path / "clips")
    header = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text
    (folder / "clips.npy").write_bytes(header + bytes(5000))
    with pytest.raises(DataError, match=r"clips\.npy: truncated or no \.npy file"):
        ClipSet.open(folder)


def test_description_that_is_nested_too_deeply(tmp_path):
    folder = write_clips(tmp_path / "clips")
    (folder / "dataset.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"dataset\.json: not JSON"):
        ClipSet.open(folder)


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(1, 5):
        name = f"S001C001P{number:03d}R001A{number:03d}.skeleton"
        (folder / name).write_text(make_text([1] * number, seed=number))
    return folder


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("dataset.json", {"counts": None}, r"dataset\.json: counts must have train, test, missing, excluded, got None"),
        ("dataset.json", {"counts": {"train": 1.5}}, r"dataset\.json: counts must have train"),
        ("bad_files.csv", b"file,line,reason\na,b,c\n", r"bad_files\.csv: damaged: invalid literal"),
        ("bad_files.csv", b"file,line,reason\na\n", r"bad_files\.csv: damaged: not enough values"),
        ("bad_files.csv", b"\xff", r"bad_files\.csv: damaged"),
    ],
)
def test_finished_folder_that_was_damaged_is_not_summarised(tmp_path, source, name, content, reason):
    out = tmp_path / "out"
    prepare("ntu-rgb+d", source, out)
    if isinstance(content, dict):
        content = json.dumps({**json.loads((out / name).read_text()), **content}).encode()
    (out / name).write_bytes(content)
    with pytest.raises(DataError, match=reason):
        prepare("ntu-rgb+d", source, out)


def test_journal_with_counts_that_are_none(tmp_path, source, monkeypatch):
    """Such a line is not taken for work that is done."""
    out, expected = tmp_path / "out", tmp_path / "expected"
    prepare("ntu-rgb+d", source, expected)
    monkeypatch.setattr(journal, "RECORDINGS_PER_CHECKPOINT", 1)
    stop_after(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        prepare("ntu-rgb+d", source, out, workers=1)
    monkeypatch.undo()
    lines = (out / "progress.jsonl").read_text().splitlines()
    lines[2] = lines[2].replace(", 2, 2,", ', "2", true,')
    (out / "progress.jsonl").write_text("\n".join(lines) + "\n")
    assert prepare("ntu-rgb+d", source, out).num_resumed == 1
    assert (out / "clips.npy").read_bytes() == (expected / "clips.npy").read_bytes()


def stop_after(monkeypatch, number):
    original = journal.ClipWriter.append

    def append(self, outcome, clip):
        if len(self.outcomes) == number:
            raise KeyboardInterrupt
        original(self, outcome, clip)

    monkeypatch.setattr(journal.ClipWriter, "append", append)


def test_going_on_never_empties_the_journal(tmp_path, source, monkeypatch):
    """Killed at any moment of taking up a journal, the next run still has it."""
    out = tmp_path / "out"
    monkeypatch.setattr(journal, "RECORDINGS_PER_CHECKPOINT", 1)
    stop_after(monkeypatch, 3)
    with pytest.raises(KeyboardInterrupt):
        prepare("ntu-rgb+d", source, out, workers=1)
    monkeypatch.undo()
    with open(out / "progress.jsonl", "a") as file:
        file.write("[half a line")
    before = (out / "progress.jsonl").read_bytes()
    writes = []
    original = journal.ClipWriter._keep_lines

    def keep_lines(self, text):
        write = self._journal.write
        self._journal.write = lambda text: writes.append(text) or write(text)
        original(self, text)
        assert (out / "progress.jsonl").read_bytes() == before[: -len("[half a line")]

    with monkeypatch.context() as patch:
        patch.setattr(journal.ClipWriter, "_keep_lines", keep_lines)
        assert prepare("ntu-rgb+d", source, out).num_resumed == 3
    assert len(writes) == 1  # of the one recording that was left


def test_beginnings_of_files_that_a_kill_left_are_removed(tmp_path, source):
    out, expected = tmp_path / "out", tmp_path / "expected"
    prepare("ntu-rgb+d", source, expected)
    out.mkdir()
    for name in ("progress.jsonl", ".samples.csv.abc.tmp", ".dataset.json.x1.tmp", ".bad_files.csv.y2.tmp"):
        (out / name).write_text("")
    assert len(leftovers(out, "samples.csv", "dataset.json")) == 2
    prepare("ntu-rgb+d", source, out)
    assert sorted(os.listdir(out)) == sorted(os.listdir(expected))


def test_synthetic_recordings_that_were_killed_at_their_first_file(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "..synthetic.json.abc.tmp").write_text("{")
    assert synthetic.write(tmp_path / "raw", num_subjects=2, num_repetitions=1, num_cameras=1, num_actions=2) == 4


# ---- layouts and configurations --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("? [a, b]\n: 1\n", "line 1: a key must be a word, got a list"),
        ("name: 2023-13-45\n", "month must be in 1..12"),
        ("[" * 3000, "recursion"),
        ("name: 3\njoints: [a, b, c]\nbones: {}\ncenter: a\nchest_normal: [a, b, c]\n", "name must be text, got 3"),
        ("a: &a [*a]\n", "a value must not contain itself"),
    ],
)
def test_layout_files_that_yaml_fails_on_in_its_own_ways(tmp_path, text, reason):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(LayoutError, match=rf"layout file .*own\.yaml: .*{reason}"):
        layouts.from_yaml(tmp_path / "own.yaml")


def test_layouts_of_thousands_of_joints():
    joints = [f"j{number}" for number in range(1024)]
    chain = dict(zip(joints[1:], joints[:-1], strict=True))
    fields = {"name": "chain", "joints": joints, "bones": chain, "center": "j0", "chest_normal": joints[:3]}
    assert layouts.from_dict(fields).num_joints == 1024
    with pytest.raises(LayoutError, match="joints must be at most 1024, got 1025"):
        layouts.from_dict({**fields, "joints": [*joints, "one more"]})


def test_lines_of_yaml_that_would_fill_the_memory(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    text = "\n".join(lines)
    with pytest.raises(yaml.YAMLError, match="at most 100000 values"):
        check_size(text)
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(LayoutError, match="at most 100000 values"):
        layouts.from_yaml(tmp_path / "own.yaml")
    with pytest.raises(ConfigError, match=r"own\.yaml is no readable YAML file: must have at most 100000 values"):
        load_config(tmp_path / "own.yaml")


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("pretrain.epochs=" + "9" * 5000, "the value is not YAML"),
        ("pretrain.milestones=" + "[" * 3000, "the value is not YAML"),
        ("pretrain.epochs=99999999999999999999", "pretrain.epochs must be at least 1 and below 9.22337e.18"),
        ("linear.milestones=[1, 99999999999999999999]", "linear.milestones must be"),
        ("pretrain.learning_rate=" + "9" * 400, "pretrain.learning_rate must be a number"),
        ("knn.k=[99999999999999999999]", "knn.k must be below 9.22337e.18"),
        ("threads=1000000", "threads must be at least 1 and below 4097"),
        ("timeout_minutes=1e300", "distributed.timeout_minutes must be above 0 and below 1e.06"),
        ("device=???", "device must be text, got '\\?\\?\\?'"),
    ],
)
def test_settings_beyond_all_bounds(override, reason):
    with pytest.raises(ConfigError, match=reason):
        load_config("cpu-small", [override])


def test_text_is_not_taken_for_a_reference_to_other_settings():
    with pytest.raises(ConfigError, match=r"device must be text, got '\$\{seed\}'"):
        load_config({"device": "${seed}"})


def test_names_of_presets_of_thousands_of_letters():
    with pytest.raises(ConfigError, match="unknown preset"):
        load_config("a" * 5000)


# ---- what runs write -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": torch.zeros(0)}, "was not written by this package"),
        ({"format_version": torch.zeros(0)}, "must have format version"),
        ({"kind": "linear"}, "kind must be pretrain or distill, got 'linear'"),
        ({"step": -1}, "step must be a number from 0 on, got -1"),
        ({"epoch": True}, "epoch must be a number from 0 on, got True"),
        ({"seconds": float("nan")}, "seconds must be a number from 0 on, got nan"),
        ({"log_position": 2**70}, "log_position must be a number from 0 on"),
        ({"data": {"folder": 3, "fingerprint": "a"}}, "data must have its folder as text, got 3"),
        ({"optimizer": {}}, "optimizer must have its state"),
        ({"unlogged": [torch.zeros(5)]}, "unlogged must be tensors of 2 values each"),
        ({"unlogged_names": [1]}, "unlogged_names must be text"),
        ({"random_states_of_other_ranks": 3}, "random_states_of_other_ranks must be a list of states"),
        ({"teacher": {"run": 3}}, "teacher must say which run it is"),
    ],
)
def test_checkpoints_with_values_that_cannot_be(tmp_path, run, change, reason):
    torch.save({**checkpoints.load(last(run)), "unlogged_names": ["a", "b"], **change}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=rf"last\.pt .*{reason}"):
        checkpoints.load(tmp_path / "last.pt")


def change_model(checkpoint, name, change):
    model = dict(checkpoint["model"])
    model[name] = change(model[name].clone())
    return {**checkpoint, "model": model}


def with_value(value):
    def change(tensor):
        tensor.view(-1)[0] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("queue", with_value(float("nan")), "queue must be finite"),
        ("queue_pointer", with_value(-1), r"queue_pointer must be a position from 0 to 11, got \[-1\]"),
        ("queue_pointer", with_value(12), r"queue_pointer must be a position from 0 to 11, got \[12\]"),
        ("queue", torch.Tensor.int, "queue must be torch.float32, got torch.int32"),
        ("queue", lambda tensor: "none", "queue must be a tensor, got str"),
        (
            "queue",
            lambda tensor: tensor[:, :, :-1],
            r"queue_size is 11, not 12; queue must be \(2, 4, 12\), got",
        ),
    ],
)
def test_weights_that_cannot_be(run, name, change, reason):
    checkpoint = change_model(checkpoints.load(last(run)), name, change)
    with pytest.raises(CheckpointError, match=rf"weights in checkpoint .*last\.pt are not those of IKEM .*: {reason}"):
        checkpoints.build_method(last(run), checkpoint)


def test_sizes_that_would_fill_the_memory(run):
    checkpoint = checkpoints.load(last(run))
    checkpoint["method"]["queue_size"] = 10**12
    with pytest.raises(CheckpointError, match="queue_size is 1000000000000, but no tensor has a dimension above"):
        checkpoints.build_method(last(run), checkpoint)


@pytest.mark.parametrize(
    ("part", "change", "reason"),
    [
        ("random_state", {"torch": torch.zeros(3, dtype=torch.uint8)}, "its random state: "),
        ("random_state", {"numpy": None}, "its random state: "),
        (
            "optimizer",
            {"state": {0: {"momentum_buffer": torch.zeros(1)}}},
            "its state of the optimiser: the momentum",
        ),
        ("config", {"pretrain": {"epochz": 3}}, "its configuration: .*unknown key 'pretrain.epochz'"),
    ],
)
def test_parts_of_a_checkpoint_that_a_run_cannot_go_on_from(run, clips, part, change, reason):
    checkpoint = checkpoints.load(last(run))
    torch.save({**checkpoint, part: {**checkpoint[part], **change}}, last(run))
    before = last(run).read_bytes()
    with pytest.raises(CheckpointError, match=rf"last\.pt cannot be used: {reason}"):
        engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False)
    assert last(run).read_bytes() == before


def test_compressed_checkpoints_are_refused(tmp_path, run):
    """Reading one could take any amount of memory."""
    import zipfile

    with zipfile.ZipFile(last(run)) as old, zipfile.ZipFile(tmp_path / "last.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    with pytest.raises(CheckpointError, match="is compressed"):
        checkpoints.load(tmp_path / "last.pt")
    check_archive(tmp_path / "last.pt", compressed=True)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[" * 100_000, "damaged: .*recursion"),
        ("{", "damaged: "),
        ("[]", "must be an object whose kind is one of train, knn, note"),
        ('{"kind": []}', "must be an object whose kind is one of"),
        ('{"kind": "note", "epoch": 1, "step": true, "text": "a"}', "step must be a whole number, got True"),
        ('{"kind": "knn", "epoch": 1, "step": 2, "accuracy": {"a": NaN}}', "accuracy must be numbers by name"),
    ],
)
def test_damaged_lines_of_a_log(tmp_path, line, reason):
    (tmp_path / "log.jsonl").write_text('{"kind": "note", "epoch": 1, "step": 2, "text": "a"}\n' + line + "\n")
    with pytest.raises(engine.LogError, match=rf"log\.jsonl: line 2: .*{reason}"):
        list(engine.read_log(tmp_path))
    with pytest.raises(engine.LogError, match=r"cannot read .*none/log\.jsonl: No such file"):
        list(engine.read_log(tmp_path / "none"))


def test_full_disk_does_not_make_tensorboard_print(tmp_path, monkeypatch, capsys):
    """Its thread hands the error over; without this it also prints it, with a traceback."""
    log = run_log.RunLog(tmp_path)
    hook = threading.excepthook
    note = {"kind": "note", "epoch": 1, "step": 1, "text": "a"}
    log.write(note)
    log.position()
    record_writer = "tensorboard.summary.writer.record_writer.RecordWriter.write"

    def refuse(*_):
        raise OSError(28, os.strerror(28))

    def go_on():
        for _ in range(3):
            log.write(note)
            log.position()

    monkeypatch.setattr(record_writer, refuse)
    with pytest.raises(engine.LogError, match=r"cannot write .*: No space left on device"):
        go_on()
    log.close()
    assert "Traceback" not in capsys.readouterr().err
    assert threading.excepthook is not hook


def test_events_are_handed_over_with_the_checkpoint(tmp_path):
    """A killed process would take along those of the last two minutes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = run_log.RunLog(tmp_path)
    log.write({"kind": "knn", "epoch": 1, "step": 1, "accuracy": {"joint": 0.5}})
    log.write({"kind": "knn", "epoch": 2, "step": 2, "accuracy": {"joint": 0.6}})
    log.position()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("knn/joint")] == [1, 2]
    log.close()


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"sample_names": np.array("ab")}, r"sample_names must be \(N,\) names, got \(\)"),
        ({"sample_names": np.array(["a", "a"])}, "sample_names must be distinct"),
        ({"labels": np.array([0.0, 1.0])}, "labels must be int64"),
        ({"labels": np.array([0, 3])}, "labels must be classes of all, 0 to 2, got 0 to 3"),
        ({"all": np.full((2, 3), np.nan)}, "all must be finite numbers with a row for each of the 2 names"),
        ({"all": np.zeros((3, 3))}, "all must be finite numbers with a row for each of the 2 names"),
        ({"all": np.zeros((2, 3), dtype=complex)}, "all must be finite numbers"),
    ],
)
def test_scores_that_cannot_be(tmp_path, arrays, reason):
    whole = {"sample_names": np.array(["a", "b"]), "labels": np.array([0, 1]), "all": np.zeros((2, 3))}
    np.savez(tmp_path / "scores.npz", **{**whole, **arrays})
    with pytest.raises(ScoresError, match=rf"scores\.npz: {reason}"):
        load_scores(tmp_path / "scores.npz")


def test_archives_whose_directory_swallowed_members(tmp_path):
    """A single bit, of which there is no checksum, left scores out without a word."""
    path = tmp_path / "scores.npz"
    logits = {f"student/{name}": np.eye(3, dtype=np.float32) for name in ("joint", "motion", "all")}
    save_scores(path, Scores(("a", "b", "c"), np.arange(3), logits))
    content = bytearray(path.read_bytes())
    first = content.index(b"PK\x01\x02")
    second = content.index(b"PK\x01\x02", first + 1)
    third = content.index(b"PK\x01\x02", second + 1)
    content[first + 32] = third - second  # length of a comment, which is the second entry now
    path.write_bytes(content)
    with pytest.raises(ScoresError, match=r"its directory lists 4 members, and must list 5 different ones"):
        load_scores(path)


def test_released_checkpoints_with_values_that_cannot_be(tmp_path):
    from reference_vectors import checkpoint

    state = checkpoint("cross_reference_checkpoint.pt")
    state["queue"][0, 0] = float("nan")
    with pytest.raises(ReferenceCheckpointError, match="queue must be finite"):
        load_reference(state)
    torch.save(state, tmp_path / "released.pt")
    content = bytearray((tmp_path / "released.pt").read_bytes())
    position = content.find(state["queue_motion"].numpy().tobytes())
    content[position] ^= 1
    (tmp_path / "released.pt").write_bytes(content)
    with pytest.raises(ReferenceCheckpointError, match=r"released\.pt: not a readable checkpoint: the checksum of"):
        load_reference(tmp_path / "released.pt")
