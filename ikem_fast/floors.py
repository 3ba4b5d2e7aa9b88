"""The least work that each op can be done with, from shapes alone: bytes moved and arithmetic operations.

Bytes: everything an op is given is read once and everything it gives is written once; what it keeps to itself (logits,
activations between passes, masks that can be made again) costs nothing. For forward + backward, everything is read once
more that the gradient is a function of, since the results lie between, the results' gradients are read and the inputs'
written. Operations: two for each multiply-add of the products that cannot be avoided, nothing for the rest. An op
cannot be faster than its bytes at the speed of a copy, nor than its operations at the speed of the machine's best
matrix products (ceilings.py); the larger of the two times is the floor.

Knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SIZE = {"fp32": 4, "bf16": 2}  # bytes of a number


@dataclass(frozen=True)
class Work:
    """Bytes that are read and written once, and arithmetic operations of a kind, "fp32" or "bf16"."""

    bytes: int
    operations: int = 0
    kind: str = "fp32"

    def __post_init__(self) -> None:
        if self.kind not in SIZE:
            raise ValueError(f"kind must be one of {', '.join(SIZE)}, got {self.kind!r}")

    def __add__(self, other: Work) -> Work:
        if self.kind != other.kind and self.operations and other.operations:
            raise ValueError(f"only operations of one kind can be added, got {self.kind} and {other.kind}")
        kind = self.kind if self.operations else other.kind
        return Work(self.bytes + other.bytes, self.operations + other.operations, kind)

    def __mul__(self, times: int) -> Work:
        return Work(times * self.bytes, times * self.operations, self.kind)

    def seconds(self, copy_bytes_per_second: float, operations_per_second: float) -> tuple[float, str]:
        """The least time, and what decides it, "bytes" or "operations"."""
        by_bytes, by_operations = self.bytes / copy_bytes_per_second, self.operations / operations_per_second
        return (by_bytes, "bytes") if by_bytes >= by_operations else (by_operations, "operations")


# ---- clips and views


def clip_views(
    clips: int, frames: int, joints: int, persons: int, modalities: int, views: int = 2, kind: str = "fp32"
) -> Work:
    """Stored float32 clips are read once, R views of S modalities are written once in ``kind``, and their sums and sums
    of squares (2, R, S, V, 3) in float64.
    """
    values = clips * 3 * frames * joints * persons
    return Work(values * (4 + views * modalities * SIZE[kind]) + 8 * 2 * views * modalities * joints * 3, 0, kind)


def derive_modalities(
    clips: int, frames: int, joints: int, persons: int, modalities: int, backward: bool = False
) -> Work:
    """float32 clips are read once, S modalities written once; backward reads clips and S gradients and writes one."""
    values = clips * 3 * frames * joints * persons
    tensors = 1 + modalities + (1 + modalities + 1 if backward else 0)
    return Work(4 * values * tensors)


def draw_views(clips: int, views: int = 2) -> Work:
    """Of every clip its number (int64) is read, of each of its views a crop (int64) and six coefficients of the shear
    are written.
    """
    return Work(clips * (8 + views * (8 + 6 * SIZE["fp32"])))


def parse_skeleton(text_bytes: int, frames: int, joints: int, persons: int) -> Work:
    """The text is read once and (3, F, V, M) float64 written once."""
    return Work(text_bytes + 8 * 3 * frames * joints * persons)


# ---- the encoder; B sequences are those of all persons of all clips


def edges_and_groups(edges: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many edges (partition, from, to) there are, and pairs of a partition and a joint that one leads to."""
    return len(edges), len({(partition, end) for partition, _, end in edges})


