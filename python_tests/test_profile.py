"""``python -m ikem_fast.profile``: the phases of training, their times in a trace, and their work."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from engine_helpers import TINY, assert_same_run, tiny_config
from recorded_graphs import RecordedGraphs
from small_trainers import distillation, ikem

import ikem_fast
from ikem_fast import ceilings, engine, ranges
from ikem_fast.ceilings import Ceilings
from ikem_fast.engine import step as training_step
from ikem_fast.floors import Work
from ikem_fast.methods import IKEM
from ikem_fast.profile import main
from ikem_fast.profiling import phases, running
from ikem_fast.profiling.traces import BETWEEN, IDLE, REST_OF_STEP, UNATTRIBUTED, TraceError, read_times
from ikem_fast.profiling.work import work_of_step

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 2
MADE = Ceilings(1e10, 1e11, 2e11)
OF_PRETRAINING = {
    *("reading data", "momentum update", "views", "query encoders", "heads", "key encoders"),
    *("gather of keys", "enqueue", "gradient limit", "optimiser step"),
}
OF_DISTILLATION = OF_PRETRAINING - {"momentum update", "query encoders", "key encoders"} | {
    *("teacher encoders", "student encoders", "relational distillation"),
}


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    """Measuring them takes seconds."""
    monkeypatch.setattr(running.ceilings, "measure", lambda device: MADE)


def profile(tmp_path, *arguments):
    """What the command writes: the table's text, its values and the trace."""
    out = tmp_path / "profile"
    settings = (*TINY, "max_gradient_norm=1", "model.modalities=[joint,motion,bone]")
    command = (*arguments, "--out", out, "--config", "cpu-small", "--steps", STEPS, *settings)
    assert main([str(argument) for argument in command]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["table.json", "table.md", "trace.json.gz"]
    values = json.loads((out / "table.json").read_text())
    return (out / "table.md").read_text(), values, json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))


@pytest.mark.parametrize(
    ("arguments", "expected", "differentiated"),
    [
        (["pretrain", "--stage", "single"], OF_PRETRAINING | {"single contrast"}, {"query encoders"}),
        (
            ["pretrain"],
            OF_PRETRAINING | {"context exchange", "implicit exchange"},
            {"query encoders", "context exchange"},
        ),
        (["distill"], OF_DISTILLATION, {"student encoders", "relational distillation"}),
    ],
    ids=["stage 1", "stage 2", "distillation"],
)
def test_all_phases_are_in_trace_and_table(clips, tmp_path, capsys, arguments, expected, differentiated):
    text, values, trace = profile(tmp_path, *arguments, "--data", clips)
    marked = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
    assert {name: marked[name] for name in expected - {"heads"}} == dict.fromkeys(expected - {"heads"}, STEPS)
    assert marked["training step"] == STEPS
    assert marked["heads"] == 2 * STEPS  # of either view
    assert marked["backward"] == 2 * STEPS  # of the losses with respect to embeddings, and of those
    assert marked["kNN"] == marked["checkpoint"] == 1

    rows = {(row["phase"], row["pass"]): row for row in values["phases"]}
    shown = {name for name, which in rows if which == "forward"}
    assert shown == expected
    assert {name for name, which in rows if which == "backward"} >= differentiated | {"heads"}
    assert sum(row["share"] for row in values["phases"]) == pytest.approx(1)
    assert sum(row["seconds"] for row in values["phases"]) == pytest.approx(values["step_seconds"])
    assert all(row["seconds"] >= 0 for row in values["phases"])
    # The encoders' time is found, on the way back too.
    for which in ("forward", "backward"):
        trained = rows[next(name for name in differentiated if name.endswith("encoders")), which]
        assert trained["share"] > 0.02
        assert trained["floor_seconds"] == max(trained["bytes"] / 1e10, trained["operations"] / 1e11)
        assert trained["share_of_floor"] == pytest.approx(trained["floor_seconds"] / trained["seconds"])
    assert rows["backward", "of no phase"]["share"] < 0.3
    assert [row["phase"] for row in values["occasional"]] == ["reading losses back", "kNN", "checkpoint"]
    assert values["occasional"][0]["every"] == "3 steps"
    assert values["plain_step_seconds"] > 0
    assert "ikem_fast::graph_convolution" in [row["name"] for row in values["operations"]]
    assert sum(row["seconds"] for row in values["operations"]) <= values["step_seconds"]

    assert text in capsys.readouterr().out
    for name in expected:
        assert re.search(rf"^\| {name} +\|", text, re.MULTILINE)
    assert re.search(r"^\| a step .*\| +100\.0 \|", text, re.MULTILINE)


