"""``pytest benchmarks/``: a test for every case, way and device, checked before it is timed (cases.py).

pytest benchmarks/                                                  # small sizes, some minutes on two cores
pytest benchmarks/ --profile full --benchmark-json FILE             # published sizes and sweeps
pytest benchmarks/bench_info_nce.py --threads 2 --no-compile
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import ikem_fast
from benchmarks import ceilings, memory, timing
from benchmarks.cases import COMPILED, Case
from ikem_fast import _extension, hardware

DEVICES = ("cpu", "cuda")
BUDGET = {"small": 0.2, "full": 1.5}  # seconds that each benchmark is timed for, inputs included
FEWEST_ROUNDS, MOST_ROUNDS = 3, 500
CHECK_SEEDS, TIMING_SEED = (1, 2), 3  # two draws are checked: a result left over from the first is wrong for the second


def pytest_addoption(parser):
    group = parser.getgroup("ikem_fast benchmarks")
    group.addoption("--profile", choices=tuple(BUDGET), default="small", help="sizes: small ones, or the published")
    group.addoption("--threads", type=int, default=hardware.usable_cores(), help="of the CPU (default: all cores)")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption("--devices", choices=DEVICES, nargs="+", default=DEVICES, help="of those that are there")
    group.addoption("--seconds", type=float, default=math.inf, help="after so many the benchmarks left are skipped")
    group.addoption("--memory", type=float, default=0.5, help="share of the free memory that a call may take")
    group.addoption("--commit", help="what is measured, where there is no git to ask")


def pytest_configure(config):
    if not any(map(config.pluginmanager.hasplugin, ("benchmark", "pytest_benchmark.plugin"))):
        raise pytest.UsageError("benchmarks need pytest-benchmark: pip install pytest-benchmark")
    config.addinivalue_line("python_files", "bench_*.py")
    _extension.require()
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[_STATE] = _State(memory.keep_freed_memory(), os.getloadavg()[0], time.monotonic())


@dataclasses.dataclass
class _State:
    allocator: str
    load_average: float
    begin: float
    expected: dict = dataclasses.field(default_factory=dict)  # results of the case at hand by seed


_STATE = pytest.StashKey[_State]()


def devices(config) -> list[str]:
    """What is there of what benchmarks shall run on."""
    has_cuda = torch.cuda.is_available() and _extension.cuda_available()
    return [device for device in DEVICES if device in config.getoption("--devices") and (device == "cpu" or has_cuda)]


def pytest_report_header(config):
    return (
        f"benchmarks: profile {config.getoption('--profile')}, {_hardware(config)}, {torch.get_num_threads()} threads"
    )


# ---- one test per case, way and device


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    profile, without_compiled = (metafunc.config.getoption(name) for name in ("--profile", "--no-compile"))
    parameters = []
    for device in devices(metafunc.config):
        if device not in getattr(metafunc.module, "DEVICES", DEVICES):
            continue
        cases = metafunc.module.cases(profile, device)
        # Compiling takes longer than all else: in the small profile an op's last phase is compiled alone.
        last_phases = {case.op: case.phase for case in cases}
        for number, case in enumerate(cases):
            for way in case.ways:
                if way == COMPILED and (
                    without_compiled or (profile == "small" and case.phase != last_phases[case.op])
                ):
                    continue
                for launch in ("python", "graph") if device == "cuda" else ("python",):
                    parameters.append(_parameter(device, number, case, way, launch))
    metafunc.parametrize(("device", "number", "case", "way", "launch"), parameters)


def _parameter(device: str, number: int, case: Case, way: str, launch: str):
    options = {"timer": timing.cuda_timer()} if device == "cuda" else {}
    mark = pytest.mark.benchmark(group=_group(case, device), disable_gc=True, **options)
    name = f"{case.op}, {case.phase}, {case.size_label}, {device}, {way}" + (", graph" if launch == "graph" else "")
    return pytest.param(device, number, case, way, launch, marks=mark, id=name)


def _group(case: Case, device: str) -> str:
    return f"{case.op} · {case.phase} · {case.size_label} · {device}"


@pytest.fixture
def measure(request, benchmark, device, number, launch) -> Callable[[Case, str], None]:
    """Checks a way of a case and times it; ``measure(case, way)``."""
    config = request.config
    profile, state = config.getoption("--profile"), config.stash[_STATE]

    def run(case: Case, way: str) -> None:
        if time.monotonic() - state.begin > config.getoption("--seconds"):
            pytest.skip("the time of --seconds was over")
        memory.return_freed_memory()
        needed, free = case.bytes_needed.get(way, 0), memory.free_bytes(device)
        share = config.getoption("--memory")
        if needed > share * free:
            pytest.skip(f"needs about {needed / 1e9:.1f} GB, more than {share:.0%} of the {free / 1e9:.1f} GB free")
        threads = case.sizes.get("threads", config.getoption("--threads"))
        torch.set_num_threads(threads)
        if way == COMPILED:
            torch._dynamo.reset()
        error = _check(case, way, device, state, case.checked.get(way, case.ways[way]))
        call, setup, calls = _make_call(case, way, device, launch, state)
        peak = None
        if case.with_peak and launch == "python" and way != COMPILED:
            if device == "cuda":
                peak = memory.peak_of_case(case, way, device)
            else:
                name = request.module.__name__.rpartition(".")[2]
                peak = memory.peak_in_process(name, profile, number, way, threads)
        benchmark.extra_info = _extra_info(case, way, device, launch, threads, calls, error, peak)
        if case.once:
            benchmark.pedantic(call, setup=setup, rounds=1)
            return
        seconds = _seconds_of_round(call, setup, device, BUDGET[profile] / 4)
        rounds = min(MOST_ROUNDS, max(case.fewest_rounds.get(way, FEWEST_ROUNDS), int(BUDGET[profile] / seconds)))
        benchmark.pedantic(call, setup=setup, rounds=rounds)

    yield run
    torch.set_num_threads(config.getoption("--threads"))


def _check(case: Case, way: str, device: str, state: _State, function: Callable[[Any], Any]) -> float:
    """The largest error over two draws. Ends the test before anything is timed if it is too large."""
    errors = []
    for seed in CHECK_SEEDS:
        inputs = case.inputs(way, torch.Generator(device).manual_seed(seed))
        result = _call(function, inputs, way)
        errors.append(case.error(result, _expected(case, way, device, seed, state)))
    return _judge(errors, case, way, device)


def _judge(errors: list[float], case: Case, way: str, device: str, launch: str = "python") -> float:
    error = max(math.inf if math.isnan(error) else error for error in errors)
    name = way if launch == "python" else f"{way}, {launch}"
    assert error <= case.tolerance[way], (
        f"{_group(case, device)}: '{name}' is {error:.1e} away from the definition, allowed are "
        f"{case.tolerance[way]:.1e}: nothing was timed"
    )
    return error


def _call(function: Callable[[Any], Any], inputs: Any, way: str) -> Any:
    try:
        return function(inputs)
    except Exception as error:  # a compiler's may be of any kind
        if way != COMPILED:
            raise
        pytest.skip(f"torch.compile failed: {_first_line(error)}")


def _expected(case: Case, way: str, device: str, seed: int, state: _State) -> Any:
    """The definition's result, kept for the other ways of the same case."""
    definition = case.definition(way)
    key = (case, device, definition, seed)
    if key not in state.expected:
        for other in [k for k in state.expected if k[:2] != key[:2]]:
            del state.expected[other]
        state.expected[key] = definition(case.draw(torch.Generator(device).manual_seed(seed)))
    return state.expected[key]


