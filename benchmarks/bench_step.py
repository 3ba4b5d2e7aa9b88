"""A whole training step: ours against separate eager encoders, and those under torch.compile.

    pytest benchmarks/bench_step.py -s
    python benchmarks/bench_step.py --threads 2
    python benchmarks/bench_step.py --device cuda
    python benchmarks/bench_step.py --profile step.json   # a trace of one of our steps, for a trace viewer

Six modalities at the published sizes: views of stored clips, query and key encoders, losses, backward, momentum update,
enqueue and SGD, in training mode with dropout. "separate" has one eager encoder per modality (the plain-PyTorch
definition of the encoder) and all else as we have it; "separate, all eager" has the losses' definitions, too, as a user
would write them; "captured", on a GPU, replays a CUDA graph. Each way has weights of its own, drawn alike. Before
anything is timed, losses and gradients of a step without dropout are compared with those of the separate encoders. Ways
take turns; views are drawn anew for every step.

Peak memory is what a process of its own needs for a step on top of weights, gradients, queues and clips.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable

import allocator
import measuring
import torch
from separate_encoders import separate
from torch import Tensor

from ikem_fast import ops
from ikem_fast.engine.cuda_graphs import open_graphs
from ikem_fast.engine.step import WARM_UP_STEPS
from ikem_fast.methods import IKEM, StepLosses
from ikem_fast.methods.ikem import STAGES
from ikem_fast.quirks import Quirks

WAYS = (
    "ours",
    "ours, bf16",
    "separate",
    "separate, autocast bf16",
    "separate, compiled",
    "separate, all eager",
)
CAPTURED = ("ours, captured", "ours, bf16, captured")  # on a GPU, as CUDA graphs
# Largest difference of a loss, and of the gradient relative to its norm.
TOLERANCE = {"ours": (1e-4, 1e-3), "ours, bf16": (2e-2, 0.5), "separate, compiled": (1e-4, 1e-3)}
NUM_STORED = 256  # more than a batch
LOSSES = ("info_nce", "context_loss", "exchange_loss")


class Trainer:
    """A trainer, its optimiser and its clips."""

    def __init__(self, way: str, arguments: argparse.Namespace, *, dropout: float = 0.5, max_queue: int | None = None):
        torch.manual_seed(0)
        self.device = torch.device(arguments.device)
        self.stage = arguments.stage
        self.num_clips = arguments.clips
        self.all_eager = way == "separate, all eager"
        self.module = IKEM(
            hidden_channels=arguments.hidden_channels,
            feature_size=arguments.feature_size,
            queue_size=arguments.queue if max_queue is None else min(arguments.queue, max_queue),
            dropout=dropout,
            precision="bf16" if way.startswith("ours, bf16") else "fp32",
            # Which of the key encoders move has no part in what is compared.
            quirks=Quirks(partial_momentum_update=False),
        ).to(self.device)
        if way.startswith("separate"):
            separate(self.module, compiled="compiled" in way, autocast="autocast" in way)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4, fused=True)
        generator = torch.Generator(self.device).manual_seed(1)
        self.clips = torch.randn(NUM_STORED, 3, 50, 25, 2, generator=generator, device=self.device).cumsum(dim=2)
        self.num_frames = torch.full((NUM_STORED,), 80, device=self.device)
        # What differs between steps, where a captured one reads it.
        self.epoch = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.indices = torch.arange(self.num_clips, device=self.device)
        self.graphs = open_graphs(self.device) if way in CAPTURED else None
        self.replay: Callable[[], Tensor] | None = None
        self.warm_ups = 0

    def losses(self) -> StepLosses:
        parameters = ops.draw_views(0, self.epoch, self.indices, 50, ops.AugmentationConfig())
        views = self.module.views(self.clips, self.num_frames, self.indices, parameters)
        return self.module.losses(*views, self.stage)

    def step(self, number: int) -> Tensor:
        self.epoch.fill_(number)
        torch.arange(number, number + self.num_clips, out=self.indices).remainder_(NUM_STORED)
        if self.graphs is None:
            return self.train()
        if self.warm_ups < WARM_UP_STEPS:
            self.warm_ups += 1
            return self.graphs.warm_up(self.train)
        if self.replay is None:
            self.replay = self.graphs.capture(self.train)
        return self.replay()

    def train(self) -> Tensor:
        step = with_eager_losses(self.losses) if self.all_eager else self.losses()
        self.optimizer.zero_grad(set_to_none=True)
        step.total.backward()
        self.optimizer.step()
        return step.total.detach()


def with_eager_losses(run: Callable[[], StepLosses]) -> StepLosses:
    """Runs with the losses' plain-PyTorch definitions in the place of the fused ones."""
    own = {name: getattr(ops, f"{name}_and_accuracy") for name in LOSSES}
    for name in LOSSES:
        definition = getattr(ops, f"{name}_reference")

        def losses(*arguments, definition=definition):
            values = definition(*arguments)
            return values, torch.zeros_like(values)

        setattr(ops, f"{name}_and_accuracy", losses)
    try:
        return run()
    finally:
        for name, function in own.items():
            setattr(ops, f"{name}_and_accuracy", function)


