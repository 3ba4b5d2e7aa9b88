"""Checks of queues that are spread over ranks, run on every rank by test_sharded_queue.py.

Every rank knows the clips and columns of all, and compares its part of the results with what one process gets.
"""

from __future__ import annotations

import math
import resource

import pytest
import rank_processes
import torch
from contrast_inputs import units
from torch import distributed

from ikem_fast import ops
from ikem_fast.methods.common import settle
from ikem_fast.ops import _sharded, sharded_queue

TEMPERATURE = 0.07
NUMBERS = {
    torch.float64: (torch.float64, 1e-13, 1e-12),
    torch.float32: (torch.float32, 2e-6, 2e-5),
    torch.bfloat16: (torch.float32, 2e-6, 1.5e-2),  # rounded factors of products, and a part of every rank
}


def rows_of(group, values):
    """This rank's clips of values (B, W N, ...)."""
    return values.chunk(group.size(), dim=1)[group.rank()]


def contrast(group, streams=3, clips=5, size=7, columns=11, dtype=torch.float64, queue_dtype=None):
    """q, k of all ranks' clips and the whole queue."""
    clips, queue_size = clips * group.size(), columns * group.size()
    return (
        units(streams, clips, size, dim=2, seed=0, dtype=dtype),
        units(streams, clips, size, dim=2, seed=1, dtype=dtype),
        units(streams, size, queue_size, dim=1, seed=2, dtype=queue_dtype or dtype),
    )


def assert_near(ours, expected, tolerance, largest=None):
    """Equal but for a share of the largest value."""
    values = expected if largest is None else largest
    torch.testing.assert_close(ours, expected, rtol=0, atol=tolerance * values.abs().max().item())


def assert_as_whole(group, function, rows, queues, tolerance, gradient_tolerance):
    """Losses, accuracies and gradients of ``function(*rows, *queues, group)`` are those of one process with all clips.

    ``rows`` are tensors (B, W N, D) and whether each has a gradient.
    """

    def outcome(parts, queues, group):
        leaves = [values.clone().requires_grad_(with_gradient) for values, with_gradient in parts]
        losses, *accuracy = function(*leaves, *queues, group)
        weights = torch.arange(1.0, len(losses) + 1, dtype=losses.dtype)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        return losses.detach(), accuracy, torch.autograd.grad((losses * weights).sum(), wanted)

    whole, whole_accuracy, whole_gradients = outcome(rows, queues, None)
    own = [(rows_of(group, values), with_gradient) for values, with_gradient in rows]
    shards = [ops.own_columns(queue, group) for queue in queues]
    losses, accuracy, gradients = outcome(own, shards, group)

    of_ranks = [torch.empty_like(losses) for _ in range(group.size())]
    distributed.all_gather(of_ranks, losses, group=group)
    assert_near(torch.stack(of_ranks).mean(dim=0), whole, tolerance)
    for ours, expected in zip(gradients, whole_gradients, strict=True):
        # The mean over the clips of all ranks has the W-th part of a rank's gradient.
        assert_near(ours / group.size(), rows_of(group, expected), gradient_tolerance, largest=expected)
    if accuracy:
        of_ranks = [torch.empty_like(accuracy[0]) for _ in range(group.size())]
        distributed.all_gather(of_ranks, accuracy[0], group=group)
        torch.testing.assert_close(torch.stack(of_ranks).mean(dim=0), whole_accuracy[0])


def in_all_numbers():
    for dtype, (queue_dtype, *tolerances) in NUMBERS.items():
        yield dtype, queue_dtype, tolerances
    yield torch.bfloat16, torch.bfloat16, NUMBERS[torch.bfloat16][1:]


