"""The training loop: what it writes down, and that an interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from engine_helpers import NUM_TRAIN, assert_same_run, comparable_log, tiny_config

from ikem_fast import engine
from ikem_fast.data import DataError
from ikem_fast.engine import checkpoints, randomness
from ikem_fast.engine.loop import learning_rate, parts_of_batch, stage_of
from ikem_fast.engine.run_log import read_log
from ikem_fast.methods import IKEM, RelationalDistillation, StepLosses
from ikem_fast.ops import draw_views

STEPS_PER_EPOCH = NUM_TRAIN // 4

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def straight_run(clips, tmp_path_factory):
    """A pretraining that nobody interrupts: four epochs of two steps, two in each stage."""
    return engine.pretrain(clips, tmp_path_factory.mktemp("runs") / "straight", tiny_config(), progress=False)


@pytest.fixture(scope="module")
def straight_student(clips, straight_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "student"
    return engine.distill(None, straight_run, out, tiny_config(), progress=False)


def interfere(monkeypatch, method_class, at_call, action):
    """Calls ``action`` inside the forward pass of the ``at_call``-th step from now on."""
    original, calls = method_class.contrast, 0

    def wrapped(self, *arguments, **options):
        nonlocal calls
        calls += 1
        losses = original(self, *arguments, **options)
        return action(losses) if calls == at_call else losses

    monkeypatch.setattr(method_class, "contrast", wrapped)


def terminate(losses):
    os.kill(os.getpid(), signal.SIGTERM)
    return losses


def die(losses):
    raise MemoryError("as abrupt as a kill, as far as the run folder is concerned")


def test_run_folder_holds_everything(straight_run):
    assert {path.name for path in straight_run.iterdir()} == {".lock", "checkpoints", "config.yaml", "log.jsonl"}
    assert {path.name for path in (straight_run / "checkpoints").iterdir()} == {"last.pt", "previous.pt"}
    assert engine.load_config(straight_run / "config.yaml") == tiny_config()
    checkpoint = checkpoints.load(straight_run / "checkpoints" / "last.pt")
    assert (checkpoint["kind"], checkpoint["epoch"], checkpoint["step"]) == ("pretrain", 4, 8)
    assert checkpoint["versions"]["torch"] == torch.__version__
    assert engine.load_config(checkpoint["config"]) == tiny_config()
    assert int(checkpoint["model"]["queue_pointer"]) == 8 * 4 % 12


def test_log_lines(straight_run):
    lines = list(read_log(straight_run))
    train_lines = [line for line in lines if line["kind"] == "train"]
    # A line every three steps, and one where the stage changes.
    assert [(line["step"], line["steps"]) for line in train_lines] == [(3, 3), (4, 1), (6, 2), (8, 2)]
    assert [line["epoch"] for line in train_lines] == [2, 2, 3, 4]
    assert [line["stage"] for line in train_lines] == ["single"] * 2 + ["cross"] * 2
    assert [line["learning_rate"] for line in train_lines] == pytest.approx([0.02] * 2 + [0.002] * 2)
    assert set(train_lines[0]["losses"]) == {"single/joint", "single/motion"}
    assert set(train_lines[-1]["losses"]) == {f"{a}/{b}" for a in ("context", "exchange") for b in ("joint", "motion")}
    assert [set(line["contrast_accuracy"]) for line in train_lines] == [{"single/joint", "single/motion"}] * 2 + [
        {f"{a}/{b}" for a in ("single", "exchange") for b in ("joint", "motion")}
    ] * 2
    for line in train_lines:
        assert all(0 <= accuracy <= 1 for accuracy in line["contrast_accuracy"].values())
        assert line["loss"] == pytest.approx(sum(line["losses"].values()))
        assert line["clips_per_second"] > 0
    knn_lines = [line for line in lines if line["kind"] == "knn"]
    assert [(line["epoch"], line["step"]) for line in knn_lines] == [(2, 4), (4, 8)]
    assert set(knn_lines[0]["accuracy"]) == {"joint", "motion", "all"}
    assert all(0 <= value <= 1 for line in knn_lines for value in line["accuracy"].values())


def test_stages_and_learning_rate():
    section = engine.load_config().pretrain
    rates = [learning_rate(section, epoch) for epoch in (1, 250, 251, 300)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])
    assert [stage_of("pretrain", section, epoch) for epoch in (1, 150, 151)] == ["single", "single", "cross"]
    section.cross_epoch = None
    assert stage_of("pretrain", section, 300) == "single"
    assert stage_of("distill", section, 1) == "distill"


def test_learning_rate_grows_with_the_batch():
    section = engine.load_config(None, ["pretrain.batch_size=512", "pretrain.reference_batch_size=128"]).pretrain
    assert [learning_rate(section, epoch) for epoch in (1, 251)] == pytest.approx([0.4, 0.04])
    section.reference_batch_size = None
    assert learning_rate(section, 1) == 0.1


def test_ranks_and_parts_share_a_batch_in_order():
    batch = np.arange(24)[::-1]
    parts = [parts_of_batch(batch, rank, 3, 2) for rank in range(3)]
    assert np.array_equal(np.concatenate([part for of_rank in parts for part in of_rank]), batch)
    assert {part.shape for of_rank in parts for part in of_rank} == {(4,)}


def test_order_of_clips_depends_on_seed_and_epoch_alone():
    first = randomness.epoch_order(100, 3, 5)
    torch.rand(7)
    assert torch.equal(first, randomness.epoch_order(100, 3, 5))
    assert sorted(first.tolist()) == list(range(100))
    assert not torch.equal(first, randomness.epoch_order(100, 3, 6))
    assert not torch.equal(first, randomness.epoch_order(100, 4, 5))


def test_views_of_a_step_differ_and_every_clip_comes_once_an_epoch(clips, tmp_path, monkeypatch):
    seen, views = [], []

    def draw(seed, epoch, samples, *arguments):
        seen.append(samples.tolist())
        return draw_views(seed, epoch, samples, *arguments)

    def contrast(self, view_q, view_k, *_):
        views.append((view_q.views.clone(), view_k.views.clone()))
        total = sum(p.sum() for p in self.query_encoders.parameters()) * 0.0
        return StepLosses(total, {"single/joint": total.detach()}, {}, torch.zeros(2, 4, self.embedding_size))

    monkeypatch.setattr(engine.step, "draw_views", draw)
    monkeypatch.setattr(IKEM, "contrast", contrast)
    config = tiny_config("pretrain.cross_epoch=null", "knn_every_epochs=0", f"max_steps={STEPS_PER_EPOCH}")
    engine.pretrain(clips, tmp_path / "run", config, progress=False)
    assert [len(indices) for indices in seen] == [4] * STEPS_PER_EPOCH
    assert len({index for indices in seen for index in indices}) == 4 * STEPS_PER_EPOCH
    for view_q, view_k in views:
        assert view_q.shape == (1, 2, 4, 12, 20, 3)
        assert not torch.equal(view_q, view_k)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_where_the_clips_lie_changes_nothing(straight_run, clips, tmp_path, dtype):
    runs = {}
    for place in ("resident", "stream"):
        config = tiny_config(f"storage.place={place}", f"storage.dtype={dtype}")
        runs[place] = engine.pretrain(clips, tmp_path / place, config, progress=False)
    assert_same_run(runs["resident"], runs["stream"])
    as_by_default = comparable_log(runs["stream"]) == comparable_log(straight_run)
    assert as_by_default is (dtype == "float32")


def test_clips_that_cannot_be_read_end_the_run_with_its_last_good_checkpoint(clips, tmp_path, monkeypatch):
    folder = shutil.copytree(clips, tmp_path / "clips")

    def truncate(losses):
        os.truncate(folder / "clips.npy", 2000)
        return losses

    interfere(monkeypatch, IKEM, 2, truncate)
    config = tiny_config("storage.place=stream")
    with pytest.raises(DataError, match=r"clips\.npy.*the last good checkpoint is .*last\.pt \(epoch 1, step 2\)"):
        engine.pretrain(folder, tmp_path / "run", config, progress=False)


@pytest.mark.parametrize("at_step", [4, 5, 8])
def test_resumed_after_sigterm_equals_uninterrupted(straight_run, clips, tmp_path, monkeypatch, at_step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interfere(patch, IKEM, at_step, terminate)
        with pytest.raises(engine.TrainingInterrupted) as stopped:
            engine.pretrain(clips, out, tiny_config(), progress=False)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in str(stopped.value)
    assert checkpoints.load(out / "checkpoints" / "last.pt")["step"] == at_step
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    engine.pretrain(clips, out, tiny_config(), progress=False)
    assert_same_run(out, straight_run)


def test_resumed_after_sudden_death_equals_uninterrupted(straight_run, clips, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interfere(patch, IKEM, 4, die)
        with pytest.raises(MemoryError):
            engine.pretrain(clips, out, tiny_config(), progress=False)
    assert [line["step"] for line in read_log(out)] == [3]  # written after the checkpoint of step 2
    with open(out / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"kind": "train", "step": 99')  # a line that was being written
    (out / "checkpoints" / ".last.pt.abc.tmp").write_bytes(b"half a checkpoint")
    engine.pretrain(clips, out, tiny_config(), progress=False)
    assert_same_run(out, straight_run)
    assert not list((out / "checkpoints").glob(".*"))


def test_continued_beyond_max_steps_equals_uninterrupted(straight_run, clips, tmp_path):
    out = tmp_path / "run"
    engine.pretrain(clips, out, tiny_config("max_steps=5"), progress=False)
    lines = [line for line in read_log(out) if line["kind"] == "train"]
    assert [(line["step"], line["steps"]) for line in lines] == [(3, 3), (4, 1), (5, 1)]
    assert checkpoints.load(out / "checkpoints" / "last.pt")["step"] == 5
    engine.pretrain(clips, out, tiny_config("max_steps=6"), progress=False)
    assert list(read_log(out))[-1]["epoch"] == 3
    assert checkpoints.load(out / "checkpoints" / "last.pt")["epoch"] == 3
    engine.pretrain(clips, out, tiny_config(), progress=False)
    assert_same_run(out, straight_run)


def test_run_that_is_done_stays_as_it_is(straight_run, clips):
    before = {path: path.read_bytes() for path in straight_run.rglob("*") if path.is_file()}
    engine.pretrain(clips, straight_run, tiny_config(), progress=False)
    after = {path: path.read_bytes() for path in straight_run.rglob("*") if path.is_file()}
    assert before == after


def test_resumed_distillation_equals_uninterrupted(straight_run, straight_student, tmp_path, monkeypatch):
    assert [line["stage"] for line in read_log(straight_student) if line["kind"] == "train"] == ["distill"] * 2
    out = tmp_path / "student"
    with monkeypatch.context() as patch:
        interfere(patch, RelationalDistillation, 3, terminate)
        with pytest.raises(engine.TrainingInterrupted):
            engine.distill(None, straight_run, out, tiny_config(), progress=False)
    engine.distill(None, straight_run, out, tiny_config(), progress=False)
    assert_same_run(out, straight_student)


def test_teacher_stays_frozen(straight_run, straight_student):
    teacher, _ = engine.load_run(straight_run)
    student, checkpoint = engine.load_run(straight_student)
    assert checkpoint["teacher"] == {"run": str(straight_run.resolve()), "step": 8}
    for name, parameter in teacher.query_encoders.named_parameters():
        assert torch.equal(parameter, dict(student.teacher_encoders.named_parameters())[name]), name


def test_signal_during_knn_leaves_it_for_the_next_run(straight_run, clips, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        original = engine.loop.extract

        def extract(*arguments, **options):
            terminate(None)
            return original(*arguments, **options)

        patch.setattr(engine.loop, "extract", extract)
        with pytest.raises(engine.TrainingInterrupted):
            engine.pretrain(clips, out, tiny_config(), progress=False)
    assert all(line["kind"] == "train" for line in read_log(out))
    engine.pretrain(clips, out, tiny_config(), progress=False)
    assert_same_run(out, straight_run)


def test_second_ctrl_c_does_not_wait(clips, tmp_path, monkeypatch):
    def twice(losses):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler that repeats itself changes nothing
        os.kill(os.getpid(), signal.SIGINT)
        return losses

    interfere(monkeypatch, IKEM, 2, twice)
    before = signal.getsignal(signal.SIGINT)  # ignored, where the tests run in a background job
    with pytest.raises(KeyboardInterrupt):
        engine.pretrain(clips, tmp_path / "run", tiny_config(), progress=False)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(("at_step", "good"), [(1, "epoch 0, step 0"), (4, "epoch 1, step 2")])
def test_non_finite_loss_names_step_and_last_good_checkpoint(clips, tmp_path, monkeypatch, at_step, good):
    def spoil(step):
        return replace(step, losses={**step.losses, "single/motion": step.losses["single/motion"] * float("nan")})

    interfere(monkeypatch, IKEM, at_step, spoil)
    epoch = (at_step - 1) // STEPS_PER_EPOCH + 1
    message = rf"loss single/motion is nan in epoch {epoch}, step {at_step}; the last good .*last\.pt \({good}\)"
    with pytest.raises(engine.NonFiniteError, match=message):
        engine.pretrain(clips, tmp_path / "run", tiny_config(), progress=False)
    model = checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["model"]
    assert all(bool(torch.isfinite(tensor).all()) for tensor in model.values())


def test_weights_that_are_not_finite_are_never_saved(clips, tmp_path, monkeypatch):
    def explode(step):
        # The loss itself is finite; its gradient is what the update cannot stand.
        return replace(step, total=step.total + (step.total * 0.0).sqrt())

    interfere(monkeypatch, IKEM, 2, explode)
    with pytest.raises(engine.NonFiniteError, match=r"query_encoders\.\S* is not finite after step 2"):
        engine.pretrain(clips, tmp_path / "run", tiny_config(), progress=False)
    assert checkpoints.load(tmp_path / "run" / "checkpoints" / "last.pt")["step"] == 0


def test_set_smaller_than_a_batch_is_refused(clips, tmp_path):
    config = tiny_config("pretrain.batch_size=10")
    with pytest.raises(engine.ConfigError, match="at most the number of training clips, 9, got 10"):
        engine.pretrain(clips, tmp_path / "run", config, progress=False)


def test_tensorboard_and_kept_checkpoints(clips, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    options = ("logging.tensorboard=true", "keep_every_epochs=2")
    engine.pretrain(clips, out, tiny_config(*options, "max_steps=5"), progress=False)
    engine.pretrain(clips, out, tiny_config(*options), progress=False)
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [
        "epoch-0002.pt",
        "epoch-0004.pt",
        "last.pt",
        "previous.pt",
    ]
    assert checkpoints.load(out / "checkpoints" / "epoch-0002.pt")["step"] == 4
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    # Step 5 ended the first run in mid-window, and was taken back when the run went on.
    assert [event.step for event in events.Scalars("train/loss")] == [3, 4, 6, 8]
    assert [event.step for event in events.Scalars("knn/all")] == [4, 8]
    logged = {line["step"]: line["loss"] for line in read_log(out) if line["kind"] == "train"}
    assert {event.step: event.value for event in events.Scalars("train/loss")} == pytest.approx(logged, rel=1e-6)


def test_progress_bar_shows_losses_and_speed(clips, tmp_path, capsys):
    engine.pretrain(clips, tmp_path / "run", tiny_config("max_steps=4"), progress=True)
    shown = capsys.readouterr().err
    assert "9 clips, 2 steps of 4 an epoch" in shown
    for part in ("pretrain epoch 2/4 single", "4/4", "single/joint", "clips/s"):
        assert part in shown


def test_random_state_of_every_generator_is_kept():
    import random

    state = json.loads(json.dumps(randomness.random_state(), default=lambda tensor: tensor.tolist()))
    assert set(state) == {"torch", "cuda", "numpy", "python"}
    kept = randomness.random_state()
    drawn = (random.random(), np.random.rand(), torch.rand(3).tolist())
    randomness.set_random_state(kept)
    assert drawn == (random.random(), np.random.rand(), torch.rand(3).tolist())


def test_random_numbers_of_ranks_differ_and_repeat():
    drawn = []
    for key in ((7, 0, 0), (7, 0, 1), (7, 5, 1), (8, 0, 1), (7, 0, 1)):
        randomness.seed_rank(*key)
        drawn.append((torch.rand(1).item(), np.random.rand()))
    assert drawn[1] == drawn[4]
    assert len(set(drawn)) == 4


def test_step_in_parts_is_logged_as_one(clips, tmp_path):
    """And a run goes on in the middle of an epoch of such steps."""
    config = ("pretrain.accumulate_steps=2", "model.dropout=0.3")
    straight = engine.pretrain(clips, tmp_path / "straight", tiny_config(*config), progress=False)
    checkpoint = checkpoints.load(straight / "checkpoints" / "last.pt")
    assert (checkpoint["step"], int(checkpoint["model"]["queue_pointer"])) == (8, 8 * 4 % 12)
    pieces = tmp_path / "pieces"
    engine.pretrain(clips, pieces, tiny_config(*config, "max_steps=3"), progress=False)
    with pytest.raises(engine.RunError, match=r"pretrain\.accumulate_steps is 1, not 2"):
        engine.pretrain(clips, pieces, tiny_config("model.dropout=0.3"), progress=False)
    engine.pretrain(clips, pieces, tiny_config(*config), progress=False)
    assert_same_run(pieces, straight)


def test_long_gradients_are_shortened(clips, tmp_path):
    """One step from the same weights: without momentum an update is the rate times the gradient, by modality."""
    lengths = {}
    for limit in ("null", "0.001"):
        out = tmp_path / f"run-{limit}"
        options = ("pretrain.sgd_momentum=0.0", "pretrain.weight_decay=0.0", f"pretrain.max_gradient_norm={limit}")
        engine.pretrain(clips, out, tiny_config(*options, "max_steps=1"), progress=False)
        before, after = (checkpoints.load(out / "checkpoints" / name)["model"] for name in ("previous.pt", "last.pt"))
        trained = [name for name, p in engine.load_run(out)[0].named_parameters() if p.requires_grad]
        moved = torch.cat([(after[name] - before[name]).double().flatten(1) for name in trained], dim=1)
        lengths[limit] = moved.norm(dim=1)
    assert (lengths["null"] > 100 * lengths["0.001"]).all()
    assert lengths["0.001"].tolist() == pytest.approx([0.02 * 0.001] * 2, rel=0.05)
