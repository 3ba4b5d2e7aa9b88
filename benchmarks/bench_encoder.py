"""Six encoders in training mode, block by block and whole, and whole in inference: ours against separate eager ones.

"forward" is without gradient, as a key encoder runs. What is timed has dropout; results and gradients are compared
without it, since every way draws masks of its own. The floor's operations are those of direct products (floors.py), and
a block's bytes those of every tensor between its ops written and read once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.bench_graph_convolution import edges_and_groups
from benchmarks.cases import BOTH, COMPILED, EAGER, FORWARD, OURS, OURS_BF16, Case, compiled, over_threads
from benchmarks.clips import FRAMES, JOINTS, LAYOUT, PERSONS
from ikem_fast import floors
from ikem_fast.nn import EncoderInput, MultiStreamSTGCN, STGCNReference
from ikem_fast.nn.layers import BatchStatistics
from ikem_fast.nn.parts import block_plan

DROPOUT = 0.5
HIDDEN_CHANNELS, FEATURE_SIZE = 16, 256
PLAN = block_plan(HIDDEN_CHANNELS, FEATURE_SIZE)
FIRST, LAST = 0, len(PLAN) - 1
# One block of each kind, from 0.
BLOCKS = {"small": (9,), "full": (0, 1, 4, 5, 7, 8, 9)}
CLIPS = {("small", "cpu"): 2, ("small", "cuda"): 32, ("full", "cpu"): 16, ("full", "cuda"): 128}
BATCHES = {"cpu": (4, 64), "cuda": (32, 256)}
# Of the norm of features and of the gradient of all parameters, largest.
TOLERANCE = {EAGER: 1e-3, COMPILED: 1e-3, OURS: 1e-3, OURS_BF16: 0.1}
# Ten blocks on end: rounding turns some of the ReLUs on or off, so that the gradient of eager float32 is itself off by
# 6e-3 from that of float64.
TOLERANCE_OF_ALL = {EAGER: 2e-2, COMPILED: 2e-2, OURS: 2e-2, OURS_BF16: 0.5}


class Piece(NamedTuple):
    """All blocks with the norm of the input before and the mean after them, or one of them."""

    modalities: int
    block: int | None
    training: bool

    def sizes(self) -> tuple[int, int, int]:
        """Channels and frames of the input, output channels."""
        channels, frames = 3, FRAMES
        for out_channels, stride in PLAN[: self.block or 0]:
            channels, frames = out_channels, -(-frames // stride)
        return channels, frames, PLAN[LAST if self.block is None else self.block][0]


@functools.lru_cache(maxsize=4)
def make_encoders(modalities: int, device: str, dropout: float, precision: str) -> MultiStreamSTGCN:
    torch.manual_seed(0)
    return MultiStreamSTGCN(
        LAYOUT.adjacency(),
        modalities,
        hidden_channels=HIDDEN_CHANNELS,
        feature_size=FEATURE_SIZE,
        dropout=dropout,
        precision=precision,
    ).to(device)


@functools.lru_cache(maxsize=4)
def make_separate(modalities: int, device: str, dropout: float) -> nn.ModuleList:
    """An eager encoder for each modality, with the same weights."""
    encoders = make_encoders(modalities, device, dropout, "fp32")
    return nn.ModuleList(encoders.to_reference(stream) for stream in range(modalities))


def ours(piece: Piece, dropout: float, precision: str) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """Features, or a block's output, and the parameters that they are made of."""

    def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        encoders = make_encoders(piece.modalities, x.device.type, dropout, precision).train(piece.training)
        if piece.block is None:
            return encoders.features(EncoderInput(x, PERSONS)), dict(encoders.named_parameters())
        block = encoders.blocks[piece.block]
        seed = torch.zeros(1, dtype=torch.int64, device=x.device)
        pool = PERSONS if piece.block == LAST else 0
        y = block(x, encoders.graph, BatchStatistics(), seed, piece.block, pool)
        return y, dict(block.named_parameters())

    return run


def separate(piece: Piece, dropout: float, compile_all: bool = False):
    """As :func:`ours`, in lists of an entry for each stream."""
    features = compiled(STGCNReference.features) if compile_all else STGCNReference.features
    block = compiled(_run_block) if compile_all else _run_block

    def run(x: Tensor) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        encoders = make_separate(piece.modalities, x.device.type, dropout).train(piece.training)
        streams = zip(encoders, x.unbind(), strict=True)
        if piece.block is None:
            results, parts = [features(encoder, EncoderInput(values, PERSONS)) for encoder, values in streams], encoders
        else:
            results = [
                block(encoder.blocks[piece.block], values, encoder.adjacency, piece.block == LAST)
                for encoder, values in streams
            ]
            parts = [encoder.blocks[piece.block] for encoder in encoders]
        parameters = [dict(part.named_parameters()) for part in parts]
        return results, {name: [one[name] for one in parameters] for name in parameters[0]}

    return run


def _run_block(block: nn.Module, x: Tensor, adjacency: Tensor, is_last: bool) -> Tensor:
    y = block(x.permute(0, 3, 1, 2), adjacency)
    if is_last:
        return y.mean(dim=(2, 3)).unflatten(0, (-1, PERSONS)).mean(dim=1)
    return y.permute(0, 2, 3, 1)