def _make_call(case: Case, way: str, device: str, launch: str, state: _State):
    """What a round calls, what is done before it, and how many calls of the way it is."""
    function = case.ways[way]
    generator = torch.Generator(device).manual_seed(TIMING_SEED)
    if device == "cpu":
        return function, lambda: ((case.inputs(way, generator),), {}), 1
    inputs = case.inputs(way, generator)
    timer = timing.cuda_timer()
    begin = timer()
    function(inputs)
    places = [case.inputs(way, generator) for _ in range(timing.row_length(timer() - begin))]

    def refill() -> None:
        for place in places:
            timing.put(case.inputs(way, generator), place)

    if launch == "python":
        return timing.launched_row(function, places), refill, len(places)
    checked = case.checked.get(way, function)
    try:
        replay = timing.captured_row(function, places)
        replay_checked = replay if checked is function else timing.captured_row(checked, places[-1:])
    except RuntimeError as error:
        pytest.skip(f"cannot be captured: {_first_line(error)}")
    errors = []
    for seed in CHECK_SEEDS:
        refill()
        timing.put(case.inputs(way, torch.Generator(device).manual_seed(seed)), places[-1])
        errors.append(case.error(replay_checked()[-1], _expected(case, way, device, seed, state)))
    _judge(errors, case, way, device, launch)
    return replay, refill, len(places)


