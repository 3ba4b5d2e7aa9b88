"""Where time went in a trace of torch's profiler: seconds of each phase, forward and backward apart.

A kernel counts for the phase within which it was launched; on a CPU a phase counts for the time between its ends, less
the phases within. Autograd runs a node for every operation of the forward pass and writes that operation's sequence
number beside it, so that the node's time counts for the backward pass of the operation's phase. What autograd does
besides (nodes that keep gradients, the engine itself) has no such number and is shown as ``backward`` of no phase.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ikem_fast.profiling.phases import BACKWARD, DATA, FORWARD, OCCASIONAL, STEP, STEP_PHASES, Phase

_NODE = "autograd::engine::evaluate_function: "
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_MICRO = 1e-6

_Event = Mapping[str, Any]  # of a trace

REST_OF_STEP: Phase = (STEP, "the rest")
BETWEEN: Phase = ("between steps", "")
IDLE: Phase = ("idle", "")
UNATTRIBUTED: Phase = (BACKWARD, "of no phase")


class TraceError(ValueError):
    """A trace without what is looked for in it."""


@dataclass(frozen=True)
class Times:
    """What a trace of some training steps tells.

    Attributes:
        steps: how many there are.
        step_seconds: of one of them, from the reading of its data to the next one's, without what is occasional; a
            mean, as all that follows.
        host: seconds of a step by phase on the thread that trains; on a CPU they add up to ``step_seconds``.
        device: likewise on a GPU, where these add up to it, and ``IDLE`` is when it had nothing to do; None for a trace
            of a CPU. Of kernels that run at the same time, the time belongs to the one that began first.
        occasional: seconds of each occurrence of what is not in every step.
        operations: kernels on a GPU, on a CPU operators without those that they call: how often a step has those of a
            name, and how many seconds they take; the longest first.
    """

    steps: int
    step_seconds: float
    host: dict[Phase, float]
    device: dict[Phase, float] | None
    occasional: dict[str, list[float]]
    operations: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class _Mark:
    """A phase, from its begin to its end in microseconds."""

    begin: float
    end: float
    phase: Phase


def read_times(trace: Mapping[str, Any]) -> Times:
    """Reads a trace as ``torch.profiler`` exports it.

    Raises:
        TraceError: there is no training step in it.
    """
    threads: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    on_device, launches = [], {}
    for event in trace["traceEvents"]:
        if event.get("ph") != "X":
            continue
        category = event.get("cat")
        if category in _ON_DEVICE:
            on_device.append(event)
        elif category in _LAUNCHES:
            launches[event["args"].get("correlation")] = event
        elif category in ("cpu_op", "user_annotation"):
            threads[event["tid"]].append(event)
    for events in threads.values():
        events.sort(key=lambda event: (event["ts"], -event["dur"]))
    trainers = [thread for thread, events in threads.items() if any(event["name"] == STEP for event in events)]
    if not trainers:
        raise TraceError(f"trace must hold a {STEP!r}, got none")
    trainer = trainers[0]
    phase_of_sequence = _phases_of_sequence_numbers(threads[trainer])
    marks = {thread: list(_marks(events, phase_of_sequence)) for thread, events in threads.items()}
    begin, end, num_steps = _window(marks[trainer])
    occasional = {
        name: [_MICRO * (mark.end - mark.begin) for mark in _outermost(marks[trainer]) if mark.phase[0] == name]
        for name in OCCASIONAL
    }
    host = _own_times(marks[trainer], begin, end)
    for name in OCCASIONAL:
        host.pop((name, FORWARD), None)
    seconds = sum(host.values())
    device = None
    if on_device:
        on_device = _launched_between(on_device, launches, begin, end)
        device = _device_times(on_device, marks, trainer, begin, end)
        seconds = sum(device.values())
        operations = [(event["name"], _MICRO * event["dur"]) for event, _ in on_device]
    else:
        operations = _operators(threads[trainer], begin, end)
    return Times(
        num_steps,
        seconds / num_steps,
        _per_step(host, num_steps),
        _per_step(device, num_steps),
        occasional,
        _by_name(operations, num_steps),
    )


def _per_step(seconds: dict[Phase, float] | None, num_steps: int) -> dict[Phase, float] | None:
    return None if seconds is None else {phase: value / num_steps for phase, value in seconds.items()}


def _phases_of_sequence_numbers(events: Iterable[_Event]) -> dict[int, str]:
    """In which phase the operation with each sequence number ran, of operations in order.

    Several have the same one: those that no gradient goes through take the number that the next one will have, and the
    parts of an operation have its own. The last is the one that the node belongs to.
    """
    phases: dict[int, str] = {}
    open_phases: list[tuple[float, str]] = []
    for event in events:
        while open_phases and open_phases[-1][0] <= event["ts"]:
            open_phases.pop()
        if event["cat"] == "user_annotation":
            if event["name"] in STEP_PHASES and event["name"] != BACKWARD:
                open_phases.append((event["ts"] + event["dur"], event["name"]))
            continue
        arguments = event.get("args", {})
        number = arguments.get("Sequence number")
        if number is None or arguments.get("Fwd thread id"):
            continue
        if open_phases:
            phases[number] = open_phases[-1][1]
        else:
            phases.pop(number, None)
    return phases


def _marks(events: Iterable[_Event], phase_of_sequence: Mapping[int, str]) -> Iterator[_Mark]:
    """The phases on a thread, and as phases' backward passes the nodes of autograd, in order."""
    for event in events:
        name, phase = event["name"], None
        if event["cat"] == "user_annotation":
            if name == STEP:
                phase = REST_OF_STEP
            elif name == BACKWARD:
                phase = UNATTRIBUTED
            elif name in STEP_PHASES or name in OCCASIONAL:
                phase = (name, FORWARD)
        elif name.startswith(_NODE):
            forward = phase_of_sequence.get(event.get("args", {}).get("Sequence number"))
            phase = UNATTRIBUTED if forward is None else (forward, BACKWARD)
        if phase is not None:
            yield _Mark(event["ts"], event["ts"] + event["dur"], phase)


