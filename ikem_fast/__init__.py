"""Implicit knowledge exchange over multiple skeleton modalities: self-supervised learning of human actions."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def _installed_folder() -> str | None:
    """Where the package is installed, if this is its source tree, which after ``pip install .`` is not built itself.

    ``python -m ikem_fast.train`` in the source tree finds the tree first; the tree then steps aside.
    """
    here = Path(__file__).resolve().parent
    if (here / "_build_info.json").is_file() or not (here.parent / "pyproject.toml").is_file():
        return None
    for entry in sys.path:
        folder = Path(entry).resolve() / here.name
        if folder != here and (folder / "_build_info.json").is_file():
            return str(folder)
    return None


if (_folder := _installed_folder()) is not None:
    __path__ = [_folder]

from . import _extension as _extension  # noqa: E402 - from the folder chosen above

__version__ = "0.1.0"

_MODULES = (
    *("data", "engine", "evaluation", "export", "inference", "layouts", "methods", "modalities"),
    *("nn", "ops", "quirks", "report"),
)
_NAMES = {"MODALITIES": "modalities", "load": "inference", "load_reference": "reference"}

__all__ = ["__version__", *_MODULES, *_NAMES]


def __getattr__(name: str):
    # Imported on first use, so that a command starts without the modules that it does not need.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
