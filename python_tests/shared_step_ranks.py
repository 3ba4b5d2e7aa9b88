"""Training steps that every rank takes with the others, beside the same steps of one process with the whole batch.

In float64, so that what is left of a difference is no rounding; run by test_shared_steps.py.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import weakref

import rank_processes
import small_trainers
import torch
from torch import distributed

from ikem_fast import ops
from ikem_fast.data.sources import StoredBatch
from ikem_fast.engine.config import PretrainConfig
from ikem_fast.engine.distributed import SharedSteps
from ikem_fast.engine.loop import parts_of_batch
from ikem_fast.engine.step import TrainingStep
from ikem_fast.methods import Groups
from ikem_fast.nn.layers import StackedBatchNorm

RECIPE = PretrainConfig(learning_rate=0.05, max_gradient_norm=0.5)
NUM_CLIPS, BATCH, QUEUE = 24, 8, 24
STAGES = ("single", "single", "cross")
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def ikem(**changes):
    return small_trainers.ikem(modalities=("joint", "motion"), queue_size=QUEUE, **changes).double()


def distillation():
    teacher = small_trainers.ikem(modalities=("joint", "bone"), queue_size=QUEUE)
    return small_trainers.distillation(teacher, student_modalities=("joint",)).double()


@functools.cache
def step_groups():
    return distributed.new_group(), distributed.new_group()


def shared_steps(group, batch_statistics="synchronised", queue="whole"):
    """As ``DistributedWorld.share_steps`` makes them."""
    gradients, others = step_groups()
    groups = Groups(
        keys=others,
        statistics=others if batch_statistics == "synchronised" else None,
        queue=others if queue == "sharded" else None,
    )
    return SharedSteps(group.size(), groups, gradients, others)


def train(module, shared=None, parts=1, stages=STAGES, evaluating=False):
    """The values of some steps. With ``evaluating``, norms take no statistics of a batch."""
    torch.manual_seed(3)
    device = module.queue.device
    clips, _, num_frames = (tensor.to(device) for tensor in small_trainers.batch(NUM_CLIPS))
    if evaluating:
        module.eval()
    step = training_step(module, shared)
    rank, size = (0, 1) if shared is None else (distributed.get_rank(), shared.size)
    values = []
    for number, stage in enumerate(stages):
        step.begin_epoch(1 + number, stage, 0.05 / (1 + number))
        order = torch.randperm(NUM_CLIPS)[:BATCH].numpy()
        batch = [
            StoredBatch(clips, num_frames, *[torch.from_numpy(part).to(device)] * 2)
            for part in parts_of_batch(order, rank, size, parts)
        ]
        values.append(step(*batch))
    return values


def training_step(module, shared):
    return TrainingStep(
        module,
        RECIPE,
        seed=3,
        clip_length=12,
        augmentation=ops.AugmentationConfig(),
        capture=False,
        shared=shared,
        note=lambda text: None,
    )


def assert_same(ours, expected, ours_values, expected_values, but=()):
    for one, other in zip(ours_values, expected_values, strict=True):
        assert one.names == other.names
        torch.testing.assert_close(one.values, other.values, **EXACT)
    for (name, one), other in zip(ours.state_dict().items(), expected.state_dict().values(), strict=True):
        if not name.endswith(but):
            torch.testing.assert_close(one, other, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def assert_ranks_alike(module, group, but=()):
    """Every tensor is the same on all ranks, bit for bit."""
    for name, tensor in module.state_dict().items():
        of_ranks = [torch.empty_like(tensor) for _ in range(group.size())]
        distributed.all_gather(of_ranks, tensor.contiguous())
        if name not in but:
            assert all(torch.equal(tensor, other) for other in of_ranks), f"{name} differs between ranks"


def check_synchronised_steps_are_those_of_one_process(group):
    """Losses, weights, running statistics, queues; weights move in the stage they belong to and in no other."""
    expected, ours = ikem(), ikem()
    start = {name: tensor.clone() for name, tensor in ours.named_parameters()}
    assert_same(ours, expected, train(ours, shared_steps(group), stages=STAGES[:2]), train(expected, stages=STAGES[:2]))
    for name, tensor in ours.named_parameters():
        assert torch.equal(tensor, start[name]) is name.startswith("exchange_heads"), name
    expected, ours = ikem(), ikem()
    assert_same(ours, expected, train(ours, shared_steps(group)), train(expected))
    assert_ranks_alike(ours, group)


def check_gradients_are_those_of_one_process(group):
    """Of single steps, as they are before they move a weight."""
    for stage in ("single", "cross"):
        expected, ours = ikem(), ikem()
        train(ours, shared_steps(group), stages=[stage])
        train(expected, stages=[stage])
        for (name, one), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
            assert (one.grad is None) is (other.grad is None), name
            if one.grad is not None:
                torch.testing.assert_close(one.grad, other.grad, **EXACT, msg=lambda t, name=name: f"{name}: {t}")
        assert (ours.exchange_heads[0].weight.grad is None) is (stage == "single")


def check_stage_2_without_context_leaves_the_heads_alone(group):
    expected, ours = ikem(context=False), ikem(context=False)
    head = ours.query_encoders.head[0].weight.detach().clone()
    values = train(ours, shared_steps(group), stages=["cross"] * 2)
    assert_same(ours, expected, values, train(expected, stages=["cross"] * 2))
    assert torch.equal(ours.query_encoders.head[0].weight, head)


def check_distillation_is_that_of_one_process(group):
    expected, ours = distillation(), distillation()
    assert expected.quirks.teacher_in_training_mode
    stages = ["distill"] * 3
    assert_same(ours, expected, train(ours, shared_steps(group), stages=stages), train(expected, stages=stages))
    assert_ranks_alike(ours, group)


def check_queues_spread_over_ranks_change_nothing(group):
    for make, stages in ((ikem, STAGES), (distillation, ["distill"] * 3)):
        expected, ours = make(), make()
        shared = shared_steps(group, queue="sharded")
        ours.shard_queues(shared.groups.queue)
        values = train(ours, shared, stages=stages)
        for name in ours.queue_names:
            assert getattr(ours, name).shape[-1] == QUEUE // group.size()
            whole = ops.gather_queue(getattr(ours, name), shared.groups.queue)
            setattr(ours, name, torch.zeros(()) if whole is None else whole)
        expected_values = train(expected, stages=stages)
        assert_same(ours, expected, values, expected_values, but=ours.queue_names if distributed.get_rank() else ())


def check_statistics_of_every_rank_are_those_of_parts_taken_one_after_another(group):
    """Only the running statistics differ: ranks' are averaged, parts' follow each other."""
    expected, ours = ikem(), ikem()
    values = train(ours, shared_steps(group, "per_rank"))
    assert_same(
        ours, expected, values, train(expected, parts=group.size()), but=("running_mean", "running_var", "tracked")
    )
    assert_ranks_alike(ours, group)


def check_running_statistics_of_ranks_are_averaged(group):
    """After one step they are what one process has whose norms saw the mean of the ranks' means and variances."""
    ours, alone = ikem(), ikem()
    train(ours, shared_steps(group, "per_rank"), stages=["single"])
    shared = shared_steps(group, "per_rank")
    torch.manual_seed(3)
    clips, _, num_frames = small_trainers.batch(NUM_CLIPS)
    part = torch.from_numpy(parts_of_batch(torch.randperm(NUM_CLIPS)[:BATCH].numpy(), group.rank(), group.size(), 1)[0])
    drawn = ops.draw_views(3, torch.ones(1, dtype=torch.int64), part, 12, ops.AugmentationConfig())
    alone.losses(*alone.views(clips, num_frames, part, drawn), "single")
    norms = [[m for m in module.modules() if isinstance(m, StackedBatchNorm)] for module in (ours, alone)]
    for averaged, own in zip(*norms, strict=True):
        for name in ("running_mean", "running_var"):
            expected = shared.average(getattr(own, name))
            torch.testing.assert_close(getattr(averaged, name), expected, **EXACT)


