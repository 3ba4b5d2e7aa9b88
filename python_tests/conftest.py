"""Shared by all tests: which package is tested, and which tests need a GPU."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from contextlib import suppress
from pathlib import Path

# Before anything imports matplotlib: tests run without a display.
os.environ.setdefault("MPLBACKEND", "Agg")

import engine_helpers
import inference_helpers
import pytest
import torch

import ikem_fast
from ikem_fast import _extension, engine

# Registers the profiles that --hypothesis-profile names. Without Hypothesis the fuzz tests are left out.
with suppress(ModuleNotFoundError):
    import fuzzing  # noqa: F401


def register_benchmarks() -> None:
    """Lets tests import ``benchmarks`` without the repository on the path, where the package may lie unbuilt."""
    folder = Path(__file__).resolve().parent.parent / "benchmarks"
    spec = importlib.util.spec_from_file_location(
        "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["benchmarks"])


register_benchmarks()


def pytest_configure(config):
    if not _extension.available():
        raise pytest.UsageError(
            f"{_extension.problem()} (tested is {_extension.PACKAGE_FOLDER}: bare `pytest` tests the installed "
            "package, `python -m pytest` the source tree)"
        )


def pytest_report_header(config):
    cuda = "with" if _extension.cuda_available() else "without"
    versions = f"ikem_fast {ikem_fast.__version__}, torch {torch.__version__}"
    return f"{versions}, {cuda} CUDA part; tested is {_extension.PACKAGE_FOLDER}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() and _extension.cuda_available():
        return
    skip = pytest.mark.skip(reason="needs a GPU and the CUDA part")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def outside_the_source_tree(tmp_path_factory):
    """Leave the source tree, where `python -m ikem_fast...` in a subprocess would find the unbuilt package first."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("working_folder"))
    yield
    os.chdir(before)


@pytest.fixture(scope="module")
def one_thread():
    """Small trainings are faster on one thread, also beside other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A prepared folder of random clips."""
    return engine_helpers.write_clips(tmp_path_factory.mktemp("data") / "clips")


@pytest.fixture(scope="module")
def finished(clips, tmp_path_factory):
    """A run of three steps."""
    config = engine_helpers.tiny_config("max_steps=3")
    return engine.pretrain(clips, tmp_path_factory.mktemp("runs") / "run", config, progress=False)


@pytest.fixture
def run(finished, tmp_path):
    """A copy of it: last.pt is of step 3, previous.pt of step 2."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture(scope="session")
def trained_runs(tmp_path_factory):
    """A pretraining and its distillation, evaluated, with their recordings; tests change copies of them."""
    return inference_helpers.train_runs(tmp_path_factory.mktemp("trained"))


@pytest.fixture(params=["default", "avx2", "avx512"])
def capability(request, monkeypatch):
    """Each instruction set that this CPU has, for the CPU's kernels to use in the test."""
    monkeypatch.setenv("IKEM_FAST_CPU_CAPABILITY", request.param)
    try:
        _extension.require().build_info()
    except RuntimeError as error:
        pytest.skip(str(error))
    return request.param
