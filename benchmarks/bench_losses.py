"""The losses of stage 1, stage 2 and distillation: ours against what PyTorch does in their place.

    pytest benchmarks/bench_losses.py -s
    python benchmarks/bench_losses.py --threads 2
    python benchmarks/bench_losses.py --sweep            # N = 32 ... 1024 and K = 4096 ... 262144
    python benchmarks/bench_losses.py --device cuda

Six modalities, embeddings of 128, three students, topk 1. Stage 1 is `info_nce`, stage 2 `context_loss` and
`exchange_loss`, distillation `relational_distillation_loss`. Compared with the plain-PyTorch definitions
(`*_reference`) as they are and under torch.compile, forward alone and with the backward pass. Every call gets
embeddings drawn anew, outside the timing; all sides have the same queues, threads and allocator settings, and losses
and gradients are compared with the definitions' before anything is timed. Ways take turns. "of products" is the time
of the same matrix products alone, by torch.matmul in float32 and bfloat16, over that of the whole.

Peak memory is what a process of its own needs on top of inputs and queues: on the CPU by the high-water mark of its
resident memory, with memory returned to the system as soon as it is freed; on a GPU by PyTorch's own count.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass

import allocator
import measuring
import torch
from torch import Tensor
from torch.nn import functional

from ikem_fast import ops

STREAMS, SIZE, STUDENTS, TOPK, TEMPERATURE = 6, 128, 3, 1, 0.07
STAGES = ("stage 1", "stage 2", "distillation")
WAYS = ("ours", "ours, bf16", "definition", "definition, compiled")
# Largest difference from the definition, of losses and of gradients relative to their largest.
TOLERANCE = {"ours": (1e-5, 1e-4), "ours, bf16": (2e-2, 5e-2), "definition, compiled": (1e-5, 1e-4)}


@dataclass
class Queues:
    """(S, D, K) of the modalities and (S·D, K) of the joint embedding, unit columns."""

    queue: Tensor
    joint: Tensor


def make_queues(stage: str, queue_size: int, device: str) -> Queues:
    generator = torch.Generator(device).manual_seed(0)
    queue = torch.randn(STREAMS, SIZE, queue_size, generator=generator, device=device)
    queue.div_(queue.norm(dim=1, keepdim=True))
    joint = torch.empty(0, device=device)
    if stage == "distillation":
        joint = queue.reshape(STREAMS * SIZE, queue_size) / STREAMS**0.5
    return Queues(queue, joint)


def draw_inputs(stage: str, num_clips: int, generator: torch.Generator) -> list[Tensor]:
    """Unit embeddings: what is trained first, then the others."""

    def unit(*sizes: int) -> Tensor:
        return functional.normalize(torch.randn(*sizes, generator=generator, device=generator.device), dim=-1)

    small = (STREAMS, num_clips, SIZE)
    if stage == "stage 1":
        return [unit(*small).requires_grad_(), unit(*small)]
    if stage == "stage 2":
        return [unit(*small).requires_grad_(), unit(STREAMS, num_clips, STREAMS * SIZE).requires_grad_(), unit(*small)]
    return [unit(STUDENTS, num_clips, STREAMS * SIZE).requires_grad_(), unit(*small)]


def losses_of(stage: str, reference: bool) -> Callable[[list[Tensor], Queues], Tensor]:
    """The losses (terms,) of a stage, of inputs from ``draw_inputs``."""
    suffix = "_reference" if reference else ""
    info_nce, context, exchange, distillation = (
        getattr(ops, name + suffix)
        for name in ("info_nce", "context_loss", "exchange_loss", "relational_distillation_loss")
    )
    if stage == "stage 1":
        return lambda x, queues: info_nce(*x, queues.queue, TEMPERATURE)
    if stage == "stage 2":
        return lambda x, queues: torch.cat(
            [
                context(x[0], x[2], queues.queue, TEMPERATURE, TOPK),
                exchange(x[1], x[2], queues.queue, TEMPERATURE),
            ]
        )
    return lambda x, queues: distillation(*x, queues.queue, queues.joint, TEMPERATURE, TOPK)


def make_way(name: str, stage: str) -> Callable[[list[Tensor], Queues], Tensor]:
    if name == "ours":
        return losses_of(stage, reference=False)
    if name == "ours, bf16":
        losses = losses_of(stage, reference=False)
        # Embeddings leave the encoder in bfloat16 then; rounding them belongs to the time.
        return lambda x, queues: losses([value.bfloat16() for value in x], queues)
    definition = losses_of(stage, reference=True)
    return torch.compile(definition, dynamic=False) if name == "definition, compiled" else definition


def run_way(way: Callable, x: list[Tensor], queues: Queues, backward: bool) -> Tensor:
    if not backward:
        with torch.no_grad():
            return way(x, queues)
    losses = way(x, queues)
    losses.float().sum().backward()
    return losses


def measure_products(stage: str, num_clips: int, queues: Queues, dtype: torch.dtype, backward: bool) -> Callable:
    """The matrix products that a stage cannot do without: similarities, and their gradients'."""
    queue = queues.queue.to(dtype)
    rows = torch.randn(STREAMS, num_clips, SIZE, device=queue.device).to(dtype)
    joint_rows = torch.randn(STREAMS * num_clips, STREAMS * SIZE, device=queue.device).to(dtype)
    # Factors, and whether the left one has a gradient.
    factors = [(rows, queue, stage != "distillation")]
    if stage == "stage 2":
        factors.append((joint_rows, queue.reshape(STREAMS * SIZE, -1), True))
    if stage == "distillation":
        factors.append((joint_rows[: STUDENTS * num_clips], queues.joint.to(dtype), True))
    results = [torch.matmul(a, b) for a, b, _ in factors]

    def run() -> None:
        for (a, b, has_gradient), result in zip(factors, results, strict=True):
            torch.matmul(a, b, out=result)
            if backward and has_gradient:
                torch.matmul(result, b.mT)

    return run


