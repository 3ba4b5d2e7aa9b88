import pytest
import reference_vectors as vectors
import small_trainers
import torch
from torch.nn import functional

from ikem_fast import MODALITIES, load_reference, methods, ops
from ikem_fast.quirks import Quirks


def release_run(name):
    arrays = vectors.load(f"{name}.npz")
    if name == "single":
        return arrays, vectors.state_dict(arrays)
    return arrays, vectors.checkpoint(f"{name}_reference_checkpoint.pt")


def release_losses(module, stage, losses):
    if stage == "single":
        return {name: losses[f"single/{name}"] for name in MODALITIES}
    return {name: losses[f"context/{name}"] + losses[f"exchange/{name}"] for name in MODALITIES}


@pytest.mark.parametrize("stage", ["single", "cross"])
def test_three_steps_of_the_release(stage):
    """Losses, gradients, queues and final norms of three SGD steps."""
    arrays, state = release_run(stage)
    module = load_reference(state, dropout=0.0)
    optimizer = vectors.release_optimizer(module, arrays)
    views = [torch.tensor(arrays[name]) for name in ("im_q", "im_k", "num_frames")]
    for step in range(3):
        result = module.training_losses(*views, stage=stage)
        losses = result.losses
        ours = torch.stack(list(release_losses(module, stage, losses).values()))
        assert vectors.relative_error(ours, arrays[f"step{step}/losses"]) < 1e-5
        if stage == "cross":
            for kind, part in (("context", "context"), ("exchange", "ikem")):
                for name, letter in vectors.LETTERS.items():
                    expected = float(arrays[f"step{step}/part/{part}_{letter}"])
                    assert losses[f"{kind}/{name}"].item() == pytest.approx(expected, rel=2e-5)
        optimizer.zero_grad()
        torch.testing.assert_close(result.total.detach(), sum(losses.values()))
        result.total.backward()
        if step == 0:
            vectors.assert_first_step_agrees(module, arrays, num_gradients=624 if stage == "single" else 648)
        optimizer.step()
    vectors.assert_final_norms_agree(module, arrays)


@pytest.mark.parametrize(
    "modalities", [MODALITIES, ("joint", "motion", "bone"), ("angular_velocity", "joint"), ("rotation_axis",)]
)
def test_any_subset_of_the_modalities(modalities):
    module = small_trainers.ikem(modalities=modalities)
    losses = module.training_losses(*small_trainers.batch()).losses
    assert list(losses) == [f"single/{name}" for name in modalities]
    assert all(loss.shape == () and loss.isfinite() for loss in losses.values())
    assert module.features(*small_trainers.batch()[1:]).shape == (len(modalities), 5, 6)
    if len(modalities) > 1:
        losses = module.training_losses(*small_trainers.batch(), stage="cross").losses
        assert list(losses) == [f"{kind}/{name}" for kind in ("context", "exchange") for name in modalities]
    else:
        with pytest.raises(ValueError, match="needs at least 2 modalities, got 1"):
            module.training_losses(*small_trainers.batch(), stage="cross")


