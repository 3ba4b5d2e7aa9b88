"""Log-sum-exp of rows against a queue, which the contrast and the exchange loss are made of: as the latter calls it."""

from __future__ import annotations

import torch

from benchmarks import contrast
from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, OURS_BF16, Case, Inputs, compiled, of_phase
from benchmarks.contrast import EMBEDDING, MODALITIES, TEMPERATURE, TOLERANCE, unit
from ikem_fast import floors, ops

SIZES = {"small": [(16, 4096)], "full": [(128, 32768)]}
ROW = MODALITIES * EMBEDDING


def make_case(phase: str, clips: int, queue: int) -> Case:
    rows = MODALITIES * clips

    def draw(generator: torch.Generator) -> Inputs:
        x, positive = unit(generator, 1, rows, ROW), torch.rand(1, rows, generator=generator, device=generator.device)
        if phase == FORWARD:
            return Inputs((x, positive))
        weights = torch.rand(1, rows, generator=generator, device=generator.device)
        return Inputs((x.requires_grad_(), positive.requires_grad_()), (weights,))

    def with_queue(function):
        def run(x, positive):
            joint = contrast.queues(queue, x.device.type)[1].unsqueeze(0)
            return function(x, joint, positive, 1 / TEMPERATURE)

        return run

    def rounding(function):
        return lambda x, positive: function(x.bfloat16(), positive)

    ours, definition = with_queue(ops.queue_log_sum_exp), with_queue(ops.queue_log_sum_exp_reference)
    ways = {EAGER: definition, COMPILED: compiled(definition), OURS: ours, OURS_BF16: rounding(ours)}
    sizes = (1, rows, ROW, queue)
    return Case(
        op="queue_log_sum_exp",
        phase=phase,
        sizes={"rows": rows, "queue": queue},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        expected=of_phase(phase, definition),
        expected_of={OURS_BF16: of_phase(phase, rounding(definition))},
        tolerance=TOLERANCE,
        floor=floors.queue_log_sum_exp(*sizes, backward=phase == BOTH),
        floor_bf16=floors.queue_log_sum_exp(*sizes, kind="bf16", backward=phase == BOTH),
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(phase, *sizes) for sizes in SIZES[profile] for phase in (FORWARD, BOTH)]


def test_queue_log_sum_exp(measure, case, way):
    measure(case, way)