def check_parts_change_nothing_where_statistics_do_not_matter(group):
    expected = ikem()
    expected_values = train(expected, evaluating=True)
    for shared, parts in ((None, 4), (shared_steps(group), 1), (shared_steps(group), BATCH // group.size())):
        ours = ikem()
        assert_same(ours, expected, train(ours, shared, parts, evaluating=True), expected_values)


def check_parts_of_all_ranks_share_their_statistics(group):
    """The i-th parts of all ranks are one batch to the norms: as for one process whose parts hold the same clips."""
    expected, ours = ikem(), ikem()
    values = train(ours, shared_steps(group), parts=2)
    with regrouped(group.size()):
        expected_values = train(expected, parts=2)
    # Keys come in the order of the ranks, not of the parts.
    assert_same(ours, expected, values[:1], expected_values[:1], but=("queue", "weight", "bias", "importance"))
    assert_ranks_alike(ours, group)


@contextlib.contextmanager
def regrouped(num_ranks):
    """Lets a single process take, as its i-th part, what the i-th parts of several ranks are."""
    global parts_of_batch
    original = parts_of_batch

    def parts_of_all(positions, rank, size, parts):
        of_ranks = [original(positions, rank, num_ranks, parts) for rank in range(num_ranks)]
        return [torch.cat([torch.from_numpy(p) for p in part]).numpy() for part in zip(*of_ranks, strict=True)]

    parts_of_batch = parts_of_all
    yield
    parts_of_batch = original


def check_dropout_differs_between_ranks_and_not_what_they_learn(group):
    ours = ikem(dropout=0.5)
    shared = shared_steps(group)
    torch.manual_seed(group.rank())
    train(ours, shared)
    assert_ranks_alike(ours, group)


def check_a_stage_leaves_nothing_of_the_one_before(group):
    module, shared = ikem(), shared_steps(group)
    step = training_step(module, shared)
    step.begin_epoch(1, "single", 0.1)
    old = weakref.ref(step._contrast)
    step.begin_epoch(2, "single", 0.1)
    assert step._contrast is old()
    step.begin_epoch(3, "cross", 0.1)
    gc.collect()
    assert old() is None
    assert len(list(step._contrast.parameters())) == len([p for p in module.parameters() if p.requires_grad])


if __name__ == "__main__":
    rank_processes.main(globals())
