"""Both augmented views of six modalities: the compiled operator against what PyTorch does in their place.

    pytest benchmarks/bench_clip_views.py -s
    python benchmarks/bench_clip_views.py --threads 2 --repeats 50
    python benchmarks/bench_clip_views.py --device cuda

Takes 128 of 1024 stored clips, T = 50, V = 25, M = 2, crop and shear, both views, statistics included. Compared with a
composition with one PyTorch call per bone (as the method is usually written down), with the vectorised definition
`clip_views_reference`, and with the latter under torch.compile. All get the same fresh samples and parameters and the
same allocator settings in one process, and all results are compared before anything is timed. Operator and copies take
turns, so that both see the machine as it is. GB/s count every byte of the clips that is read and of the views that is
written once; a copy is of 256 MiB, counted once read and once written. The process restarts itself once to set the
allocator: otherwise each call returns its memory to the system, and page faults of the next call outweigh what is
measured, for every side.

On a GPU the batches come out of 16384 clips, which no cache holds, and all ways are timed as Python launches them and
as CUDA graphs, where they can be captured; cuda_timing.py says how.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Callable

import allocator
import cuda_timing
import torch
from torch import Tensor

from ikem_fast import _extension, layouts
from ikem_fast.ops import AugmentationConfig, ViewParameters, augment, clip_views, clip_views_reference, draw_views
from ikem_fast.ops.clip_views import ClipViews

STORED, BATCH, FRAMES, JOINTS, PERSONS, MODALITIES, VIEWS = 1024, 128, 50, 25, 2, 6, 2
STORED_ON_GPU = 16384
GPU_TARGET = 0.7  # of the copy bandwidth
LAYOUT = layouts.get("ntu-rgb+d")
Sample = tuple[Tensor, ViewParameters]


def derive_bone_by_bone(clips: Tensor, num_frames: Tensor) -> list[Tensor]:
    """The six modalities (N, 3, T, V, M) in order, one joint at a time (docs/method.md section 3)."""
    rate = (50 / num_frames.float()).view(-1, 1, 1, 1, 1)
    motion, acceleration = torch.zeros_like(clips), torch.zeros_like(clips)
    motion[:, :, :-1] = rate * (clips[:, :, 1:] - clips[:, :, :-1])
    acceleration[:, :, :-2] = rate * (motion[:, :, 1:-1] - motion[:, :, :-2])
    bone, axis, velocity = torch.zeros_like(clips), torch.zeros_like(clips), torch.zeros_like(clips)
    for joint, parent in enumerate(LAYOUT.bone_parents):
        bone[:, :, :, joint] = clips[:, :, :, joint] - clips[:, :, :, parent]
    a, b, c = (bone[:, :, :, joint] for joint in LAYOUT.chest_normal)
    bone[:, :, :, LAYOUT.root] = torch.nn.functional.normalize(torch.cross(a - c, b - c, dim=1), dim=1)
    for joint, previous in enumerate(LAYOUT.previous_bones):
        axis[:, :, :, joint] = torch.cross(bone[:, :, :, joint], bone[:, :, :, previous], dim=1)
        first = torch.nn.functional.normalize(bone[:, :, :, joint], dim=1)
        second = torch.nn.functional.normalize(bone[:, :, :, previous], dim=1)
        angle = torch.atan2(torch.cross(first, second, dim=1).norm(dim=1), (first * second).sum(dim=1))
        speed = rate[:, 0, :, :, 0] * (angle[:, 1:] - angle[:, :-1])
        direction = torch.nn.functional.normalize(axis[:, :, :-1, joint], dim=1)
        velocity[:, :, :-1, joint] = speed.unsqueeze(1) * direction
    return [clips, motion, bone, acceleration, axis, velocity]


def bone_by_bone(clips: Tensor, num_frames: Tensor, indices: Tensor, parameters: ViewParameters, dtype: torch.dtype):
    """What ``clip_views`` gives, from a gather, ``augment`` and one call per bone."""
    views = []
    for view in range(VIEWS):
        augmented = augment(clips[indices], parameters.view(view))
        rows = derive_bone_by_bone(augmented, num_frames[indices])
        views.append(torch.stack([row.permute(0, 4, 2, 3, 1).flatten(0, 1).to(dtype) for row in rows]))
    views = torch.stack(views)
    return ClipViews(views, torch.stack([views.float().sum(dim=(2, 3)), views.float().square().sum(dim=(2, 3))]))


def largest_error(ours: ClipViews, expected: ClipViews) -> float:
    """Of any modality, relative to its largest magnitude; and of its statistics."""
    over = (0, 2, 3, 4, 5)
    views = (ours.views.double() - expected.views.double()).abs().amax(over) / expected.views.double().abs().amax(over)
    sums = (ours.statistics - expected.statistics).abs().amax() / expected.statistics.abs().amax()
    # The largest of angular velocity lies where bones are nearly parallel: rounding of coordinates turns its axis.
    return float(torch.stack([*views[:-1], 1e-2 * views[-1], sums]).max())


def time_in_turns(functions: dict[str, Callable[[Sample], object]], draw: Callable[[], Sample], repeats: int):
    """Sorted seconds of each function's calls, every one on a fresh sample; two rounds before that are not counted."""
    seconds = {name: [] for name in functions}
    for call in range(repeats + 2):
        for name, function in functions.items():
            sample = draw()
            start = time.perf_counter()
            function(sample)
            if call >= 2:
                seconds[name].append(time.perf_counter() - start)
    return {name: sorted(values) for name, values in seconds.items()}


