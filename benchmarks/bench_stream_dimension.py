"""Where the stream dimension of the encoder's activations goes: (S, B·M, T, V, C) or (B·M, T, V, S·C).

    python benchmarks/bench_stream_dimension.py --threads 2 --repeats 20

Times the two library calls that the encoder is made of, forward, for S = 6 streams of B·M = 32 sequences, bfloat16
channels last: the 9x1 convolution as S separate calls against one grouped call, and the 1x1 convolution over rows
(B·M·T·V, C) as one batched product (leading streams) against a grouped convolution (streams in the channels). Both ways
get the same values and their results are compared.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

STREAMS, SEQUENCES, JOINTS = 6, 32, 25
SIZES = ((16, 50), (32, 25), (64, 13), (256, 13))  # channels and frames


def time_in_turns(functions: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, float]:
    seconds = {name: [] for name in functions}
    for call in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if call >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def largest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    return float((first.float() - second.float()).abs().max() / second.float().abs().max())


def make_calls(channels: int, frames: int, generator: torch.Generator) -> dict[str, Callable[[], torch.Tensor]]:
    """The ways to make each of the two convolutions, on the same values."""
    leading = torch.randn(STREAMS, SEQUENCES, frames, JOINTS, channels, generator=generator).bfloat16()
    inner = leading.permute(1, 2, 3, 0, 4).reshape(SEQUENCES, frames, JOINTS, STREAMS * channels)
    temporal = (torch.randn(STREAMS, channels, channels, 9, 1, generator=generator) * 0.1).bfloat16()
    temporal = [weight.to(memory_format=torch.channels_last) for weight in temporal]
    all_temporal = torch.cat(temporal).to(memory_format=torch.channels_last)
    pointwise = (torch.randn(STREAMS, channels, channels, generator=generator) * 0.1).bfloat16()
    all_pointwise = pointwise.reshape(STREAMS * channels, channels, 1, 1)
    transposed = pointwise.transpose(1, 2).contiguous()
    # Channels-last tensors in the dimension order of convolutions, without copies.
    streams = [values.permute(0, 3, 1, 2) for values in leading]
    together = inner.permute(0, 3, 1, 2)
    rows = leading.flatten(1, 3)
    return {
        "9x1: 6 calls": lambda: [F.conv2d(x, w, padding=(4, 0)) for x, w in zip(streams, temporal, strict=True)],
        "9x1: grouped": lambda: F.conv2d(together, all_temporal, padding=(4, 0), groups=STREAMS),
        "1x1: batched product": lambda: torch.bmm(rows, transposed),
        "1x1: grouped": lambda: F.conv2d(together, all_pointwise, groups=STREAMS),
        "1x1: 6 products": lambda: [x @ w for x, w in zip(rows, transposed, strict=True)],
    }


def check_calls(calls: dict[str, Callable[[], torch.Tensor]], channels: int) -> None:
    separate = torch.stack(calls["9x1: 6 calls"]())
    grouped = calls["9x1: grouped"]().unflatten(1, (STREAMS, channels)).transpose(0, 1)
    batched = calls["1x1: batched product"]()
    products = calls["1x1: grouped"]().unflatten(1, (STREAMS, channels)).permute(1, 0, 3, 4, 2).flatten(1, 3)
    for ours, other in ((separate, grouped), (batched, products), (batched, torch.stack(calls["1x1: 6 products"]()))):
        if not largest_difference(ours, other) < 2e-2:
            raise SystemExit(f"C = {channels}: two ways differ by {largest_difference(ours, other):.1e}")


@torch.no_grad()
def run(threads: int, repeats: int) -> None:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    print(f"torch {torch.__version__}, {threads} threads, load average {os.getloadavg()[0]:.1f}")
    for channels, frames in SIZES:
        calls = make_calls(channels, frames, generator)
        check_calls(calls, channels)
        for name, seconds in time_in_turns(calls, repeats).items():
            print(f"C {channels:>3}, T {frames}: {name:22}{1e3 * seconds:>9.3f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    run(arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
