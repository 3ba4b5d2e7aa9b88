"""Prepared folders, whole and half done, damaged in every way: read right, mended, or refused with a reason."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct

import numpy as np
import pytest

pytest.importorskip("hypothesis")

from engine_helpers import write_clips
from fuzzing import changed, damaged, digest, nothing_written, odd_numbers, odd_words, outcome, share_of_cases
from hypothesis import given
from hypothesis import strategies as st
from skeleton_text import make_text

from ikem_fast.data import ClipSet, journal, open_source, prepare

# So that journals have several lines on the disk before the end.
EVERY = 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = write_clips(tmp_path_factory.mktemp("whole") / "clips", num_train=3)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_folder(folder, files):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)


def use(folder, files):
    """Opens a folder of these files and reads all of its clips, through the memory map and by system calls."""
    write_folder(folder, files)

    def read():
        clip_set = ClipSet.open(folder)
        batch = clip_set.batch(np.arange(len(clip_set)))
        source = open_source(clip_set, place="stream", device="cpu")
        (streamed,) = source.batches([np.arange(len(clip_set))])
        return clip_set, batch, streamed

    with nothing_written(folder):
        result, error = outcome(read, names=folder)
    if error is not None:
        return None
    clip_set, batch, streamed = result
    assert np.array_equal(batch.clips.numpy(), streamed.clips.numpy())
    assert batch.clips.isfinite().all()
    assert np.array_equal(batch.clips.numpy(), np.load(folder / "clips.npy"))
    assert len(clip_set) == len(set(clip_set.names)) == len(clip_set.clips)
    assert all(clip_set.names)
    assert clip_set.labels.min() >= 0
    assert clip_set.labels.max() < clip_set.num_classes
    assert (clip_set.valid_frames >= 1).all()
    assert (clip_set.valid_frames <= clip_set.num_frames).all()
    assert set(clip_set.splits) <= {"train", "test"}
    # Read from the table itself, by another route.
    rows = list(csv.reader(io.StringIO((folder / "samples.csv").read_bytes().decode(), newline="")))[1:]
    assert [row[0] for row in rows] == clip_set.names
    assert [[int(row[column]) for column in (1, 6, 7)] for row in rows] == np.stack(
        [clip_set.labels, clip_set.num_frames, clip_set.valid_frames], axis=1
    ).tolist()
    assert [row[8] for row in rows] == clip_set.splits.tolist()
    return clip_set


@given(data=st.data())
@pytest.mark.parametrize("name", ["clips.npy", "samples.csv", "dataset.json"])
def test_damaged_files(tmp_path, whole, name, data):
    # Of the clips mostly the header, where nearly every byte has a meaning.
    if name == "clips.npy" and data.draw(st.booleans()):
        content = data.draw(damaged(whole[name][:128])) + whole[name][128:]
    else:
        content = data.draw(damaged(whole[name]))
    use(tmp_path / "clips", {**whole, name: content})


@given(data=st.data())
def test_descriptions_with_other_values(tmp_path, whole, data):
    metadata = data.draw(changed(json.loads(whole["dataset.json"])))
    use(tmp_path / "clips", {**whole, "dataset.json": json.dumps(metadata).encode()})


@given(data=st.data())
def test_tables_with_other_cells(tmp_path, whole, data):
    rows = list(csv.reader(io.StringIO(whole["samples.csv"].decode())))
    cell = st.one_of(odd_words, st.integers().map(str), st.integers(0, 30).map(str), st.just("9" * 5000))
    for _ in range(data.draw(st.integers(1, 3))):
        row = data.draw(st.integers(0, len(rows) - 1))
        column = data.draw(st.integers(0, len(rows[row]) - 1)) if rows[row] else 0
        match data.draw(st.sampled_from(("cell", "cell", "cell", "row", "drop row", "column", "drop column", "order"))):
            case "cell" if rows[row]:
                rows[row][column] = data.draw(cell)
            case "row":
                rows.insert(row, list(rows[row]))
            case "drop row" if len(rows) > 1:
                del rows[row]
            case "column":
                rows = [[*cells[:column], *cells[column : column + 1], *cells[column:]] for cells in rows]
            case "drop column":
                rows = [[*cells[:column], *cells[column + 1 :]] for cells in rows]
            case "order":
                rows = [cells[::-1] for cells in rows]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    use(tmp_path / "clips", {**whole, "samples.csv": text.getvalue().encode("utf-8", "surrogatepass")})


@st.composite
def npy_headers(draw):
    """Headers of .npy files with odd shapes and types, or with anything in their place."""
    shape = draw(st.lists(odd_numbers | st.sampled_from((3, 8, 12, 20)), max_size=6).map(tuple))
    shape = draw(st.sampled_from(((8, 3, 12, 20, 1), shape, shape)))
    kinds = ("<f4", ">f4", "<f8", "<i4", "|O", "<f2", "|S4", "<c8", "|V4", "nonsense", [("a", "<f4")], ("<f4", (2,)))
    fields = {
        "descr": draw(st.sampled_from(kinds) | odd_words),
        "fortran_order": draw(st.sampled_from((False, False, True, 0, "no"))),
        "shape": shape,
    }
    text = repr(draw(changed(fields)) if draw(st.booleans()) else fields).encode("utf-8", "surrogatepass")
    if draw(st.integers(0, 4)) == 0:
        text = draw(st.binary(max_size=100) | st.sampled_from((b"(" * 3000, b"__import__('os').getcwd()", b"{")))
    version = draw(st.sampled_from(((1, 0), (2, 0), (3, 0), (9, 9))))
    length = len(text) + draw(st.sampled_from((0, 0, 0, 1, -1, 10**4)))
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H" if version == (1, 0) else "<I", max(0, length)) + text


@given(header=npy_headers())
@pytest.mark.filterwarnings("ignore")  # numpy's, of headers that old versions wrote
def test_clips_of_other_shapes_and_types(tmp_path, whole, header):
    use(tmp_path / "clips", {**whole, "clips.npy": header + whole["clips.npy"][128:]})


@given(
    position=st.integers(0, 8 * 3 * 12 * 20 - 1), value=st.floats(width=32) | st.sampled_from((np.nan, np.inf, -np.inf))
)
def test_odd_coordinates(tmp_path, whole, position, value):
    clips = np.frombuffer(whole["clips.npy"][128:], dtype="<f4").copy()
    clips[position] = value
    clip_set = use(tmp_path / "clips", {**whole, "clips.npy": whole["clips.npy"][:128] + clips.tobytes()})
    assert (clip_set is None) == (not np.isfinite(value))


# ---- half-done folders -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    for number in range(1, 6):
        name = f"S001C001P{number:03d}R001A{number:03d}.skeleton"
        (folder / name).write_text(make_text([1] * number, seed=number))
    return folder


@pytest.fixture(scope="module")
def made_at_once(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "clips"
    prepare("ntu-rgb+d", source, out, num_frames=4, workers=1)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def begun(source, tmp_path_factory):
    """What a preparation that ends after its fourth recording leaves behind."""
    out = tmp_path_factory.mktemp("begun") / "clips"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "RECORDINGS_PER_CHECKPOINT", EVERY)
        original = journal.ClipWriter.append

        def append(self, outcome, clip):
            if len(self.outcomes) == 4:
                raise KeyboardInterrupt
            original(self, outcome, clip)

        patch.setattr(journal.ClipWriter, "append", append)
        with pytest.raises(KeyboardInterrupt):
            prepare("ntu-rgb+d", source, out, num_frames=4, workers=1)
    return {path.name: path.read_bytes() for path in out.iterdir()}


@share_of_cases(0.5)
@given(data=st.data())
def test_journals_that_were_cut_off_lose_nothing(tmp_path, source, made_at_once, begun, data):
    """A killed process or a power failure cuts both files, the clips after what the journal says of them."""
    entries = begun["progress.jsonl"]
    entries = entries[: data.draw(st.integers(0, len(entries)))]
    clips = begun["clips.npy.partial"]
    clip_bytes = (len(clips) - 128) // 4
    kept = 128 + clip_bytes * max(0, entries.count(b"\n") - 1)
    clips = clips[: data.draw(st.integers(kept, len(clips)))]
    zeros = [bytes(data.draw(st.sampled_from((0, 0, 7, 5000)))) for _ in range(2)]
    out = tmp_path / "out"
    write_folder(out, {"progress.jsonl": entries + zeros[0], "clips.npy.partial": clips + zeros[1]})
    summary = prepare("ntu-rgb+d", source, out, num_frames=4, workers=1)
    assert summary.num_resumed == max(0, entries.count(b"\n") - 1)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == made_at_once


@share_of_cases(0.5)
@given(data=st.data())
def test_damaged_journals(tmp_path, source, made_at_once, begun, data):
    """They are no more than a note of what is done: whatever they say, no wrong folder comes of it unnoticed."""
    out = tmp_path / "out"
    write_folder(out, {**begun, "progress.jsonl": data.draw(damaged(begun["progress.jsonl"]))})
    before = digest(source)
    _, error = outcome(lambda: prepare("ntu-rgb+d", source, out, num_frames=4, workers=1), names=out)
    assert digest(source) == before
    if error is None:
        outcome(lambda: ClipSet.open(out), names=out)
        assert set(made_at_once) == {path.name for path in out.iterdir()}


@share_of_cases(0.5)
@given(data=st.data())
def test_finished_folders_that_were_damaged(tmp_path, source, made_at_once, data):
    out = tmp_path / "out"
    name = data.draw(st.sampled_from(("dataset.json", "bad_files.csv")))
    write_folder(out, {**made_at_once, name: data.draw(damaged(made_at_once[name]))})
    with nothing_written(out):
        outcome(lambda: prepare("ntu-rgb+d", source, out, num_frames=4, workers=1), names=out)
