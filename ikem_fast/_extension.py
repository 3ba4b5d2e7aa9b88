"""Loads the compiled part of the package, or keeps the one sentence that says why it cannot be.

Importing this never raises. ``_build_info.json``, which the build installs beside the libraries and installs last, is
read and compared first, so that a library built for another torch never reaches the dynamic linker.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import json
import re
import struct
import sys
from pathlib import Path
from types import ModuleType

PACKAGE_FOLDER = Path(__file__).parent
# Builds against the torch that is installed, and needs nothing else in the environment.
REINSTALL = "pip install --force-reinstall --no-deps ."
TORCH_REQUIREMENT = "torch>=2.11,<2.14"
# First supported minor version and first unsupported one: TORCH_REQUIREMENT in numbers.
SUPPORTED_TORCH = ((2, 11), (2, 14))


class ExtensionError(RuntimeError):
    """The compiled part of ikem_fast cannot be used; the message says why and what to do, in one sentence."""


def read_build_info(folder: Path = PACKAGE_FOLDER) -> dict | None:
    """The build information beside the libraries, or None where there is no complete build."""
    try:
        info = json.loads((folder / "_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return info if isinstance(info, dict) and "torch_version" in info else None


def minor_version(version: str) -> tuple[int, int]:
    """``2.13.0+cpu`` to ``(2, 13)``."""
    major, minor = version.split(".")[:2]
    return int(major), int(re.match(r"\d+", minor).group())


def base_version(version: str) -> str:
    """``2.13.0+cpu`` to ``2.13.0``."""
    return version.split("+")[0]


def find_problem(torch_version: str | None, folder: Path = PACKAGE_FOLDER) -> str | None:
    """Why the extension in ``folder`` cannot be used with this Python and this torch, or None; loads nothing.

    torch keeps the C++ interface within one minor version: 2.13.0 and 2.13.1 agree, 2.12 and 2.13 do not.

    Args:
        torch_version: the version of the torch that runs, None where there is none.
        folder: the folder of the libraries.
    """
    get_torch = f"`pip install '{TORCH_REQUIREMENT}'`"
    if torch_version is None:
        return f"ikem_fast needs torch, which is not installed here: install it with {get_torch}"
    running = base_version(torch_version)
    if not SUPPORTED_TORCH[0] <= minor_version(torch_version) < SUPPORTED_TORCH[1]:
        return (
            f"ikem_fast needs {TORCH_REQUIREMENT} but torch {running} is running: install one with {get_torch}, "
            f"then reinstall with `{REINSTALL}`"
        )
    info = read_build_info(folder)
    if info is None:
        return f"ikem_fast's compiled part is missing: build it in the source tree with `{REINSTALL}`"
    built_for = base_version(info["torch_version"])
    if minor_version(built_for) != minor_version(running):
        return (
            f"ikem_fast's compiled part was built for torch {built_for} but torch {running} is running: "
            f"reinstall with `{REINSTALL}`"
        )
    if not any((folder / f"_C{suffix}").is_file() for suffix in importlib.machinery.EXTENSION_SUFFIXES):
        running = f"{sys.version_info.major}.{sys.version_info.minor}"
        return (
            f"ikem_fast's compiled part was built for Python {info.get('python')} but Python {running} is running: "
            f"reinstall with `{REINSTALL}`"
        )
    return None


def check_library(path: Path) -> None:
    """Refuse a truncated library, which would end the process with SIGBUS instead of an error of the dynamic linker.

    A library ends with its table of sections, whose place its ELF header (64 bits) states.

    Raises:
        OSError: ``path`` cannot be read, is no library or ends before its table of sections.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:4] != b"\x7fELF":
        raise OSError(f"{path} is not a shared library")
    (sections,) = struct.unpack_from("<Q", header, 40)
    entry_size, entries = struct.unpack_from("<HH", header, 58)
    if sections + entry_size * entries > size:
        raise OSError(f"{path} is truncated")


def load_module(folder: Path = PACKAGE_FOLDER) -> ModuleType:
    """Load ``_C`` of ``folder``, after :func:`find_problem` found none.

    Raises:
        ExtensionError: the library is damaged or misses a symbol.
    """
    paths = [folder / f"_C{suffix}" for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next(path for path in paths if path.is_file())
    try:
        check_library(path)
        if folder == PACKAGE_FOLDER:
            return importlib.import_module("ikem_fast._C")
        spec = importlib.util.spec_from_file_location("ikem_fast._C", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    except (ImportError, OSError, RuntimeError) as error:
        raise ExtensionError(_describe_failure("compiled part", error)) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _describe_failure(part: str, error: Exception) -> str:
    return f"ikem_fast's {part} cannot be loaded ({_first_line(error)}): reinstall with `{REINSTALL}`"


_module: ModuleType | None = None
_problem: str | None = None
_cuda_loaded = False
_cuda_problem: str | None = None


def _load() -> None:
    global _module, _problem, _cuda_loaded, _cuda_problem
    try:
        import torch
    except (ImportError, OSError) as error:
        # A torch that is there but cannot be imported has its own, better reason.
        missing = getattr(error, "name", None) == "torch"
        _problem = (
            find_problem(None) if missing else f"torch cannot be imported ({_first_line(error)}): reinstall torch"
        )
        return
    _problem = find_problem(torch.__version__)
    if _problem is None:
        try:
            _module = load_module()
        except ExtensionError as error:
            _problem = str(error)
    library = PACKAGE_FOLDER / "_C_cuda.so"
    if _module is None or not library.is_file():
        return
    try:
        check_library(library)
        torch.ops.load_library(library)
        _cuda_loaded = True
    except (OSError, RuntimeError) as error:
        _cuda_problem = _describe_failure("CUDA part", error)


def require() -> ModuleType:
    """The module ``_C``.

    Raises:
        ExtensionError: it cannot be used; the message is the one of :func:`problem`.
    """
    if _module is None:
        raise ExtensionError(_problem)
    return _module


def available() -> bool:
    """Whether ``_C`` is loaded and the operators of the CPU are registered."""
    return _module is not None


def problem() -> str | None:
    """Why ``_C`` is not loaded, in one sentence; None where it is."""
    return _problem


def cuda_available() -> bool:
    """Whether ``_C_cuda`` is loaded; says nothing about a GPU."""
    return _cuda_loaded


def cuda_problem() -> str | None:
    """Why a ``_C_cuda`` that is there was not loaded; None where it was, or where there is none."""
    return _cuda_problem


_load()
