"""A benchmarked computation: its inputs, the ways to compute it, what must come out, and the least work it can take.

A file ``bench_<op>.py`` has ``cases(profile, device)``, which lists them without making a large tensor, and a test::

    def test_enqueue(measure, case, way):
        measure(case, way)

conftest.py makes one test of every case, way and device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ikem_fast.floors import Work
from ikem_fast.hardware import usable_cores

EAGER, COMPILED, OURS, OURS_BF16, RELEASE_MANNER = "eager", "eager compiled", "ours fp32", "ours bf16", "release manner"
WAYS = (EAGER, COMPILED, OURS, OURS_BF16, RELEASE_MANNER)
FORWARD, BOTH, STEP, CALL = "forward", "forward + backward", "step", "call"
# How sizes are abbreviated in labels; others are written out.
SYMBOLS = {
    "clips": "N", "queue": "K", "modalities": "S", "embedding": "D", "frames": "T", "joints": "V", "persons": "M",
    "channels": "C",
}  # fmt: skip


class Inputs(NamedTuple):
    """Arguments of a function of tensors and, for its backward pass, the gradients of its first results."""

    arguments: tuple
    cotangents: tuple[Tensor, ...] = ()


def largest_error(result: Any, expected: Any) -> float:
    """The largest difference of any tensor or number, relative to the largest magnitude it should have.

    Both are nested tuples, lists, mappings and dataclasses; a list of tensors also stands for a tensor with one more
    dimension, for streams that are computed one by one. What is not finite, or of another shape or structure than
    expected, is infinitely wrong.
    """
    errors = [_error(*pair) for pair in _pairs(result, expected)]
    return max(errors, default=math.inf)


def _error(result: Any, expected: Any) -> float:
    if expected is None and result is None:
        return 0.0
    if expected is None or result is None:
        return math.inf
    result, expected = (torch.as_tensor(value).detach().double().cpu() for value in (result, expected))
    if result.shape != expected.shape:
        return math.inf
    if expected.numel() == 0:
        return 0.0
    error = float((result - expected).abs().max() / expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny))
    return error if math.isfinite(error) else math.inf


def _pairs(result: Any, expected: Any) -> Iterator[tuple[Any, Any]]:
    if dataclasses.is_dataclass(expected):
        result, expected = (
            {f.name: getattr(v, f.name, None) for f in dataclasses.fields(expected)} for v in (result, expected)
        )
    if isinstance(expected, Mapping):
        if not isinstance(result, Mapping) or result.keys() != expected.keys():
            yield math.inf, 0.0
            return
        result, expected = [result[name] for name in expected], list(expected.values())
    if isinstance(expected, tuple | list):
        if not isinstance(result, tuple | list) or len(result) != len(expected):
            yield math.inf, 0.0
            return
        for values in zip(result, expected, strict=True):
            yield from _pairs(*values)
    else:
        yield torch.stack(result) if isinstance(result, list) else result, expected


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One computation at one size.

    Attributes:
        op: what the file is named after: "clip_views", "step, stage 2".
        phase: one of ``FORWARD``, ``BOTH``, ``STEP``, ``CALL``.
        sizes: in the field's terms, {"clips": 128, "queue": 32768}; all of them stand in the label. "threads" is the
            number of CPU threads to measure with, in the place of the run's.
        draw: makes fresh inputs on the generator's device, the same for the same seed; not timed.
        ways: by name, out of ``WAYS``: functions of the inputs to the result.
        expected: the plain-PyTorch definition, of the same inputs.
        tolerance: of every way, the largest error.
        floor: bytes that must be read and written and operations that cannot be avoided.
        floor_bf16: the same of ``ours bf16``; ``None`` if it is no different.
        expected_of: by way, the definition where it is another: with the way's rounding where that decides, such as
            which neighbours are nearest, or without the dropout that ``checked`` leaves out.
        prepare: by way, what is done to its inputs before the timing, such as to lay them out as the way has them.
        checked: by way, what is checked in its place where the timed one draws random numbers of its own (the same
            code without dropout).
        error: how far a result is from what is expected.
        clips: that a call goes through, for clips per second; 0 if it is not a thing of clips.
        sweep: which of the sizes varies over cases that belong together: "batch", "queue", "modalities", "threads".
        bytes_needed: by way, about what a call holds, where that is so much that it may not be there.
        with_peak: whether to measure the memory that a call needs beyond its inputs, too.
        once: it takes too long to be warmed up and repeated, and is timed once.
        fewest_rounds: by way, where it shall be timed more than three times however long that takes.
    """

    op: str
    phase: str
    sizes: Mapping[str, int]
    draw: Callable[[torch.Generator], Any]
    ways: Mapping[str, Callable[[Any], Any]]
    expected: Callable[[Any], Any]
    tolerance: Mapping[str, float]
    floor: Work
    floor_bf16: Work | None = None
    expected_of: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    prepare: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    checked: Mapping[str, Callable[[Any], Any]] = dataclasses.field(default_factory=dict)
    error: Callable[[Any, Any], float] = largest_error
    clips: int = 0
    sweep: str = ""
    bytes_needed: Mapping[str, int] = dataclasses.field(default_factory=dict)
    with_peak: bool = False
    once: bool = False
    fewest_rounds: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown or not self.ways:
            raise ValueError(f"ways must be some of {', '.join(WAYS)}, got {', '.join(unknown) or 'none'}")
        missing = [way for way in self.ways if way not in self.tolerance]
        if missing:
            raise ValueError(f"tolerance must have every way, {', '.join(missing)} is not there")

    @property
    def size_label(self) -> str:
        """ "N=128 K=32768"."""
        return " ".join(f"{SYMBOLS.get(name, name)}={size}" for name, size in self.sizes.items())

    def inputs(self, way: str, generator: torch.Generator) -> Any:
        """Fresh inputs as a way takes them."""
        drawn = self.draw(generator)
        return self.prepare[way](drawn) if way in self.prepare else drawn

    def definition(self, way: str) -> Callable[[Any], Any]:
        """What gives the result that a way must have."""
        return self.expected_of.get(way, self.expected)

    def work(self, way: str) -> Work:
        return self.floor_bf16 if way == OURS_BF16 and self.floor_bf16 is not None else self.floor


