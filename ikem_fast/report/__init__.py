"""A report page of one or more runs: one HTML file with its pictures inside, which opens anywhere without a network."""

from __future__ import annotations

import importlib

_NAMES = {"ReportError": "records", "write_report": "writing"}

__all__ = list(_NAMES)


def __getattr__(name: str):
    # Imported on first use, so that the command line shows its help without loading torch.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