def check(stage: str, names: list[str], num_clips: int, queues: Queues) -> None:
    """Ends the process unless losses and gradients are the definition's."""
    generator = torch.Generator(queues.queue.device).manual_seed(1)
    x = draw_inputs(stage, num_clips, generator)
    trained = [value for value in x if value.requires_grad]

    def evaluate(name: str, inputs: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        losses = make_way(name, stage)(inputs, queues)
        return losses.detach().double(), [g.double() for g in torch.autograd.grad(losses.float().sum(), trained)]

    # Rounding changes a few nearest neighbours, so ours in bfloat16 are compared with the definition of rounded inputs.
    rounded = [value.bfloat16() for value in x]
    expectations = {"ours, bf16": evaluate("definition", rounded)}
    for name in names:
        if name == "definition":
            continue
        losses, gradients = evaluate(name, x)
        expected, expected_gradients = expectations.get(name) or evaluate("definition", x)
        error = float(((losses - expected) / expected).abs().max())
        gradient_error = max(
            float((ours - theirs).abs().max() / theirs.abs().max())
            for ours, theirs in zip(gradients, expected_gradients, strict=True)
        )
        if not (error < TOLERANCE[name][0] and gradient_error < TOLERANCE[name][1]):
            raise SystemExit(
                f"{stage}: '{name}' is {error:.1e} (gradients {gradient_error:.1e}) away from the definition: "
                "nothing was timed"
            )


def time_ways(stage: str, names: list[str], num_clips: int, queues: Queues, backward: bool, repeats: int):
    """Sorted seconds of each way's calls, and of the products alone in float32 and bfloat16."""
    device = queues.queue.device
    generator = torch.Generator(device).manual_seed(2)
    ways = {name: make_way(name, stage) for name in names}
    products = {
        f"products, {'bf16' if dtype == torch.bfloat16 else 'fp32'}": measure_products(
            stage, num_clips, queues, dtype, backward
        )
        for dtype in (torch.float32, torch.bfloat16)
    }
    runs = {name: lambda x, way=way: run_way(way, x, queues, backward) for name, way in ways.items()}
    runs.update({name: lambda _, run=run: run() for name, run in products.items()})
    return measuring.time_in_turns(
        runs,
        lambda: draw_inputs(stage, num_clips, generator),
        lambda name: max(3, repeats // 4) if name.startswith("definition") else repeats,
        device,
    )


def measure_peak(stage: str, name: str, num_clips: int, queue_size: int, backward: bool, device: str) -> int:
    """Bytes that a call needs on top of inputs and queues; the second call, when libraries have loaded."""
    queues = make_queues(stage, queue_size, device)
    generator = torch.Generator(device).manual_seed(3)
    way = make_way(name, stage)
    run_way(way, draw_inputs(stage, 2, generator), make_queues(stage, 64, device), backward)
    x = draw_inputs(stage, num_clips, generator)
    return measuring.peak_beyond(lambda: run_way(way, x, queues, backward), device)


def definition_bytes(stage: str, num_clips: int, queue_size: int) -> int:
    """A lower bound of what the definition needs with its backward pass: logits and their log-softmax of every pair."""
    pairs = {"stage 1": STREAMS / 2, "stage 2": STREAMS * (STREAMS - 1), "distillation": STREAMS * STUDENTS}[stage]
    return int(pairs * 2 * 4 * num_clips * 2 * queue_size)


def run_size(stage: str, num_clips: int, queue_size: int, names: list[str], repeats: int, device: str) -> dict:
    """Times, peak memories and the table of one stage at one size. Returns medians by (way, backward)."""
    threads = torch.get_num_threads()
    room = (
        torch.cuda.mem_get_info()[0] if device == "cuda" else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )
    fits = definition_bytes(stage, num_clips, queue_size) < room / 2
    names = [name for name in names if fits or name.startswith("ours")]
    queues = make_queues(stage, queue_size, device)
    # Where the definition does not fit, the same code was compared with it at a smaller size.
    check(stage, names, num_clips if fits else 16, queues if fits else make_queues(stage, 1024, device))
    print(f"\n{stage}, N = {num_clips}, K = {queue_size}" + ("" if fits else ": the definition does not fit in memory"))
    header = ("median", "fastest", "slowest", "of products", "memory", "ours is")
    print(f"{'':24}{'pass':>10}" + "".join(f"{title:>12}" for title in header))
    medians = {}
    for backward in (False, True):
        seconds = time_ways(stage, names, num_clips, queues, backward, repeats)
        for name, values in seconds.items():
            median = medians[name, backward] = statistics.median(values)
            times = "".join(f"{1e3 * value:>9.2f} ms" for value in (median, values[0], values[-1]))
            if name.startswith("products"):
                print(f"{name:24}{'both' if backward else 'forward':>10}{times}")
                continue
            products = statistics.median(seconds["products, bf16" if name.endswith("bf16") else "products, fp32"])
            peak = None
            if "compiled" not in name:
                peak = measuring.peak_in_process(
                    __file__, stage, name, num_clips, queue_size, int(backward), device, threads=threads
                )
                medians[name, backward, "memory"] = peak
            memory = "" if peak is None else f"{peak / 1e6:.0f} MB"
            ratio = "" if name.startswith("ours") else f"{median / statistics.median(seconds['ours']):.1f} times"
            shown = f"{products / median:>12.0%}{memory:>12}{ratio:>12}"
            print(f"{name:24}{'both' if backward else 'forward':>10}{times}{shown}")
    return medians


def run(arguments: argparse.Namespace) -> dict:
    device = arguments.device
    measuring.begin(arguments.device, arguments.threads)
    names = [name for name in WAYS if not (arguments.no_compile and "compiled" in name)]
    figures = {}
    for stage in arguments.stages:
        figures[stage] = run_size(stage, arguments.clips, arguments.queue, names, arguments.repeats, device)
    if arguments.sweep:
        names = [name for name in names if "compiled" not in name]
        sizes = [(n, arguments.queue) for n in (32, 256, 512, 1024)]
        sizes += [(arguments.clips, k) for k in (4096, 131072, 262144)]
        for stage in arguments.stages:
            for num_clips, queue_size in sizes:
                run_size(stage, num_clips, queue_size, names, max(3, arguments.repeats // 4), device)
    if device == "cpu":
        print(f"\nload average {os.getloadavg()[0]:.1f} after the run")
    return figures


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=12)
    parser.add_argument("--clips", type=int, default=128, help="N")
    parser.add_argument("--queue", type=int, default=32768, help="K")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--sweep", action="store_true", help="other N and K, too")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    return parser.parse_args(arguments)


def test_losses_cpu():
    figures = run(parse(["--clips", "16", "--queue", "4096", "--repeats", "3", "--no-compile"]))
    for medians in figures.values():
        assert medians["ours", True, "memory"] < medians["definition", True, "memory"]


def main() -> None:
    if sys.argv[1:2] == ["--peak"]:
        stage, name, num_clips, queue_size, backward, device = sys.argv[2:]
        print(measure_peak(stage, name, int(num_clips), int(queue_size), backward == "1", device))
        return
    arguments = parse()
    if arguments.device == "cpu":
        allocator.keep_freed_memory()
    run(arguments)


if __name__ == "__main__":
    main()
