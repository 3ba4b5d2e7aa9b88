"""What the benchmarks' ``--device cuda`` share: timing by CUDA events, CUDA graphs, and the table.

A way is a function of one sample. Its calls are timed in rows, each call on a sample of its own and with its result
kept until the row ends, so that no call finds its memory in the caches; the row's time is divided by its calls. Ways
take turns with each other and with a copy. All samples are drawn anew before each round, outside the timing.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

COPIED = 2**28  # float32 values, 1 GiB: read and written, far beyond any cache
WARM_UP = 3  # rounds that are not counted
CALLS, FEW_CALLS = 16, 2  # of a row of what is measured, and of a baseline


@dataclasses.dataclass(frozen=True)
class Timing:
    """Sorted seconds of one call, one value per round."""

    seconds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def require_gpu() -> None:
    """Ends the process in one sentence where torch sees no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit(f"--device cuda: torch {torch.__version__} sees no GPU")


def describe_gpu() -> str:
    properties = torch.cuda.get_device_properties(0)
    cache = properties.L2_cache_size / 2**20
    return f"{properties.name}, {cache:.0f} MiB L2, torch {torch.__version__}, CUDA {torch.version.cuda}"


class Samples:
    """Samples at fixed places in memory, where a CUDA graph reads them, and others' values put there by ``refill``."""

    def __init__(self, draw: Callable[[], object], count: int):
        self._draw = draw
        self.places = [draw() for _ in range(count)]

    def refill(self) -> None:
        for place in self.places:
            _put(self._draw(), place)


def _put(values, place) -> None:
    """Copies the tensors of nested tuples and dataclasses."""
    if isinstance(place, Tensor):
        place.copy_(values)
    elif isinstance(place, tuple):
        for value, part in zip(values, place, strict=True):
            _put(value, part)
    elif dataclasses.is_dataclass(place):
        for field in dataclasses.fields(place):
            _put(getattr(values, field.name), getattr(place, field.name))


def row(way: Callable, places: Sequence) -> Callable[[], list]:
    """One call of ``way`` after another, each launched from Python."""
    return lambda: [way(place) for place in places]


def captured_row(way: Callable, places: Sequence) -> Callable[[], list]:
    """The same calls in one CUDA graph.

    Raises:
        RuntimeError: the calls cannot be captured, mostly because one of them waits for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries load and compilers run before the capture
        for _ in range(2):
            way(places[0])
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [way(place) for place in places]

    def replay() -> list:
        graph.replay()
        return results

    return replay


def time_rows(rows: Mapping[str, tuple[Callable[[], object], int]], refill: Callable[[], None], rounds: int):
    """Times rows, given with their numbers of calls, and a copy of 1 GiB, which the result calls ``copy``."""
    source = torch.ones(COPIED, device="cuda")
    destination = torch.empty_like(source)
    rows = {**rows, "copy": (lambda: destination.copy_(source), 1)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for number in range(rounds + WARM_UP):
        refill()
        for name, (function, calls) in rows.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            function()
            stop.record()
            stop.synchronize()
            if number >= WARM_UP:
                seconds[name].append(start.elapsed_time(stop) / 1e3 / calls)
    return {name: Timing(sorted(values)) for name, values in seconds.items()}


def copy_rate(timing: Timing) -> float:
    """Bytes read and written per second by the median copy."""
    return 2 * 4 * COPIED / timing.median


def compare_ways(
    ways: Mapping[str, Callable],
    baselines: Mapping[str, Callable],
    draw: Callable[[], object],
    check: Callable[[str, object, object], None],
    moved: int,
    rounds: int,
) -> dict[str, Timing]:
    """Checks, times and prints ways of one computation, each launched from Python and, where it can be, as a graph.

    Args:
        ways: what is measured; one is called ``operator``.
        baselines: what it is compared with. One that fails is left out and named.
        draw: gives a fresh sample on the GPU.
        check: called with the name, a result and its sample; ends the process if the result is wrong.
        moved: bytes that one call must read and write.
        rounds: of timing; a tenth of them, at least three, for the baselines.

    Returns:
        Timings by name; those of graphs end in ``, graph``, that of the copy is ``copy``.
    """
    samples = Samples(draw, CALLS)
    timings: dict[str, Timing] = {}
    few = samples.places[:FEW_CALLS]
    for kind, places, repeats in ((ways, samples.places, rounds), (baselines, few, max(3, rounds // 10))):
        rows: dict[str, tuple[Callable[[], object], int]] = {}
        for name, way in kind.items():
            try:
                result = way(places[-1])
            except Exception as error:  # a compiler's may be of any kind
                if kind is ways:
                    raise
                print(f"left out: {name} failed: {_first_line(error)}")
                continue
            check(name, result, places[-1])
            rows[name] = (row(way, places), len(places))
        timings |= time_rows(rows, samples.refill, repeats)
        # Apart, and last, since a capture that fails may leave memory to the allocator.
        graphs: dict[str, tuple[Callable[[], object], int]] = {}
        for name in rows:
            try:
                replay = captured_row(kind[name], places)
            except RuntimeError as error:
                print(f"no graph: {name} cannot be captured: {_first_line(error)}")
                continue
            samples.refill()
            check(f"{name}, graph", replay()[-1], places[-1])
            graphs[f"{name}, graph"] = (replay, len(places))
        if graphs:
            timings |= time_rows(graphs, samples.refill, repeats)
        if kind is ways:
            copy = timings["copy"]  # it took turns with the operator
    timings["copy"] = copy
    print_table(timings, moved)
    return timings


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


def print_table(timings: Mapping[str, Timing], moved: int) -> None:
    """A line per way: times, ``moved`` bytes over the median time, and that as a share of the copy's rate."""
    rate = copy_rate(timings["copy"])
    print(f"{'':34}{'median':>13}{'fastest':>13}{'slowest':>13}{'GB/s':>8}{'of a copy':>11}{'operator is':>16}")
    for name, timing in timings.items():
        times = "".join(f"{1e6 * value:>10.1f} us" for value in (timing.median, timing.seconds[0], timing.seconds[-1]))
        own = (2 * 4 * COPIED if name == "copy" else moved) / timing.median
        operator = "operator, graph" if name.endswith(", graph") else "operator"
        ratio = ""
        if operator in timings and not name.startswith(("operator", "copy")):
            ratio = f"{timing.median / timings[operator].median:.3g} times"
        print(f"{name:34}{times}{own / 1e9:>8.0f}{own / rate:>11.1%}{ratio:>16}")


def print_target(timings: Mapping[str, Timing], moved: int, target: float) -> None:
    """The share of the copy's bandwidth that the operator reaches, against the target."""
    name = "operator, graph" if "operator, graph" in timings else "operator"
    share = moved / timings[name].median / copy_rate(timings["copy"])
    verdict = "reached" if share >= target else "missed"
    print(f"{name}: {share:.0%} of the copy bandwidth; the target of {target:.0%} is {verdict}")
