"""Graph convolution of six streams, with the batch statistics of its result.

The baseline is a 1x1 convolution to three groups of channels and a product with the adjacency, stream by stream, and
the statistics that the batch norm after it takes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from benchmarks.cases import (
    BOTH,
    COMPILED,
    EAGER,
    FORWARD,
    OURS,
    OURS_BF16,
    Case,
    Inputs,
    activations_as_bfloat16,
    compiled,
    exact_in_bfloat16,
    of_phase,
)
from benchmarks.clips import JOINTS, LAYOUT, PERSONS
from ikem_fast import floors, ops

MODALITIES, PARTITIONS = 6, 3
# Frames, channels, output channels; of the encoder's second, ninth and tenth block.
SIZES = {"small": [(50, 16, 16)], "full": [(50, 16, 16), (13, 64, 64), (13, 64, 256)]}
CLIPS = {("small", "cpu"): 4, ("small", "cuda"): 32, ("full", "cpu"): 16, ("full", "cuda"): 128}
TOLERANCE = {EAGER: 1e-4, COMPILED: 1e-4, OURS: 1e-4, OURS_BF16: 3e-2}


@functools.cache
def graph(device: str) -> tuple[Tensor, Tensor]:
    adjacency = LAYOUT.adjacency().to(device)
    return adjacency, ops.graph_edges(adjacency)


@functools.cache
def edges_and_groups() -> tuple[int, int]:
    """Those of the layout that clips have here."""
    return floors.edges_and_groups(ops.graph_edges(LAYOUT.adjacency()).tolist())


def composition(x: Tensor, weight: Tensor, bias: Tensor, importance: Tensor, adjacency: Tensor) -> tuple[Tensor, ...]:
    """Values (B, T, V, C_out), mean and variance of a stream."""
    y = torch.conv2d(x.permute(0, 3, 1, 2), weight.flatten(0, 1)[..., None, None], bias.flatten())
    y = torch.einsum("bkctv,kvw->bctw", y.unflatten(1, (PARTITIONS, -1)), adjacency * importance)
    variance, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return y.permute(0, 2, 3, 1), mean, variance


def by_stream(function):
    """Lists of an entry for each stream."""

    def run(*arguments: Tensor) -> tuple[list[Tensor], ...]:
        adjacency, _ = graph(arguments[0].device.type)
        streams = zip(*(value.unbind() for value in arguments), strict=True)
        return tuple(map(list, zip(*(function(*stream, adjacency) for stream in streams), strict=True)))

    return run


def on_graph(function):
    return lambda x, *parameters: function(x, *parameters, *graph(x.device.type))


def make_case(phase: str, clips: int, frames: int, channels: int, out_channels: int) -> Case:
    sequences = PERSONS * clips

    def draw(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(sizes, generator=generator, device=generator.device)

        with_gradient = phase == BOTH
        x = exact_in_bfloat16(0.5 + normal(MODALITIES, sequences, frames, JOINTS, channels))
        weight = normal(MODALITIES, PARTITIONS, out_channels, channels, scale=channels**-0.5)
        bias = normal(MODALITIES, PARTITIONS, out_channels)
        importance = 1 + normal(MODALITIES, PARTITIONS, JOINTS, JOINTS, scale=0.1)
        arguments = tuple(value.requires_grad_(with_gradient) for value in (x, weight, bias, importance))
        if not with_gradient:
            return Inputs(arguments)
        of_y = exact_in_bfloat16(normal(MODALITIES, sequences, frames, JOINTS, out_channels))
        return Inputs(arguments, (of_y, normal(MODALITIES, out_channels), normal(MODALITIES, out_channels)))

    ours, definition = on_graph(ops.graph_convolution), on_graph(ops.graph_convolution_reference)
    ways = {EAGER: by_stream(composition), COMPILED: by_stream(compiled(composition)), OURS: ours, OURS_BF16: ours}
    sizes = (MODALITIES, sequences, frames, JOINTS, channels, out_channels, *edges_and_groups())
    return Case(
        op="graph_convolution",
        phase=phase,
        sizes={"clips": clips, "frames": frames, "channels": channels, "output channels": out_channels},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        prepare={OURS_BF16: activations_as_bfloat16(0)},
        expected=of_phase(phase, definition),
        tolerance=TOLERANCE,
        floor=floors.graph_convolution(*sizes, backward=phase == BOTH),
        floor_bf16=floors.graph_convolution(*sizes, kind="bf16", backward=phase == BOTH),
        clips=clips,
    )


def cases(profile: str, device: str) -> list[Case]:
    clips = CLIPS[profile, device]
    return [make_case(phase, clips, *sizes) for sizes in SIZES[profile] for phase in (FORWARD, BOTH)]


def test_graph_convolution(measure, case, way):
    measure(case, way)