def make_set(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Callable[[], Sample]]:
    """Stored clips and frame counts on the generator's device, and what draws samples of them."""
    device = generator.device
    clips = torch.randn(count, 3, FRAMES, JOINTS, PERSONS, generator=generator, device=device)
    num_frames = torch.randint(20, 300, (count,), generator=generator, device=device)
    epochs = itertools.count(1)

    def draw() -> Sample:
        indices = torch.randperm(count, generator=generator, device=device)[:BATCH]
        return indices, draw_views(1, next(epochs), indices, FRAMES, AugmentationConfig(), VIEWS)

    return clips, num_frames, draw


def make_ways(clips: Tensor, num_frames: Tensor, dtype: torch.dtype, compiled: bool) -> tuple[dict, dict]:
    """The operator's ways and those it is compared with, each a function of a sample."""
    ways = {
        "operator": lambda s: clip_views(clips, num_frames, *s, LAYOUT, dtype=dtype),
        "operator, no statistics": lambda s: clip_views(clips, num_frames, *s, LAYOUT, dtype=dtype, statistics=False),
    }
    baselines = {
        "one call per bone": lambda s: bone_by_bone(clips, num_frames, *s, dtype),
        "definition": lambda s: clip_views_reference(clips, num_frames, *s, LAYOUT, dtype=dtype),
    }
    if compiled:
        definition = torch.compile(clip_views_reference, dynamic=False)
        baselines["definition, compiled"] = lambda s: definition(clips, num_frames, *s, LAYOUT, dtype=dtype)
    return ways, baselines


def bytes_moved(dtype: torch.dtype) -> int:
    """Of one call: every value of the batch's clips read once, and of the views written once."""
    values = BATCH * 3 * FRAMES * JOINTS * PERSONS
    return values * (4 + VIEWS * MODALITIES * dtype.itemsize)


def run_cuda(rounds: int, compiled: bool) -> None:
    cuda_timing.require_gpu()
    clips, num_frames, draw = make_set(STORED_ON_GPU, torch.Generator("cuda").manual_seed(0))
    print(f"{cuda_timing.describe_gpu()}: {BATCH} of {STORED_ON_GPU} clips, {rounds} rounds")
    for dtype in (torch.float32, torch.bfloat16):
        ways, baselines = make_ways(clips, num_frames, dtype, compiled)
        # Rounding moves values of lower precision to a neighbour.
        tolerance = 4e-5 if dtype == torch.float32 else 1.01 * 2.0**-7

        def check(name, result, sample, dtype=dtype, tolerance=tolerance):
            expected = clip_views_reference(clips, num_frames, *sample, LAYOUT, dtype=dtype)
            statistics = expected.statistics if result.statistics is None else result.statistics
            error = largest_error(result._replace(statistics=statistics), expected)
            if not error < tolerance:
                raise SystemExit(f"'{name}' is {error:.1e} away from the definition in {dtype}: nothing more is timed")

        moved = bytes_moved(dtype)
        print(f"\n{dtype}, {moved / 1e6:.1f} MB, all within {tolerance:.1e} of the definition")
        timings = cuda_timing.compare_ways(ways, baselines, draw, check, moved, rounds)
        cuda_timing.print_target(timings, moved, GPU_TARGET)


def run(threads: int, repeats: int, compiled: bool) -> dict[str, float]:
    torch.set_num_threads(threads)
    clips, num_frames, draw = make_set(STORED, torch.Generator().manual_seed(0))
    print(f"torch {torch.__version__}, {threads} threads, {_extension.require().build_info()['cpu_capability']}")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores before the run")
    figures = {}
    source = torch.zeros(2**26)
    destination = torch.empty_like(source)
    copy_bytes = 2 * 4 * source.numel()
    for dtype in (torch.float32, torch.bfloat16):
        moved = bytes_moved(dtype)
        fast, slow = make_ways(clips, num_frames, dtype, compiled)
        fast["copy"] = lambda s: destination.copy_(source)
        sample = draw()
        ours = fast["operator"](sample)
        tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
        for name, function in slow.items():
            error = largest_error(ours, function(sample))
            if not error < tolerance:
                raise SystemExit(f"operator and '{name}' differ by {error:.1e} in {dtype}: nothing was timed")
            figures[f"{dtype}, {name}, error"] = error
        seconds = time_in_turns(fast, draw, repeats)
        seconds |= time_in_turns(slow, draw, max(3, repeats // 10))
        print(f"\n{dtype}, {moved / 1e6:.1f} MB, differences from {', '.join(slow)}: at most {tolerance:.1e}")
        print(f"{'':26}{'median':>12}{'fastest':>12}{'slowest':>12}{'GB/s':>8}{'of a copy':>11}{'operator is':>13}")
        copy_rate = copy_bytes / statistics.median(seconds["copy"])
        for name, values in seconds.items():
            median = statistics.median(values)
            rate = (copy_bytes if name == "copy" else moved) / median
            times = "".join(f"{1e3 * value:>9.2f} ms" for value in (median, values[0], values[-1]))
            faster = median / statistics.median(seconds["operator"])
            ratio = "" if name.startswith(("operator", "copy")) else f"{faster:>7.0f} times"
            print(f"{name:26}{times}{rate / 1e9:>8.1f}{rate / copy_rate:>11.0%}{ratio:>13}")
            figures[f"{dtype}, {name}"] = median
        best = moved / seconds["operator"][0] / (copy_bytes / seconds["copy"][0])
        print(f"fastest operator call against the fastest copy: {best:.0%}")
    print(f"\nload average {os.getloadavg()[0]:.1f} after the run")
    return figures


def test_clip_views_cpu():
    figures = run(torch.get_num_threads(), repeats=10, compiled=False)
    assert figures["torch.float32, one call per bone, error"] < 1e-5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        run_cuda(arguments.repeats, not arguments.no_compile)
        return
    allocator.keep_freed_memory()
    run(arguments.threads, arguments.repeats, not arguments.no_compile)


if __name__ == "__main__":
    main()
