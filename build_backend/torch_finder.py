"""Find the torch to build against by its files alone: nothing here imports torch."""

from __future__ import annotations

import os
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import setuptools  # noqa: F401  (puts its vendored packaging and tomli within reach where they are not installed)
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PROJECT_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class TorchInstallation:
    """One torch on disk.

    Attributes:
        root: the folder of the package, with ``include`` and ``lib`` in it.
        version: as torch states it, for example ``2.13.0+cpu``.
        cuda: CUDA version this torch was built for (``13.0``), or None.
    """

    root: Path
    version: str
    cuda: str | None


def torch_requirement(pyproject: Path = PROJECT_ROOT / "pyproject.toml") -> str:
    """The project's own run-time requirement on torch, as written in pyproject.toml."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    return next(text for text in dependencies if Requirement(text).name == "torch")


def read_torch(root: Path) -> TorchInstallation | None:
    """The installation in folder ``root``, or None where there is no torch with headers and libraries."""
    version_file = root / "version.py"
    if not version_file.is_file() or not (root / "include" / "torch" / "csrc" / "stable").is_dir():
        return None
    text = version_file.read_text(encoding="utf-8")
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)['\"]", text, re.MULTILINE)
    if version is None:
        return None
    return TorchInstallation(root.resolve(), version.group(1), cuda.group(1) if cuda else None)


def candidate_folders() -> list[Path]:
    """Where a torch may lie, best first: the environment installed into, its base if it looks there, sys.path.

    Under pip's build isolation sysconfig still names the target environment's folders, and sys.path holds the
    isolated one's.
    """
    folders = [sysconfig.get_path(key) for key in ("platlib", "purelib")]
    settings = Path(sys.prefix) / "pyvenv.cfg"
    if settings.is_file() and re.search(
        r"include-system-site-packages\s*=\s*true", settings.read_text(encoding="utf-8"), re.IGNORECASE
    ):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(key, vars=base) for key in ("platlib", "purelib")]
    folders += sys.path
    return [Path(folder) for folder in dict.fromkeys(folders) if folder]


def find_torch(requirement: str | None = None, folders: list[Path] | None = None) -> TorchInstallation | None:
    """The first torch that satisfies ``requirement`` (default: the project's), or None.

    A torch outside the requirement is passed over, because pip would replace it after the build and leave an
    extension that fits neither. ``IKEM_FAST_TORCH_ROOT`` names one folder and overrides the search.

    Raises:
        RuntimeError: ``IKEM_FAST_TORCH_ROOT`` is set but holds no torch.
    """
    chosen = os.environ.get("IKEM_FAST_TORCH_ROOT")
    if chosen:
        installation = read_torch(Path(chosen))
        if installation is None:
            raise RuntimeError(f"IKEM_FAST_TORCH_ROOT must be the folder of an installed torch, got {chosen}")
        return installation
    specifier = Requirement(requirement or torch_requirement()).specifier
    for folder in candidate_folders() if folders is None else folders:
        installation = read_torch(folder / "torch")
        if installation is not None and specifier.contains(installation.version, prereleases=True):
            return installation
    return None
