"""Stored clips on the device and streamed from the file: the same clips, and what is said where they cannot be had."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import threading
import weakref

import engine_helpers
import numpy as np
import pytest
import torch

from ikem_fast.data import ClipSet, DataError, ResidentClips, StreamingClips, clip_file, memory, open_source, sources
from ikem_fast.ops import AugmentationConfig, clip_views, draw_views

DTYPES = [torch.float32, torch.float16]
PLACES = ["resident", "stream"]
SHAPE = (14, 3, 12, 25, 2)
CLIP_BYTES = 3 * 12 * 25 * 2 * 4


@pytest.fixture
def folder(tmp_path):
    """Clips of two persons, every third of them in the test split."""
    folder = engine_helpers.write_clips(tmp_path / "clips", layout="ntu-rgb+d")
    save(folder, np.random.default_rng(1).standard_normal(SHAPE, dtype=np.float32))
    table = (folder / "samples.csv").read_text().replace(",test", ",train").splitlines()
    table[3::3] = [line.replace(",train", ",test") for line in table[3::3]]
    (folder / "samples.csv").write_text("\n".join(table) + "\n")
    return folder


@pytest.fixture
def clip_set(folder):
    return ClipSet.open(folder)


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not reading_threads()


def save(folder, clips):
    np.save(folder / "clips.npy", clips)


def reading_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("ikem_fast clips")]


def take(batch):
    """Clips, frame counts and samples of a batch, as copies on the CPU."""
    clips, num_frames = batch.clips, batch.num_frames
    if batch.indices is not None:
        clips, num_frames = clips[batch.indices], num_frames[batch.indices]
    return [tensor.cpu().clone() for tensor in (clips, num_frames, batch.samples)]


def make_views(batch, clip_length):
    parameters = draw_views(5, 2, batch.samples, clip_length, AugmentationConfig(camera_view=1.0, motion_scale=True))
    made = clip_views(batch.clips, batch.num_frames, batch.indices, parameters)
    return [made.views, made.statistics]


def is_same(ours, others):
    bits = {torch.float32: torch.int32, torch.float16: torch.int16}
    pairs = zip(ours, others, strict=True)
    return all(
        one.dtype == other.dtype
        and torch.equal(one.view(bits.get(one.dtype, one.dtype)), other.view(bits.get(other.dtype, other.dtype)))
        for one, other in pairs
    )


@pytest.fixture(params=["whole", "train", "shuffled"])
def selection(request, clip_set):
    """All clips, a split with gaps, and clips in no order of which one comes twice."""
    if request.param == "train":
        return clip_set.split("train")
    return clip_set if request.param == "whole" else clip_set.subset([9, 2, 13, 4, 3, 2, 8, 0, 1])


ORDERS = [[[0, 1, 2, 3], [4, 5, 6, 7], [8]], [[7, 2, 2, 5, 2], [0], [], [8, 8, 1]], [[3]], [[]], []]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_give_the_same(selection, dtype, order):
    resident, stream = (open_source(selection, dtype=dtype, place=place) for place in PLACES)
    batches = list(zip(resident.batches(order), stream.batches(order), strict=True))
    assert len(batches) == len(order)
    for positions, (one, other) in zip(order, batches, strict=True):
        batch = selection.batch(positions)
        rows = torch.from_numpy(selection.rows[batch.indices.numpy()])
        assert is_same(take(one), [batch.clips.to(dtype), batch.num_frames, rows])
        assert is_same(take(other), take(one))
        assert one.clips.shape[0] == len(selection)
        assert (other.clips.shape[0], other.indices) == (len(positions), None)
        if positions:
            assert is_same(make_views(other, stream.clip_length), make_views(one, resident.clip_length))


@pytest.mark.parametrize("place", PLACES)
def test_batches_of_tensors_and_arrays_over_and_over(clip_set, place):
    source = open_source(clip_set, place=place)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    expected = [take(batch) for batch in source.batches(part.tolist() for part in order.split(4))]
    for batches in (order.split(4), np.split(order.numpy(), [4, 8, 12])):
        for batch, values in zip(source.batches(batches), expected, strict=True):
            assert is_same(take(batch), values)
    pairs = zip(source.batches(order.split(4)), source.batches(order.split(4)), expected, strict=True)
    assert all(is_same(take(one), values) and is_same(take(other), values) for one, other, values in pairs)


@pytest.mark.parametrize("place", PLACES)
def test_batches_stay_as_they_are(clip_set, place):
    positions = np.array([3, 1])

    def reuse_one_array():
        for number in range(10):
            positions[:] = number, number + 1
            yield positions

    for number, batch in enumerate(list(open_source(clip_set, place=place).batches(reuse_one_array()))):
        assert batch.samples.tolist() == [number, number + 1]
        assert is_same(take(batch)[:1], [clip_set.batch([number, number + 1]).clips])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
def test_reading_in_pieces(selection, place, dtype, monkeypatch):
    """Chunks of less than the whole, and a system that reads fewer bytes than it is asked for."""
    preadv = os.preadv

    def read_less(descriptor, targets, position):
        if len(targets) > 1:
            return preadv(descriptor, targets[:-1], position)
        return preadv(descriptor, [targets[0][:1001]], position)

    order = [[8, 1, 2, 3, 4, 0, 0], [7, 6, 5]]
    expected = [take(batch) for batch in open_source(selection, dtype=dtype, place=place).batches(order)]
    monkeypatch.setattr(clip_file, "_CHUNK_BYTES", 3 * CLIP_BYTES + 1)
    monkeypatch.setattr(os, "preadv", read_less)
    assert clip_file.ClipFile(selection).chunk_size == 3
    ours = [take(batch) for batch in open_source(selection, dtype=dtype, place=place).batches(order)]
    assert all(is_same(one, other) for one, other in zip(ours, expected, strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_frame_counts(clip_set, place):
    for file_frame_count, expected in ((True, [33, 20]), (False, [20, 20])):
        source = open_source(clip_set, place=place, file_frame_count=file_frame_count)
        (batch,) = source.batches([[13, 0]])
        assert take(batch)[1].tolist() == expected
        assert batch.num_frames.dtype == batch.samples.dtype == torch.int64


def test_size_decides(clip_set, monkeypatch):
    size = 14 * CLIP_BYTES
    for dtype, free, kind in (
        (torch.float32, 2 * size, ResidentClips),
        (torch.float32, 2 * size - 1, StreamingClips),
        (torch.float16, 2 * size - 1, ResidentClips),
        (torch.float16, size - 1, StreamingClips),
    ):
        monkeypatch.setattr(sources, "free_memory", lambda device, free=free: free)
        source = open_source(clip_set, dtype=dtype)
        assert type(source) is kind
        assert (source.place == "resident") == (kind is ResidentClips)
    assert open_source(clip_set, resident_share=1.0, dtype=torch.float32, place="stream").place == "stream"
    monkeypatch.setattr(sources, "free_memory", lambda device: size)
    assert open_source(clip_set, resident_share=1.0).place == "resident"
    assert open_source(clip_set, place="resident").place == "resident"
    assert open_source(clip_set.split("test")).place == "resident"
    monkeypatch.setattr(sources, "free_memory", lambda device: size - 1)
    with pytest.raises(
        DataError,
        match=r"clips: place must be 'stream' or 'auto', got 'resident': 14 clips as float32 need 0\.1 MB, and cpu has "
        r"0\.1 MB free",
    ):
        open_source(clip_set, place="resident")


def test_description(clip_set, folder):
    resident, stream = (open_source(clip_set, place=place) for place in PLACES)
    assert resident.describe() == "14 clips resident on cpu as float32, 0.1 MB"
    assert stream.describe() == f"14 clips streamed from {folder} to cpu as float32, 0.1 MB"
    for source in (resident, stream):
        assert (source.clip_set, source.device, source.dtype) == (clip_set, torch.device("cpu"), torch.float32)
        assert source.clip_length == 12


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"dtype": torch.bfloat16}, r"dtype must be torch\.float32 or torch\.float16, got torch\.bfloat16"),
        ({"dtype": "float16"}, r"dtype must be torch\.float32 or torch\.float16, got 'float16'"),
        ({"place": "gpu"}, "place must be one of auto, resident, stream, got 'gpu'"),
        ({"resident_share": 0}, "resident_share must be above 0 and at most 1, got 0"),
        ({"resident_share": float("nan")}, "resident_share must be above 0 and at most 1, got nan"),
        ({"device": "meta"}, "device must be 'cpu' or a CUDA device, got 'meta'"),
        ({"device": "nowhere"}, "device must be 'cpu' or a CUDA device, got 'nowhere'"),
        ({"device": "cuda:99"}, "device must be there: got 'cuda:99' with . CUDA devices"),
    ],
)
def test_bad_arguments(clip_set, arguments, reason):
    with pytest.raises(ValueError, match=reason):
        open_source(clip_set, **arguments)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    ("positions", "error", "reason"),
    [
        ([0, 14], IndexError, "indices must be 0 to 13, got 14"),
        ([-1], IndexError, "indices must be 0 to 13, got -1"),
        ([[0]], ValueError, r"indices must be \(B,\) whole numbers, got \(1, 1\) int64"),
        ([0.5], ValueError, r"indices must be \(B,\) whole numbers, got \(1,\) float64"),
    ],
)
def test_bad_positions(clip_set, place, positions, error, reason):
    with pytest.raises(error, match=reason):
        list(open_source(clip_set, place=place).batches([[0], positions, [1]]))


def test_errors_of_the_iterable_come_through(clip_set):
    def break_off():
        yield [0]
        raise KeyError("order")

    for place in PLACES:
        with pytest.raises(KeyError, match="order"):
            list(open_source(clip_set, place=place).batches(break_off()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [65505.0, -65505.0, 1e30])
def test_beyond_float16(folder, place, value):
    clips = np.zeros(SHAPE, np.float32)
    clips[:, 0, 0, 0, 0] = 65504.0, *[-65504.0] * 13
    save(folder, clips)
    (batch,) = open_source(ClipSet.open(folder), dtype=torch.float16, place=place).batches([range(14)])
    assert is_same(take(batch)[:1], [torch.from_numpy(clips).half()])
    clips[6, 2, 3, 4, 1] = value
    save(folder, clips)
    (batch,) = open_source(ClipSet.open(folder), place=place).batches([range(14)])
    assert is_same(take(batch)[:1], [torch.from_numpy(clips)])
    with pytest.raises(DataError) as caught:
        list(open_source(ClipSet.open(folder), dtype=torch.float16, place=place).batches([[1], [6]]))
    assert str(caught.value) == (
        f"{folder / 'clips.npy'}: coordinates must be at most 65504 m to be stored as float16, got {value:g} in row 6: "
        "dtype must be float32"
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_coordinates_that_are_not_finite(folder, place, dtype, value):
    clips = np.zeros(SHAPE, np.float32)
    clips[6, 2, 3, 4, 1] = value
    save(folder, clips)
    clip_set = ClipSet.open(folder)
    message = rf"clips\.npy: damaged: coordinates must be finite, .* got {value} in row 6"
    with pytest.raises(DataError, match=message):
        list(open_source(clip_set, dtype=dtype, place=place).batches([[1], [6]]))
    with pytest.raises(DataError, match=message):
        clip_set.batch([1, 6])
    assert len(clip_set.batch([1, 5])) == 2


@pytest.mark.parametrize("place", PLACES)
def test_damaged_files(clip_set, folder, place):
    path = folder / "clips.npy"
    size = path.stat().st_size
    stream = open_source(clip_set, place="stream")
    os.truncate(path, size - 1)
    with pytest.raises(DataError, match=rf"clips\.npy: must have {size} bytes, got {size - 1}: it was changed"):
        list((stream if place == "stream" else open_source(clip_set, place=place)).batches([[0]]))
    path.unlink()
    with pytest.raises(DataError, match=r"clips\.npy: No such file or directory"):
        list((stream if place == "stream" else open_source(clip_set, place=place)).batches([[0]]))


def test_file_cut_off_while_it_is_read(clip_set, folder):
    path = folder / "clips.npy"
    size = path.stat().st_size
    order = [[0], *[[2]] * sources.PREFETCH, [1], [13]]
    batches = open_source(clip_set, place="stream").batches(order)
    first = take(next(batches))
    os.truncate(path, size - CLIP_BYTES - 1)
    assert is_same(first[:1], [clip_set.batch([0]).clips])
    taken = []
    with pytest.raises(DataError, match=rf"clips\.npy: must have {size} bytes, got {size - CLIP_BYTES - 1}: it was"):
        taken.extend(batch.samples.tolist() for batch in batches)
    assert taken == order[1:-1]
    assert not reading_threads()
    assert list(batches) == []


@pytest.mark.parametrize("place", PLACES)
def test_failing_disk(clip_set, place, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(DataError, match=r"clips\.npy: Input/output error") as caught:
        list(open_source(clip_set, place=place).batches([[0], [1]]))
    assert isinstance(caught.value.__cause__, OSError)


def test_read_ahead_is_bounded(clip_set):
    """Neither positions nor clips pile up, however slow the consumer or long the epoch."""
    drawn, alive = itertools.count(), weakref.WeakSet()
    last_drawn = 0

    def endless():
        nonlocal last_drawn
        for last_drawn in drawn:
            yield [last_drawn % 14] * 2

    batches = open_source(clip_set, place="stream").batches(endless())
    for number in range(50):
        batch = next(batches)
        alive.add(batch.clips)
        assert last_drawn == number + sources.PREFETCH
        assert len(alive) <= 2  # this one, and at most one that the name still held when this one was made
    assert len(reading_threads()) == 1
    batches.close()
    assert last_drawn == 49 + sources.PREFETCH


def test_thread_ends_early(clip_set):
    source = open_source(clip_set, place="stream")
    order = [[number % 14] for number in range(100)]
    untouched = source.batches(order)
    assert not reading_threads()  # it begins with the first batch
    batches = source.batches(order)
    next(batches)
    assert len(reading_threads()) == 1
    batches.close()
    assert not reading_threads()
    for _ in source.batches(order):
        break
    gc.collect()
    assert not reading_threads()

    def fail_in_training():
        for batch in source.batches(order):
            raise RuntimeError(f"samples {batch.samples.tolist()}")

    with pytest.raises(RuntimeError, match=r"samples \[0\]"):
        fail_in_training()
    gc.collect()
    assert not reading_threads()
    assert len(list(untouched)) == 100


def test_process_ends_in_the_middle(folder):
    script = (
        "import sys\n"
        "from ikem_fast.data import ClipSet, open_source\n"
        "batches = open_source(ClipSet.open(sys.argv[1]), place='stream').batches([i % 14] for i in range(10**9))\n"
        "print(next(batches).samples.tolist(), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "[0]\n", "")


def write_group(folder, limit, used, **statistics):
    """``limit`` and ``used`` are (file name, content)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (limit, used):
        (folder / name).write_text(f"{content}\n")
    (folder / "memory.stat").write_text("".join(f"{name} {value}\n" for name, value in statistics.items()))


