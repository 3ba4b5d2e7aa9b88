"""The least work of each phase of a training step, from the shapes of a method's modules and of its batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ikem_fast import floors
from ikem_fast.floors import SIZE, Work
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
    streamed: bool = False,
    sgd_momentum: bool = True,
    limits_gradients: bool = False,
) -> dict[Phase, Work]:
    """The least work of each phase of a step, forward and backward apart.

    Losses against a queue alone make their gradient in the forward pass, so that all of their work is counted there.

    Args:
        method: on its device, in the mode that it trains in.
        stage: ``"single"``, ``"cross"`` or ``"distill"``.
        num_clips: N of the whole step.
        clip_shape: (3, T, V, M).
        num_parts: that the step's clips are taken in, each through all that has weights or queues by itself.
        streamed: whether clips are read from the file.
        sgd_momentum: whether the optimiser has one.
        limits_gradients: whether gradients are limited.
    """
    _, num_frames, num_joints, num_persons = clip_shape
    part = num_clips // num_parts
    kind = kind_of(method)
    streams, embedding = len(method.modalities), method.embedding_size
    of_losses = (streams, part, embedding, method.queue_size)
    work: dict[Phase, Work] = {}

    def add(name: str, forward: Work, both: Work | None = None, times: int = num_parts) -> None:
        """Counts a forward pass, and what forward and backward passes together have more."""
        for which, amount in ((FORWARD, forward), (BACKWARD, both and _beyond(both, forward))):
            if amount is not None:
                work[name, which] = work.get((name, which), Work(0)) + amount * times

    def encoders(name: str, module: MultiStreamSTGCN, trained: bool = False) -> None:
        sizes = (part, num_persons, num_frames)
        add(name, _encoders(module, *sizes), _encoders(module, *sizes, backward=True) if trained else None)

    def heads(module: nn.Sequential, trained: bool = False) -> None:
        add("heads", _heads(module, part), _heads(module, part, backward=True) if trained else None)

    # What is streamed is read from the file's pages and written where the views are made from.
    add(
        DATA,
        Work(2 * SIZE["fp32"] * num_clips * clip_shape[0] * num_frames * num_joints * num_persons * streamed),
        times=1,
    )
    first, second = method.view_modalities
    for modalities, num_views in ((first, 2),) if first == second else ((first, 1), (second, 1)):
        add("views", floors.clip_views(part, num_frames, num_joints, num_persons, len(modalities), num_views))
    enqueued = floors.enqueue(streams, num_clips, embedding)
    if isinstance(method, IKEM):
        values = sum(parameter.numel() for parameter in method.key_encoders.parameters())
        moved = values // streams * len(method.moving_modalities(stage))
        add("momentum update", floors.momentum_update(moved), times=1)
        encoders("query encoders", method.query_encoders, trained=True)
        heads(method.query_encoders.head, trained=True)
        encoders("key encoders", method.key_encoders)
        heads(method.key_encoders.head)
        if stage == "single":
            add("single contrast", floors.info_nce(*of_losses, kind=kind, backward=True))
        elif method.context:
            passes = (floors.context_loss(*of_losses, kind=kind, backward=backward) for backward in (False, True))
            add("context exchange", *passes)
        if stage == "cross" and method.exchange:
            heads(method.exchange_heads, trained=True)
            add("implicit exchange", floors.exchange_loss(*of_losses, kind=kind, backward=True))
    else:
        encoders("teacher encoders", method.teacher_encoders)
        heads(method.teacher_encoders.head)
        encoders("student encoders", method.student_encoders, trained=True)
        heads(method.student_encoders.head, trained=True)
        passes = (
            floors.relational_distillation_loss(len(method.feature_names), *of_losses, kind=kind, backward=backward)
            for backward in (False, True)
        )
        add("relational distillation", *passes)
        enqueued += floors.enqueue(1, num_clips, streams * embedding)
    add("enqueue", enqueued, times=1)
    trained = sum(parameter.numel() for parameter in method.stage_parameters(stage))
    if limits_gradients:
        # Gradients are read and written.
        add("gradient limit", Work(2 * SIZE["fp32"] * trained), times=1)
    add("optimiser step", floors.sgd(trained, momentum=sgd_momentum), times=1)
    return work


def kind_of(method: IKEM | RelationalDistillation) -> str:
    """The numbers that its activations and products are in, "fp32" or "bf16"."""
    return _kind(method.precision, method.queue)


def _kind(precision: str, weight: Tensor) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[activation_dtype(precision, weight)]


def _beyond(both: Work, forward: Work) -> Work:
    """What a forward and backward pass has more than a forward pass."""
    return Work(both.bytes - forward.bytes, both.operations - forward.operations, both.kind)


def _encoders(
    module: MultiStreamSTGCN, num_clips: int, num_persons: int, num_frames: int, *, backward: bool = False
) -> Work:
    blocks = [(block.temporal_conv.weight.shape[1], block.temporal_conv.stride) for block in module.blocks]
    num_joints = module.graph.adjacency.shape[-1]
    graph = floors.edges_and_groups(module.graph.edges.tolist())
    sizes = (module.num_streams, num_clips, num_persons, num_frames, num_joints, blocks, *graph)
    kind = _kind(module.precision, module.input_norm.weight)
    work = floors.encoder(*sizes, in_channels=module.in_channels, kind=kind, backward=backward)
    if module.training:
        return work
    # Without batch statistics a block, all but the last, ends in its convolution, which then also adds the residual:
    # what it gave is neither written nor read again.
    for out_channels, stride in blocks[:-1]:
        num_frames = -(-num_frames // stride)
        values = module.num_streams * num_clips * num_persons * num_frames * num_joints * out_channels
        work = Work(work.bytes - 2 * SIZE[kind] * values, work.operations, work.kind)
    return work


def _heads(module: nn.Sequential, num_clips: int, *, backward: bool = False) -> Work:
    """Of the linear layers of all streams' heads, which compute in float32."""
    layers = [layer for layer in module if isinstance(layer, StackedLinear)]
    sizes = [(layer.weight.shape[0], num_clips, layer.in_features, layer.out_features) for layer in layers]
    return sum((floors.linear(*size, backward=backward) for size in sizes), Work(0))
