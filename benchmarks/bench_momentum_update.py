"""Moving the key encoders' parameters towards the query encoders'."""

from __future__ import annotations

import functools

import torch

from benchmarks.baselines import eager
from benchmarks.cases import CALL, COMPILED, EAGER, OURS, Case, compiled
from benchmarks.clips import LAYOUT
from ikem_fast import floors, ops
from ikem_fast.nn import MultiStreamSTGCN

MODALITIES, MOMENTUM = 6, 0.999
# Hidden channels and size of the features.
SIZES = {"small": (8, 64), "full": (16, 256)}


@functools.cache
def shapes(hidden_channels: int, feature_size: int) -> list[torch.Size]:
    """Of the parameters of six encoders with their heads."""
    encoders = MultiStreamSTGCN(
        LAYOUT.adjacency(),
        MODALITIES,
        hidden_channels=hidden_channels,
        feature_size=feature_size,
        head_sizes=(feature_size, 128),
    )
    return [parameter.shape for parameter in encoders.parameters()]


def in_place(function):
    def run(inputs):
        keys, queries = inputs
        function(keys, queries, MOMENTUM)
        return keys

    return run


def make_case(hidden_channels: int, feature_size: int) -> Case:
    sizes = shapes(hidden_channels, feature_size)
    values = sum(size.numel() for size in sizes)

    def draw(generator: torch.Generator):
        return [[torch.randn(size, generator=generator, device=generator.device) for size in sizes] for _ in range(2)]

    ways = {EAGER: eager.momentum_update_, COMPILED: compiled(eager.momentum_update_), OURS: ops.momentum_update_}
    return Case(
        op="momentum_update",
        phase=CALL,
        sizes={"tensors": len(sizes), "values": values},
        draw=draw,
        ways={name: in_place(function) for name, function in ways.items()},
        expected=in_place(ops.momentum_update_reference_),
        tolerance=dict.fromkeys(ways, 1e-6),
        floor=floors.momentum_update(values),
    )


def cases(profile: str, device: str) -> list[Case]:
    return [make_case(*SIZES[profile])]


def test_momentum_update(measure, case, way):
    measure(case, way)