def of_phase(phase: str, function: Callable) -> Callable[[tuple[Tensor, Tensor]], tuple]:
    """A way: the result without gradient, or the result and the gradients of parameters and, if it has one, of x."""

    def forward(inputs: tuple[Tensor, Tensor]) -> tuple:
        with torch.no_grad():
            return function(inputs[0])[0], {}

    def both(inputs: tuple[Tensor, Tensor]) -> tuple:
        x, cotangent = inputs
        results, parameters = function(x)
        wanted = {name: value if isinstance(value, list) else [value] for name, value in parameters.items()}
        leaves = [leaf for group in wanted.values() for leaf in group] + ([x] if x.requires_grad else [])
        outputs, cotangents = ([results], [cotangent]) if isinstance(results, Tensor) else (results, cotangent.unbind())
        gradients = iter(
            torch.autograd.grad(outputs, leaves, [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)])
        )
        of_parameters = {name: [next(gradients) for _ in group] for name, group in wanted.items()}
        return results, of_parameters | ({"x": list(gradients)} if x.requires_grad else {})

    return both if phase == BOTH else forward


def error(result: tuple, expected: tuple) -> float:
    """Norms of what features and all gradients are off by, relative to their own; the larger."""

    def joined(values: Tensor | list[Tensor]) -> Tensor:
        # A single tensor of all streams, or one of each.
        values = [values] if isinstance(values, Tensor) else values
        return torch.cat([value.detach().double().flatten() for value in values])

    def off(some: Tensor, other: Tensor) -> float:
        if some.shape != other.shape:
            return math.inf
        relative = float((some - other).norm() / other.norm())
        return relative if math.isfinite(relative) else math.inf

    def of_all(gradients: Mapping[str, list[Tensor]]) -> Tensor:
        return torch.cat([joined(gradients[name]) for name in sorted(gradients)])

    errors = [off(joined(result[0]), joined(expected[0]))]
    if expected[1]:
        errors.append(
            off(of_all(result[1]), of_all(expected[1])) if result[1].keys() == expected[1].keys() else math.inf
        )
    return max(errors)


def make_case(phase: str, clips: int, piece: Piece, sweep: str = "", compile_all: bool = True) -> Case:
    channels, frames, out_channels = piece.sizes()
    has_gradient = phase == BOTH and piece.block not in (None, FIRST)
    stride = 1 if piece.block is None else PLAN[piece.block][1]
    shape = (piece.modalities, PERSONS * clips, frames, JOINTS, channels)
    pooled = piece.block in (None, LAST)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(shape, generator=generator, device=generator.device)
        of_result = (clips, out_channels) if pooled else (PERSONS * clips, -(-frames // stride), JOINTS, out_channels)
        result = torch.randn(piece.modalities, *of_result, generator=generator, device=generator.device)
        return x.requires_grad_(has_gradient), result

    def as_activations(inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, cotangent = inputs
        return x.detach().bfloat16().requires_grad_(has_gradient), cotangent

    def ways(dropout: float) -> dict[str, Callable]:
        made = {
            EAGER: separate(piece, dropout),
            COMPILED: separate(piece, dropout, compile_all=True),
            OURS: ours(piece, dropout, "fp32"),
            OURS_BF16: ours(piece, dropout, "bf16"),
        }
        return {name: of_phase(phase, function) for name, function in made.items()}

    def floor(kind: str) -> floors.Work:
        options = {"kind": kind, "backward": phase == BOTH}
        if piece.block is None:
            return floors.encoder(
                piece.modalities, clips, PERSONS, FRAMES, JOINTS, PLAN, *edges_and_groups(), **options
            )
        return floors.block(
            piece.modalities, PERSONS * clips, frames, JOINTS, channels, out_channels, *edges_and_groups(),
            stride=stride, residual=piece.block != FIRST, pool=PERSONS if piece.block == LAST else 0,
            input_gradient=has_gradient, **options,
        )  # fmt: skip

    timed = ways(DROPOUT)
    if piece.block is None and not compile_all:
        del timed[COMPILED]
    name = "encoder" if piece.block is None else "encoder block"
    sizes = {"clips": clips, "modalities": piece.modalities}
    return Case(
        op=name if piece.training else f"{name}, inference",
        phase=phase,
        sizes=sizes if piece.block is None else {**sizes, "block": piece.block + 1},
        draw=draw,
        ways=timed,
        checked={name: way for name, way in ways(0.0).items() if name in timed} if piece.training else {},
        prepare={} if piece.block is None else {OURS_BF16: as_activations},
        expected=of_phase(phase, separate(piece, 0.0)),
        tolerance=TOLERANCE_OF_ALL if piece.block is None and phase == BOTH else TOLERANCE,
        floor=floor("fp32"),
        floor_bf16=floor("bf16"),
        error=error,
        clips=clips,
        sweep=sweep,
    )


def cases(profile: str, device: str) -> list[Case]:
    clips = CLIPS[profile, device]
    compile_all = profile == "full"  # all blocks, which takes longer than the small profile may
    listed = [make_case(FORWARD, clips, Piece(6, None, training=False), compile_all=compile_all)]
    for phase in (FORWARD, BOTH):
        pieces = [Piece(6, block, training=True) for block in (None, *BLOCKS[profile])]
        listed += [make_case(phase, clips, piece, compile_all=compile_all) for piece in pieces]
        if profile == "full" and phase == BOTH:
            listed += [make_case(phase, clips, Piece(count, None, training=True), "modalities") for count in (1, 3)]
            listed += [make_case(phase, count, Piece(6, None, training=True), "batch") for count in BATCHES[device]]
    if (profile, device) == ("full", "cpu"):
        listed += over_threads(make_case(BOTH, clips, Piece(6, None, training=True)))
    return listed


def test_encoder(measure, case, way):
    measure(case, way)
