"""The benchmarks' framework: floors by hand, wrong results end a benchmark before it is timed, every op has one."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

import ikem_fast
from benchmarks import memory, timing
from benchmarks.cases import (
    EAGER,
    OURS,
    OURS_BF16,
    Case,
    Inputs,
    activations_as_bfloat16,
    forward,
    forward_and_backward,
    largest_error,
)
from ikem_fast import floors, layouts, ops
from ikem_fast.floors import Work

PROJECT_ROOT = Path(__file__).resolve().parent.parent
FILES = sorted(path.stem for path in (PROJECT_ROOT / "benchmarks").glob("bench_*.py"))
# Compiled operators whose benchmark is named after what they do.
OTHER_NAMES = {"temporal_convolution_spectral": "temporal_convolution"}

# ---- floors, counted by hand


def test_floors_of_views():
    # 2 clips of 3·4·5·1 = 60 values each: 480 bytes read; 2 views of 6 modalities of 120 values: 5760 bytes written, in
    # bfloat16 half; (2, 2, 6, 5, 3) sums in float64: 2880 bytes.
    assert floors.clip_views(2, 4, 5, 1, 6) == Work(480 + 5760 + 2880)
    assert floors.clip_views(2, 4, 5, 1, 6, kind="bf16") == Work(480 + 2880 + 2880, 0, "bf16")
    # 120 values: read, 6 times written; backward: read again, 6 gradients read, one written.
    assert floors.derive_modalities(2, 4, 5, 1, 6) == Work(4 * 120 * 7)
    assert floors.derive_modalities(2, 4, 5, 1, 6, backward=True) == Work(4 * 120 * 15)
    assert floors.draw_views(10) == Work(10 * 8 + 20 * (8 + 24))
    assert floors.parse_skeleton(1000, 2, 5, 1) == Work(1000 + 8 * 30)


def test_floors_of_convolutions():
    # One stream, one sequence of 2 frames, 3 joints, 4 channels to 5; 7 edges, in 6 pairs of partition and joint.
    # x has 24 values, y 30, weights 3·(5·4 + 5 + 9) = 102. Gathered first: 7·4 + 6·20 = 148 multiply-adds a frame;
    # last: 3·3·20 + 7·5 = 215.
    sizes = (1, 1, 2, 3, 4, 5, 7, 6)
    once = 2 * 2 * 148
    assert floors.graph_convolution(*sizes) == Work(4 * (24 + 30 + 102), once)
    assert floors.graph_convolution(*sizes, kind="bf16") == Work(2 * 54 + 4 * 102, once, "bf16")
    # x, y, y's gradient read and x's written; weights read and their gradients written.
    both = Work(4 * (24 + 30 + 102) + 4 * (24 + 30 + 30 + 24 + 2 * 102), 3 * once)
    assert floors.graph_convolution(*sizes, backward=True) == both
    without = floors.graph_convolution(*sizes, backward=True, input_gradient=False)
    assert without == Work(both.bytes - 4 * 24, 2 * once)
    assert floors.graph_convolution(1, 1, 5, 3, 4, 5, 7, 6, stride=2).operations == 3 * 2 * 148
    # Where it is cheaper, after the product: with 9 edges in 9 pairs, 9·8 + 9·8·1 = 144 before, 9·8·1 + 9·1 = 81 after.
    assert floors.graph_convolution(1, 1, 1, 3, 8, 1, 9, 9).operations == 2 * 81

    # 3 frames, 3 taps, of which the first and the last frame miss one: 7 products of 2·2 channels at 2 joints.
    assert floors.temporal_convolution(1, 1, 3, 2, 2, taps=3) == Work(4 * (12 + 12 + 3 * 4 + 2), 2 * 7 * 2 * 4)
    # Stride 2 keeps the first and the last frame.
    strided = floors.temporal_convolution(1, 1, 3, 2, 2, taps=3, stride=2, kind="bf16", backward=True)
    assert strided == Work(2 * (12 + 8) + 4 * 14 + 2 * (12 + 8 + 8 + 12) + 8 * 14, 3 * 2 * 4 * 2 * 4, "bf16")

    assert floors.residual_activation(1, 4, 2, 3, 5) == Work(3 * 4 * 120)
    assert floors.residual_activation(1, 4, 2, 3, 5, backward=True) == Work(3 * 4 * 120 + 5 * 4 * 120)
    assert floors.residual_activation(1, 4, 2, 3, 5, residual=False, pool=2) == Work(4 * 120 + 4 * 2 * 5)
    assert floors.batch_norm_coefficients(6, 10, backward=True) == Work(4 * 60 * 15)


def test_floors_of_blocks_add_up():
    sizes = (2, 4, 5, 3, 4, 6, 7, 6)
    block = floors.block(*sizes, stride=2)
    parts = [
        floors.graph_convolution(*sizes),
        floors.temporal_convolution(2, 4, 5, 3, 6, stride=2),
        floors.residual_activation(2, 4, 3, 3, 6),
        floors.graph_convolution(2, 4, 5, 3, 4, 6, 3, 3, partitions=1, stride=2),
    ]
    assert block == Work(sum(part.bytes for part in parts), sum(part.operations for part in parts))
    same = floors.block(2, 4, 5, 3, 6, 6, 7, 6, kind="bf16", backward=True)
    assert same.kind == "bf16"
    # Two blocks, 3 to 4 to 6 channels: the norm of the input reads and writes 2·4·5·3·3 values.
    encoder = floors.encoder(2, 2, 2, 5, 3, [(4, 1), (6, 2)], 7, 6)
    first = floors.block(2, 4, 5, 3, 3, 4, 7, 6, residual=False)
    assert encoder == Work(8 * 360) + first + floors.block(*sizes, stride=2, pool=2)


def test_floors_of_losses():
    # 2 modalities, 3 clips, embeddings of 4, queue of 5: 2·3·4·5 = 120 multiply-adds.
    assert floors.info_nce(2, 3, 4, 5) == Work(4 * (24 + 24 + 40 + 2), 240)
    assert floors.info_nce(2, 3, 4, 5, backward=True) == Work(4 * (24 + 24 + 40 + 2 + 24 + 2), 480)
    assert floors.context_loss(2, 3, 4, 5) == floors.info_nce(2, 3, 4, 5)
    # Rows of 8 numbers: 2·3·8·5 multiply-adds.
    assert floors.exchange_loss(2, 3, 4, 5, kind="bf16") == Work(4 * (48 + 24 + 40 + 2), 480, "bf16")
    # One student, 3·8·5 multiply-adds, and as many again for its gradient; the teacher's 120.
    distillation = floors.relational_distillation_loss(1, 2, 3, 4, 5, backward=True)
    assert distillation == Work(4 * (24 + 24 + 80 + 1 + 24 + 1), 2 * (120 + 240))
    assert floors.queue_log_sum_exp(1, 6, 8, 5) == Work(4 * (48 + 40 + 18), 480)
    # 2 + 1 sums of 3 clips, 2·3 neighbours with 2 similarities each.
    assert floors.pair_log_sum_exp(2, 3, 4, 5) == Work(4 * (24 + 40 + 9 + 12) + 8 * 6, 240)
    assert floors.enqueue(6, 128, 128) == Work(2 * 4 * 6 * 128 * 128)
    assert floors.momentum_update(100) == Work(1200)


def test_the_floor_of_the_published_encoder():
    from benchmarks.bench_encoder import PLAN
    from benchmarks.bench_graph_convolution import edges_and_groups

    # Six encoders forward and backward and six forward, 128 clips: 2.9 TFLOP (3.65 if taps beyond the ends counted),
    # and 23 GB of activations in bfloat16. 67 % of the operations are the last block's convolution over frames.
    sizes = (6, 128, 2, 50, 25, PLAN, *edges_and_groups())
    forward_work, both = (floors.encoder(*sizes, kind="bf16", backward=backward) for backward in (False, True))
    assert (forward_work + both).operations == pytest.approx(2.93e12, rel=0.01)
    assert (forward_work + both).bytes == pytest.approx(23.1e9, rel=0.01)
    last = floors.temporal_convolution(6, 256, 13, 25, 256)
    assert last.operations / forward_work.operations == pytest.approx(0.667, abs=0.005)


def test_work():
    assert Work(10, 100).seconds(10.0, 1000.0) == (1.0, "bytes")
    assert Work(10, 100, "bf16").seconds(1000.0, 10.0) == (10.0, "operations")
    assert Work(1, 2) * 3 + Work(4) == Work(7, 6)
    assert Work(4) + Work(1, 2, "bf16") == Work(5, 2, "bf16")
    with pytest.raises(ValueError, match="only operations of one kind can be added, got fp32 and bf16"):
        Work(1, 2) + Work(1, 2, "bf16")
    with pytest.raises(ValueError, match="kind must be one of fp32, bf16, got 'fp8'"):
        Work(1, 2, "fp8")


# ---- errors, cases, ways


class Result(NamedTuple):
    values: torch.Tensor
    count: int


def test_largest_error():
    ten = torch.tensor([1.0, -10.0])
    assert largest_error(ten, ten) == 0
    assert largest_error(ten + torch.tensor([0.1, 0.0]), ten) == pytest.approx(0.01)
    # Each tensor by itself: a small one is not hidden by a large one.
    assert largest_error((1000 * ten, {"a": 1e-3 * ten}), (1000 * ten, {"a": 2e-3 * ten})) == pytest.approx(0.5)
    assert largest_error(Result(ten, 3), Result(ten, 4)) == 0.25
    assert largest_error([ten, ten], torch.stack([ten, ten])) == 0
    assert largest_error((None, ten), (None, ten)) == 0
    for wrong in (ten[:1], None, torch.tensor([math.nan, -10.0]), torch.tensor([math.inf, -10.0])):
        assert largest_error((wrong,), (ten,)) == math.inf
    for other in ((ten,), (ten, ten, ten), {"a": ten, "b": ten}, ten):
        assert largest_error(other, (ten, ten)) == math.inf
    assert largest_error({"a": ten}, {"b": ten}) == math.inf


def test_cases_say_what_is_missing():
    def make(**changed):
        arguments = {"ways": {OURS: abs}, "tolerance": {OURS: 0.0}, **changed}
        return Case("op", "call", {"clips": 2, "queue": 8, "rows": 3}, abs, expected=abs, floor=Work(1), **arguments)

    assert make().size_label == "N=2 K=8 rows=3"
    assert make().work(OURS_BF16) == Work(1)
    assert make(floor_bf16=Work(2)).work(OURS_BF16) == Work(2)
    with pytest.raises(ValueError, match="tolerance must have every way, eager is not there"):
        make(ways={OURS: abs, EAGER: abs})
    with pytest.raises(ValueError, match=r"ways must be some of eager, .*, got theirs"):
        make(ways={"theirs": abs})


def test_ways_of_a_function():
    x, y = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0])
    inputs = Inputs((x, y), (torch.tensor([1.0, 10.0]),))
    assert not forward(torch.mul)(inputs).requires_grad
    results, gradients = forward_and_backward(torch.mul)(inputs)
    assert largest_error((results, gradients), ((x * y,), (torch.tensor([5.0, 70.0]),))) == 0
    # A list stands for a tensor of streams.
    by_stream, of_stream = forward_and_backward(lambda x, y: ([x[0] * y[0], x[1] * y[1]],))(inputs)
    assert largest_error((by_stream, of_stream), ((x * y,), gradients)) == 0
    rounded = activations_as_bfloat16(1)(inputs)
    assert [value.dtype for value in rounded.arguments] == [torch.float32, torch.bfloat16]
    assert rounded.cotangents[0].dtype == torch.bfloat16
    assert x.is_leaf
    assert x.grad is None


@pytest.mark.parametrize("name", FILES)
def test_cases_of_a_file_are_told_apart(name):
    module = importlib.import_module(f"benchmarks.{name}")
    if not hasattr(module, "cases"):
        pytest.skip("times runs rather than cases")
    for profile in ("small", "full"):
        for device in ("cpu", "cuda"):
            cases = module.cases(profile, device)
            labels = [(case.op, case.phase, case.size_label) for case in cases]
            assert len(labels) == len(set(labels))
            for case in cases:
                assert set(case.checked) | set(case.prepare) <= set(case.ways)
                assert case.floor.bytes > 0


def test_every_op_has_a_benchmark():
    compiled = {path.stem for path in (PROJECT_ROOT / "csrc" / "ops").glob("*.cpp")}
    public = {name.removesuffix("_reference") for name in dir(ops) if name.endswith("_reference")}
    in_place = {name.removesuffix("_reference_") for name in dir(ops) if name.endswith("_reference_")}
    for op in compiled | public | in_place:
        assert f"bench_{OTHER_NAMES.get(op, op)}" in FILES


def test_edges_and_groups_of_the_graph():
    from benchmarks.bench_graph_convolution import edges_and_groups

    adjacency = layouts.get("ntu-rgb+d").adjacency()
    edges, groups = edges_and_groups()
    assert edges == int((adjacency != 0).sum())
    assert groups == int((adjacency != 0).any(dim=1).sum())


# ---- timing and memory


def test_values_are_put_at_their_places():
    class Place(NamedTuple):
        values: torch.Tensor
        count: int

    places = Place(torch.zeros(2), 1), [torch.zeros(1, requires_grad=True)]
    addresses = places[0].values.data_ptr(), places[1][0].data_ptr()
    timing.put((Place(torch.ones(2), 2), [torch.full((1,), 3.0)]), places)
    assert places[0].values.tolist() == [1, 1]
    assert places[1][0].tolist() == [3]
    assert (places[0].values.data_ptr(), places[1][0].data_ptr()) == addresses
    assert [timing.row_length(seconds) for seconds in (0.0, 1e-3, 4e-3, 1.0)] == [16, 10, 2, 1]


def test_peak_memory():
    # In a process of its own: here, what earlier tests freed would serve the call, and its peak be nothing.
    program = (
        "import torch; from benchmarks.memory import peak_beyond;"
        "print(peak_beyond(lambda: torch.ones(96 * 2**18).sum(), 'cpu'))"
    )
    output = subprocess.check_output([sys.executable, "-c", program], cwd=PROJECT_ROOT, text=True)
    assert 80 * 2**20 < int(output) < 160 * 2**20
    small = importlib.import_module("benchmarks.bench_info_nce").cases("small", "cpu")
    number = next(number for number, case in enumerate(small) if case.phase == "forward + backward")
    # The definition keeps logits and their log-softmax.
    assert memory.peak_in_process("bench_info_nce", "small", number, EAGER, 1) > 2 * 4 * 6 * 16 * 4096
    with pytest.raises(
        RuntimeError, match=r"the memory of bench_nothing, case 0, eager, could not be measured: .*No module"
    ):
        memory.peak_in_process("bench_nothing", "small", 0, EAGER, 1)


# ---- what is wrong is not timed

PLANTED = """
import torch
from benchmarks.cases import CALL, EAGER, OURS, OURS_BF16, RELEASE_MANNER, Case
from ikem_fast.floors import Work

