"""The doctor in a sound installation, and in ones that lack a part."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ikem_fast import _extension, doctor

WITHOUT_TORCH = """
import runpy, sys
sys.modules["torch"] = None
runpy.run_module("ikem_fast.doctor", run_name="__main__")
"""


def run_doctor(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *(arguments or ("-m", "ikem_fast.doctor"))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def facts_of(diagnosis: doctor.Diagnosis) -> dict[str, str]:
    return dict(diagnosis.facts)


def test_sound_installation_is_ready():
    result = run_doctor(IKEM_FAST_CPU_CAPABILITY="default")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "ikem_fast is ready to use." in result.stdout
    assert f" {torch.__version__} (" in result.stdout
    assert "default (compiled for default" in result.stdout
    assert "numpy" in result.stdout


def test_impossible_capability_is_a_problem():
    result = run_doctor(IKEM_FAST_CPU_CAPABILITY="avx1024")
    assert result.returncode == 1
    assert "IKEM_FAST_CPU_CAPABILITY must be default, avx2 or avx512, got 'avx1024'" in result.stdout


def test_missing_torch_is_said_in_words():
    result = run_doctor("-c", WITHOUT_TORCH)
    assert result.returncode == 1, result.stderr
    assert "ikem_fast needs torch, which is not installed here" in result.stdout
    assert "Traceback" not in result.stderr


def test_torch_that_cannot_be_imported_is_said_in_words(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libfoo.so: cannot open\\nsecond line')\n", encoding="utf-8")
    paths = f"{tmp_path}{os.pathsep}{_extension.PACKAGE_FOLDER.parent}"
    result = run_doctor("-m", "ikem_fast.doctor", PYTHONPATH=paths)
    assert result.returncode == 1, result.stderr
    assert "Problem: torch cannot be imported (libfoo.so: cannot open): reinstall torch.\n" in result.stdout
    assert "Traceback" not in result.stderr


def test_missing_extension_is_a_problem(monkeypatch):
    monkeypatch.setattr(_extension, "_module", None)
    monkeypatch.setattr(_extension, "_problem", "ikem_fast's compiled part is missing: build it")
    monkeypatch.setattr(_extension, "read_build_info", lambda: None)
    diagnosis = doctor.diagnose()
    assert not diagnosis.usable
    assert facts_of(diagnosis)["compiled part"] == "missing"
    assert diagnosis.problems == ["ikem_fast's compiled part is missing: build it."]


def test_missing_dependency_is_a_problem(monkeypatch):
    monkeypatch.setattr(doctor, "dependency_versions", lambda: {"numpy": "2.0", "tqdm": None})
    diagnosis = doctor.diagnose()
    assert diagnosis.problems == ["Not installed: tqdm. Run `pip install tqdm`."]


def test_threads_are_counted_where_they_run(monkeypatch):
    module = _extension.require()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert module.count_parallel_threads() == 2
        torch.set_num_threads(1)
        assert module.count_parallel_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_serial_kernels_are_noticed(monkeypatch):
    monkeypatch.setattr(_extension, "_module", SimpleNamespace(count_parallel_threads=lambda: 1))
    diagnosis = doctor.Diagnosis()
    doctor._examine_threads(diagnosis, SimpleNamespace(get_num_threads=lambda: 8))
    assert facts_of(diagnosis)["threads"] == "CPU kernels run on 1 of 8"
    assert "OpenMP" in diagnosis.advice[0]


def fake_torch(cuda: str | None, capability: tuple[int, int] | None):
    properties = SimpleNamespace(
        name="A GPU", major=(capability or (0, 0))[0], minor=(capability or (0, 0))[1], total_memory=80 * 2**30
    )
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda),
        cuda=SimpleNamespace(
            is_available=lambda: capability is not None,
            device_count=lambda: 1,
            get_device_properties=lambda index: properties,
        ),
    )


@pytest.mark.parametrize(
    ("torch_cuda", "capability", "built", "expected"),
    [
        (None, None, {}, "This torch is a CPU build"),
        ("13.0", None, {}, "torch sees no GPU"),
        ("13.0", (9, 0), {"cuda_built": False}, "IKEM_FAST_CUDA=on"),
        ("13.0", (12, 0), {"cuda_built": True}, "TORCH_CUDA_ARCH_LIST=12.0"),
        ("13.0", (9, 0), {"cuda_built": True}, None),
    ],
)
def test_advice_about_gpus(monkeypatch, torch_cuda, capability, built, expected):
    monkeypatch.setattr(_extension, "_cuda_loaded", bool(built.get("cuda_built")))
    diagnosis = doctor.Diagnosis()
    built = {"cuda_architectures": ["80-real", "90a-real"], "cuda_compiler": "13.0", **built}
    doctor._examine_cuda(diagnosis, fake_torch(torch_cuda, capability), built)
    assert diagnosis.usable
    if expected is None:
        assert diagnosis.advice == []
        assert "cuda:0 A GPU, compute capability 9.0, 80 GiB" in facts_of(diagnosis)["devices"]
    else:
        assert len(diagnosis.advice) == 1
        assert expected in diagnosis.advice[0]


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 6), ["80-real"], True),
        ((9, 0), ["80-real"], False),
        ((9, 0), ["90a-real"], True),
        ((10, 3), ["90a-real", "90a-virtual"], False),
        ((10, 3), ["100-real"], True),
        ((12, 0), ["90-virtual"], True),
        ((7, 5), ["80", "90"], False),
    ],
)
def test_architecture_fits(capability, architectures, fits):
    assert doctor.architecture_fits(capability, architectures) is fits
