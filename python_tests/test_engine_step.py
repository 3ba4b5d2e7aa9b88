"""Training steps: captured as a graph or not they train alike; who cannot capture says so and trains on."""

from __future__ import annotations

import copy
import os
import signal
from dataclasses import replace

import pytest
import small_trainers
import torch
from engine_helpers import assert_same_run, tiny_config
from recorded_graphs import RecordedGraphs

from ikem_fast import engine, ops
from ikem_fast.data.sources import StoredBatch
from ikem_fast.engine import checkpoints
from ikem_fast.engine.config import PretrainConfig
from ikem_fast.engine.cuda_graphs import CudaGraphs, open_graphs
from ikem_fast.engine.run_log import read_log
from ikem_fast.engine.step import WARM_UP_STEPS, TrainingStep
from ikem_fast.methods import IKEM

pytestmark = pytest.mark.usefixtures("one_thread")

# Eight steps of each stage, with a change of the learning rate amid them.
LONG = (
    *("pretrain.epochs=8", "pretrain.cross_epoch=5", "pretrain.milestones=[3,6]", "pretrain.max_gradient_norm=3.0"),
    *("distill.epochs=4", "distill.milestones=[3]"),
)
RECIPE = PretrainConfig(learning_rate=0.05, max_gradient_norm=3.0)
AUGMENTATION = ops.AugmentationConfig()


@pytest.fixture
def graphs(monkeypatch):
    """Graphs that every training from now on captures with."""
    recorded = RecordedGraphs()
    monkeypatch.setattr(engine.step, "open_graphs", lambda device: recorded)
    return recorded


@pytest.fixture(scope="module")
def uncaptured(clips, tmp_path_factory):
    """A pretraining and a distillation without graphs."""
    folder = tmp_path_factory.mktemp("uncaptured")
    engine.pretrain(clips, folder / "teacher", tiny_config(*LONG), progress=False)
    engine.distill(None, folder / "teacher", folder / "student", tiny_config(*LONG), progress=False)
    return folder


def notes(run):
    return [line["text"] for line in read_log(run) if line["kind"] == "note"]


def training_step(module, note=lambda text: pytest.fail(text), recipe=RECIPE, capture=True):
    return TrainingStep(
        module, recipe, seed=3, clip_length=12, augmentation=AUGMENTATION, capture=capture, note=note
    )  # fmt: skip


def stored(num_clips=9, device="cpu"):
    clips, _, num_frames = small_trainers.batch(num_clips)
    return clips.to(device), num_frames.to(device)


def resident(clips, num_frames, numbers):
    indices = torch.tensor(numbers, device=clips.device)
    return StoredBatch(clips, num_frames, indices, indices + 100)


def streamed(clips, num_frames, numbers):
    indices = torch.tensor(numbers, device=clips.device)
    return StoredBatch(clips[indices], num_frames[indices], None, indices + 100)


# ---- captured and not ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["resident", "stream"])
def test_captured_run_equals_uncaptured(uncaptured, clips, tmp_path, graphs, place):
    config = tiny_config(*LONG, f"storage.place={place}")
    run = engine.pretrain(clips, tmp_path / "run", config, progress=False)
    assert_same_run(run, uncaptured / "teacher")
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (2, 2 * WARM_UP_STEPS, 2 * (8 - WARM_UP_STEPS))


def test_captured_distillation_equals_uncaptured(uncaptured, tmp_path, graphs):
    run = engine.distill(None, uncaptured / "teacher", tmp_path / "run", tiny_config(*LONG), progress=False)
    assert_same_run(run, uncaptured / "student")
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, WARM_UP_STEPS, 8 - WARM_UP_STEPS)


@pytest.mark.parametrize("steps", [7, 14])
def test_resumed_run_captures_anew_and_equals_uncaptured(uncaptured, clips, tmp_path, graphs, steps):
    run = tmp_path / "run"
    engine.pretrain(clips, run, tiny_config(*LONG, f"max_steps={steps}"), progress=False)
    assert checkpoints.load(run / "checkpoints" / "last.pt")["step"] == steps
    engine.pretrain(clips, run, tiny_config(*LONG), progress=False)
    assert_same_run(run, uncaptured / "teacher")
    assert graphs.warm_ups + graphs.replays == 16