def test_free_memory_within_control_groups(tmp_path):
    root, membership = tmp_path / "cgroup", tmp_path / "membership"

    def free():
        return list(memory._free_in_control_groups(membership, root))

    assert free() == []
    membership.write_text("3:cpuset:/\n0::/outer/inner\n")
    assert free() == []
    write_group(root / "outer" / "inner", ("memory.max", "max"), ("memory.current", 70))
    write_group(root / "outer", ("memory.max", 100), ("memory.current", 90), inactive_file=20, active_file=5)
    assert free() == [35]
    write_group(root / "outer" / "inner", ("memory.max", 50), ("memory.current", 60))
    assert free() == [0, 35]
    membership.write_text("4:memory,hugetlb:/inner\n0::/\n")
    limit, used = "memory.limit_in_bytes", "memory.usage_in_bytes"
    write_group(root / "memory", (limit, 1000), (used, 700), total_inactive_file=30, total_active_file=0)
    assert free() == [330]  # a container sees its own group as the root


def test_free_memory():
    free = memory.free_memory(torch.device("cpu"))
    assert 0 <= free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_give_the_same_on_a_gpu(selection, dtype, monkeypatch):
    monkeypatch.setattr(clip_file, "_CHUNK_BYTES", 4 * CLIP_BYTES)
    order = ORDERS[1]
    resident, stream = (open_source(selection, device="cuda", dtype=dtype, place=place) for place in PLACES)
    assert resident.device == stream.device == torch.device("cuda", torch.cuda.current_device())
    expected = open_source(selection, dtype=dtype, place="resident").batches(order)
    batches = zip(order, resident.batches(order), stream.batches(order), expected, strict=True)
    for positions, one, other, on_host in batches:
        assert {tensor.device for tensor in (*vars(one).values(), other.clips, other.samples)} == {resident.device}
        assert is_same(take(one), take(on_host))
        assert is_same(take(other), take(on_host))
        if positions:
            assert is_same(make_views(other, stream.clip_length), make_views(one, resident.clip_length))


