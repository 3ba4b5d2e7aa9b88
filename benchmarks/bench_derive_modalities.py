"""Deriving six modalities of a batch: the compiled operator against its plain definition.

    pytest benchmarks/bench_derive_modalities.py -s
    python benchmarks/bench_derive_modalities.py --threads 2 --repeats 50
    python benchmarks/bench_derive_modalities.py --device cuda

Both get the same fresh random clips and the same allocator settings in one process; the results are compared before
they are timed. The process restarts itself once to set the allocator: otherwise each call returns its memory to the
system, and page faults of the next call outweigh what is measured, for both sides.

On a GPU the operator is also compared with one PyTorch call per bone and with torch.compile, each as Python launches it
and as a CUDA graph, where it can be captured; cuda_timing.py says how calls are timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import allocator
import cuda_timing
import torch
from bench_clip_views import derive_bone_by_bone

from ikem_fast import _extension
from ikem_fast.ops import derive_modalities, derive_modalities_reference

BATCH, FRAMES, JOINTS, PERSONS, MODALITIES = 128, 50, 25, 2, 6


def draw_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    device = generator.device
    clips = torch.randn(BATCH, 3, FRAMES, JOINTS, PERSONS, generator=generator, device=device)
    return clips, torch.randint(20, 300, (BATCH,), generator=generator, device=device)


def errors(ours: torch.Tensor, clips: torch.Tensor, num_frames: torch.Tensor) -> torch.Tensor:
    """Of each modality, the largest, relative to the modality's largest magnitude."""
    expected = derive_modalities_reference(clips, num_frames)
    over_modality = tuple(range(1, ours.dim()))
    return (ours - expected).abs().amax(over_modality) / expected.abs().amax(over_modality)


def time_calls(function: Callable, repeats: int, generator: torch.Generator) -> list[float]:
    """Seconds of each call, every one on fresh clips; two more calls before that are not counted."""
    seconds = []
    for call in range(repeats + 2):
        clips, num_frames = draw_batch(generator)
        start = time.perf_counter()
        function(clips, num_frames)
        if call >= 2:
            seconds.append(time.perf_counter() - start)
    return sorted(seconds)


def run_cuda(rounds: int, compiled: bool) -> None:
    cuda_timing.require_gpu()
    generator = torch.Generator("cuda").manual_seed(0)
    baselines = {
        "one call per bone": lambda batch: torch.stack(derive_bone_by_bone(*batch)),
        "definition": lambda batch: derive_modalities_reference(*batch),
    }
    if compiled:
        definition = torch.compile(derive_modalities_reference, dynamic=False)
        baselines["definition, compiled"] = lambda batch: definition(*batch)

    def check(name, result, batch):
        # The axis of angular velocity turns with rounding where bones are nearly parallel.
        *others, last = errors(result, *batch)
        error = float(torch.stack([*others, 1e-2 * last]).max())
        if not error < 4e-5:
            raise SystemExit(f"'{name}' is {error:.1e} away from the definition: nothing more is timed")

    moved = 4 * BATCH * 3 * FRAMES * JOINTS * PERSONS * (1 + MODALITIES)
    print(f"{cuda_timing.describe_gpu()}: {rounds} rounds")
    print(f"clips ({BATCH}, 3, {FRAMES}, {JOINTS}, {PERSONS}) float32, {moved / 1e6:.1f} MB")
    ways = {"operator": lambda batch: derive_modalities(*batch)}
    cuda_timing.compare_ways(ways, baselines, lambda: draw_batch(generator), check, moved, rounds)


def run(threads: int, repeats: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    batch = draw_batch(generator)
    error = float(errors(derive_modalities(*batch), *batch).max())
    if not error < 1e-5:
        raise SystemExit(f"the operator and its definition differ by {error:.1e}: nothing was timed")
    values = BATCH * 3 * FRAMES * JOINTS * PERSONS
    gigabytes = 4 * values * (1 + MODALITIES) / 1e9
    operator = time_calls(derive_modalities, repeats, generator)
    definition = time_calls(derive_modalities_reference, max(5, repeats // 5), generator)
    output = torch.empty(MODALITIES * values)
    fill = time_calls(lambda *_: output.fill_(1.0), repeats, generator)
    print(f"torch {torch.__version__}, {threads} threads, {_extension.require().build_info()['cpu_capability']}")
    print(f"clips ({BATCH}, 3, {FRAMES}, {JOINTS}, {PERSONS}) float32, largest difference {error:.1e}")
    print(f"{'':28}{'median':>10}{'fastest':>10}{'slowest':>10}{'GB/s':>8}")
    for name, seconds in (("operator", operator), ("plain definition", definition), ("writing the output once", fill)):
        median = statistics.median(seconds)
        moved = gigabytes if name != "writing the output once" else 4 * MODALITIES * values / 1e9
        times = "".join(f"{1e3 * value:>7.2f} ms" for value in (median, seconds[0], seconds[-1]))
        print(f"{name:28}{times}{moved / median:>8.1f}")
    speedup = statistics.median(definition) / statistics.median(operator)
    print(f"the operator is {speedup:.0f} times as fast")
    return {"error": error, "speedup": speedup}


def test_derive_modalities_cpu():
    figures = run(torch.get_num_threads(), repeats=20)
    assert figures["error"] < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out (on the GPU)")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        run_cuda(arguments.repeats, not arguments.no_compile)
        return
    allocator.keep_freed_memory()
    run(arguments.threads, arguments.repeats)


if __name__ == "__main__":
    main()
