"""The least work of each phase of a training step, summed over its ops from the shapes of a method's modules."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ikem_fast import floors
from ikem_fast.floors import Work
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.nn import MultiStreamSTGCN
from ikem_fast.nn.layers import StackedLinear
from ikem_fast.nn.precision import activation_dtype
from ikem_fast.profiling.phases import BACKWARD, DATA, FORWARD, Phase


def work_of_step(
    method: IKEM | RelationalDistillation,
    stage: str,
    *,
    num_clips: int,
    clip_shape: Sequence[int],
    num_parts: int = 1,
    storage: str = "fp32",
    streamed: bool = False,
    sgd_momentum: bool = True,
    limits_gradients: bool = False,
) -> dict[Phase, Work]:
    """The least work of each phase of a step, forward and backward apart.

    Args:
        method: on its device, in the mode that it trains in.
        stage: ``"single"``, ``"cross"`` or ``"distill"``.
        num_clips: N of the whole step.
        clip_shape: (3, T, V, M).
        num_parts: that the step's clips are taken in, each through all that has weights or queues by itself.
        storage: of the clips, ``"fp32"`` or ``"fp16"``.
        streamed: whether clips are read from the file.
        sgd_momentum: whether the optimiser has one.
        limits_gradients: whether gradients are limited.
    """
    _, num_frames, num_joints, num_persons = clip_shape
    values = 3 * num_frames * num_joints * num_persons
    part = num_clips // num_parts
    work: dict[Phase, Work] = {}

    def add(name: str, forward: Work, backward: Work | None = None, times: int = num_parts) -> None:
        for which, amount in ((FORWARD, forward), (BACKWARD, backward)):
            if amount is not None:
                total = _times(amount, times)
                work[name, which] = work[name, which] + total if (name, which) in work else total

    def encoders(name: str, module: MultiStreamSTGCN, trained: bool, with_head: bool) -> None:
        forward = _encoder(module, part, num_frames, num_persons, backward=False)
        if with_head:
            forward += _head(module.head, part, backward=False)
        add(name, forward, _encoder(module, part, num_frames, num_persons, backward=True) if trained else None)

    def heads(module: nn.Sequential) -> None:
        add("heads", _head(module, part, backward=False), _head(module, part, backward=True))

    # What is streamed is read from the file's pages and written where the views are made from.
    read = 2 * num_clips * values * floors.SIZE[storage] if streamed else 0
    add(DATA, Work(read), times=1)
    first, second = method.view_modalities
    if first == second:
        add("views", floors.clip_views(2, part, values, len(first), storage))
    else:
        for modalities in (first, second):
            add("views", floors.clip_views(1, part, values, len(modalities), storage))

    streams, embedding, queue = len(method.modalities), method.embedding_size, method.queue_size
    kind = kind_of(method)
    enqueued = floors.enqueue(streams, num_clips, embedding)
    if isinstance(method, IKEM):
        moved = sum(parameter.numel() for parameter in method.key_encoders.parameters())
        add("momentum update", floors.momentum_update(moved), times=1)
        encoders("query encoders", method.query_encoders, trained=True, with_head=False)
        heads(method.query_encoders.head)
        encoders("key encoders", method.key_encoders, trained=False, with_head=True)
        if stage == "single":
            add("single contrast", floors.queue_log_sum_exp(streams, part, embedding, queue, kind, True), Work(0))
        else:
            if method.context:
                sizes = (streams, part, embedding, queue, kind)
                add("context exchange", *(floors.pair_log_sum_exp(*sizes, backward) for backward in (False, True)))
            if method.exchange:
                heads(method.exchange_heads)
                rows, joint = streams * part, streams * embedding
                add("implicit exchange", floors.queue_log_sum_exp(1, rows, joint, queue, kind, True), Work(0))
    else:
        students = len(method.feature_names)
        encoders("teacher encoders", method.teacher_encoders, trained=False, with_head=True)
        encoders("student encoders", method.student_encoders, trained=True, with_head=False)
        heads(method.student_encoders.head)
        sizes = (streams, part, embedding, queue, kind)
        passes = (floors.pair_log_sum_exp(*sizes, backward, students) for backward in (False, True))
        add("relational distillation", *passes)
        enqueued += floors.enqueue(1, num_clips, streams * embedding)
    add("gather of keys", Work(0), times=1)
    add("enqueue", enqueued, times=1)
    trained = sum(parameter.numel() for parameter in method.stage_parameters(stage))
    if limits_gradients:
        add("gradient limit", floors.gradient_limit(trained), times=1)
    add("optimiser step", floors.sgd(trained, sgd_momentum), times=1)
    return work


def _times(work: Work, times: int) -> Work:
    return Work(times * work.bytes, times * work.operations, work.kind)


def kind_of(method: IKEM | RelationalDistillation) -> str:
    """The numbers that its activations and products are in, "fp32" or "bf16"."""
    return _kind(method.precision, method.queue)


def _kind(precision: str, weight: Tensor) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[activation_dtype(precision, weight)]


def _encoder(module: MultiStreamSTGCN, num_clips: int, num_frames: int, num_persons: int, *, backward: bool) -> Work:
    """Of all ops of the encoders, their activations alone: weights are far fewer."""
    streams, joints = module.num_streams, module.graph.adjacency.shape[-1]
    sequences = streams * num_clips * num_persons
    kind = _kind(module.precision, module.input_norm.weight)
    # The input norm reads the views in fp32 and writes activations; backward needs both again, for its own weights.
    values = sequences * num_frames * joints * module.in_channels
    total = Work(values * (floors.SIZE["fp32"] + floors.SIZE[kind]))
    last = len(module.blocks) - 1
    for number, block in enumerate(module.blocks):
        _, partitions, out_channels, in_channels = block.graph_conv.weight.shape
        stride, taps = block.temporal_conv.stride, block.temporal_conv.weight.shape[-1]
        rows = sequences * num_frames * joints
        num_frames = -(-num_frames // stride)
        out_rows = sequences * num_frames * joints
        total += floors.graph_convolution(
            rows, in_channels, out_channels, partitions * in_channels, kind, backward=backward
        )
        total += floors.temporal_convolution(rows, out_rows, out_channels, taps, kind, backward=backward)
        if block.residual is not None:
            total += floors.graph_convolution(out_rows, in_channels, out_channels, in_channels, kind, backward=backward)
        if module.training:
            total += floors.residual_activation(
                out_rows, out_channels, int(block.has_residual), number == last, kind, backward=backward
            )
        elif block.has_residual:
            # In eval mode the temporal convolution adds the residual as it writes.
            total += Work(floors.SIZE[kind] * out_rows * out_channels)
    return total


def _head(module: nn.Sequential, num_clips: int, *, backward: bool) -> Work:
    total = Work(0)
    for layer in module:
        if isinstance(layer, StackedLinear):
            streams = layer.weight.shape[0]
            total += floors.linear(streams, num_clips, layer.in_features, layer.out_features, backward)
    return total