def test_teacher_with_its_own_clips_and_settings(run, tmp_path):
    out = tmp_path / "profile"
    assert main(["distill", "--teacher", str(run), "--out", str(out), "--steps", "1", "batch_size=2"]) == 0
    about = json.loads((out / "table.json").read_text())["about"]
    assert (about["data"], about["clip_shape"]) == ("random", [3, 12, 20, 1])
    assert (about["modalities"], about["queue_size"], about["clips"]) == (["joint", "motion"], 12, 2)


def test_synthetic_clips_as_the_published_ones(tmp_path):
    out = tmp_path / "profile"
    sizes = [text for text in TINY if not text.startswith("seed")]
    assert main(["pretrain", "--config", "cpu-small", "--out", str(out), "--steps", "1", *sizes]) == 0
    about = json.loads((out / "table.json").read_text())["about"]
    assert (about["data"], about["clip_shape"]) == ("synthetic", [3, 50, 25, 2])


def test_losses_and_weights_are_the_same_bits_when_somebody_looks(finished, clips, tmp_path):
    with torch.profiler.profile():
        engine.pretrain(clips, tmp_path / "run", tiny_config("max_steps=3"), progress=False)
    assert_same_run(tmp_path / "run", finished)


def test_every_phase_that_is_marked_is_known():
    package = Path(ikem_fast.__file__).parent
    marked = set()
    for path in package.rglob("*.py"):
        marked.update(re.findall(r'[^.\w]phase\("([^"]+)"\)', path.read_text(encoding="utf-8")))
    assert marked == {*phases.STEP_PHASES, *phases.OCCASIONAL, phases.STEP, phases.READING_AHEAD}


# ---- ranges


