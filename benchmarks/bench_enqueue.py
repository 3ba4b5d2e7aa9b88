"""Writing a batch's keys into the queues' ring buffer."""

from __future__ import annotations

import torch

from benchmarks.cases import CALL, COMPILED, EAGER, OURS, Case, compiled
from ikem_fast import floors, ops

SIZES = {
    "small": [{"clips": 128, "queue": 4096}],
    "full": [{"clips": 128, "queue": 32768}],
}
MODALITIES, EMBEDDING = 6, 128


def in_place(function):
    """A way: the function's effect on a queue and its pointer."""

    def run(inputs):
        queue, keys, pointer = inputs
        function(queue, keys, pointer)
        return queue, pointer

    return run


def make_case(clips: int, queue: int) -> Case:
    def draw(generator: torch.Generator):
        device = generator.device
        values = torch.randn(MODALITIES, EMBEDDING, queue, generator=generator, device=device)
        keys = torch.randn(MODALITIES, clips, EMBEDDING, generator=generator, device=device)
        return values, keys, torch.randint(queue, (1,), generator=generator, device=device)

    return Case(
        op="enqueue",
        phase=CALL,
        sizes={"clips": clips, "queue": queue},
        draw=draw,
        ways={
            EAGER: in_place(ops.enqueue_reference_),
            COMPILED: in_place(compiled(ops.enqueue_reference_)),
            OURS: in_place(ops.enqueue_),
        },
        expected=in_place(ops.enqueue_reference_),
        tolerance=dict.fromkeys((EAGER, COMPILED, OURS), 0.0),
        floor=floors.enqueue(MODALITIES, clips, EMBEDDING),
        clips=clips,
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(**sizes) for sizes in SIZES[profile]]


def test_enqueue(measure, case, way):
    measure(case, way)