def graph_convolution(
    modalities: int,
    sequences: int,
    frames: int,
    joints: int,
    in_channels: int,
    out_channels: int,
    edges: int,
    groups: int,
    *,
    partitions: int = 3,
    stride: int = 1,
    kind: str = "fp32",
    backward: bool = False,
    input_gradient: bool = True,
) -> Work:
    """x is read, y written. Backward reads x, y (which the gradient of its variance is a function of) and the gradient
    of y, and writes that of x. Weights and their gradients are float32, in the rearranged form that is smallest.

    Operations of a frame: the cheaper of gathering joints before the product (edges·C_in + groups·C_in·C_out) and after
    it (P·V·C_in·C_out + edges·C_out); backward has one such product for the weights and one for x.

    Args:
        edges: E, entries of the partitioned adjacency that are not zero.
        groups: pairs of a partition and a joint which an edge of that partition leads to, at most P·V.
    """
    rows = modalities * sequences * -(-frames // stride)
    x, y = rows * joints * in_channels, rows * joints * out_channels
    before = edges * in_channels + groups * in_channels * out_channels
    after = partitions * joints * in_channels * out_channels + edges * out_channels
    product = 2 * rows * min(before, after)
    weights = 4 * modalities * partitions * (out_channels * in_channels + out_channels + joints**2)
    forward = Work(SIZE[kind] * (x + y) + weights, product, kind)
    if not backward:
        return forward
    moved = SIZE[kind] * (x + 2 * y + (x if input_gradient else 0)) + 2 * weights
    return forward + Work(moved, product * (2 if input_gradient else 1), kind)


def temporal_convolution(
    modalities: int,
    sequences: int,
    frames: int,
    joints: int,
    channels: int,
    *,
    taps: int = 9,
    stride: int = 1,
    kind: str = "fp32",
    backward: bool = False,
) -> Work:
    """x is read, y written, with as many channels. Backward reads x, y and the gradient of y and writes that of x.
    Weights and their gradients are float32.

    Operations: of direct products, C² multiply-adds for each tap inside the clip; backward has as many for the weights
    and for x. They are no lower bound: in the frequency domain, or by Winograd's method, a convolution takes fewer, so
    that it can be faster than this floor where operations decide.
    """
    out_frames = -(-frames // stride)
    inside = sum(0 <= stride * t + tap - taps // 2 < frames for t in range(out_frames) for tap in range(taps))
    x, y = (modalities * sequences * count * joints * channels for count in (frames, out_frames))
    product = 2 * modalities * sequences * inside * joints * channels**2
    weights = 4 * modalities * (taps * channels**2 + channels)
    forward = Work(SIZE[kind] * (x + y) + weights, product, kind)
    if not backward:
        return forward
    return forward + Work(SIZE[kind] * (x + 2 * y + x) + 2 * weights, 2 * product, kind)


def residual_activation(
    modalities: int,
    sequences: int,
    frames: int,
    joints: int,
    channels: int,
    *,
    residual: bool = True,
    pool: int = 0,
    kind: str = "fp32",
    backward: bool = False,
) -> Work:
    """x and the residual are read, the result is written: as large as x, or with ``pool`` means, (B / M, C) float32.
    Backward reads x, the residual and the result's gradient, and writes as many gradients.
    """
    values = modalities * sequences * frames * joints * channels
    given = SIZE[kind] * values * (2 if residual else 1)
    result = 4 * modalities * (sequences // pool) * channels if pool else SIZE[kind] * values
    return Work(given + result + (2 * given + result if backward else 0), 0, kind)


def batch_norm_coefficients(modalities: int, channels: int, backward: bool = False) -> Work:
    """Four numbers of each channel are read, two written; backward reads three and two gradients, and writes four."""
    return Work(4 * modalities * channels * (6 + (9 if backward else 0)))


def block(
    modalities: int,
    sequences: int,
    frames: int,
    joints: int,
    in_channels: int,
    out_channels: int,
    edges: int,
    groups: int,
    *,
    stride: int = 1,
    residual: bool = True,
    pool: int = 0,
    kind: str = "fp32",
    backward: bool = False,
    input_gradient: bool = True,
) -> Work:
    """The sum of a block's ops: graph convolution, convolution over frames, residual with activation, and a projection
    where channels or frames change. What lies between them is written and read once each: a batch norm gives nothing
    before it has seen all values.
    """
    sizes = {"kind": kind, "backward": backward}
    gathering = {**sizes, "input_gradient": input_gradient}
    out_frames = -(-frames // stride)
    work = graph_convolution(
        modalities, sequences, frames, joints, in_channels, out_channels, edges, groups, **gathering
    )
    work += temporal_convolution(modalities, sequences, frames, joints, out_channels, stride=stride, **sizes)
    work += residual_activation(
        modalities, sequences, out_frames, joints, out_channels, residual=residual, pool=pool, **sizes
    )
    if residual and (in_channels != out_channels or stride != 1):
        work += graph_convolution(
            modalities, sequences, frames, joints, in_channels, out_channels, joints, joints,
            partitions=1, stride=stride, **gathering,
        )  # fmt: skip
    return work


def encoder(
    modalities: int,
    clips: int,
    persons: int,
    frames: int,
    joints: int,
    blocks: Sequence[tuple[int, int]],
    edges: int,
    groups: int,
    *,
    in_channels: int = 3,
    kind: str = "fp32",
    backward: bool = False,
) -> Work:
    """The sum of S encoders' blocks, the first without a gradient of its input, and of the norm of the input, which is
    float32.

    Args:
        blocks: output channels and stride of every block.
    """
    sequences = clips * persons
    values = modalities * sequences * frames * joints * in_channels
    work = Work((4 + SIZE[kind]) * values * (2 if backward else 1), 0, kind)
    for number, (out_channels, stride) in enumerate(blocks):
        work += block(
            modalities, sequences, frames, joints, in_channels, out_channels, edges, groups,
            stride=stride, residual=number > 0, pool=persons if number == len(blocks) - 1 else 0, kind=kind,
            backward=backward, input_gradient=number > 0,
        )  # fmt: skip
        in_channels, frames = out_channels, -(-frames // stride)
    return work


# ---- losses. Embeddings and queues are float32, whatever the products are made in. Exponentials are not counted. The
# queue is read once also with the backward pass: gradients can be summed while the log-sum-exp is.


def info_nce(
    modalities: int, clips: int, embedding: int, queue: int, *, kind: str = "fp32", backward: bool = False
) -> Work:
    """q, k and the queues are read. Products: of q with the queue, for the gradient of q as many."""
    rows = modalities * clips * embedding
    product = 2 * rows * queue
    moved = 4 * (2 * rows + modalities * embedding * queue + modalities)
    return Work(moved + (4 * (rows + modalities) if backward else 0), product * (2 if backward else 1), kind)


def context_loss(
    modalities: int, clips: int, embedding: int, queue: int, *, kind: str = "fp32", backward: bool = False
) -> Work:
    """As :func:`info_nce`: similarities of a modality are shared by all its pairs, and the gradients of all its pairs
    are summed before the product with the queue.
    """
    return info_nce(modalities, clips, embedding, queue, kind=kind, backward=backward)


def exchange_loss(
    modalities: int, clips: int, embedding: int, queue: int, *, kind: str = "fp32", backward: bool = False
) -> Work:
    """e (S, N, S·D), k and the queues are read. Products: of all S·N rows with the queues of all modalities, for the
    gradient of e as many.
    """
    rows, keys = modalities * clips * modalities * embedding, modalities * clips * embedding
    moved = 4 * (rows + keys + modalities * embedding * queue + modalities)
    moved += 4 * (rows + modalities) if backward else 0
    return Work(moved, 2 * rows * queue * (2 if backward else 1), kind)


def relational_distillation_loss(
    students: int,
    modalities: int,
    clips: int,
    embedding: int,
    queue: int,
    *,
    kind: str = "fp32",
    backward: bool = False,
) -> Work:
    """The students' and the teacher's embeddings, the teacher's queues and that of its joint embedding are read.
    Products: of the teacher with its queues, of the students with the joint queue; for the students' gradient as many
    as the latter.
    """
    rows, teacher = students * clips * modalities * embedding, modalities * clips * embedding
    moved = 4 * (rows + teacher + 2 * modalities * embedding * queue + students)
    moved += 4 * (rows + students) if backward else 0
    return Work(moved, 2 * queue * (teacher + rows * (2 if backward else 1)), kind)


def queue_log_sum_exp(
    batch: int, rows: int, size: int, queue: int, *, kind: str = "fp32", backward: bool = False
) -> Work:
    """x (B, R, D), a positive logit of each row and the queue are read, two numbers of each row written; backward reads
    the gradient of one of them and writes those of x and of the positive logits.
    """
    values = batch * rows * size
    moved = SIZE[kind] * values + 4 * batch * (size * queue + 3 * rows)
    moved += SIZE[kind] * values + 4 * batch * 2 * rows if backward else 0
    return Work(moved, 2 * values * queue * (2 if backward else 1), kind)


def pair_log_sum_exp(
    modalities: int,
    clips: int,
    embedding: int,
    queue: int,
    *,
    topk: int = 1,
    kind: str = "fp32",
    backward: bool = False,
) -> Work:
    """x (A, N, D) and the queues are read; (A + A (A - 1) / 2) N sums, A·N·topk neighbours (int64) and the A
    similarities at each of them are written. Backward reads the gradients of sums and similarities and writes that of
    x. Products: as :func:`context_loss`.
    """
    values = modalities * clips * embedding
    sums = (modalities + modalities * (modalities - 1) // 2) * clips
    mined = modalities * clips * topk * modalities
    moved = SIZE[kind] * values + 4 * (modalities * embedding * queue + sums + mined) + 8 * modalities * clips * topk
    moved += SIZE[kind] * values + 4 * (sums + mined) if backward else 0
    return Work(moved, 2 * values * queue * (2 if backward else 1), kind)


# ---- between steps


def momentum_update(values: int) -> Work:
    """Key and query parameters, float32, are read, and the keys written."""
    return Work(3 * SIZE["fp32"] * values)


def enqueue(modalities: int, clips: int, embedding: int) -> Work:
    """Keys (S, N, D) are read and written into S·N columns of the queue, whose others are not touched."""
    return Work(2 * SIZE["fp32"] * modalities * clips * embedding)


# ---- heads and optimiser


def linear(
    streams: int, clips: int, in_features: int, out_features: int, *, kind: str = "fp32", backward: bool = False
) -> Work:
    """A linear layer on ``streams`` times ``clips`` float32 vectors. x, weights and biases are read and y is written;
    backward reads x, the weights and y's gradient, and writes the gradients of x, of the weights and of the biases.
    ``kind`` is that of the products alone.
    """
    x, y = streams * clips * in_features, streams * clips * out_features
    weights, products = streams * (in_features + 1) * out_features, 2 * x * out_features
    if not backward:
        return Work(SIZE["fp32"] * (x + weights + y), products, kind)
    return Work(SIZE["fp32"] * (3 * x + 3 * weights + 2 * y), 3 * products, kind)


def sgd(parameters: int, *, momentum: bool = True) -> Work:
    """Weights, gradients and momenta are read, weights and momenta written."""
    return Work((5 if momentum else 3) * SIZE["fp32"] * parameters)
