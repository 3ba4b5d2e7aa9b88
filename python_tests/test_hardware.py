"""The processor as reports and benchmarks name it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from ikem_fast import hardware

LISTED = (
    "processor\t: 0\nvendor_id\t: Maker\nmodel name\t: A Processor 9 @ 2 GHz \nprocessor\t: 1\nmodel name\t: Another\n"
)


def test_cpu_name(monkeypatch):
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: LISTED)
    assert hardware.cpu_name() == "A Processor 9 @ 2 GHz"
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    # Some architectures list no name.
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "processor\t: 0\n")
    assert hardware.cpu_name() == "riscv64"

    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert hardware.cpu_name() == "riscv64"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not limit a process to cores")
def test_usable_cores():
    allowed = os.sched_getaffinity(0)
    assert hardware.usable_cores() == len(allowed)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert hardware.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, allowed)
