"""Recordings, their names and lists of them, damaged in every way: read right or refused with a reason."""

from __future__ import annotations

import io
import json
import string

import numpy as np
import pytest

pytest.importorskip("hypothesis")

import scipy.io
from fuzzing import changed, damaged, nothing_written, odd_scalars, odd_words, outcome, share_of_cases
from hypothesis import given
from hypothesis import strategies as st
from skeleton_text import make_text

from ikem_fast import layouts
from ikem_fast.data import READERS
from ikem_fast.data.listing import read_missing_list
from ikem_fast.data.preprocess import prepare_clip

NTU = make_text([1, 0, 2, 3]).encode()
UCLA = {"file_name": "a", "skeletons": np.random.default_rng(0).normal(size=(3, 20, 3)).round(4).tolist(), "label": 1}


def mat_bytes(*frames, **options):
    file = io.BytesIO()
    scipy.io.savemat(file, {"d_skel": np.random.default_rng(0).normal(size=(20, 3, *frames))}, **options)
    return file.getvalue()


MAT_FILES = (mat_bytes(4), mat_bytes(4, do_compression=True), mat_bytes())


def read(kind, path, content, *, folder):
    """A recording of one's kind from some bytes, or None where it is refused; then also as a clip."""
    path.write_bytes(content)
    layout = layouts.get(READERS[kind].layout)
    with nothing_written(folder):
        xyz, _ = outcome(lambda: READERS[kind].read(path, layout))
    if xyz is not None:
        num_persons = READERS[kind].num_persons
        assert xyz.dtype == np.float64
        assert (xyz.shape[0], *xyz.shape[2:]) == (3, layout.num_joints, num_persons)
        assert xyz.shape[1] >= 1
        assert np.isfinite(xyz).all()
        made, _ = outcome(lambda: prepare_clip(xyz, layout, 8))
        if made is not None:
            assert np.isfinite(made[0]).all()
            assert 1 <= made[1] <= xyz.shape[1]
    return xyz


def parse_plainly(content):
    """The coordinates of the first two bodies in an NTU text without mistakes."""
    lines = iter(content.decode("latin-1").split("\n"))
    xyz = np.zeros((3, int(next(lines)), 25, 2))
    for frame in range(xyz.shape[1]):
        for body in range(int(next(lines))):
            next(lines)
            for joint in range(int(next(lines))):
                words = next(lines).replace("\t", " ").replace("\r", " ").split(" ")
                if body < 2:
                    xyz[:, frame, joint, body] = [float(word) for word in words if word][:3]
    return xyz


@st.composite
def ntu_texts(draw):
    """An NTU file with some words replaced by odd ones, or with damaged bytes."""
    if draw(st.booleans()):
        return draw(damaged(NTU))
    lines = NTU.decode().split("\n")
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.integers(0, len(lines) - 1))
        words = lines[number].split(" ")
        word = draw(
            st.one_of(odd_words, odd_scalars.map(_as_text), st.text(alphabet=string.digits + "+-.eEinf", max_size=12))
        )
        words[draw(st.integers(0, len(words) - 1))] = word
        lines[number] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _as_text(value):
    return str(float(value)) if isinstance(value, int) and abs(value) < 2**64 else repr(value)[:40]


@given(content=ntu_texts())
def test_ntu_text(tmp_path, content):
    xyz = read("ntu-rgb+d", tmp_path / "a.skeleton", content, folder=tmp_path)
    if xyz is not None:
        np.testing.assert_array_equal(xyz, parse_plainly(content))


@given(content=st.one_of(damaged(json.dumps(UCLA).encode()), changed(UCLA).map(lambda tree: json.dumps(tree).encode())))
def test_nw_ucla_json(tmp_path, content):
    xyz = read("nw-ucla", tmp_path / "a.json", content, folder=tmp_path)
    if xyz is not None:
        frames = json.loads(content)["skeletons"]
        numbers = [value for frame in frames for joint in frame for value in joint]
        assert {type(number) for number in numbers} <= {int, float}
        np.testing.assert_array_equal(xyz[..., 0].transpose(1, 2, 0).ravel(), [float(number) for number in numbers])


@given(content=st.sampled_from(MAT_FILES).flatmap(damaged))
def test_utd_mhad_mat(tmp_path, content):
    read("utd-mhad", tmp_path / "a.mat", content, folder=tmp_path)


@pytest.mark.parametrize("kind", READERS)
@share_of_cases(0.5)
@given(data=st.data())
def test_bytes_of_any_kind(tmp_path, kind, data):
    content = data.draw(
        st.one_of(st.binary(max_size=200), st.sampled_from((NTU, *MAT_FILES, json.dumps(UCLA).encode())))
    )
    read(kind, tmp_path / "file", content, folder=tmp_path)


_digits = st.text(alphabet=string.digits, max_size=5) | st.sampled_from(("001", "01", "1", "٣", "9" * 5000))


@st.composite
def file_names(draw):
    """Names that are nearly those of recordings."""
    forms = ("S{}C{}P{}R{}A{}.skeleton", "a{}_s{}_e{}_v{}.json", "a{}_s{}_t{}_skeleton.mat")
    form = draw(st.sampled_from(forms))
    name = form.format(*(draw(_digits) for _ in range(form.count("{}"))))
    return name + draw(st.sampled_from(("", "", "\n", " ", ".skeleton"))) if draw(st.booleans()) else name


@pytest.mark.parametrize("kind", READERS)
@given(name=st.one_of(file_names(), st.text(max_size=30)))
def test_file_names(kind, name):
    reader = READERS[kind]
    sample, error = outcome(lambda: reader.parse_name(name))
    assert error is None
    if sample is not None:
        assert sample.name + reader.suffix == name
        assert all(0 <= sample.label < max(len(p.class_names) for p in reader.protocols.values()) for _ in (0,))
        assert all(isinstance(protocol.is_training(sample), bool) for protocol in reader.protocols.values())


@given(
    lines=st.lists(
        st.one_of(file_names(), file_names().map(lambda name: name.rpartition(".")[0]), odd_words), max_size=6
    ),
    tail=st.binary(max_size=4),
)
def test_lists_of_missing_recordings(tmp_path, lines, tail):
    path = tmp_path / "missing.txt"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass") + tail)
    for reader in READERS.values():
        with nothing_written(tmp_path):
            names, _ = outcome(lambda reader=reader: read_missing_list(reader, path), names=path)
        if names is not None:
            assert names
            assert all(reader.parse_name(name + reader.suffix).name == name for name in names)