@pytest.fixture
def nvtx(monkeypatch):
    """What NVTX would be told, and that CUDA is in use."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", told.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: told.append("end"))
    return told


def test_ranges_without_a_profiler_are_nvtx_where_cuda_is_in_use(nvtx):
    @ranges.phase("outer")
    def function():
        with ranges.phase("inner"):
            raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            function()
    assert nvtx == ["outer", "inner", "end", "end"] * 2
    with torch.profiler.profile() as profiler, pytest.raises(KeyError):
        function()
    assert nvtx == ["outer", "inner", "end", "end"] * 2
    assert {"outer", "inner"} <= {event.name for event in profiler.events()}


def test_captured_steps_have_ranges_when_they_are_captured_alone(finished, clips, tmp_path, monkeypatch, nvtx):
    graphs = RecordedGraphs()
    monkeypatch.setattr(training_step, "open_graphs", lambda device: graphs)
    engine.pretrain(clips, tmp_path / "run", tiny_config("max_steps=3", "capture=false"), progress=False)
    assert nvtx.count("views") == nvtx.count("training step") == 3
    nvtx.clear()
    engine.pretrain(clips, tmp_path / "captured", tiny_config("max_steps=4"), progress=False)
    assert (graphs.warm_ups, graphs.captures, graphs.replays) == (3, 1, 1)
    assert nvtx.count("training step") == 4
    assert nvtx.count("views") == nvtx.count("optimiser step") == graphs.warm_ups + graphs.captures
    assert_same_run(tmp_path / "run", finished)


# ---- traces


def event(category, name, begin, end, thread=1, **arguments):
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": end - begin, "tid": thread, "args": arguments}


def mark(name, begin, end, thread=1):
    return event("user_annotation", name, begin, end, thread)


def operation(begin, end, number, thread=1):
    return event("cpu_op", "aten::op", begin, end, thread, **{"Sequence number": number})


def node(begin, end, number=None, thread=1):
    arguments = {} if number is None else {"Sequence number": number, "Fwd thread id": 1}
    return event("cpu_op", "autograd::engine::evaluate_function: Node", begin, end, thread, **arguments)


def test_times_of_a_trace_of_a_cpu():
    trace = [
        mark("ProfilerStep#1", 0, 500),
        mark("reading data", 10, 20),
        mark("training step", 30, 130),
        operation(35, 36, 4),
        mark("query encoders", 40, 70),
        operation(41, 42, 5),  # without a gradient: the number is that of the next one
        mark("heads", 70, 90),
        operation(71, 75, 5),
        operation(76, 77, 6),
        mark("backward", 100, 125),
        node(101, 104, 6),
        node(104, 110, 5),
        operation(105, 109, None),
        node(111, 112),
        node(113, 116, 4),
        mark("reading losses back", 140, 150),
        mark("reading data", 160, 162),
        mark("training step", 170, 180),
        mark("checkpoint", 200, 300),
        mark("reading losses back", 210, 220),
    ]
    times = read_times({"traceEvents": [{"ph": "M", "name": "process_name"}, *reversed(trace)]})
    expected = {
        ("reading data", "forward"): 12,
        REST_OF_STEP: 10 + 10 + 5 + 10,
        ("query encoders", "forward"): 30,
        ("heads", "forward"): 20,
        ("heads", "backward"): 9,
        UNATTRIBUTED: 16,
        BETWEEN: 10 + 10 + 10 + 8,
    }
    assert {phase: round(2e6 * seconds, 6) for phase, seconds in times.host.items()} == expected
    assert times.steps == 2
    assert times.step_seconds == pytest.approx((170 - 10) / 2 * 1e-6)
    assert times.device is None
    assert times.occasional == {
        "reading losses back": pytest.approx([10e-6]),
        "kNN": [],
        "checkpoint": pytest.approx([100e-6]),
    }
    node_, op = "autograd::engine::evaluate_function: Node", "aten::op"
    assert {name: (2 * calls, round(2e6 * seconds, 6)) for name, (calls, seconds) in times.operations.items()} == {
        op: (5, 1 + 1 + 4 + 1 + 4 + 0),
        node_: (4, 3 + 2 + 1 + 3),
    }
    with pytest.raises(TraceError, match="trace must hold a 'training step', got none"):
        read_times({"traceEvents": trace[:2]})


def test_times_of_a_trace_of_a_gpu():
    """Kernels count for the phase in which they were launched, whenever they ran."""

    def launch(at, number, thread=1):
        return event("cuda_runtime", "cudaLaunchKernel", at, at + 1, thread, correlation=number)

    def kernel(begin, end, number, category="kernel"):
        return event(category, "kernel", begin, end, 7, correlation=number)

    trace = [
        mark("reading data", 10, 20),
        launch(12, 1),
        kernel(15, 20, 1, "gpu_memcpy"),
        mark("training step", 30, 100),
        mark("query encoders", 40, 60),
        operation(41, 43, 5),
        launch(42, 2),
        kernel(50, 150, 2),
        event("gpu_user_annotation", "query encoders", 50, 150, 7),
        mark("backward", 70, 95),
        node(75, 80, 5, thread=2),
        launch(76, 3, thread=2),
        kernel(140, 200, 3),  # beside the one before
        launch(85, 4, thread=2),
        kernel(210, 220, 4),
        launch(90, 5, thread=3),  # reads ahead
        kernel(220, 230, 5, "gpu_memcpy"),
        launch(96, 6),
        kernel(230, 240, 6),  # for instance a whole graph
        kernel(5, 500, 99),  # launched before
    ]
    times = read_times({"traceEvents": trace})
    expected = {
        ("reading data", "forward"): 5 + 10,
        ("query encoders", "forward"): 100,
        ("query encoders", "backward"): 50,
        UNATTRIBUTED: 10,
        REST_OF_STEP: 10,
        IDLE: 5 + 30 + 10,
    }
    assert {phase: round(1e6 * seconds, 6) for phase, seconds in times.device.items()} == expected
    assert times.step_seconds == pytest.approx(230e-6)
    assert times.host["query encoders", "forward"] == pytest.approx(20e-6)
    assert times.host[UNATTRIBUTED] == pytest.approx(25e-6)
    assert times.operations == {"kernel": (6, pytest.approx(195e-6))}


# ---- work


def test_work_of_small_steps():
    """Counted by hand: 5 clips (3, 12, 20, 1), D = 4, K = 12, d = 6, six modalities."""
    shape = {"num_clips": 5, "clip_shape": (3, 12, 20, 1)}
    module = ikem(modalities=("joint", "motion", "bone"))
    work = work_of_step(module, "cross", **shape, limits_gradients=True)
    # Two views and their sums in float64.
    assert work["views", "forward"] == Work(5 * 720 * 4 * (1 + 2 * 3) + 8 * 2 * 2 * 3 * 20 * 3)
    assert work["enqueue", "forward"] == Work(2 * 4 * 3 * 5 * 4)
    per_stream = sum(parameter[0].numel() for parameter in module.key_encoders.parameters())
    assert work["momentum update", "forward"] == Work(3 * 4 * 1 * per_stream)  # motion's alone
    # Heads 6 → 6 → 4 of queries and keys, 6 → 12 → 12 of the exchange.
    products = 2 * (6 * 6 + 6 * 4) + (6 * 12 + 12 * 12)
    assert work["heads", "forward"].operations == 2 * 3 * 5 * products
    assert work["heads", "backward"].operations == 2 * 2 * 3 * 5 * (products - 6 * 6 - 6 * 4)
    assert work["context exchange", "forward"].operations == 2 * 3 * 5 * 4 * 12
    assert work["context exchange", "backward"].operations == 2 * 3 * 5 * 4 * 12
    assert work["implicit exchange", "forward"].operations == 2 * 2 * 3 * 5 * 12 * 12
    assert work["query encoders", "forward"] == work["key encoders", "forward"]
    trained = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    assert work["gradient limit", "forward"] == Work(2 * 4 * trained)
    assert work["optimiser step", "forward"] == Work(5 * 4 * trained)
    assert work["reading data", "forward"] == Work(0)
    single = work_of_step(module, "single", **shape, streamed=True, sgd_momentum=False)
    assert single["single contrast", "forward"].operations == 2 * 2 * 3 * 5 * 4 * 12
    assert single["momentum update", "forward"] == Work(3 * 4 * 3 * per_stream)
    exchange = sum(parameter.numel() for parameter in module.exchange_heads.parameters())
    assert single["optimiser step", "forward"] == Work(3 * 4 * (trained - exchange))
    assert single["reading data", "forward"] == Work(2 * 4 * 5 * 720)
    # Every part of a batch goes through all of a queue.
    parts = work_of_step(ikem(), "single", num_clips=6, clip_shape=(3, 12, 20, 1), num_parts=2)
    part = work_of_step(ikem(), "single", num_clips=3, clip_shape=(3, 12, 20, 1))
    assert parts["single contrast", "forward"] == part["single contrast", "forward"] * 2
    assert parts["optimiser step", "forward"] == part["optimiser step", "forward"]


def test_work_of_distillation():
    module = distillation(ikem(modalities=("joint", "motion", "bone")), student_modalities=["bone"])
    shape = {"num_clips": 5, "clip_shape": (3, 12, 20, 1)}
    work = work_of_step(module, "distill", **shape)
    assert work["enqueue", "forward"] == Work(2 * 4 * 5 * (3 * 4 + 12))
    assert work["relational distillation", "forward"].operations == 2 * 12 * 5 * (3 * 4 + 12)
    assert work["relational distillation", "backward"].operations == 2 * 12 * 5 * 12
    in_training = work["teacher encoders", "forward"]
    module.teacher_encoders.eval()
    in_evaluation = work_of_step(module, "distill", **shape)["teacher encoders", "forward"]
    assert in_evaluation.operations == in_training.operations
    assert in_evaluation.bytes < in_training.bytes


def test_work_at_the_published_sizes_is_that_of_the_encoders():
    """3.65 TFLOP with all nine taps everywhere and three partitions of every joint; some need not be computed."""
    with torch.device("meta"):
        sizes = IKEM.__init__.__kwdefaults__
    assert (sizes["hidden_channels"], sizes["feature_size"], sizes["queue_size"]) == (16, 256, 32768)
    work = work_of_step(IKEM(precision="bf16"), "cross", num_clips=128, clip_shape=(3, 50, 25, 2))
    encoders = [of for (name, _), of in work.items() if name.endswith("encoders")]
    assert sum(of.operations for of in encoders) == pytest.approx(3.65e12, rel=0.25)
    assert sum(of.operations for of in encoders) > 0.9 * sum(of.operations for of in work.values())
    assert {of.kind for of in encoders} == {"bf16"}


def test_ceilings_are_measured(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(ceilings, "COPIED", {"cpu": 2**16})
    monkeypatch.setattr(ceilings, "PRODUCT", {"cpu": 64})
    found = ceilings.measure(torch.device("cpu"))
    assert found.copy_bytes_per_second > 1e7
    assert found.operations_per_second("fp32") == found.fp32_operations_per_second > 1e7
    assert found.operations_per_second("bf16") == found.bf16_operations_per_second > 1e6


# ---- mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pretrain", "--stage", "both"), "stage must be one of single, cross, got 'both'"),
        (("distill", "--stage", "single"), "stage must be left out for distill, got 'single'"),
        (("pretrain", "--steps", "0"), "steps must be at least 1, got 0"),
        (("pretrain", "--teacher", "run"), "--teacher is for distill, got it for pretrain"),
        (("pretrain", "--capture", "device=cpu"), "capture needs a CUDA device, got cpu"),
        (("distill", "--nvtx", "device=cpu"), "nvtx needs a CUDA device, got cpu"),
        (("pretrain", "--data", "nowhere"), "nowhere"),
        (("distill", "--teacher", "nowhere"), "nowhere holds no run"),
        (("pretrain", "--config", "cpu-smal"), "did you mean 'cpu-small'"),
        (("pretrain", "bach_size=3"), "did you mean 'pretrain.batch_size'"),
        (("pretrain", "batch_size", "3"), "override 'batch_size' must have the form key=value"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(arguments, message, tmp_path, capsys):
    out = tmp_path / "profile"
    assert main([*arguments, "--out", str(out)]) == 2
    text = capsys.readouterr().err
    assert text.startswith("error: ")
    assert message in text
    assert text.count("\n") == 1
    assert not out.exists() or not list(out.iterdir())


@pytest.mark.parametrize("arguments", [(), ("pretain",), ("pretrain", "--speed", "3")])
def test_unusable_command_line_shows_its_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: python -m ikem_fast.profile" in capsys.readouterr().err


def test_python_keeps_its_own_profile_within_the_package_folder():
    program = "import cProfile, profile; cProfile.run('1 + 1'); profile.run('1 + 1'); print(profile.__file__)"
    folder = Path(ikem_fast.__path__[0])
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=True)
    assert Path(done.stdout.split()[-1]).parent != folder
