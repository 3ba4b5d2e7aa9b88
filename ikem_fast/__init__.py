"""Implicit knowledge exchange over multiple skeleton modalities: self-supervised learning of human actions."""

from __future__ import annotations

import importlib

from . import _extension as _extension

__version__ = "0.1.0"

_MODULES = ("data", "engine", "evaluation", "layouts", "methods", "modalities", "nn", "ops", "quirks", "report")
_NAMES = {"MODALITIES": "modalities", "load_reference": "reference"}

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
