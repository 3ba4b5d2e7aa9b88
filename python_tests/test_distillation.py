import pytest
import reference_vectors as vectors
import small_trainers
import torch
from torch.nn import functional

from ikem_fast import MODALITIES, load_reference, methods, ops
from ikem_fast.quirks import Quirks

THREE = ("joint", "motion", "bone")


def test_three_steps_of_the_release():
    """Losses, gradients, queues and final norms of three SGD steps."""
    arrays = vectors.load("distill.npz")
    module = load_reference(vectors.checkpoint("distill_reference_checkpoint.pt"), dropout=0.0)
    optimizer = vectors.release_optimizer(module, arrays)
    views = [torch.tensor(arrays[name]) for name in ("im_q", "im_k", "num_frames")]
    for step in range(3):
        result = module.training_losses(*views)
        losses = result.losses
        assert list(losses) == [f"distill/{name}" for name in THREE]
        assert vectors.relative_error(torch.stack(list(losses.values())), arrays[f"step{step}/losses"]) < 1e-5
        optimizer.zero_grad()
        result.total.backward()
        if step == 0:
            vectors.assert_first_step_agrees(module, arrays, num_gradients=312)
        optimizer.step()
    vectors.assert_final_norms_agree(module, arrays)


def test_the_teacher_is_that_of_pretraining_and_frozen():
    teacher = small_trainers.ikem()
    module = small_trainers.distillation(teacher)
    copied = module.teacher_encoders.state_dict()
    for name, tensor in teacher.query_encoders.state_dict().items():
        assert torch.equal(copied[name], tensor)
    view_q, _, num_frames = small_trainers.batch()
    teacher.eval(), module.eval()
    torch.testing.assert_close(module.features(view_q, num_frames, "teacher"), teacher.features(view_q, num_frames))
    module.train().training_losses(*small_trainers.batch()).total.backward()
    assert all(parameter.grad is None for parameter in module.teacher_encoders.parameters())
    assert all(parameter.grad is not None for parameter in module.student_encoders.parameters())


@pytest.mark.parametrize("teacher_modalities", [MODALITIES, ("joint", "angular_velocity")])
@pytest.mark.parametrize("student_modalities", [THREE, ("acceleration",)])
def test_any_teacher_and_students(teacher_modalities, student_modalities):
    teacher = small_trainers.ikem(modalities=teacher_modalities)
    module = small_trainers.distillation(teacher, student_modalities=student_modalities, topk=2)
    losses = module.training_losses(*small_trainers.batch()).losses
    assert list(losses) == [f"distill/{name}" for name in student_modalities]
    assert module.queue_pointer.tolist() == module.teacher_queue_pointer.tolist() == [5]
    assert module.features(*small_trainers.batch()[1:]).shape == (len(student_modalities), 5, 6)
    assert module.student_encoders.head[0].out_features == 4 * len(teacher_modalities)


def test_the_first_view_goes_to_the_teacher_and_the_second_to_the_student():
    module = small_trainers.distillation(quirks=Quirks(teacher_in_training_mode=False)).eval()
    view_q, view_k, num_frames = small_trainers.batch()
    module.training_losses(view_q, view_k, num_frames)
    views = small_trainers.derived(module, view_q, num_frames)
    t = functional.normalize(module.teacher_encoders(views), dim=2)
    torch.testing.assert_close(module.queue[:, :, :5].mT, t)
    joint = functional.normalize(torch.cat(list(t), dim=1), dim=1)
    torch.testing.assert_close(module.teacher_queue[:, :5].T, joint)


@pytest.mark.parametrize("swapped", [True, False])
def test_quirk_2_which_queue_the_angular_velocity_sees(swapped):
    module = small_trainers.distillation(quirks=Quirks(bone_queue_for_angular_velocity=swapped))
    bone, angular_velocity = MODALITIES.index("bone"), MODALITIES.index("angular_velocity")
    assert torch.equal(module._queues()[angular_velocity], module.queue[bone]) is swapped
    assert torch.equal(module._queues()[:angular_velocity], module.queue[:angular_velocity])


@pytest.mark.parametrize("training", [True, False])
def test_quirk_3_the_mode_of_the_teacher(training):
    module = small_trainers.distillation(quirks=Quirks(teacher_in_training_mode=training))
    before = module.teacher_encoders.input_norm.running_mean.clone()
    module.train()
    module.training_losses(*small_trainers.batch())
    assert module.student_encoders.training
    assert module.teacher_encoders.training is training
    assert torch.equal(module.teacher_encoders.input_norm.running_mean, before) is not training
    module.eval()
    assert not module.teacher_encoders.training


@pytest.mark.parametrize("early_fusion", [True, False])
def test_quirk_4_the_three_modality_variant(early_fusion):
    quirks = Quirks(early_fusion_student=early_fusion)
    module = small_trainers.distillation(small_trainers.ikem(modalities=THREE, quirks=quirks))
    view_q, view_k, num_frames = small_trainers.batch()
    bones = module.derive(view_q, num_frames).views[0, 2]
    assert bool(bones[:, :, module.layout.root].any()) is not early_fusion
    losses = module.training_losses(view_q, view_k, num_frames).losses
    if early_fusion:
        assert list(losses) == ["distill/early_fusion"]
        student = module.student_encoders
        assert student.in_channels == 9
        assert [layer.out_features for layer in student.head if hasattr(layer, "out_features")] == [12, 12]
        assert module.features(view_q, num_frames).shape == (1, 5, 6)
    else:
        assert list(losses) == [f"distill/{name}" for name in THREE]


@pytest.mark.parametrize("early_fusion", [True, False])
def test_stored_clips_give_the_losses_of_clips_augmented_beforehand(early_fusion):
    clips, _, num_frames = small_trainers.batch(num_clips=7, num_persons=2)
    indices = torch.tensor([6, 0, 3, 3, 2])
    drawn = ops.draw_views(5, 2, indices, clips.shape[2], ops.AugmentationConfig())
    teacher = {"modalities": THREE, "quirks": Quirks(early_fusion_student=True)} if early_fusion else {}
    stored, beforehand = (small_trainers.distillation(small_trainers.ikem(**teacher)) for _ in range(2))
    views = stored.views(clips, num_frames, indices, drawn)
    assert [view.views.shape[:2] for view in views] == [(1, 3 if early_fusion else 6), (1, 3)]
    losses = stored.losses(*views).losses
    augmented = [ops.augment(clips[indices], drawn.view(view)) for view in range(2)]
    expected = beforehand.training_losses(*augmented, num_frames[indices]).losses
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_quirk_4_leaves_six_modality_teachers_alone():
    module = small_trainers.distillation(small_trainers.ikem(quirks=Quirks.release()))
    assert module.feature_names == THREE
    assert module.derive(*small_trainers.batch()[1:]).views[0, 2][:, :, module.layout.root].any()


def test_config_rebuilds_the_module():
    module = small_trainers.distillation(student_modalities=("bone",), topk=3, queue_size=7, quirks=Quirks.release())
    again = methods.from_config(module.config())
    assert again.config() == module.config()
    again.load_state_dict(module.state_dict())


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="part must be 'student' or 'teacher', got 'both'"):
        small_trainers.distillation().features(*small_trainers.batch()[1:], part="both")
    with pytest.raises(ValueError, match="topk must be in"):
        small_trainers.distillation(topk=0)
