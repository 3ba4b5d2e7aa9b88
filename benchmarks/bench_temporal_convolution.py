"""The convolution over frames of six streams, with batch norm and ReLU before it and the statistics of its result.

The baseline scales, shifts and clamps in channels last, and calls the library's convolution, stream by stream. The
floor counts the operations of direct products, which a convolution in the frequency domain need not make.
"""

from __future__ import annotations

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
from benchmarks.clips import JOINTS, PERSONS
from ikem_fast import floors, ops

MODALITIES, TAPS = 6, 9
# Frames, channels, stride.
SIZES = {"small": [(50, 16, 1)], "full": [(50, 16, 1), (50, 32, 2), (25, 32, 1), (13, 64, 1), (13, 256, 1)]}
CLIPS = {("small", "cpu"): 4, ("small", "cuda"): 32, ("full", "cpu"): 16, ("full", "cuda"): 128}
# The library adds up the bias's gradient in float32: the definition's is 2e-4 away from float64's, ours 1e-6.
TOLERANCE = {EAGER: 1e-3, COMPILED: 1e-3, OURS: 1e-3, OURS_BF16: 3e-2}


def composition(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, stride: int
) -> tuple[Tensor, ...]:
    """Values (B, T', V, C), mean and variance of a stream."""
    activation = torch.relu(scale * x + shift).permute(0, 3, 1, 2)
    y = torch.conv2d(activation, weight.unsqueeze(3), bias, stride=(stride, 1), padding=(TAPS // 2, 0))
    variance, mean = torch.var_mean(y, dim=(0, 2, 3), correction=0)
    return y.permute(0, 2, 3, 1), mean, variance


def by_stream(function, stride: int):
    """Lists of an entry for each stream."""

    def run(*arguments: Tensor) -> tuple[list[Tensor], ...]:
        streams = zip(*(value.unbind() for value in arguments), strict=True)
        return tuple(map(list, zip(*(function(*stream, stride) for stream in streams), strict=True)))

    return run


def with_stride(function, stride: int):
    return lambda *arguments: function(*arguments, stride=stride)


def make_case(phase: str, clips: int, frames: int, channels: int, stride: int) -> Case:
    sequences, out_frames = PERSONS * clips, -(-frames // stride)

    def draw(generator: torch.Generator) -> Inputs:
        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            return scale * torch.randn(sizes, generator=generator, device=generator.device)

        of_channels = (MODALITIES, channels)
        arguments = (
            exact_in_bfloat16(normal(MODALITIES, sequences, frames, JOINTS, channels)),
            1 + normal(*of_channels, scale=0.1),
            normal(*of_channels, scale=0.1),
            normal(*of_channels, channels, TAPS, scale=(TAPS * channels) ** -0.5),
            normal(*of_channels),
        )
        if phase == FORWARD:
            return Inputs(arguments)
        of_y = exact_in_bfloat16(normal(MODALITIES, sequences, out_frames, JOINTS, channels))
        leaves = tuple(value.requires_grad_() for value in arguments)
        return Inputs(leaves, (of_y, normal(*of_channels), normal(*of_channels)))

    ours = with_stride(ops.temporal_convolution, stride)
    eager, of_compiler = by_stream(composition, stride), by_stream(compiled(composition), stride)
    ways = {EAGER: eager, COMPILED: of_compiler, OURS: ours, OURS_BF16: ours}
    sizes = (MODALITIES, sequences, frames, JOINTS, channels)
    options = {"stride": stride, "backward": phase == BOTH}
    return Case(
        op="temporal_convolution",
        phase=phase,
        sizes={"clips": clips, "frames": frames, "channels": channels, "stride": stride},
        draw=draw,
        ways={name: of_phase(phase, function) for name, function in ways.items()},
        prepare={OURS_BF16: activations_as_bfloat16(0)},
        expected=of_phase(phase, with_stride(ops.temporal_convolution_reference, stride)),
        tolerance=TOLERANCE,
        floor=floors.temporal_convolution(*sizes, **options),
        floor_bf16=floors.temporal_convolution(*sizes, kind="bf16", **options),
        clips=clips,
    )


def cases(profile: str, device: str) -> list[Case]:
    clips = CLIPS[profile, device]
    return [make_case(phase, clips, *sizes) for sizes in SIZES[profile] for phase in (FORWARD, BOTH)]


def test_temporal_convolution(measure, case, way):
    measure(case, way)
