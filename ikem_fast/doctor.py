"""``python -m ikem_fast.doctor``: what was built and found here, what is missing and how to get it.

Works without the compiled part and without torch. Exits with 0 where the package is usable, with 1 where it is not.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from dataclasses import dataclass, field

import ikem_fast
from ikem_fast import _extension, hardware


@dataclass
class Diagnosis:
    """What the doctor found.

    Attributes:
        facts: (name, value) lines in the order in which they are printed.
        problems: sentences about what keeps the package from being used.
        advice: sentences about what it can do without.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return not self.problems


def architecture_fits(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for CMake ``architectures`` (``80-real``, ``90a-real``, ``90-virtual``) runs on a GPU.

    Machine code runs on later minor versions of its major version, but with a letter only on the very one; PTX
    without a letter is compiled by the driver for anything later.
    """
    for architecture in architectures:
        match = re.fullmatch(r"(\d+)(\d)([af]?)(?:-(real|virtual))?", architecture)
        if match is None:
            continue
        compiled = (int(match.group(1)), int(match.group(2)))
        letter, kind = match.group(3), match.group(4)
        if letter == "a":
            fits = capability == compiled
        else:
            later_major = kind != "real" and not letter and capability >= compiled
            fits = later_major or (capability[0] == compiled[0] and capability[1] >= compiled[1])
        if fits:
            return True
    return False


def dependency_versions() -> dict[str, str | None] | None:
    """Version of every run-time dependency, None where one is missing; None where the package is not installed."""
    try:
        requirements = importlib.metadata.requires("ikem_fast") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    versions: dict[str, str | None] = {}
    for requirement in requirements:
        if "extra ==" in requirement:
            continue
        name = re.match(r"[A-Za-z0-9._-]+", requirement).group()
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _examine_torch(diagnosis: Diagnosis):
    try:
        import torch
    except (ImportError, OSError) as error:
        missing = getattr(error, "name", None) == "torch"
        diagnosis.facts.append(("torch", "missing" if missing else "cannot be imported"))
        return None
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    diagnosis.facts.append(("torch", f"{torch.__version__} ({cuda})"))
    return torch


def _examine_extension(diagnosis: Diagnosis) -> dict:
    """Adds the compiled part's facts; returns its build information, empty where there is none."""
    built = _extension.read_build_info() or {}
    if built:
        compiler = f"{built['compiler']}, {built['build_type']}"
        diagnosis.facts.append(("compiled part", f"for torch {built['torch_version']} by {compiler}"))
    else:
        diagnosis.facts.append(("compiled part", "missing"))
    if not _extension.available():
        diagnosis.problems.append(_extension.problem() + ".")
        return built
    compiled = ", ".join(built["cpu_capabilities"])
    try:
        chosen = _extension.require().build_info()["cpu_capability"]
    except RuntimeError as error:
        diagnosis.facts.append(("CPU capability", f"compiled for {compiled}"))
        diagnosis.problems.append(f"{error}.")
    else:
        diagnosis.facts.append(("CPU capability", f"{chosen} (compiled for {compiled})"))
    return built


def _examine_cuda(diagnosis: Diagnosis, torch, built: dict) -> None:
    architectures = built.get("cuda_architectures", [])
    if not built.get("cuda_built"):
        diagnosis.facts.append(("CUDA part", "not built"))
    else:
        state = "loaded" if _extension.cuda_available() else "not loaded"
        names = ", ".join(architectures)
        diagnosis.facts.append(("CUDA part", f"for {names} by nvcc {built['cuda_compiler']}, {state}"))
    if _extension.cuda_problem():
        diagnosis.advice.append(_extension.cuda_problem() + ".")

    devices = [f"CPU with {hardware.usable_cores()} cores ({hardware.cpu_name()}, {platform.machine()})"]
    visible = torch is not None and torch.cuda.is_available()
    if visible:
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = (properties.major, properties.minor)
            label = f"{capability[0]}.{capability[1]}"
            memory = properties.total_memory / 2**30
            devices.append(f"cuda:{index} {properties.name}, compute capability {label}, {memory:.0f} GiB")
            if _extension.cuda_available() and not architecture_fits(capability, architectures):
                diagnosis.advice.append(
                    f"Nothing was compiled for compute capability {label} of cuda:{index}: "
                    f"reinstall with `TORCH_CUDA_ARCH_LIST={label} {_extension.REINSTALL}`."
                )
    diagnosis.facts.append(("devices", "; ".join(devices)))

    if torch is None:
        return
    if not torch.version.cuda:
        diagnosis.advice.append(
            "This torch is a CPU build, so everything runs on the CPU: for a GPU, install a CUDA build of torch "
            f"(https://pytorch.org/get-started) and reinstall with `{_extension.REINSTALL}`."
        )
    elif not visible:
        diagnosis.advice.append(
            "torch sees no GPU: check `nvidia-smi`, the driver and CUDA_VISIBLE_DEVICES. Everything runs on the CPU."
        )
    elif _extension.available() and not built.get("cuda_built"):
        diagnosis.advice.append(
            "The CUDA part was not built, so the GPU runs plain PyTorch: install the CUDA toolkit (nvcc) of torch's "
            f"version {torch.version.cuda} and reinstall with `IKEM_FAST_CUDA=on {_extension.REINSTALL}`."
        )


def _examine_threads(diagnosis: Diagnosis, torch) -> None:
    if torch is None or not _extension.available():
        return
    allowed = torch.get_num_threads()
    running = _extension.require().count_parallel_threads()
    diagnosis.facts.append(("threads", f"CPU kernels run on {running} of {allowed}"))
    if running == 1 and allowed > 1:
        diagnosis.advice.append(
            "The CPU kernels run on one thread only, so they were compiled without OpenMP: install a compiler with "
            f"OpenMP and reinstall with `{_extension.REINSTALL}`."
        )


def _examine_dependencies(diagnosis: Diagnosis) -> None:
    versions = dependency_versions()
    if versions is None:
        diagnosis.facts.append(("dependencies", "unknown, since the package is not installed"))
        diagnosis.problems.append("ikem_fast is not installed: run `pip install .` in its source tree.")
        return
    diagnosis.facts.append(
        ("dependencies", ", ".join(f"{name} {version or '-'}" for name, version in versions.items()))
    )
    missing = [name for name, version in versions.items() if version is None]
    if missing:
        diagnosis.problems.append(f"Not installed: {', '.join(missing)}. Run `pip install {' '.join(missing)}`.")


def diagnose() -> Diagnosis:
    """Look at this environment; raises nothing where something is missing."""
    diagnosis = Diagnosis()
    diagnosis.facts.append(("ikem_fast", f"{ikem_fast.__version__} in {_extension.PACKAGE_FOLDER}"))
    diagnosis.facts.append(("Python", f"{platform.python_version()} in {sys.prefix}"))
    torch = _examine_torch(diagnosis)
    built = _examine_extension(diagnosis)
    _examine_cuda(diagnosis, torch, built)
    _examine_threads(diagnosis, torch)
    _examine_dependencies(diagnosis)
    return diagnosis


def main() -> int:
    diagnosis = diagnose()
    width = max(len(name) for name, _ in diagnosis.facts)
    for name, value in diagnosis.facts:
        print(f"{name:<{width}}  {value}")
    print()
    for sentence in diagnosis.problems:
        print(f"Problem: {sentence}")
    for sentence in diagnosis.advice:
        print(f"Note: {sentence}")
    print("ikem_fast is ready to use." if diagnosis.usable else "ikem_fast cannot be used yet.")
    return 0 if diagnosis.usable else 1


if __name__ == "__main__":
    sys.exit(main())
