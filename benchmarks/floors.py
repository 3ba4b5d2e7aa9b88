"""The least work that each op can be done with, from shapes alone: bytes moved and arithmetic operations.

Bytes: everything an op is given is read once and everything it gives is written once; what it keeps to itself (logits,
activations between passes, masks that can be made again) costs nothing. For forward + backward, everything is read once
more that the gradient is a function of, since the results lie between, the results' gradients are read and the inputs'
written. Operations: two for each multiply-add of the products that cannot be avoided, nothing for the rest. An op
cannot be faster than its bytes at the speed of a copy, nor than its operations at the speed of the machine's best
matrix products (ceilings.py); the larger of the two times is the floor.

Knows neither torch nor ikem_fast.
"""

from __future__ import annotations

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


def enqueue(modalities: int, clips: int, embedding: int) -> Work:
    """Keys (S, N, D) are read and written into S·N columns of the queue, whose others are not touched."""
    return Work(2 * SIZE["fp32"] * modalities * clips * embedding)
