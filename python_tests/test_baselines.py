"""What this package is compared with computes the method: both manners against the authors' release's numbers."""

import numpy as np
import pytest
import reference_vectors as vectors
import small_trainers
import torch
from torch.nn import functional

from benchmarks.baselines import eager, release_manner, trainers
from ikem_fast import MODALITIES, layouts, load_reference, ops
from ikem_fast.quirks import Quirks

LAYOUT = layouts.get("ntu-rgb+d")


@pytest.fixture(params=[eager, release_manner], ids=["eager", "release_manner"])
def manner(request):
    return request.param


def test_preparation(manner):
    arrays = vectors.load("preprocess.npz")
    for name in arrays["names"]:
        clip, length = manner.prepare_clip(arrays[f"xyz/{name}"], LAYOUT, 50)
        assert clip.dtype == np.float32
        assert vectors.relative_error(clip, arrays[f"position/{name}"]) < 5e-6  # which was made in float32
        assert length == np.any(arrays[f"xyz/{name}"][:, :, 0, 0] != 0, axis=0).sum()


def test_modalities(manner):
    arrays = vectors.load("modalities.npz")
    derived = manner.derive_modalities(
        torch.tensor(arrays["input"]), torch.tensor(arrays["num_frames"]), LAYOUT, MODALITIES
    )
    assert tuple(derived) == MODALITIES
    for name, values in derived.items():
        assert vectors.relative_error(values, arrays[name]) < 1e-6, name
    few = manner.derive_modalities(*(torch.tensor(arrays[key]) for key in ("input", "num_frames")), LAYOUT, ["bone"])
    assert list(few) == ["bone"]
    assert torch.equal(few["bone"], derived["bone"])