def over_threads(case: Case) -> list[Case]:
    """The case with 1, 2, 4 ... CPU threads, below the number of cores, which it has by itself."""
    counts = [2**power for power in range(10) if 2**power < usable_cores()]
    sizes = ({**case.sizes, "threads": count} for count in counts)
    return [dataclasses.replace(case, sizes=size, sweep="threads", with_peak=False) for size in sizes]


def forward(function: Callable) -> Callable[[Inputs], Any]:
    """A way: the function of the arguments, without gradient."""

    def run(inputs: Inputs) -> Any:
        with torch.no_grad():
            return function(*inputs.arguments)

    return run


def forward_and_backward(function: Callable) -> Callable[[Inputs], tuple]:
    """A way: the function's results, and the gradients of those arguments that require one."""

    def run(inputs: Inputs) -> tuple:
        results = function(*inputs.arguments)
        results = (results,) if isinstance(results, Tensor) else tuple(results)
        leaves = [value for value in _tensors(inputs.arguments) if value.requires_grad]
        differentiated, cotangents = [], []
        for result, cotangent in zip(results, inputs.cotangents, strict=False):
            differentiated += result if isinstance(result, list) else [result]
            cotangents += cotangent if isinstance(result, list) else [cotangent]
        return results, torch.autograd.grad(differentiated, leaves, cotangents)

    return run


def of_phase(phase: str, function: Callable) -> Callable[[Inputs], Any]:
    return forward_and_backward(function) if phase == BOTH else forward(function)


def compiled(function: Callable) -> Callable:
    """The function under torch.compile, which compiles it at the first call."""
    return torch.compile(function, dynamic=False)


def _tensors(values: Sequence) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def activations_as_bfloat16(*names: int) -> Callable[[Inputs], Inputs]:
    """Prepares inputs for bfloat16: the arguments of these numbers and the first cotangent, the others stay float32."""

    def prepare(inputs: Inputs) -> Inputs:
        arguments = [_rounded(value) if number in names else value for number, value in enumerate(inputs.arguments)]
        first = [value.bfloat16() for value in inputs.cotangents[:1]]
        return Inputs(tuple(arguments), (*first, *inputs.cotangents[1:]))

    return prepare


def _rounded(value: Tensor) -> Tensor:
    return value.detach().bfloat16().requires_grad_(value.requires_grad)


def exact_in_bfloat16(value: Tensor) -> Tensor:
    """float32 values that bfloat16 holds as they are, so that both precisions are given the same numbers."""
    return value.bfloat16().float()