def test_run_that_is_stopped_amid_replays_goes_on_as_if_nothing_had_happened(uncaptured, clips, tmp_path, graphs):
    def stop(replays):
        if replays == 6:
            os.kill(os.getpid(), signal.SIGTERM)

    graphs.before_replay = stop
    run = tmp_path / "run"
    with pytest.raises(engine.TrainingInterrupted):
        engine.pretrain(clips, run, tiny_config(*LONG), progress=False)
    graphs.before_replay = lambda replays: None
    engine.pretrain(clips, run, tiny_config(*LONG), progress=False)
    assert_same_run(run, uncaptured / "teacher")


def test_run_goes_on_with_and_without_capture(uncaptured, clips, tmp_path, monkeypatch):
    run = tmp_path / "run"
    engine.pretrain(clips, run, tiny_config(*LONG, "max_steps=6"), progress=False)
    with monkeypatch.context() as patch:
        recorded = RecordedGraphs()
        patch.setattr(engine.step, "open_graphs", lambda device: recorded)
        engine.pretrain(clips, run, tiny_config(*LONG, "max_steps=14"), progress=False)
    assert recorded.captures == 1
    engine.pretrain(clips, run, tiny_config(*LONG, "capture=false"), progress=False)
    assert_same_run(run, uncaptured / "teacher")


@pytest.mark.parametrize("batch_of", [resident, streamed])
def test_new_stage_shape_and_place_are_captured_anew(graphs, monkeypatch, batch_of):
    clips, num_frames = stored()
    modules = [small_trainers.ikem(modalities=("joint", "bone"), dropout=0.3) for _ in range(2)]
    captured = training_step(modules[0])
    monkeypatch.undo()
    plain = training_step(modules[1])

    def run(stage, batch, steps=WARM_UP_STEPS + 2):
        """Some steps both ways, whose values are compared at last: they must not be overwritten by the next."""
        values, states = ([], []), []
        for one, step in zip(values, (captured, plain), strict=True):
            if states:
                torch.set_rng_state(states[0])
            else:
                states.append(torch.get_rng_state())
            for number in range(steps):
                step.begin_epoch(number + 1, stage, 0.01 * (number + 1))
                one.append(step(batch(number)))
        for ours, expected in zip(*values, strict=True):
            assert ours.names == expected.names
            assert torch.equal(ours.values, expected.values)

    run("single", lambda number: batch_of(clips, num_frames, [number, 4, 6, 2]))
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, 3, 2)
    run("single", lambda number: batch_of(clips, num_frames, [7, number, 1, 8]))  # nothing new
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, 3, 7)
    run("cross", lambda number: batch_of(clips, num_frames, [7, number, 1, 8]))
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (2, 6, 9)
    run("cross", lambda number: batch_of(clips, num_frames, [7, number, 1]))
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (3, 9, 11)
    elsewhere = clips.clone()
    run("cross", lambda number: batch_of(elsewhere, num_frames, [7, number, 1]))
    moved = batch_of is resident
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == ((4, 12, 13) if moved else (3, 9, 16))
    for ours, expected in zip(*(module.state_dict().values() for module in modules), strict=True):
        assert torch.equal(ours, expected)


# ---- not captured ----------------------------------------------------------------------------------------------------


def check_note(run, expected_run, reason):
    (text,) = notes(run)
    assert text == f"training steps are not captured as a CUDA graph: {reason}"
    assert_same_run(run, expected_run)


def test_capture_that_fails_is_noted_once(uncaptured, clips, tmp_path, graphs, monkeypatch, capsys):
    original = IKEM.contrast

    def contrast(self, *arguments):
        step = original(self, *arguments)
        step.total.item()
        return step

    monkeypatch.setattr(IKEM, "contrast", contrast)
    config = tiny_config(*LONG, "logging.tensorboard=true")
    run = engine.pretrain(clips, tmp_path / "run", config, progress=True)
    check_note(run, uncaptured / "teacher", "operation not permitted when stream is capturing")
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (1, WARM_UP_STEPS, 0)
    assert capsys.readouterr().err.count("not captured as a CUDA graph") == 1
    (note,) = (line for line in read_log(run) if line["kind"] == "note")
    assert (note["epoch"], note["step"]) == (2, 3)

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert EventAccumulator(str(run / "tensorboard")).Reload().Tags()["tensors"] == ["note/text_summary"]


def test_what_a_capture_fails_with_first_is_the_reason(graphs):
    def capture(function):
        try:
            raise RuntimeError("the cause\nand its stack")
        finally:
            raise RuntimeError("failed due to a previous error")

    graphs.capture = capture
    noted = []
    step = training_step(small_trainers.ikem(modalities=("joint",)), noted.append)
    step.begin_epoch(1, "single", 0.1)
    batch = resident(*stored(), [1, 2, 3])
    for _ in range(WARM_UP_STEPS + 2):
        step(batch)
    assert noted == ["training steps are not captured as a CUDA graph: the cause"]