def check(names: list[str], arguments: argparse.Namespace) -> None:
    """Ends the process unless losses and gradients are those of separate encoders."""

    def evaluate(way: str) -> tuple[Tensor, Tensor]:
        trainer = Trainer(way, arguments, dropout=0.0, max_queue=2048)
        step = trainer.losses()
        step.total.backward()
        # The gradient of the features' last convolution, which all of the losses pass through.
        encoders = trainer.module.query_encoders
        weights = (
            [encoder.blocks[9].temporal_conv.weight for encoder in encoders.encoders]
            if way.startswith("separate")
            else [encoders.blocks[9].temporal_conv.weight]
        )
        gradient = torch.cat([weight.grad.flatten().double() for weight in weights])
        return torch.stack(list(step.losses.values())).double(), gradient

    expected, expected_gradient = evaluate("separate")
    for name in names:
        if name not in TOLERANCE:
            continue
        losses, gradient = evaluate(name)
        error = float(((losses - expected) / expected).abs().max())
        gradient_error = float((gradient - expected_gradient).norm() / expected_gradient.norm())
        print(f"{name:26}losses differ by {error:.1e}, the gradient by {gradient_error:.1e} from separate encoders'")
        if not (error < TOLERANCE[name][0] and gradient_error < TOLERANCE[name][1]):
            raise SystemExit(f"'{name}' is too far away from separate encoders: nothing was timed")


def measure_peak(way: str, arguments: argparse.Namespace) -> int:
    trainer = Trainer(way, arguments)
    trainer.step(0)
    trainer.optimizer.zero_grad(set_to_none=False)  # gradients and momenta are there beforehand
    return measuring.peak_beyond(lambda: trainer.step(1), arguments.device)


def profile(arguments: argparse.Namespace) -> None:
    """Writes a trace of one step, after two others, and prints what took longest."""
    trainer = Trainer("ours, bf16" if arguments.bf16 else "ours", arguments)
    for number in range(2):
        trainer.step(number)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if arguments.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        trainer.step(2)
    order = "self_cuda_time_total" if arguments.device == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))
    profiler.export_chrome_trace(arguments.profile)


def run(arguments: argparse.Namespace) -> dict[str, float]:
    device = torch.device(arguments.device)
    measuring.begin(arguments.device, arguments.threads)
    names = [name for name in arguments.ways if not (arguments.no_compile and "compiled" in name)]
    check(names, arguments)
    names += [name for name in CAPTURED if device.type == "cuda" and name.removesuffix(", captured") in names]
    trainers = {name: Trainer(name, arguments) for name in names}
    for trainer in trainers.values():
        for number in range(WARM_UP_STEPS + 1):
            trainer.step(number)
    numbers = iter(range(10**9))
    seconds = measuring.time_in_turns(
        {name: trainer.step for name, trainer in trainers.items()},
        lambda: next(numbers),
        lambda name: arguments.repeats if name.startswith("ours") else max(3, arguments.repeats // 2),
        device,
    )
    del trainers
    print(f"\nstage '{arguments.stage}', {arguments.clips} clips of two persons, K = {arguments.queue}")
    header = ("median", "fastest", "slowest", "clips/s", "memory", "ours is", "ours bf16 is")
    print(f"{'':26}" + "".join(f"{title:>14}" for title in header))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, values in seconds.items():
        median = medians[name]
        peak = None
        if "compiled" not in name and not arguments.no_memory:
            own = [f"--{key}={getattr(arguments, key.replace('-', '_'))}" for key in FORWARDED]
            peak = measuring.peak_in_process(__file__, name, *own, threads=arguments.threads)
            medians[name, "memory"] = peak
        times = "".join(f"{1e3 * value:>11.1f} ms" for value in (median, values[0], values[-1]))
        memory = "" if peak is None else f"{peak / 1e6:.0f} MB"
        ratios = "".join(
            f"{f'{median / medians[ours]:.2f} times':>14}"
            for ours in ("ours", "ours, bf16")
            if ours in medians and not name.startswith("ours")
        )
        print(f"{name:26}{times}{arguments.clips / median:>14.1f}{memory:>14}{ratios}")
    if device.type == "cpu":
        print(f"\nload average {os.getloadavg()[0]:.1f} after the run")
    return medians


FORWARDED = ("device", "clips", "queue", "stage", "hidden-channels", "feature-size")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--clips", type=int, help="of a batch; by default 16 on a CPU, 128 on a GPU")
    parser.add_argument("--queue", type=int, default=32768, help="K")
    parser.add_argument("--stage", choices=STAGES, default="cross")
    parser.add_argument("--hidden-channels", type=int, default=16)
    parser.add_argument("--feature-size", type=int, default=256)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument("--profile", metavar="FILE", help="only write a trace of one of our steps")
    parser.add_argument("--bf16", action="store_true", help="of the trace")
    parsed = parser.parse_args(arguments)
    if parsed.clips is None:
        parsed.clips = 128 if parsed.device == "cuda" else 16
    return parsed


def test_step_cpu():
    sizes = ["--clips", "3", "--queue", "512", "--hidden-channels", "4", "--feature-size", "64", "--repeats", "2"]
    medians = run(parse([*sizes, "--ways", "ours", "ours, bf16", "separate", "separate, all eager"]))
    assert set(WAYS) > {name for name in medians if isinstance(name, str)}
    assert medians["ours", "memory"] < medians["separate", "memory"]


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        print(measure_peak(sys.argv[2], parse(sys.argv[3:])))
        return
    arguments = parse()
    if arguments.device == "cpu":
        allocator.keep_freed_memory()
    if arguments.profile:
        profile(arguments)
    else:
        run(arguments)


if __name__ == "__main__":
    main()