def test_a_step_moves_the_keys_before_use_and_enqueues_them_after():
    module = small_trainers.ikem(modalities=("joint", "motion"), momentum=0.25)
    view_q, view_k, num_frames = small_trainers.batch()
    with torch.no_grad():
        for parameter in module.query_encoders.parameters():
            parameter.add_(0.1)
    before = {name: parameter.clone() for name, parameter in module.key_encoders.named_parameters()}
    queue, statistics = module.queue.clone(), module.key_encoders.input_norm.running_mean.clone()
    module.training_losses(view_q, view_k, num_frames)
    queries = dict(module.query_encoders.named_parameters())
    for name, parameter in module.key_encoders.named_parameters():
        torch.testing.assert_close(parameter, 0.25 * before[name] + 0.75 * queries[name])
    assert not torch.equal(module.key_encoders.input_norm.running_mean, statistics)
    assert module.queue_pointer.tolist() == [5]
    assert torch.equal(module.queue[:, :, 5:], queue[:, :, 5:])
    torch.testing.assert_close(module.queue[:, :, :5].norm(dim=1), torch.ones(2, 5))
    # The keys in the queue are those of the moved encoders, in training mode as in the step.
    keys = module.key_encoders(small_trainers.derived(module, view_k, num_frames))[1]
    torch.testing.assert_close(module.queue[1, :, :5].T, functional.normalize(keys, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("momentum_buffers", [True, False])
def test_which_buffers_of_the_key_encoders_follow(momentum_buffers):
    module = small_trainers.ikem(modalities=("joint",), momentum=0.25, momentum_buffers=momentum_buffers).eval()
    query, key = module.query_encoders, module.key_encoders
    with torch.no_grad():
        query.input_norm.running_mean.add_(1.0)
    before = key.input_norm.running_mean.clone()
    module.training_losses(*small_trainers.batch())  # in eval mode no batch changes them
    expected = 0.25 * before + 0.75 * query.input_norm.running_mean if momentum_buffers else before
    torch.testing.assert_close(key.input_norm.running_mean, expected)
    assert methods.from_config(module.config()).momentum_buffers is momentum_buffers


def test_the_queue_wraps_around_for_any_batch_size():
    module = small_trainers.ikem(modalities=("joint",))
    for seed in range(3):
        module.training_losses(*small_trainers.batch(seed=seed)).total.backward()
    assert module.queue_pointer.tolist() == [15 % 12]


@pytest.mark.parametrize("partial", [True, False])
def test_quirk_1_which_key_encoders_move_in_stage_2(partial):
    module = small_trainers.ikem(quirks=Quirks(partial_momentum_update=partial), momentum=0.5)
    with torch.no_grad():
        for parameter in module.query_encoders.parameters():
            parameter.add_(0.1)
    before = module.key_encoders.head[0].weight.clone()
    module.training_losses(*small_trainers.batch(), stage="cross")
    weights = zip(MODALITIES, module.key_encoders.head[0].weight, before, strict=True)
    moved = {name for name, now, then in weights if not now.equal(then)}
    assert moved == ({"motion", "acceleration", "angular_velocity"} if partial else set(MODALITIES))


@pytest.mark.parametrize("redraw", [True, False])
def test_quirk_7_where_the_keys_start(redraw):
    module = small_trainers.ikem(quirks=Quirks(redraw_key_weights=redraw))
    query, key = module.query_encoders, module.key_encoders
    assert torch.equal(query.head[0].weight, key.head[0].weight) is not redraw
    assert torch.equal(query.blocks[0].importance, key.blocks[0].importance)
    assert not any(parameter.requires_grad for parameter in module.key_encoders.parameters())


def test_quirk_9_which_graph():
    for one_hop, limit in ((True, 1), (False, None)):
        module = small_trainers.ikem(quirks=Quirks(one_hop_graph=one_hop))
        for encoders in (module.query_encoders, module.key_encoders):
            assert torch.equal(encoders.graph.adjacency, module.layout.adjacency(distance_limit=limit))
    assert not torch.equal(module.layout.adjacency(1), module.layout.adjacency(None))


def test_losses_of_stage_2_can_be_left_out():
    module = small_trainers.ikem(modalities=("joint", "motion"), exchange=False)
    step = module.training_losses(*small_trainers.batch(), stage="cross")
    assert list(step.losses) == ["context/joint", "context/motion"]
    module = small_trainers.ikem(modalities=("joint",), context=False)
    step = module.training_losses(*small_trainers.batch(), stage="cross")
    assert list(step.losses) == ["exchange/joint"]
    step.total.backward()
    # Weights that have no part in the loss get no gradient at all, so that weight decay leaves them alone, too.
    assert all(parameter.grad is None for parameter in module.query_encoders.head.parameters())
    assert module.query_encoders.blocks[0].temporal_conv.weight.grad.any()


def test_the_gradient_of_the_total_is_that_of_the_losses():
    """Although it is taken before the new keys overwrite the queue that the losses were made with."""
    module = small_trainers.ikem(modalities=("joint", "motion", "bone"), momentum=1.0).double()
    module.queue.copy_(functional.normalize(module.queue, dim=1))  # of unit length in float64, too
    view_q, view_k, num_frames = small_trainers.batch()
    views = view_q.double(), view_k.double(), num_frames
    queue = module.queue.clone()
    step = module.training_losses(*views, stage="cross")
    assert not torch.equal(module.queue, queue)
    (2.0 * step.total).backward()
    features = module.features(views[0], num_frames)
    q, e = (
        functional.normalize(heads(features), dim=2) for heads in (module.query_encoders.head, module.exchange_heads)
    )
    k = module.queue[:, :, :5].mT
    total = ops.context_loss_reference(q, k, queue, module.temperature, module.topk).sum()
    total = total + ops.exchange_loss_reference(e, k, queue, module.temperature).sum()
    torch.testing.assert_close(step.total.detach(), total.detach())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter, gradient in zip(trained, torch.autograd.grad(total, trained), strict=True):
        torch.testing.assert_close(parameter.grad, 2.0 * gradient)


@pytest.mark.parametrize("stage", ["single", "cross"])
def test_accuracy_is_how_often_the_positive_is_nearer_than_every_key(stage):
    # With so many keys some lie nearer even to the alike embeddings of encoders that know nothing yet.
    module = small_trainers.ikem(modalities=("joint", "motion"), momentum=1.0, queue_size=1000)
    view_q, view_k, num_frames = small_trainers.batch(num_clips=9)
    queue = module.queue.clone()
    step = module.training_losses(view_q, view_k, num_frames, stage)
    assert not any(value.requires_grad for value in (*step.losses.values(), *step.accuracies.values()))
    q, k = (
        functional.normalize(encoders(views), dim=2)
        for encoders, views in (
            (module.query_encoders, small_trainers.derived(module, view_q, num_frames)),
            (module.key_encoders, small_trainers.derived(module, view_k, num_frames)),
        )
    )
    expected = ((q * k).sum(dim=2) > (q @ queue).amax(dim=2)).float().mean(dim=1)
    names = ["single/joint", "single/motion"]
    assert list(step.accuracies)[:2] == names
    assert [step.accuracies[name].item() for name in names] == pytest.approx(expected.tolist())
    assert 0 < sum(expected.tolist()) < 2
    assert ("exchange/joint" in step.accuracies) is (stage == "cross")


def test_queues_start_as_random_unit_columns():
    module = small_trainers.ikem()
    torch.testing.assert_close(module.queue.norm(dim=1), torch.ones(6, 12))
    assert not torch.equal(module.queue[0], module.queue[1])


@pytest.mark.parametrize("stage", ["single", "cross"])
def test_a_step_down_the_gradient_lowers_every_stage(stage):
    """With keys and queue held still, short steps against the gradient lower the summed loss."""
    module = small_trainers.ikem(hidden_channels=4, feature_size=16, embedding_size=8, momentum=1.0)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    batch, queue = small_trainers.batch(num_clips=8), module.queue.clone()
    history = []
    for _ in range(5):
        module.queue.copy_(queue)
        loss = module.training_losses(*batch, stage=stage).total
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        length = torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm()
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(gradient * (0.001 / length))
        history.append(loss.item())
    assert history[1] < history[0]
    assert history[-1] < 0.97 * history[0]


def test_config_rebuilds_the_module():
    module = small_trainers.ikem(modalities=("joint", "bone"), topk=2, quirks=Quirks.release(), exchange=False)
    again = methods.from_config(module.config())
    assert again.config() == module.config()
    again.load_state_dict(module.state_dict())


def test_one_person_one_clip_one_frame():
    module = small_trainers.ikem().eval()
    view_q, view_k, num_frames = small_trainers.batch(num_clips=1, num_frames=1)
    losses = module.training_losses(view_q, view_k, num_frames, stage="cross").losses
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modalities": ("joint", "joint")}, "modalities must be distinct"),
        ({"modalities": ("join",)}, "did you mean 'joint'"),
        ({"modalities": ()}, "modalities must be a non-empty sequence"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"momentum": 1.5}, "momentum must be in"),
        ({"topk": 13}, "topk must be in 1 ... queue_size = 12, got 13"),
        ({"queue_size": 0}, "queue_size must be at least 1, got 0"),
        ({"context": False, "exchange": False}, "must not both be off"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        small_trainers.ikem(**changes)


def test_unknown_stage():
    with pytest.raises(ValueError, match="stage must be 'single' or 'cross', got 'both'"):
        small_trainers.ikem().training_losses(*small_trainers.batch(), stage="both")


def test_stored_clips_give_the_losses_of_clips_augmented_beforehand():
    clips, _, num_frames = small_trainers.batch(num_clips=7, num_persons=2)
    indices = torch.tensor([6, 0, 3, 3, 2])
    drawn = ops.draw_views(5, 2, indices, clips.shape[2], ops.AugmentationConfig(camera_view=1.0, motion_scale=True))
    stored, beforehand = (small_trainers.ikem() for _ in range(2))
    losses = stored.losses(*stored.views(clips, num_frames, indices, drawn), "cross").losses
    augmented = [ops.augment(clips[indices], drawn.view(view)) for view in range(2)]
    expected = beforehand.training_losses(*augmented, num_frames[indices], "cross").losses
    assert list(losses) == list(expected)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(stored.queue, beforehand.queue, rtol=1e-3, atol=1e-4)


def test_without_augmentation_both_views_are_the_clips_as_they_are():
    module = small_trainers.ikem(modalities=("joint", "bone"))
    clips, _, num_frames = small_trainers.batch()
    nothing = ops.draw_views(0, 1, torch.arange(5), 12, ops.AugmentationConfig(crop_padding_ratio=0, shear=0.0))
    for parameters in (nothing, None):
        first, second = module.views(clips, num_frames, None, parameters)
        assert torch.equal(first.views, second.views)
        assert torch.equal(first.views, module.derive(clips, num_frames).views)


def test_features_have_a_gradient_through_the_clips():
    module = small_trainers.ikem(modalities=("joint", "bone")).double()
    clips, _, num_frames = small_trainers.batch()
    clips = clips.double().requires_grad_()
    features = module.features(clips, num_frames)
    features.square().sum().backward()
    assert clips.grad.isfinite().all()
    assert clips.grad.abs().amax(dim=(1, 2, 3, 4)).min() > 0
    torch.testing.assert_close(features.detach(), module.features(clips.detach(), num_frames))


def test_losses_are_those_of_the_ops():
    module = small_trainers.ikem(modalities=("joint", "motion"), momentum=1.0).eval()
    view_q, view_k, num_frames = small_trainers.batch()
    queue = module.queue.clone()
    losses = module.training_losses(view_q, view_k, num_frames).losses
    q, k = (
        functional.normalize(encoders(views), dim=2)
        for encoders, views in (
            (module.query_encoders, small_trainers.derived(module, view_q, num_frames)),
            (module.key_encoders, small_trainers.derived(module, view_k, num_frames)),
        )
    )
    torch.testing.assert_close(torch.stack(list(losses.values())), ops.info_nce(q, k, queue, module.temperature))


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("stage", ["single", "cross"])
def test_a_step_never_waits_for_the_device(stage):
    module = small_trainers.ikem(hidden_channels=4, feature_size=16, embedding_size=8, queue_size=32).cuda()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    clips, _, num_frames = (tensor.cuda() for tensor in small_trainers.batch(num_clips=8))
    samples = torch.arange(8, device="cuda")

    def step():
        drawn = ops.draw_views(0, 1, samples, clips.shape[2], ops.AugmentationConfig())
        result = module.losses(*module.views(clips, num_frames, samples, drawn), stage)
        optimizer.zero_grad()
        result.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        return result

    step()  # libraries load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite() for value in (*result.losses.values(), *result.accuracies.values()))
