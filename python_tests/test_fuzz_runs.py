"""What a run writes, damaged in every way: checkpoints, logs, scores, and checkpoints of the authors' release."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pytest

pytest.importorskip("hypothesis")

import torch
from engine_helpers import tiny_config
from fuzzing import changed, damaged, nothing_written, odd_scalars, odd_values, outcome, share_of_cases
from hypothesis import given
from hypothesis import strategies as st
from reference_vectors import FOLDER as REFERENCE_FOLDER

from ikem_fast import engine, load_reference
from ikem_fast.engine import checkpoints
from ikem_fast.evaluation import Scores, load_scores
from ikem_fast.evaluation.scores import save_scores
from ikem_fast.reference import to_reference

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return engine.pretrain(clips, folder, tiny_config("max_steps=3"), progress=False)


@pytest.fixture(scope="module")
def content(finished):
    """The bytes of a checkpoint."""
    return (finished / "checkpoints" / "last.pt").read_bytes()


@pytest.fixture(scope="module")
def complete(finished):
    return checkpoints.load(finished / "checkpoints" / "last.pt")


@pytest.fixture
def executed(tmp_path, monkeypatch):
    """A file that code in a pickle would make."""
    return tmp_path / "executed"


class Code:
    """Pickled, it makes a file as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


odd_tensors = st.sampled_from(
    (
        torch.zeros(0), torch.zeros(3), torch.ones(2, 3, dtype=torch.float64), torch.full((4,), torch.nan),
        torch.zeros(2, dtype=torch.int64), torch.zeros(2, dtype=torch.complex64), torch.tensor(True),
        torch.zeros(3, dtype=torch.bfloat16), torch.zeros(2, 2).to_sparse(), torch.empty(3, device="meta"),
        torch.zeros(10, dtype=torch.uint8),
    )
)  # fmt: skip


@st.composite
def changed_tensor(draw, tensor):
    """A tensor of another shape or type, or with one other value."""
    match draw(st.sampled_from(("value", "shape", "type", "whole"))):
        case "value" if tensor.numel():
            tensor = tensor.clone()
            value = draw(st.sampled_from((0.0, 1.0, -1.0, 1e30, torch.nan, torch.inf, 2.0**40)))
            if not tensor.is_floating_point():
                value = draw(st.sampled_from((0, 1, -1, 10**6)))
            tensor.view(-1)[draw(st.integers(0, tensor.numel() - 1))] = value
            return tensor
        case "shape" if tensor.dim():
            return draw(
                st.sampled_from((tensor[:-1], tensor[None], tensor.flatten(), tensor.transpose(0, -1), tensor[0]))
            )
        case "type":
            return tensor.to(draw(st.sampled_from((torch.float64, torch.float16, torch.int64, torch.complex64))))
    return draw(odd_tensors)


@st.composite
def changed_checkpoint(draw, complete):
    """A checkpoint with an entry left out or of another type, shape or value."""
    if draw(st.booleans()):
        part = draw(st.sampled_from(("model", "optimizer", "unlogged", "random_state")))
        inner = complete[part]
        if part == "model":
            name = draw(st.sampled_from(sorted(inner)))
            match draw(st.sampled_from(("tensor", "tensor", "remove", "add", "swap"))):
                case "tensor":
                    inner = {**inner, name: draw(changed_tensor(inner[name]))}
                case "remove":
                    inner = {key: value for key, value in inner.items() if key != name}
                case "add":
                    inner = {**inner, "more": inner[name]}
                case "swap":
                    inner = {**inner, name: inner[draw(st.sampled_from(sorted(inner)))]}
            return {**complete, part: inner}
        return {**complete, part: draw(changed(inner, st.one_of(odd_values, odd_tensors)))}
    result = complete
    for _ in range(draw(st.integers(1, 2))):
        result = draw(changed(result, st.one_of(odd_values, odd_tensors)))
        if not isinstance(result, dict):
            break
    return result


def load_and_use(path):
    """What a user may do with a checkpoint that loads."""
    checkpoint = checkpoints.load(path)
    method = checkpoints.build_method(path, checkpoint)
    assert all(bool(tensor.isfinite().all()) for tensor in method.state_dict().values() if tensor.is_floating_point())
    return checkpoint