def check_info_nce_equals_the_whole_queue(group):
    for dtype, queue_dtype, tolerances in in_all_numbers():
        for sizes in ((1, 1, 3, 1), (3, 5, 7, 11), (2, 17, 24, 300)):
            q, k, queue = contrast(group, *sizes, dtype=dtype, queue_dtype=queue_dtype)

            def function(q, k, queue, group):
                return ops.info_nce_and_accuracy(q, k, queue, TEMPERATURE, group)

            assert_as_whole(group, function, [(q, True), (k, dtype != torch.bfloat16)], [queue], *tolerances)
            own = rows_of(group, q), rows_of(group, k), ops.own_columns(queue, group)
            assert torch.equal(ops.info_nce(*own, TEMPERATURE, group), function(*own, group)[0])


def check_exchange_loss_equals_the_whole_queue(group):
    for dtype, queue_dtype, tolerances in in_all_numbers():
        for sizes in ((1, 1, 3, 1), (3, 5, 7, 11), (2, 17, 12, 300)):
            _, k, queue = contrast(group, *sizes, dtype=dtype, queue_dtype=queue_dtype)
            e = units(sizes[0], k.shape[1], sizes[0] * sizes[2], dim=2, seed=3, dtype=dtype)

            def function(e, k, queue, group):
                return ops.exchange_loss_and_accuracy(e, k, queue, TEMPERATURE, group)

            assert_as_whole(group, function, [(e, True), (k, False)], [queue], *tolerances)
            own = rows_of(group, e), rows_of(group, k), ops.own_columns(queue, group)
            assert torch.equal(ops.exchange_loss(*own, TEMPERATURE, group), function(*own, group)[0])


def check_context_loss_equals_the_whole_queue(group):
    for dtype, queue_dtype, tolerances in in_all_numbers():
        for sizes in ((2, 1, 3, 1), (3, 5, 7, 11), (2, 17, 24, 300)):
            q, k, queue = contrast(group, *sizes, dtype=dtype, queue_dtype=queue_dtype)
            # One, some, as many as a rank has, more than that, all.
            for topk in {1, min(3, sizes[3]), min(40, sizes[3]), min(40, sizes[3] + 1), min(40, queue.shape[2])}:

                def function(q, k, queue, group, topk=topk):
                    return ops.context_loss_and_accuracy(q, k, queue, TEMPERATURE, topk, group)

                assert_as_whole(group, function, [(q, True), (k, dtype != torch.bfloat16)], [queue], *tolerances)
            own = rows_of(group, q), rows_of(group, k), ops.own_columns(queue, group)
            assert torch.equal(ops.context_loss(*own, TEMPERATURE, 1, group), function(*own, group, 1)[0])


def check_relational_distillation_loss_equals_the_whole_queue(group):
    for dtype, queue_dtype, tolerances in in_all_numbers():
        for students, (streams, clips, size, columns) in ((1, (1, 1, 3, 1)), (3, (2, 5, 7, 11)), (2, (6, 9, 8, 130))):
            teacher, _, queues = contrast(group, streams, clips, size, columns, dtype, queue_dtype)
            student = units(students, teacher.shape[1], streams * size, dim=2, seed=3, dtype=dtype)
            teacher_queue = units(streams * size, queues.shape[2], dim=0, seed=4, dtype=queue_dtype)
            for topk in {1, min(columns + 1, queues.shape[2], 20), min(20, queues.shape[2])}:

                def function(student, teacher, queues, teacher_queue, group, topk=topk):
                    return (
                        ops.relational_distillation_loss(
                            student, teacher, queues, teacher_queue, TEMPERATURE, topk, group
                        ),
                    )

                rows = [(student, True), (teacher, False)]
                assert_as_whole(group, function, rows, [queues, teacher_queue], *tolerances)


def check_neighbours_are_those_of_the_whole_queue(group):
    for num_y in (0, 2):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            x, _, queue = contrast(group, 3, 4, 5, 9, dtype=dtype)
            y = units(num_y, x.shape[1], 4, dim=2, seed=3, dtype=dtype) if num_y else None
            y_queue = units(4, queue.shape[2], dim=0, seed=4, dtype=dtype) if num_y else None
            own = (rows_of(group, x), ops.own_columns(queue, group))
            own_y = (rows_of(group, y), ops.own_columns(y_queue, group)) if num_y else (None, None)
            for topk in (1, 2, 9, 10, queue.shape[2]):
                whole = ops.pair_log_sum_exp(x, queue, 2.0, topk, y, y_queue)
                ours = _sharded.sharded_pair_log_sum_exp(*own, 2.0, topk, *own_y, group)
                assert torch.equal(ours.neighbours, rows_of(group, whole.neighbours))
                for name in ("single", "pair", "mined"):
                    expected = rows_of(group, getattr(whole, name))
                    assert_near(getattr(ours, name), expected, NUMBERS[dtype][1])