def test_step_that_waits_for_the_device_is_not_captured(uncaptured, clips, tmp_path, graphs):
    graphs.problem = "a.py:3 waits for the device"
    run = engine.pretrain(clips, tmp_path / "run", tiny_config(*LONG), progress=False)
    check_note(run, uncaptured / "teacher", "a.py:3 waits for the device")
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (0, WARM_UP_STEPS, 0)


def test_capture_may_be_turned_off(uncaptured, clips, tmp_path, graphs):
    run = engine.pretrain(clips, tmp_path / "run", tiny_config(*LONG, "capture=false"), progress=False)
    check_note(run, uncaptured / "teacher", "capture is false")
    assert (graphs.captures, graphs.warm_ups, graphs.replays) == (0, 0, 0)


def test_cpu_has_nothing_to_capture_and_nothing_to_say(clips, tmp_path):
    assert open_graphs(torch.device("cpu")) is None
    for capture in ("true", "false"):
        config = tiny_config("max_steps=1", f"capture={capture}")
        assert notes(engine.pretrain(clips, tmp_path / capture, config, progress=False)) == []


# ---- the step itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sgd_momentum", [0.9, 0.0])
def test_step_is_what_it_is_made_of(sgd_momentum):
    """Also for weights that stage 2 uses first, and those that it leaves alone."""
    recipe = replace(RECIPE, sgd_momentum=sgd_momentum)
    modules = [small_trainers.ikem(modalities=("joint", "bone"), context=False) for _ in range(2)]
    step = training_step(modules[0], recipe=recipe)
    trained = [parameter for parameter in modules[1].parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1, momentum=sgd_momentum, weight_decay=recipe.weight_decay)
    clips, num_frames = stored()
    for epoch, stage in enumerate(["single"] * 3 + ["cross"] * 3, start=1):
        batch = resident(clips, num_frames, [epoch, 8, 7, 0])
        step.begin_epoch(epoch, stage, 0.1 / epoch)
        names, values = step(batch)

        optimizer.param_groups[0]["lr"] = 0.1 / epoch
        drawn = ops.draw_views(3, epoch, batch.samples, 12, AUGMENTATION)
        expected = modules[1].losses(*modules[1].views(clips, num_frames, batch.indices, drawn), stage)
        optimizer.zero_grad()
        expected.total.backward()
        for stream in range(2):
            of_stream = [p.grad[stream] for p in trained if p.grad is not None]
            norm = torch.cat([gradient.flatten() for gradient in of_stream]).norm()
            for gradient in of_stream:
                gradient.mul_(min(1.0, recipe.max_gradient_norm / norm.item()))
        optimizer.step()
        assert names == (*expected.losses, *(f"accuracy/{name}" for name in expected.accuracies))
        torch.testing.assert_close(values, torch.stack([*expected.losses.values(), *expected.accuracies.values()]))
    for (name, ours), theirs in zip(modules[0].state_dict().items(), modules[1].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


def test_captured_steps_in_parts_equal_uncaptured(graphs, monkeypatch):
    clips, num_frames = stored()
    modules = [small_trainers.ikem(modalities=("joint", "bone"), dropout=0.3) for _ in range(2)]
    captured = training_step(modules[0])
    monkeypatch.undo()
    values = []
    for step in (captured, training_step(modules[1])):
        torch.manual_seed(2)
        values.append([])
        for number in range(WARM_UP_STEPS + 3):
            step.begin_epoch(number + 1, "single", 0.01)
            parts = [resident(clips, num_frames, [number, 4]), resident(clips, num_frames, [2, 7])]
            values[-1].append(step(*parts).values)
    assert (graphs.captures, graphs.replays) == (1, 3)
    for ours, expected in zip(*values, strict=True):
        assert torch.equal(ours, expected)
    for ours, expected in zip(*(module.state_dict().values() for module in modules), strict=True):
        assert torch.equal(ours, expected)
    for parts in ([resident(clips, num_frames, [1, 4, 2, 7])], [resident(clips, num_frames, [1])] * 4):
        captured(*parts)
    assert graphs.captures == 1  # other parts warm up anew


def test_optimizer_state_of_any_sgd_is_taken():
    """Such as that of a checkpoint from before the update was fused and the learning rate a tensor."""
    batch = resident(*stored(), [0, 1, 2])
    module, other = (small_trainers.ikem(modalities=("joint",)) for _ in range(2))
    step = training_step(module)
    step.begin_epoch(1, "single", 0.1)
    step(batch)
    saved = copy.deepcopy(step.optimizer_state())
    assert saved["param_groups"][0]["momentum"] == 0.9
    (group,) = saved["param_groups"]
    saved = {**saved, "param_groups": [{**group, "lr": 0.5, "fused": None, "foreach": True}]}
    other.load_state_dict(module.state_dict())
    continued = training_step(other)
    continued.load_optimizer_state(saved)
    for one in (step, continued):
        one.begin_epoch(2, "single", 0.01)
    assert torch.equal(step(batch).values, continued(batch).values)
    for ours, expected in zip(other.parameters(), module.parameters(), strict=True):
        assert torch.equal(ours, expected)


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.slow
def test_gpu_captured_steps_equal_uncaptured_and_never_wait():
    """Ten steps of either stage, with changing epochs and rates, and a new start from the saved state amid them."""
    stages = ["single"] * 10 + ["cross"] * 10
    clips, num_frames = stored(device="cuda")
    losses, states = {}, {}
    for capture, note in ((True, lambda text: pytest.fail(text)), (False, lambda text: None)):
        module = small_trainers.ikem(dropout=0.5, hidden_channels=4, feature_size=16).cuda()
        step = training_step(module, note, capture=capture)
        torch.manual_seed(5)
        values = []
        for number, stage in enumerate(stages):
            if number in (6, 14):
                saved = copy.deepcopy((module.state_dict(), step.optimizer_state()))
                module = small_trainers.ikem(dropout=0.5, hidden_channels=4, feature_size=16).cuda()
                module.load_state_dict(saved[0])
                torch.manual_seed(number)
                step = training_step(module, note, capture=capture)
                step.load_optimizer_state(saved[1])
            step.begin_epoch(1 + number // 2, stage, 0.01 / (1 + number // 2))
            batch = resident(clips, num_frames, [number % 9, 4, 2, 7])
            replayed = step._replay is not None and stages[number - 1] == stage
            if replayed:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                values.append(step(batch).values)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert (step._replay is not None) is capture
        losses[capture], states[capture] = values, module.state_dict()
    for number, (ours, expected) in enumerate(zip(losses[True], losses[False], strict=True)):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4, msg=lambda t, n=number: f"step {n}: {t}")
    for name, ours in states[True].items():
        torch.testing.assert_close(ours, states[False][name], rtol=1e-2, atol=1e-3, msg=lambda t, n=name: f"{n}: {t}")


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("place", ["resident", "stream"])
def test_gpu_captured_run_equals_uncaptured(clips, tmp_path, place):
    lines = {}
    for capture in ("true", "false"):
        run = tmp_path / capture
        config = (*LONG, "device=cuda", f"capture={capture}", f"storage.place={place}", "learning_rate=0.002")
        engine.pretrain(clips, run, tiny_config(*config, "max_steps=7"), progress=False)
        engine.pretrain(clips, run, tiny_config(*config), progress=False)
        lines[capture] = [line for line in read_log(run) if line["kind"] == "train"]
        # Each of the two processes says so.
        assert len(notes(run)) == (0 if capture == "true" else 2)
    for ours, expected in zip(lines["true"], lines["false"], strict=True):
        assert ours["step"] == expected["step"]
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-3)


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("rehearsed", [True, False])
def test_gpu_run_goes_on_where_its_steps_cannot_be_captured(clips, tmp_path, monkeypatch, rehearsed):
    """An operator waits for the device: found before the capture, or by it. Random numbers go on as ever."""
    original = IKEM.contrast

    def contrast(self, *arguments):
        step = original(self, *arguments)
        step.total.item()
        return step

    config = (*LONG, "device=cuda", "learning_rate=0.002")
    expected = engine.pretrain(clips, tmp_path / "expected", tiny_config(*config, "capture=false"), progress=False)
    monkeypatch.setattr(IKEM, "contrast", contrast)
    if not rehearsed:
        monkeypatch.setattr(CudaGraphs, "rehearse", lambda self, function: (self.warm_up(function), None))
    run = engine.pretrain(clips, tmp_path / "run", tiny_config(*config), progress=False)
    (note,) = notes(run)
    assert "training steps are not captured as a CUDA graph: " in note
    assert ("waits for the device" in note) is rehearsed
    pairs = [[line for line in read_log(folder) if line["kind"] == "train"] for folder in (run, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-3)
