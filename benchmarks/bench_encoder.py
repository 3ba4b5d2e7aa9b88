"""The encoder, block by block and whole: ours against separate eager encoders, and those under torch.compile.

    pytest benchmarks/bench_encoder.py -s
    python benchmarks/bench_encoder.py --threads 2
    python benchmarks/bench_encoder.py --device cuda

Six streams at the published sizes in training mode with dropout, forward alone (without gradient, as a key encoder
runs) and with the backward pass. Results without dropout are compared with the separate encoders' before anything is
timed; ways take turns; inputs are drawn anew for every call. "rate" is the arithmetic of direct products, with joints
gathered along the edges before the product, over the time: a convolution that needs fewer products can exceed the
machine's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable

import allocator
import measuring
import torch
from separate_encoders import SeparateEncoders
from torch import Tensor

from ikem_fast import layouts
from ikem_fast.nn import EncoderInput, MultiStreamSTGCN
from ikem_fast.nn.layers import BatchStatistics

WAYS = ("ours", "ours, bf16", "separate", "separate, compiled")
TOLERANCE = {"ours": 1e-3, "ours, bf16": 3e-2, "separate, compiled": 1e-3}
STREAMS, NUM_PERSONS, JOINTS = 6, 2, 25


def make_encoders(dropout: float) -> MultiStreamSTGCN:
    torch.manual_seed(0)
    return MultiStreamSTGCN(layouts.get("ntu-rgb+d").adjacency(), STREAMS, dropout=dropout)


class Piece:
    """A block, or all of them with the input norm before and the mean after: each way to run it, and its inputs."""

    def __init__(self, block: int | None, arguments: argparse.Namespace, dropout: float = 0.5):
        self.device = torch.device(arguments.device)
        self.block = block
        encoders = make_encoders(dropout).to(self.device)
        self.encoders = {
            "ours": encoders,
            "separate": SeparateEncoders(encoders).to(self.device),
            "separate, compiled": SeparateEncoders(encoders, compiled=True).to(self.device),
            "ours, bf16": make_encoders(dropout).to(self.device),
        }
        self.encoders["ours, bf16"].precision = "bf16"
        frames = [50] * 5 + [25] * 3 + [13] * 2
        channels = [3] + [b.temporal_conv.weight.shape[1] for b in encoders.blocks]
        number = 0 if block is None else block
        self.shape = (STREAMS, arguments.clips * NUM_PERSONS, frames[number], JOINTS, channels[number])
        blocks = range(10) if block is None else (block,)
        edges = len(encoders.graph.edges)
        self.operations = 2 * STREAMS * arguments.clips * NUM_PERSONS * sum(
            _products(frames[i], channels[i], encoders.blocks[i], edges) for i in blocks
        )  # fmt: skip

    def draw(self, generator: torch.Generator) -> Tensor:
        return torch.randn(self.shape, generator=generator, device=self.device)

    def run(self, way: str, x: Tensor) -> Tensor:
        encoders = self.encoders[way]
        if self.block is None:
            return encoders.features(EncoderInput(x, NUM_PERSONS))
        if way.startswith("ours"):
            seed = torch.zeros(1, dtype=torch.int64, device=self.device)
            x = x.bfloat16() if way.endswith("bf16") else x
            pool = NUM_PERSONS if self.block == 9 else 0
            return encoders.blocks[self.block](x, encoders.graph, BatchStatistics(), seed, self.block, pool)
        run = _compiled_block if "compiled" in way else _run_block
        return torch.stack(
            [
                run(encoder.blocks[self.block], stream.permute(0, 3, 1, 2), encoder.adjacency, self.block == 9)
                for encoder, stream in zip(encoders.encoders, x, strict=True)
            ]
        )

    def call(self, way: str, backward: bool) -> Callable[[Tensor], object]:
        def forward(x: Tensor) -> Tensor:
            with torch.no_grad():
                return self.run(way, x)

        def both(x: Tensor) -> None:
            # All but the first block pass a gradient on to their input.
            output = self.run(way, x.requires_grad_(self.block not in (None, 0)))
            output.backward(torch.ones_like(output))

        return both if backward else forward


def _run_block(block: torch.nn.Module, x: Tensor, adjacency: Tensor, is_last: bool) -> Tensor:
    y = block(x, adjacency)
    if is_last:
        return y.mean(dim=(2, 3)).unflatten(0, (-1, NUM_PERSONS)).mean(dim=1)
    return y.permute(0, 2, 3, 1)


_compiled_block = torch.compile(_run_block)


def _products(frames: int, in_channels: int, block: torch.nn.Module, edges: int) -> int:
    """Multiply-adds of a sequence in a block."""
    out_channels, stride = block.temporal_conv.weight.shape[1], block.temporal_conv.stride
    out_frames = -(-frames // stride)
    graph = frames * (edges * in_channels + 3 * JOINTS * in_channels * out_channels)
    taps = sum(0 <= stride * t + tap - 4 < frames for t in range(out_frames) for tap in range(9))
    residual = 0 if block.residual is None else out_frames * JOINTS * in_channels * out_channels
    return graph + taps * JOINTS * out_channels**2 + residual


def check(block: int | None, arguments: argparse.Namespace) -> None:
    """Ends the process unless all ways give the separate encoders' result."""
    piece = Piece(block, arguments, dropout=0.0)
    x = piece.draw(torch.Generator(piece.device).manual_seed(1))
    with torch.no_grad():
        expected = piece.run("separate", x).double()
        for name in arguments.ways:
            if name not in TOLERANCE:
                continue
            error = float((piece.run(name, x).double() - expected).norm() / expected.norm())
            if not error < TOLERANCE[name]:
                raise SystemExit(f"'{name}' is {error:.1e} away from separate encoders: nothing was timed")