def check_ties_go_to_the_lowest_column(group):
    # Whole numbers, whose products are exact: few different columns, equal ones on every rank.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 6 * group.size(), 3), generator=generator).double()
    queue = torch.randint(0, 2, (2, 3, 12 * group.size()), generator=generator).double()
    for topk in (1, 3, 12, 13, 12 * group.size()):
        whole = ops.pair_log_sum_exp(x, queue, 1.0, topk)
        leaf = rows_of(group, x).clone().requires_grad_()
        ours = _sharded.sharded_pair_log_sum_exp(leaf, ops.own_columns(queue, group), 1.0, topk, None, None, group)
        assert torch.equal(ours.neighbours, rows_of(group, whole.neighbours))
        assert torch.equal(ours.mined, rows_of(group, whole.mined))
        # The gradient of a mined value is the column that was chosen.
        (gradient,) = torch.autograd.grad(ours.mined[1, :, 0, 1].sum(), leaf)
        assert torch.equal(gradient[1], queue[1].T[rows_of(group, whole.neighbours)[1, :, 0]])
        assert not gradient[0].any()


def check_gradients_of_some_results_alone(group):
    x, _, queue = contrast(group, 3, 4, 5, 9)
    own, shard = rows_of(group, x), ops.own_columns(queue, group)

    def gradients(x, queue, group, choose):
        leaf = x.clone().requires_grad_()
        result = _sharded.sharded_pair_log_sum_exp(leaf, queue, 2.0, 2, None, None, group)
        return torch.autograd.grad(choose(result), leaf)[0]

    for choose in (
        lambda result: result.single.sum(),
        lambda result: result.pair[1].sum(),
        lambda result: result.mined[..., 1, 0].square().sum(),
    ):
        expected = gradients(x, queue, None, choose)
        assert_near(gradients(own, shard, group, choose), rows_of(group, expected), 1e-12)

    leaf = own.clone().requires_grad_()
    positive = torch.full(own.shape[:2], -math.inf, dtype=own.dtype, requires_grad=True)
    log_sum_exp, _ = _sharded.sharded_queue_log_sum_exp(leaf, shard, positive, 2.0, group)
    ours = torch.autograd.grad(log_sum_exp.square().sum(), (leaf, positive))
    leaf = x.clone().requires_grad_()
    expected = (2.0 * x @ queue).logsumexp(dim=2)
    assert_near(log_sum_exp.detach(), rows_of(group, expected), 1e-13)
    (wanted,) = torch.autograd.grad((2.0 * leaf @ queue).logsumexp(dim=2).square().sum(), leaf)
    assert_near(ours[0], rows_of(group, wanted), 1e-12)
    assert not ours[1].any()


def check_a_step_of_several_losses(group):
    q, k, queue = contrast(group, 3, 4, 5, 9)
    e = units(3, q.shape[1], 15, dim=2, seed=3)

    def gradients(q, k, e, queue, group):
        leaves = [values.clone().requires_grad_() for values in (q, e, q)]

        def measure(q, e, unused):
            context = ops.context_loss(q, k, queue, TEMPERATURE, 2, group)
            exchange = ops.exchange_loss(e, k, queue, TEMPERATURE, group)
            ops.info_nce(unused, k, queue, TEMPERATURE, group)
            return {"context": context.sum(), "exchange": exchange[1]}, {}

        step = settle(measure, *leaves)
        queue.zero_()
        return step, torch.autograd.grad(step.total, leaves, allow_unused=True)

    whole, expected = gradients(q, k, e, queue.clone(), None)
    own = [rows_of(group, values) for values in (q, k, e)]
    step, ours = gradients(*own, ops.own_columns(queue, group), group)
    assert ours[2] is None
    assert expected[2] is None
    for one, other in zip(ours[:2], expected[:2], strict=True):
        assert_near(one / group.size(), rows_of(group, other), 1e-12)
    total = step.total.detach().clone()
    distributed.all_reduce(total, group=group)
    torch.testing.assert_close(total / group.size(), whole.total.detach(), rtol=1e-13, atol=0)
    # Without gradients the losses are the same.
    with torch.no_grad():
        alone = ops.context_loss(own[0], own[1], ops.own_columns(queue, group), TEMPERATURE, 2, group)
    assert torch.equal(alone.sum(), step.losses["context"])


