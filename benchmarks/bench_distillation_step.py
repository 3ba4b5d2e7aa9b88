"""A step of distilling a frozen teacher of six modalities into students of three (steps.py)."""

from __future__ import annotations

import pytest

from benchmarks.bench_step import ALL, CLIPS, SMALL
from benchmarks.cases import RELEASE_MANNER, Case
from benchmarks.steps import DISTILL, make_case


def cases(profile: str, device: str) -> list[Case]:
    if profile == "small":
        return [make_case(DISTILL, SMALL, clips=4, queue=1024, width=8)]
    return [make_case(DISTILL, ALL, clips=CLIPS[device], queue=32768, with_peak=True)]


def test_distillation_step(measure, case, way, launch):
    if way == RELEASE_MANNER and launch == "graph":
        pytest.skip("cannot be captured: clips are augmented one by one on the CPU")
    measure(case, way)