def _outermost(marks: Iterable[_Mark]) -> Iterator[_Mark]:
    end = 0.0
    for mark in marks:
        if mark.begin >= end:
            end = mark.end
            yield mark


def _window(marks: Iterable[_Mark]) -> tuple[float, float, int]:
    """From the first step's reading of data to the end of the last step, and how many steps there are."""
    steps = [mark for mark in marks if mark.phase == REST_OF_STEP]
    reading = [mark.begin for mark in marks if mark.phase == (DATA, FORWARD) and mark.begin < steps[0].begin]
    return min([*reading, steps[0].begin]), steps[-1].end, len(steps)


def _segments(marks: Iterable[_Mark], outside: Phase) -> list[tuple[float, Phase]]:
    """From when on which phase is the innermost one on a thread."""
    segments: list[tuple[float, Phase]] = [(0.0, outside)]
    stack: list[_Mark] = []

    def close(until: float) -> None:
        while stack and stack[-1].end <= until:
            mark = stack.pop()
            segments.append((mark.end, stack[-1].phase if stack else outside))

    for mark in marks:
        close(mark.begin)
        stack.append(mark)
        segments.append((mark.begin, mark.phase))
    close(float("inf"))
    return segments


def _own_times(marks: Iterable[_Mark], begin: float, end: float) -> dict[Phase, float]:
    """Seconds that each phase is the innermost one, between two times."""
    seconds: dict[Phase, float] = defaultdict(float)
    segments = [*_segments(marks, BETWEEN), (float("inf"), BETWEEN)]
    for (since, phase), (until, _) in pairwise(segments):
        seconds[phase] += _MICRO * max(0.0, min(until, end) - max(since, begin))
    return dict(seconds)


def _operators(events: Iterable[_Event], begin: float, end: float) -> Iterator[tuple[str, float]]:
    """Names of operators on a thread between two times, and seconds that each took without those within it."""
    marks = [
        _Mark(event["ts"], event["ts"] + event["dur"], (event["name"], str(number)))
        for number, event in enumerate(events)
        if event["cat"] == "cpu_op" and begin <= event["ts"] < end
    ]
    for phase, seconds in _own_times(marks, begin, end).items():
        if phase != BETWEEN:
            yield phase[0], seconds


def _by_name(operations: Iterable[tuple[str, float]], num_steps: int) -> dict[str, tuple[float, float]]:
    calls: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for name, taken in operations:
        calls[name] += 1
        seconds[name] += taken
    longest = sorted(seconds, key=seconds.get, reverse=True)
    return {name: (calls[name] / num_steps, seconds[name] / num_steps) for name in longest}


def _launched_between(
    on_device: Iterable[_Event], launches: Mapping[Any, _Event], begin: float, end: float
) -> list[tuple[_Event, _Event]]:
    """What was launched between two times, with its launch."""
    pairs = ((event, launches.get(event.get("args", {}).get("correlation"))) for event in on_device)
    return [(event, launch) for event, launch in pairs if launch is not None and begin <= launch["ts"] <= end]


def _device_times(
    on_device: Iterable[tuple[_Event, _Event]],
    marks: Mapping[Any, list[_Mark]],
    trainer: Any,
    begin: float,
    end: float,
) -> dict[Phase, float]:
    """Seconds of each phase on the device, from one time to another or, if that is later, to the end of all work."""
    segments: dict[Any, list[tuple[float, Phase]]] = {}
    work = []
    for event, launch in on_device:
        thread = launch["tid"]
        if thread not in segments:
            # Autograd has a thread for each device; another one reads clips ahead.
            outside = BETWEEN if thread == trainer else UNATTRIBUTED if marks.get(thread) else (DATA, FORWARD)
            segments[thread] = _segments(marks.get(thread, ()), outside)
        place = bisect_right(segments[thread], launch["ts"], key=lambda segment: segment[0]) - 1
        work.append((event["ts"], event["ts"] + event["dur"], segments[thread][place][1]))
    seconds: dict[Phase, float] = defaultdict(float)
    until = begin
    for since, finish, phase in sorted(work):
        seconds[IDLE] += _MICRO * max(0.0, since - until)
        seconds[phase] += _MICRO * max(0.0, finish - max(since, until))
        until = max(until, finish)
    seconds[IDLE] += _MICRO * max(0.0, end - until)
    return dict(seconds)
