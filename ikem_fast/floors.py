"""The least work that each op can be done with, from shapes alone: bytes moved and arithmetic operations.

Bytes: everything an op is given is read once and everything it gives is written once; what it keeps to itself (logits,
activations between passes, masks that can be made again) costs nothing. A backward pass reads once more what the
gradient is a function of, reads the results' gradients and writes the inputs'. Operations: two for each multiply-add of
the products that cannot be avoided, nothing for the rest. An op cannot be faster than its bytes at the speed of a copy,
nor than its operations at the speed of the machine's best matrix products (ikem_fast/ceilings.py); the larger of the
two times is the floor.

Knows no torch. S are streams (modalities), N clips, B sequences (clips times persons), T frames, V joints, C channels,
D the size of an embedding, K the length of a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZE = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a number


@dataclass(frozen=True)
class Work:
    """Bytes that are read and written once, and arithmetic operations of a kind, "fp32" or "bf16"."""

    bytes: int
    operations: int = 0
    kind: str = "fp32"

    def __post_init__(self) -> None:
        if self.kind not in ("fp32", "bf16"):
            raise ValueError(f"kind must be fp32 or bf16, got {self.kind!r}")

    def __add__(self, other: Work) -> Work:
        if self.kind != other.kind and self.operations and other.operations:
            raise ValueError(f"only operations of one kind can be added, got {self.kind} and {other.kind}")
        kind = self.kind if self.operations else other.kind
        return Work(self.bytes + other.bytes, self.operations + other.operations, kind)

    def seconds(self, copy_bytes_per_second: float, operations_per_second: float) -> tuple[float, str]:
        """The least time, and what decides it, "bytes" or "operations"."""
        by_bytes, by_operations = self.bytes / copy_bytes_per_second, self.operations / operations_per_second
        return (by_bytes, "bytes") if by_bytes >= by_operations else (by_operations, "operations")


def clip_views(
    views: int, clips: int, values_per_clip: int, modalities: int, stored: str = "fp32", made: str = "fp32"
) -> Work:
    """Each stored clip, 3·T·V·M values, is read once; it is written once in every view and modality."""
    return Work(clips * values_per_clip * (SIZE[stored] + views * modalities * SIZE[made]))


def graph_convolution(rows: int, in_channels: int, out_channels: int, gathered: int, kind: str, backward: bool) -> Work:
    """``rows`` (S·B·T·V) of C_in channels become rows of C_out, through ``gathered`` (partitions times C_in) channels.

    Backward reads x, y (for the gradient that comes through its statistics) and y's gradient, and writes x's; the
    gradients of x and of the weight are a product each.
    """
    operations = 2 * rows * gathered * out_channels
    if backward:
        return Work(SIZE[kind] * rows * (2 * in_channels + 2 * out_channels), 2 * operations, kind)
    return Work(SIZE[kind] * rows * (in_channels + out_channels), operations, kind)


def temporal_convolution(in_rows: int, out_rows: int, channels: int, taps: int, kind: str, backward: bool) -> Work:
    """``in_rows`` (S·B·T·V) of C channels become ``out_rows`` (S·B·T'·V); all else is as of a graph convolution."""
    operations = 2 * out_rows * taps * channels**2
    if backward:
        return Work(SIZE[kind] * channels * (2 * in_rows + 2 * out_rows), 2 * operations, kind)
    return Work(SIZE[kind] * channels * (in_rows + out_rows), operations, kind)


def residual_activation(rows: int, channels: int, residuals: int, pooled: bool, kind: str, backward: bool) -> Work:
    """``rows`` of C channels and as many of ``residuals`` (0 or 1) are read, and a result is written, or its mean.

    Backward reads the same, the result's gradient, or the mean's, and writes the inputs' gradients.
    """
    values = rows * channels
    inputs, result = (1 + residuals) * values, 0 if pooled else values
    return Work(SIZE[kind] * ((2 if backward else 1) * inputs + result))


def linear(modalities: int, rows: int, in_size: int, out_size: int, backward: bool) -> Work:
    """S linear layers in fp32: x (S, N, in), weights (S, out, in), y (S, N, out); backward both gradients."""
    io, weights = modalities * rows * (in_size + out_size), modalities * in_size * out_size
    operations = 2 * rows * weights
    if backward:
        return Work(SIZE["fp32"] * (io + modalities * rows * in_size + 2 * weights), 2 * operations)
    return Work(SIZE["fp32"] * (io + weights), operations)


def queue_log_sum_exp(batches: int, rows: int, embedding: int, queue: int, kind: str, gradient: bool) -> Work:
    """Rows (B, R, D) against queues (B, D, K) in fp32, which are read once; the gradient is made in the same pass."""
    operations = 2 * batches * rows * embedding * queue
    io = SIZE["fp32"] * batches * embedding * queue + SIZE[kind] * batches * rows * embedding * (1 + gradient)
    return Work(io, (1 + gradient) * operations, kind)


def pair_log_sum_exp(
    modalities: int, clips: int, embedding: int, queue: int, kind: str, backward: bool, students: int = 0
) -> Work:
    """Rows (S, N, D) against queues (S, D, K) in fp32; with students theirs (students, N, S·D) against (S·D, K), too.

    Backward reads the same once more and makes the similarities again; the gradient of the rows, with students that of
    theirs alone, is another product.
    """
    own = modalities * clips * embedding
    of_students = students * clips * modalities * embedding
    queues = (2 if students else 1) * modalities * embedding * queue
    operations = 2 * queue * (own + of_students)
    io = SIZE["fp32"] * queues + SIZE[kind] * (own + of_students)
    if backward:
        differentiated = of_students if students else own
        return Work(io + SIZE[kind] * differentiated, operations + 2 * queue * differentiated, kind)
    return Work(io, operations, kind)


def enqueue(modalities: int, clips: int, embedding: int) -> Work:
    """Keys (S, N, D) are read and written into S·N columns of the queue, whose others are not touched."""
    return Work(2 * SIZE["fp32"] * modalities * clips * embedding)


def momentum_update(numbers: int) -> Work:
    """Keys and queries are read, keys are written."""
    return Work(3 * SIZE["fp32"] * numbers)


def gradient_limit(numbers: int) -> Work:
    """Gradients are read and written."""
    return Work(2 * SIZE["fp32"] * numbers)


def sgd(numbers: int, momentum: bool) -> Work:
    """Weights, gradients and momenta are read, weights and momenta are written."""
    return Work((5 if momentum else 3) * SIZE["fp32"] * numbers)
