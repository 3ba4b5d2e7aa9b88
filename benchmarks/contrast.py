"""What the benchmarks of the losses and of the ops below them share: embeddings, queues, sizes and ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, OURS_BF16, Case, Inputs, compiled, of_phase
from ikem_fast.floors import Work

MODALITIES, EMBEDDING, STUDENTS, TOPK, TEMPERATURE = 6, 128, 3, 1, 0.07
# Clips, queue, sweep. The published sizes are part of the sweep over the queue.
SIZES = {
    "small": [(16, 4096, "")],
    "full": [
        *((128, queue, "queue") for queue in (32768, 4096, 131072)),
        *((clips, 32768, "batch") for clips in (32, 256)),
    ],
}
# Largest difference of losses and gradients relative to their largest.
TOLERANCE = {EAGER: 1e-4, COMPILED: 1e-4, OURS: 1e-4, OURS_BF16: 5e-2}
# Of logits of N x 2K, how many a definition keeps for its backward pass, each with its log-softmax.
PAIRS = {"info_nce": 3, "context_loss": 30, "exchange_loss": 3, "relational_distillation_loss": 18}
# Definitions with a part for every pair: compiling them takes longer than the small profile may.
UNROLLED = ("context_loss", "relational_distillation_loss")
CHUNK = 32  # clips that the definition is given at a time, so that it fits in memory at any size


def unit(generator: torch.Generator, *sizes: int, dim: int = -1) -> Tensor:
    """Random embeddings of length 1 along a dimension."""
    return functional.normalize(torch.randn(sizes, generator=generator, device=generator.device), dim=dim)


@functools.lru_cache(maxsize=2)
def queues(queue: int, device: str) -> tuple[Tensor, Tensor]:
    """(S, D, K) of the modalities and (S·D, K) of the joint embedding, unit columns."""
    columns = unit(torch.Generator(device).manual_seed(0), MODALITIES, EMBEDDING, queue, dim=1)
    return columns, columns.reshape(MODALITIES * EMBEDDING, queue) / MODALITIES**0.5


def as_bfloat16(function: Callable) -> Callable:
    """The function of embeddings rounded to bfloat16, as they leave an encoder: rounding belongs to the time."""
    return lambda *embeddings: function(*(value.bfloat16() for value in embeddings))


def in_chunks(function: Callable[..., Tensor], phase: str) -> Callable[[Inputs], object]:
    """A definition whose losses are means over clips, of ``CHUNK`` clips (dimension 1) at a time."""

    def run(inputs: Inputs) -> object:
        losses, gradients = 0.0, [[] for value in inputs.arguments if value.requires_grad]
        for part in zip(*(value.split(CHUNK, dim=1) for value in inputs.arguments), strict=True):
            share = part[0].shape[1] / inputs.arguments[0].shape[1]
            leaves = [value.detach().requires_grad_(value.requires_grad) for value in part]
            cotangents = tuple(share * cotangent for cotangent in inputs.cotangents)
            result = of_phase(phase, function)(Inputs(tuple(leaves), cotangents))
            if phase == FORWARD:
                losses = losses + share * result
                continue
            losses = losses + share * result[0][0].detach()
            for all_parts, gradient in zip(gradients, result[1], strict=True):
                all_parts.append(gradient)
        return losses if phase == FORWARD else ((losses,), [torch.cat(parts, dim=1) for parts in gradients])

    return run


def loss_case(
    op: str,
    phase: str,
    sizes: tuple[int, int, str],
    draw: Callable[[torch.Generator], tuple[list[Tensor], list[Tensor]]],
    ours: Callable[..., Tensor],
    definition: Callable[..., Tensor],
    floor: Callable[..., Work],
    terms: int = MODALITIES,
) -> Case:
    """A loss of embeddings against queues.

    Args:
        sizes: of ``SIZES``.
        draw: gives embeddings that are trained, and others; arguments of the functions in this order.
        ours: the loss (terms,).
        definition: in plain PyTorch, which is the baseline, too.
        floor: of ``kind`` and ``backward``.
    """
    clips, queue, sweep = sizes

    def draw_inputs(generator: torch.Generator) -> Inputs:
        trained, others = draw(generator)
        if phase == FORWARD:
            return Inputs((*trained, *others))
        weights = torch.rand(terms, generator=generator, device=generator.device) + 0.5
        return Inputs((*(value.requires_grad_() for value in trained), *others), (weights,))

    ways = {EAGER: definition, COMPILED: compiled(definition), OURS: ours, OURS_BF16: as_bfloat16(ours)}
    if not sweep and op in UNROLLED:
        del ways[COMPILED]
    return Case(
        op=op,
        phase=phase,
        sizes={"clips": clips, "queue": queue},
        draw=draw_inputs,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        expected=in_chunks(definition, phase),
        # Rounding changes a few nearest neighbours, so the definition is given rounded embeddings.
        expected_of={OURS_BF16: in_chunks(as_bfloat16(definition), phase)},
        tolerance=TOLERANCE,
        floor=floor(backward=phase == BOTH),
        floor_bf16=floor(kind="bf16", backward=phase == BOTH),
        clips=clips,
        sweep=sweep,
        bytes_needed=dict.fromkeys((EAGER, COMPILED), 4 * clips * queue * (4 * PAIRS[op] if phase == BOTH else 12)),
        with_peak=phase == BOTH and bool(sweep),
    )


def phases(sizes: Sequence[tuple[int, int, str]], make_case: Callable[..., Case]) -> list[Case]:
    """A loss's cases: without backward only at the first size."""
    return [make_case(FORWARD, sizes[0]), *(make_case(BOTH, size) for size in sizes)]