kept = []

def double(x):
    return 2 * x

def slightly_wrong(x):
    result = 2 * x
    result[-1] *= 1 + 1e-3
    return result

def not_a_number(x):
    result = 2 * x
    result[3] = float("nan")
    return result

def stale(x):
    kept.append(2 * x)
    return kept[0]

def cases(profile, device):
    ways = {EAGER: double, OURS: slightly_wrong, OURS_BF16: not_a_number, RELEASE_MANNER: stale}
    return [
        Case(
            op="double", phase=CALL, sizes={"values": 64},
            draw=lambda generator: torch.rand(64, generator=generator) + 1, ways=ways, expected=double,
            tolerance=dict.fromkeys(ways, 1e-5), floor=Work(512),
        )
    ]

def test_double(measure, case, way):
    measure(case, way)
"""


def test_a_wrong_result_ends_a_benchmark_before_it_is_timed(tmp_path):
    pytest.importorskip("pytest_benchmark")
    (tmp_path / "bench_double.py").write_text(PLANTED, encoding="utf-8")
    (tmp_path / "benchmarks").symlink_to(PROJECT_ROOT / "benchmarks")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    report = tmp_path / "report.json"
    paths = [str(tmp_path), str(Path(ikem_fast.__file__).parent.parent)]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin", "-p", "benchmarks.conftest", "--threads", "1",
         "--import-mode=importlib", "--benchmark-json", report, "bench_double.py"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stdout + result.stderr
    assert "1 passed" in result.stdout
    assert "3 failed" in result.stdout
    for way, error in (("ours fp32", r"[0-9.]+e-0[34]"), ("ours bf16", "inf"), ("release manner", r"[0-9.]+e-01")):
        said = rf"double · call · values=64 · cpu: '{way}' is {error} away from the definition, allowed are 1.0e-05: "
        assert re.search(said + "nothing was timed", result.stdout), way
    written = json.loads(report.read_text(encoding="utf-8"))
    (benchmark,) = written["benchmarks"]
    assert benchmark["group"] == "double · call · values=64 · cpu"
    extra = benchmark["extra_info"]
    assert (extra["way"], extra["error"], extra["bytes"], extra["threads"]) == (EAGER, 0.0, 512, 1)
    start = written["ceilings"]["cpu"]["start"]
    assert extra["floor_seconds"] == pytest.approx(512 / start["copy_bytes_per_second"])
    assert start.keys() == written["ceilings"]["cpu"]["end"].keys()
    assert written["profile"] == "small"
    assert written["machine_info"]["torch"] == torch.__version__
    assert str(tmp_path) not in report.read_text(encoding="utf-8")
    assert "node" not in written["machine_info"]