def test_augmentation(manner):
    arrays = vectors.load("augmentations.npz")
    clips = torch.tensor(arrays["input"]).expand(4, -1, -1, -1, -1)

    def of_draws(name):
        return torch.tensor(np.stack([arrays[f"{name.format(i)}"] for i in range(4)]))

    nothing = torch.zeros(4, 3)
    middle = torch.full((4,), clips.shape[2] // 6)
    cropped = manner.augment(clips, eager.Augmentation(of_draws("crop{}/start"), nothing, nothing))
    assert torch.equal(cropped, of_draws("crop{}/output"))
    sheared = manner.augment(clips, eager.Augmentation(middle, of_draws("shear{}/s1"), of_draws("shear{}/s2")))
    assert vectors.relative_error(sheared, of_draws("shear{}/output")) < 1e-6
    assert sheared.dtype == torch.float32


def test_drawn_numbers_are_in_their_ranges(manner):
    torch.manual_seed(0)
    drawn = manner.draw_augmentation(2000, 50, torch.device("cpu"))
    assert sorted(set(drawn.start.tolist())) == list(range(17))
    for values in (drawn.first, drawn.second):
        assert values.shape == (2000, 3)
        assert -0.5 <= values.min() < -0.49
        assert 0.49 < values.max() <= 0.5


def release_run(name, manner, dtype):
    """Numbers of a run of the release, a trainer that begins as it did, and its batch."""
    arrays = vectors.load(f"{name}.npz")
    state = vectors.state_dict(arrays) if name == "single" else vectors.checkpoint(f"{name}_reference_checkpoint.pt")
    trainer = trainers.like(load_reference(state, dropout=0.0), manner).to(dtype)
    return arrays, trainer, [*(torch.tensor(arrays[n]).to(dtype) for n in ("im_q", "im_k")), arrays["num_frames"]]


@pytest.mark.parametrize("run", ["single", "cross", "distill"])
def test_three_steps_of_the_release(manner, run):
    """Losses and final norms of three SGD steps; of the distillation in float64, for the sake of a ReLU (see below)."""
    dtype = torch.float64 if run == "distill" else torch.float32
    arrays, trainer, (view_q, view_k, num_frames) = release_run(run, manner, dtype)
    optimizer = vectors.release_optimizer(trainer, arrays)
    for step in range(3):
        losses, keys = trainer.losses(view_q, view_k, torch.tensor(num_frames), stage=run)
        values = torch.stack(list(losses.values()))
        summed = values.unflatten(0, (-1, len(arrays["step0/losses"]))).sum(dim=0)
        assert vectors.relative_error(summed, arrays[f"step{step}/losses"]) < 1e-5
        optimizer.zero_grad()
        values.sum().backward()
        trainer.enqueue(keys)
        optimizer.step()
    final = {name: tensor.detach() for name, tensor in trainer.tensors_by_release_name().items()}
    vectors.assert_norms_agree(final, arrays)


@pytest.mark.parametrize(("run", "num_gradients"), [("single", 624), ("cross", 648), ("distill", 312)])
def test_gradients_and_queues_of_the_release(manner, run, num_gradients):
    """Of a first step, in float64: where rounding turns the sign before a ReLU, gradients jump."""
    arrays, trainer, (view_q, view_k, num_frames) = release_run(run, manner, torch.float64)
    losses, keys = trainer.losses(view_q, view_k, torch.tensor(num_frames), stage=run)
    torch.stack(list(losses.values())).sum().backward()
    trainer.enqueue(keys)
    tensors = trainer.tensors_by_release_name()
    gradients = {name: torch.zeros_like(t) if t.grad is None else t.grad for name, t in tensors.items()}
    queues = {name: t if name.startswith("queue_ptr") else t.detach().float() for name, t in tensors.items()}
    vectors.assert_queues_and_gradients_agree(queues, gradients, arrays, num_gradients=num_gradients)


def test_logits_of_the_linear_evaluation(manner):
    arrays = vectors.load("linear_eval.npz")
    classifier = load_reference(vectors.state_dict(arrays))
    trainer = trainers.Pretraining(
        manner, LAYOUT, MODALITIES, hidden_channels=4, feature_size=16, embedding_size=8, queue_size=64
    ).eval()
    for stream, name in enumerate(MODALITIES):
        state = classifier.encoders.stream_tensors(stream)
        encoder = trainer.query_encoders[name]
        encoder.load_state_dict(
            {**encoder.state_dict(), **{k: v for k, v in state.items() if not k.startswith("head")}}
        )
    with torch.no_grad():
        features = trainer.features(torch.tensor(arrays["input"]), torch.tensor(arrays["num_frames"]))
    head = classifier.encoders.head[0]
    logits = torch.baddbmm(head.bias.unsqueeze(1), features, head.weight.mT)
    for row, name in enumerate(MODALITIES):
        assert vectors.relative_error(logits[row], arrays[f"logits/{name}"]) < 1e-5
    assert vectors.relative_error(logits.mean(dim=0), arrays["logits/all"]) < 1e-5


@pytest.mark.parametrize("stage", ["single", "cross"])
def test_a_step_from_stored_clips(manner, stage):
    """The same augmented clips, weights and queues as after a step made of the package's definitions."""
    module = small_trainers.ikem().double()
    module.queue.copy_(functional.normalize(module.queue, dim=1))  # of unit length in float64, too
    step = trainers.TrainingStep(trainers.like(module, manner), stage, learning_rate=0.5)
    clips, _, num_frames = small_trainers.batch(num_clips=7)
    clips = clips.double()
    indices = torch.tensor([6, 0, 3, 3, 2])
    drawn = ops.draw_views_reference(5, 2, indices, clips.shape[2], ops.AugmentationConfig())
    views = [drawn.view(number) for number in range(2)]
    losses = step(
        clips, num_frames, indices, [eager.Augmentation(v.crop_start, v.shear_first, v.shear_second) for v in views]
    )
    optimizer = torch.optim.SGD(module.stage_parameters(stage), lr=0.5, momentum=0.9, weight_decay=1e-4)
    expected = module.training_losses(*(ops.augment(clips[indices], v) for v in views), num_frames[indices], stage)
    expected.total.backward()
    optimizer.step()
    torch.testing.assert_close(losses, expected.losses)
    again = trainers.like(module, manner)
    assert int(again.pointer) == int(step.trainer.pointer) == 5
    tensors = step.trainer.tensors_by_release_name()
    for name, tensor in again.tensors_by_release_name().items():
        torch.testing.assert_close(tensors[name].detach(), tensor.detach(), msg=lambda text, n=name: f"{n}: {text}")
    assert step(clips, num_frames, indices).keys() == losses.keys()
    assert int(step.trainer.pointer) == 10


def test_the_early_fusion_student_has_no_baseline(manner):
    three = ("joint", "motion", "bone")
    teacher = small_trainers.ikem(modalities=three, quirks=Quirks(early_fusion_student=True))
    with pytest.raises(ValueError, match="got an early-fusion student"):
        trainers.like(small_trainers.distillation(teacher), manner)
