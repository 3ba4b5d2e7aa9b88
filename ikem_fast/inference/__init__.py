"""Using trained models: features and actions of recordings."""

from __future__ import annotations

import importlib

_NAMES = {
    "Classification": "model",
    "Embeddings": "model",
    "FrozenEncoders": "encoders",
    "Model": "model",
    "ModelError": "model",
    "load": "loading",
    "save_model": "loading",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    # Imported on first use, so that the command line shows its help without loading torch.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