@pytest.mark.cuda
def test_streams_on_a_gpu_wait_for_each_other(clip_set):
    """Late copies, late kernels on a stream of their own, and memory that is given back before those have run."""
    source = open_source(clip_set, device="cuda", place="stream")
    order = [[number % 14, (5 * number) % 14, (3 * number) % 14] for number in range(40)]
    with torch.cuda.stream(torch.cuda.Stream()):
        taken = []
        for number, batch in enumerate(source.batches(order)):
            if number % 5 == 0:
                with torch.cuda.stream(source._stream):
                    torch.cuda._sleep(5_000_000)
            torch.cuda._sleep(2_000_000)
            taken.append([tensor.clone() for tensor in (batch.clips, batch.num_frames, batch.samples)])
            del batch
        torch.cuda.current_stream().synchronize()
    for positions, values in zip(order, taken, strict=True):
        expected = clip_set.batch(positions)
        assert is_same([value.cpu() for value in values], [expected.clips, expected.num_frames, expected.indices])


@pytest.mark.cuda
@pytest.mark.parametrize("place", PLACES)
def test_nothing_waits_for_the_gpu(clip_set, place):
    source = open_source(clip_set, device="cuda", place=place)
    order = [[0, 1], [2, 3], [4, 5], [6]]
    list(source.batches(order))
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(source.batches(order))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [batch.samples.tolist() for batch in batches] == order


@pytest.mark.cuda
def test_pinned_buffers_are_used_again(clip_set, monkeypatch):
    source = open_source(clip_set, device="cuda", place="stream")
    make, made = source._empty, []

    def count(num_clips, **options):
        made.append(make(num_clips, **options))
        return made[-1]

    monkeypatch.setattr(source, "_empty", count)
    for number, batch in enumerate(source.batches([[number % 14] * 3 for number in range(30)])):
        assert is_same(take(batch)[:1], [clip_set.batch([number % 14] * 3).clips])
    assert len(made) == sources.PREFETCH
    assert all(buffer.is_pinned() for buffer in made)


@pytest.mark.cuda
def test_free_memory_of_a_gpu():
    _, total = torch.cuda.mem_get_info()
    assert 0 < memory.free_memory(torch.device("cuda")) <= total