def _seconds_of_round(call: Callable, setup: Callable, device: str, budget: float) -> float:
    """Of the last of some rounds that are not counted, inputs included; the first ones also fill the allocator."""
    begin = time.perf_counter()
    for _ in range(6):
        last = time.perf_counter()
        arguments, keywords = setup() or ((), {})
        call(*arguments, **keywords)
        if device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if now - begin > budget:
            break
    return now - last


def _extra_info(
    case: Case, way: str, device: str, launch: str, threads: int, calls: int, error: float, peak: int | None
) -> dict:
    work = case.work(way)
    ceiling = ceilings.at_start(device, torch.get_num_threads())
    seconds, limit = work.seconds(ceiling.copy_bytes_per_second, ceiling.operations_per_second(work.kind))
    return {
        "op": case.op,
        "phase": case.phase,
        "sizes": dict(case.sizes),
        "size_label": case.size_label,
        "device": device,
        "way": way,
        "launch": launch,
        "threads": threads if device == "cpu" else None,
        "calls": calls,
        "clips": case.clips,
        "bytes": work.bytes,
        "operations": work.operations,
        "operation_kind": work.kind,
        "floor_seconds": seconds,
        "limited_by": limit,
        "error": error,
        "tolerance": case.tolerance[way],
        "sweep": case.sweep,
        "peak_bytes": peak,
    }


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '-').splitlines()[0]}"


# ---- what the JSON says of the machine and the run


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config, commit_info):
    name = config.getoption("--commit")
    if name:
        commit_info |= {"id": name.removesuffix("-dirty"), "dirty": name.endswith("-dirty")}


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    state = config.stash[_STATE]
    del machine_info["node"]
    machine_info["cpu"] = hardware.cpu_name()
    machine_info |= {
        "hardware": _hardware(config),
        "gpu": torch.cuda.get_device_name() if "cuda" in devices(config) else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "ikem_fast": ikem_fast.__version__,
        "cpu_capability": _extension.require().build_info()["cpu_capability"],
        "threads": config.getoption("--threads"),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "load_average_before": state.load_average,
        "allocator": state.allocator,
    }


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_json(config, benchmarks, output_json):
    torch.set_num_threads(config.getoption("--threads"))
    for benchmark in output_json["benchmarks"]:
        benchmark["params"] = None  # functions and tensors; extra_info has what there is to say
    output_json["profile"] = config.getoption("--profile")
    output_json["load_average_after"] = os.getloadavg()[0]
    output_json["ceilings"] = {
        device: {
            "start": dataclasses.asdict(ceilings.at_start(device, torch.get_num_threads())),
            "end": dataclasses.asdict(ceilings.measure(device)),
        }
        for device in devices(config)
    }


def _hardware(config) -> str:
    """The GPU with its driver if it is measured, else the CPU with its cores."""
    if "cuda" not in devices(config):
        return f"{hardware.cpu_name()}, {hardware.usable_cores()} cores"
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        driver = "unknown"
    return f"{torch.cuda.get_device_name()}, driver {driver}"
