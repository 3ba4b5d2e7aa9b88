"""setuptools' build_ext, handed over to CMake: one configure, build and install for all extensions."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from torch_finder import PROJECT_ROOT, TorchInstallation, find_torch, torch_requirement

# What CMake installs into the package; removed first, so that no earlier build's CUDA part stays beside this one's.
BUILD_PRODUCTS = ("_C.*.so", "_C_cuda.so", "_build_info.json")
CUDA_CHOICES = ("auto", "on", "off")


def cuda_architectures(arch_list: str) -> str:
    """Translate TORCH_CUDA_ARCH_LIST into CMake's form: ``8.0 9.0a+PTX`` to ``80-real;90a-real;90a-virtual``.

    Raises:
        ValueError: an entry is not MAJOR.MINOR with an optional letter and an optional +PTX.
    """
    architectures = []
    for entry in re.split(r"[;,\s]+", arch_list.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise ValueError(f"TORCH_CUDA_ARCH_LIST entries must read like 8.0, 9.0a or 10.0+PTX, got '{entry}'")
        major, minor, letter, with_ptx = match.groups()
        architectures.append(f"{major}{minor}{letter}-real")
        if with_ptx:
            architectures.append(f"{major}{minor}{letter}-virtual")
    return ";".join(dict.fromkeys(architectures))


def build_folder(torch: TorchInstallation) -> Path:
    """The CMake build folder for this Python and this torch: one is never reused with another torch.

    A torch that pip fetched for one isolated build lies in a folder of its own each time; those share one key per
    version, so that build folders do not pile up.
    """
    place = "isolated" if re.search(r"pip-build-env-|build-env-", str(torch.root)) else str(torch.root)
    key = hashlib.sha256(f"{sys.executable}|{place}|{torch.version}".encode()).hexdigest()[:8]
    return PROJECT_ROOT / "build" / f"cmake-{sys.implementation.cache_tag}-torch{torch.version}-{key}"


def configure_arguments(torch: TorchInstallation, environment: Mapping[str, str]) -> list[str]:
    """CMake's configure arguments; each is stated on every call, so that the cache holds no stale path.

    Raises:
        ValueError: IKEM_FAST_CUDA or TORCH_CUDA_ARCH_LIST cannot be understood.
    """
    cuda = environment.get("IKEM_FAST_CUDA", "auto").lower()
    if cuda not in CUDA_CHOICES:
        raise ValueError(f"IKEM_FAST_CUDA must be auto, on or off, got '{cuda}'")
    arguments = [
        f"-DCMAKE_BUILD_TYPE={environment.get('CMAKE_BUILD_TYPE', 'Release')}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-DIKEM_FAST_TORCH_ROOT={torch.root}",
        f"-DIKEM_FAST_CUDA={cuda}",
    ]
    ninja = shutil.which("ninja")
    if ninja:
        arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    arch_list = environment.get("TORCH_CUDA_ARCH_LIST", "").strip()
    # Stated even when empty, so that an earlier build's list does not stay in the cache.
    arguments.append(f"-DIKEM_FAST_CUDA_ARCHITECTURES={cuda_architectures(arch_list) if arch_list else ''}")
    return arguments + shlex.split(environment.get("CMAKE_ARGS", ""))


class CMakeExtension(Extension):
    """An extension whose sources only CMake knows."""

    def __init__(self, name: str):
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """Runs CMake; ``_build_info.json`` is installed last and marks the build as complete."""

    def run(self) -> None:
        try:
            torch = find_torch()
            if torch is None:
                raise RuntimeError(f"no torch to build against was found: install '{torch_requirement()}' first")
            arguments = configure_arguments(torch, os.environ)
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"ikem_fast: {error}") from None
        folder = build_folder(torch)
        package = (PROJECT_ROOT if self.inplace else Path(self.build_lib).resolve()) / "ikem_fast"
        package.mkdir(parents=True, exist_ok=True)
        for pattern in BUILD_PRODUCTS:
            for stale in package.glob(pattern):
                stale.unlink()
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        self.cmake("-S", str(PROJECT_ROOT), "-B", str(folder), *arguments)
        self.cmake("--build", str(folder), "--parallel", jobs)
        self.cmake("--install", str(folder), "--prefix", str(package), "--component", "ikem_fast")

    @staticmethod
    def cmake(*arguments: str) -> None:
        if shutil.which("cmake") is None:
            raise SystemExit("ikem_fast: there is no cmake on PATH: `pip install cmake ninja`")
        if subprocess.run(["cmake", *arguments], check=False).returncode != 0:
            raise SystemExit(f"ikem_fast: `{shlex.join(['cmake', *arguments])}` failed; its messages are above")

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class CleanBuildPy(build_py):
    """Starts from an empty package: setuptools keeps build/lib, and with it modules that the source no longer has."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "ikem_fast", ignore_errors=True)
        super().run()