@given(data=st.data())
def test_damaged_checkpoints(tmp_path, content, complete, data):
    path = tmp_path / "last.pt"
    path.write_bytes(data.draw(damaged(content)))
    with nothing_written(tmp_path):
        checkpoint, _ = outcome(lambda: load_and_use(path), names=path)
    if checkpoint is not None:
        # A byte of no meaning, such as the date of a member: everything else must be the same.
        assert describe(checkpoint) == describe(complete)


def describe(value):
    """Nested values of tensors in a form that can be compared."""
    if isinstance(value, dict):
        return {key: describe(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [describe(inner) for inner in value]
    if isinstance(value, torch.Tensor):
        return (str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    return value


@share_of_cases(0.5)
@given(data=st.data())
def test_checkpoints_with_other_entries(tmp_path, complete, data):
    path = tmp_path / "last.pt"
    try:
        torch.save(data.draw(changed_checkpoint(complete)), path)
    except (NotImplementedError, UnicodeEncodeError):
        return  # torch does not write it either
    with nothing_written(tmp_path):
        outcome(lambda: load_and_use(path), names=path)


@share_of_cases(0.25)
@given(data=st.data())
def test_going_on_from_checkpoints_with_other_entries(tmp_path, finished, clips, complete, data):
    """Whatever a checkpoint holds, a run either says why it cannot go on, or goes on and ends with a good one."""
    run = tmp_path / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(finished, run)
    (run / "checkpoints" / "previous.pt").unlink()
    path = run / "checkpoints" / "last.pt"
    try:
        torch.save(data.draw(changed_checkpoint(complete)), path)
    except (NotImplementedError, UnicodeEncodeError):
        return
    before = path.read_bytes()
    _, error = outcome(lambda: engine.pretrain(clips, run, tiny_config("max_steps=4"), progress=False))
    if error is None:
        assert load_and_use(path)["step"] >= 4
        list(engine.read_log(run))
    else:
        assert path.read_bytes() == before


@pytest.mark.filterwarnings("ignore")  # torch's, of pickles and scripts
@given(data=st.data())
def test_archives_of_other_things(tmp_path, content, executed, data):
    """Nothing in a file is ever executed, whatever kind of file it is and wherever in it the code stands."""
    path = tmp_path / "last.pt"
    code = Code(executed)
    kind = data.draw(st.sampled_from(("pickle", "torch", "legacy", "entry", "member", "zip", "npz", "script", "bytes")))
    if kind == "pickle":
        path.write_bytes(pickle.dumps(code, protocol=data.draw(st.integers(0, 5))))
    elif kind in ("torch", "legacy"):
        value = data.draw(st.sampled_from((code, [code], {"format": checkpoints.FORMAT, "model": code})))
        torch.save(value, path, _use_new_zipfile_serialization=kind == "torch")
    elif kind in ("entry", "member"):
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        name = data.draw(st.sampled_from(sorted(members)))
        other = pickle.dumps(code, protocol=2) if kind == "entry" else data.draw(damaged(members[name]))
        with zipfile.ZipFile(path, "w", data.draw(st.sampled_from((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)))) as file:
            for member in members:
                file.writestr(member, other if member == name else members[member])
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr(data.draw(st.sampled_from(("a.txt", "archive/data.pkl", "archive/version"))), b"1")
    elif kind == "npz":
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
    elif kind == "script":
        torch.jit.script(torch.nn.Identity()).save(path)
    else:
        path.write_bytes(data.draw(st.binary(max_size=100)))
    for read in (load_and_use, load_reference):
        outcome(lambda read=read: read(path), names=path if read is load_and_use else None)
    assert not executed.exists()


# ---- logs ------------------------------------------------------------------------------------------------------------


@given(data=st.data())
def test_logs(tmp_path, finished, data):
    lines = (finished / "log.jsonl").read_text().splitlines()
    if data.draw(st.booleans()):
        number = data.draw(st.integers(0, len(lines) - 1))
        lines[number] = json.dumps(data.draw(changed(json.loads(lines[number]))))
        written = ("\n".join(lines) + "\n").encode()
    else:
        written = data.draw(damaged((finished / "log.jsonl").read_bytes()))
    (tmp_path / "log.jsonl").write_bytes(written)
    with nothing_written(tmp_path):
        read, _ = outcome(lambda: list(engine.read_log(tmp_path)), names=tmp_path / "log.jsonl")
    for line in read or ():
        assert line["kind"] in ("train", "knn", "note")
        assert line["step"] >= 0
        for values in (line.get("losses", {}), line.get("accuracy", {})):
            assert all(np.isfinite(value) for value in values.values())


# ---- scores ----------------------------------------------------------------------------------------------------------


def some_scores():
    logits = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    return Scores(("a", "b", "c", "d"), np.array([0, 1, 2, 1]), {"student/joint": logits, "student/all": -logits})


def same_scores(one, other):
    return (
        one.sample_names == other.sample_names
        and np.array_equal(one.labels, other.labels)
        and one.logits.keys() == other.logits.keys()
        and all(np.array_equal(logits, other.logits[name]) for name, logits in one.logits.items())
    )


@given(data=st.data())
def test_damaged_scores(tmp_path, data):
    path = tmp_path / "scores.npz"
    save_scores(path, some_scores())
    path.write_bytes(data.draw(damaged(path.read_bytes())))
    with nothing_written(tmp_path):
        scores, _ = outcome(lambda: load_scores(path), names=path)
    assert scores is None or same_scores(scores, some_scores())


odd_arrays = st.one_of(
    odd_scalars.map(lambda value: np.array(value, dtype=object if isinstance(value, str | None.__class__) else None)),
    st.sampled_from(
        (
            np.zeros(4), np.zeros((4, 3)), np.zeros((4, 3, 1)), np.zeros((4, 0)), np.zeros((3, 3)),
            np.full((4, 3), np.nan),
            np.array(["a", "b", "c", "c"]), np.array(["a"] * 4, dtype=object), np.arange(4.0), np.arange(4) - 1,
            np.zeros((4, 3), complex), np.zeros((4, 3), "M8[s]"), np.zeros(4, [("x", "f4")]), np.array("abcd"),
        )
    ),
)  # fmt: skip


@given(data=st.data())
def test_scores_with_other_arrays(tmp_path, data):
    scores = some_scores()
    arrays = {"sample_names": np.array(scores.sample_names), "labels": scores.labels, **scores.logits}
    name = data.draw(st.sampled_from(sorted(arrays)))
    arrays[name] = data.draw(odd_arrays)
    if data.draw(st.booleans()):
        del arrays[name]
    path = tmp_path / "scores.npz"
    np.savez(path, **arrays)
    with nothing_written(tmp_path):
        read, _ = outcome(lambda: load_scores(path), names=path)
    if read is not None:
        assert len(set(read.sample_names)) == len(read.labels)
        for logits in read.logits.values():
            assert logits.shape[0] == len(read.labels)
            assert np.isfinite(logits).all()
            assert read.labels.min() >= 0
            assert read.labels.max() < logits.shape[1]


# ---- checkpoints of the authors' release -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    return torch.load(REFERENCE_FOLDER / "cross_reference_checkpoint.pt", weights_only=True)


@share_of_cases(0.5)
@given(data=st.data())
def test_damaged_released_checkpoints(tmp_path, data):
    path = tmp_path / "released.pt"
    path.write_bytes(data.draw(damaged((REFERENCE_FOLDER / "cross_reference_checkpoint.pt").read_bytes())))
    with nothing_written(tmp_path):
        outcome(lambda: load_reference(path))


@share_of_cases(0.25)
@given(data=st.data())
def test_released_checkpoints_with_other_entries(released, data):
    state = dict(released)
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(sorted(state)))
        match data.draw(st.sampled_from(("tensor", "tensor", "value", "remove", "rename"))):
            case "tensor":
                state[name] = data.draw(changed_tensor(state[name])) if isinstance(state[name], torch.Tensor) else 0
            case "value":
                state[name] = data.draw(odd_values)
            case "remove":
                del state[name]
            case "rename":
                state[data.draw(st.sampled_from(("encoder_q", "queue_ptr", "encoder_k.A", "more")))] = state.pop(name)
    module, _ = outcome(lambda: load_reference(state))
    if module is not None:
        written = to_reference(module)
        assert set(written) == set(state)
        assert all(torch.equal(written[key].double(), state[key].double()) for key in state)