def run_piece(block: int | None, arguments: argparse.Namespace) -> dict[tuple[str, bool], float]:
    check(block, arguments)
    piece = Piece(block, arguments)
    generator = torch.Generator(piece.device).manual_seed(2)
    title = "whole encoder" if block is None else f"block {block + 1}"
    frames, channels = piece.shape[2], piece.shape[4]
    print(f"\n{title}: {frames} frames, {channels} channels in")
    header = ("median", "fastest", "slowest", "rate", "ours is", "ours bf16 is")
    print(f"{'':22}{'pass':>10}" + "".join(f"{column:>14}" for column in header))
    medians = {}
    for backward in (False, True):
        seconds = measuring.time_in_turns(
            {name: piece.call(name, backward) for name in arguments.ways},
            lambda: piece.draw(generator),
            lambda _: arguments.repeats,
            piece.device,
        )
        for name, values in seconds.items():
            medians[name, backward] = statistics.median(values)
        for name, values in seconds.items():
            median = medians[name, backward]
            rate = (3 if backward else 1) * piece.operations / median / 1e9
            times = "".join(f"{1e3 * value:>11.2f} ms" for value in (median, values[0], values[-1]))
            ratios = "".join(
                f"{f'{median / medians[ours, backward]:.2f} times':>14}"
                for ours in ("ours", "ours, bf16")
                if (ours, backward) in medians and not name.startswith("ours")
            )
            print(f"{name:22}{'both' if backward else 'forward':>10}{times}{rate:>8.0f} GFLOP/s{ratios}")
    return medians


def run(arguments: argparse.Namespace) -> dict[int | None, dict[tuple[str, bool], float]]:
    measuring.begin(arguments.device, arguments.threads)
    print(f"{arguments.clips} clips of {NUM_PERSONS} persons, {STREAMS} streams")
    arguments.ways = [name for name in arguments.ways if not (arguments.no_compile and "compiled" in name)]
    figures = {block: run_piece(block, arguments) for block in (*arguments.blocks, None)}
    if arguments.device == "cpu":
        print(f"\nload average {os.getloadavg()[0]:.1f} after the run")
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--clips", type=int, help="of a batch; by default 16 on a CPU, 128 on a GPU")
    parser.add_argument("--blocks", type=int, nargs="*", choices=range(10), default=list(range(10)), help="from 0")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parsed = parser.parse_args(arguments)
    if parsed.clips is None:
        parsed.clips = 128 if parsed.device == "cuda" else 16
    return parsed


def test_encoder_cpu():
    arguments = ["--clips", "2", "--repeats", "2", "--blocks", "0", "9", "--ways", "ours", "ours, bf16", "separate"]
    figures = run(parse(arguments))
    assert set(figures) == {0, 9, None}
    assert all(median > 0 for medians in figures.values() for median in medians.values())


def main() -> None:
    arguments = parse()
    if arguments.device == "cpu":
        allocator.keep_freed_memory()
    run(arguments)


if __name__ == "__main__":
    main()
