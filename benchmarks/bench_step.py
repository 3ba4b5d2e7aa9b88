"""A training step of stage 1 and of stage 2, from stored clips to updated weights (steps.py)."""

from __future__ import annotations

import pytest

from benchmarks.cases import COMPILED, EAGER, OURS, OURS_BF16, RELEASE_MANNER, Case
from benchmarks.steps import make_case
from ikem_fast.hardware import usable_cores

ALL = (EAGER, COMPILED, OURS, OURS_BF16, RELEASE_MANNER)
# Without torch.compile, which takes minutes for an encoder's and a step's graphs.
SMALL = (EAGER, OURS, OURS_BF16, RELEASE_MANNER)
SWEPT = (EAGER, OURS, OURS_BF16)
CLIPS = {"cpu": 16, "cuda": 128}


def cases(profile: str, device: str) -> list[Case]:
    if profile == "small":
        return [make_case(stage, SMALL, clips=4, queue=1024, width=8) for stage in ("single", "cross")]
    clips, queue = CLIPS[device], 32768
    listed = [
        make_case("single", ALL, clips=clips, queue=queue, with_peak=True),
        make_case("cross", ALL, clips=clips, queue=queue, with_peak=True),
        make_case("cross", (EAGER, OURS_BF16), clips=clips, queue=queue, with_peak=True, autocast=True),
    ]
    sweeps = [("batch", {"clips": factor * clips // 4}) for factor in (1, 2, 8)]
    sweeps += [("queue", {"queue": length}) for length in (4096, 16384, 65536)]
    sweeps += [("modalities", {"modalities": number}) for number in (2, 3, 4)]
    if device == "cpu":
        threads = sorted({2**power for power in range(4)} & set(range(1, usable_cores() + 1)))
        sweeps += [("threads", {"threads": number}) for number in threads]
    for sweep, size in sweeps:
        listed.append(make_case("cross", SWEPT, **{"clips": clips, "queue": queue, **size}, sweep=sweep))
    return listed


def test_step(measure, case, way, launch):
    if way == RELEASE_MANNER and launch == "graph":
        pytest.skip("cannot be captured: clips are augmented one by one on the CPU")
    measure(case, way)
