"""Log-sum-exps of similarities and of their products over all pairs of modalities: what the context loss is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks import contrast
from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, OURS_BF16, Case, Inputs, compiled, of_phase
from benchmarks.contrast import EMBEDDING, MODALITIES, TEMPERATURE, TOLERANCE, TOPK, unit
from ikem_fast import floors, ops

SIZES = {"small": [(16, 4096)], "full": [(128, 32768)]}
PAIRS = MODALITIES * (MODALITIES - 1) // 2


def composition(x: Tensor, queue: Tensor, scale: float, topk: int) -> ops.PairLogSumExp:
    """As :func:`ikem_fast.ops.pair_log_sum_exp_reference`, with a search for the largest in the place of its sort."""
    s = x @ queue
    neighbours = s.detach().topk(topk, dim=2).indices
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    at_neighbours = neighbours.unsqueeze(0).expand(len(x), *neighbours.shape)
    mined = s.unsqueeze(1).expand(-1, len(x), -1, -1).gather(3, at_neighbours).permute(1, 2, 3, 0)
    sums = ((scale * values).logsumexp(dim=2) for values in (s, s[first] * s[second]))
    return ops.PairLogSumExp(*sums, neighbours, mined)


def differentiable(found: ops.PairLogSumExp):
    """What has a gradient, and the neighbours, which have none, last."""
    return found.single, found.pair, found.mined, found.neighbours


def make_case(phase: str, clips: int, queue: int) -> Case:
    def draw(generator: torch.Generator) -> Inputs:
        x = unit(generator, MODALITIES, clips, EMBEDDING)
        if phase == FORWARD:
            return Inputs((x,))
        shapes = ((MODALITIES, clips), (PAIRS, clips), (MODALITIES, clips, TOPK, MODALITIES))
        weights = (torch.rand(shape, generator=generator, device=generator.device) for shape in shapes)
        return Inputs((x.requires_grad_(),), tuple(weights))

    def with_queue(function):
        def run(x):
            return differentiable(function(x, contrast.queues(queue, x.device.type)[0], 1 / TEMPERATURE, TOPK))

        return run

    ours, definition = with_queue(ops.pair_log_sum_exp), with_queue(ops.pair_log_sum_exp_reference)
    eager = with_queue(composition)
    ways = {EAGER: eager, COMPILED: compiled(eager), OURS: ours, OURS_BF16: contrast.as_bfloat16(ours)}
    sizes = (MODALITIES, clips, EMBEDDING, queue)
    options = {"topk": TOPK, "backward": phase == BOTH}
    return Case(
        op="pair_log_sum_exp",
        phase=phase,
        sizes={"clips": clips, "queue": queue},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        expected=of_phase(phase, definition),
        expected_of={OURS_BF16: of_phase(phase, contrast.as_bfloat16(definition))},
        tolerance=TOLERANCE,
        floor=floors.pair_log_sum_exp(*sizes, **options),
        floor_bf16=floors.pair_log_sum_exp(*sizes, kind="bf16", **options),
        clips=clips,
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(phase, *sizes) for sizes in SIZES[profile] for phase in (FORWARD, BOTH)]


def test_pair_log_sum_exp(measure, case, way):
    measure(case, way)