def check_no_clips(group):
    q, k, queue = contrast(group, clips=0)
    e, shard = q.new_zeros(3, 0, 21), ops.own_columns(queue, group)
    teacher_queue = shard.flatten(0, 1)
    for left, function in (
        (q, lambda left: ops.info_nce(left, k, shard, TEMPERATURE, group)),
        (q, lambda left: ops.context_loss(left, k, shard, TEMPERATURE, 12, group)),
        (e, lambda left: ops.exchange_loss(left, k, shard, TEMPERATURE, group)),
        (e, lambda left: ops.relational_distillation_loss(left, k, shard, teacher_queue, TEMPERATURE, 12, group)),
    ):
        leaf = left.clone().requires_grad_()
        losses = function(leaf)
        assert losses.shape == (3,)
        assert losses.isnan().all()  # the mean of nothing
        losses.sum().backward()
        assert leaf.grad.shape == left.shape


def check_the_same_bits_every_time(group):
    q, k, queue = contrast(group, 3, 6, 16, 200, dtype=torch.float32)
    own, shard = [rows_of(group, values) for values in (q, k)], ops.own_columns(queue, group)
    results = []
    for _ in range(2):
        leaf = own[0].clone().requires_grad_()
        losses = ops.context_loss(leaf, own[1], shard, TEMPERATURE, 3, group)
        results.append((losses.detach(), *torch.autograd.grad(losses.sum(), leaf)))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def check_groups_of_some_of_the_ranks(group):
    q, k, queue = contrast(group, 3, 4, 5, 8)
    # All ranks must make all groups.
    alone = [distributed.new_group([rank]) for rank in range(group.size())][group.rank()]
    own = rows_of(group, q), rows_of(group, k)
    expected = ops.context_loss_and_accuracy(*own, queue, TEMPERATURE, 2)
    ours = ops.context_loss_and_accuracy(*own, queue, TEMPERATURE, 2, alone)
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert torch.equal(ops.info_nce(*own, queue, TEMPERATURE, alone), ops.info_nce(*own, queue, TEMPERATURE))

    # Ranks in pairs, each pair with a queue of its own.
    pairs = [distributed.new_group([rank, rank + 1]) for rank in range(0, group.size(), 2)]
    pair = pairs[group.rank() // 2]
    queue = queue + group.rank() // 2

    def function(q, k, queue, group):
        return ops.context_loss_and_accuracy(q, k, queue, 10.0, 2, group)

    assert_as_whole(pair, function, [(q, True), (k, True)], [queue], *NUMBERS[torch.float64][1:])


def check_enqueue_as_into_the_whole_queue(group):
    ranks, rank = group.size(), group.rank()
    for columns, dtype in ((1, torch.float32), (5, torch.float32), (6, torch.bfloat16)):
        queue_size = columns * ranks
        whole, pointer = torch.randn(2, 3, queue_size).to(dtype), torch.tensor([queue_size - 2])
        shard, own_pointer = ops.own_columns(whole, group), pointer.clone()
        reference, reference_pointer = shard.clone(), pointer.clone()
        here = ops.queue_columns(queue_size, group)
        assert (here.start, here.stop) == (rank * columns, (rank + 1) * columns)
        for num_keys in (1, 4, 3 * queue_size + 2, columns, 0, queue_size, 7, 2, 2 * columns + 1):
            keys = torch.randn(2, num_keys, 3)
            ops.enqueue_(whole, keys, pointer)
            ops.enqueue_(shard, keys, own_pointer, here.start, queue_size)
            ops.enqueue_reference_(reference, keys, reference_pointer, here.start, queue_size)
            assert torch.equal(shard, whole[:, :, here])
            assert torch.equal(reference, shard)
            assert own_pointer.tolist() == reference_pointer.tolist() == pointer.tolist()


def check_queues_gathered_and_cut_again(group):
    for shape, dtype in (((3, 5, 6), torch.float32), ((7, 4), torch.bfloat16), ((2, 3, 1), torch.float64)):
        whole = torch.randn(*shape[:-1], shape[-1] * group.size()).to(dtype)
        shard = ops.own_columns(whole, group)
        assert shard.is_contiguous()
        assert shard.untyped_storage().nbytes() == shard.numel() * shard.element_size()
        for most_bytes in (sharded_queue._GATHERED_BYTES, 1, 2 * whole[..., 0, :].numel() * whole.element_size()):
            before, sharded_queue._GATHERED_BYTES = sharded_queue._GATHERED_BYTES, most_bytes
            gathered = ops.gather_queue(shard, group)
            sharded_queue._GATHERED_BYTES = before
            assert (gathered is not None) == (group.rank() == 0)
            assert gathered is None or torch.equal(gathered, whole)
        strided = torch.stack([shard, shard], dim=-1)[..., 0]
        gathered = ops.gather_queue(strided, group)
        assert gathered is None or torch.equal(gathered, whole)


def check_memory_does_not_grow_with_the_queue(group):
    q, k, _ = contrast(group, 3, 64 // group.size(), 16, 1, dtype=torch.float32)
    q, k = rows_of(group, q).clone().requires_grad_(), rows_of(group, k)

    def step(columns):
        queue = torch.full((3, 16, columns), 0.01)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        ops.context_loss(q, k, queue, TEMPERATURE, 2, group).sum().backward()
        ops.info_nce(q, k, queue, TEMPERATURE, group).sum().backward()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

    step(64)
    assert step(1 << 17) < 16  # MB; similarities alone would take 96


def check_wrong_arguments_are_named(group):
    q, k, queue = contrast(group)
    own = rows_of(group, q), rows_of(group, k), ops.own_columns(queue, group)
    queue_size = queue.shape[2]
    with pytest.raises(ValueError, match=rf"queue_size must be a multiple of the {group.size()} ranks .*, got 9"):
        ops.queue_columns(9, group)
    with pytest.raises(ValueError, match="queue_size must be a multiple of"):
        ops.own_columns(torch.zeros(2, 9), group)
    with pytest.raises(ValueError, match=rf"topk must be in 1 \.\.\. K = {queue_size}, got {queue_size + 1}"):
        ops.context_loss(*own, TEMPERATURE, queue_size + 1, group)
    e, teacher_queue = own[0].repeat(1, 1, 3), own[2].flatten(0, 1)
    with pytest.raises(ValueError, match=rf"topk must be in 1 \.\.\. K = {queue_size}, got 0"):
        ops.relational_distillation_loss(e, own[1], own[2], teacher_queue, TEMPERATURE, 0, group)
    outside = distributed.new_group([0])
    for refused in ([outside] if group.rank() > 0 else []) + ["gloo", group.rank() + 1]:
        for function in (
            lambda refused: ops.info_nce(*own, TEMPERATURE, refused),
            lambda refused: ops.context_loss(*own, TEMPERATURE, 1, refused),
            lambda refused: ops.exchange_loss(own[0].repeat(1, 1, 3), *own[1:], TEMPERATURE, refused),
            lambda refused: ops.gather_queue(own[2], refused),
            lambda refused: ops.queue_columns(8, refused),
        ):
            with pytest.raises(ValueError, match=r"group must be a torch.distributed.ProcessGroup .* or None, got"):
                function(refused)


if __name__ == "__main__":
    rank_processes.main(globals())
