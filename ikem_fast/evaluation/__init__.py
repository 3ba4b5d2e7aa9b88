"""Evaluation of learned encoders: features, nearest neighbours, linear heads, and the fusion of scores."""

from __future__ import annotations

import importlib

_NAMES = {
    "Features": "features",
    "KnnRow": "knn",
    "LinearClassifier": "linear_classifier",
    "LinearEvaluation": "linear",
    "LinearHeads": "heads",
    "Scores": "scores",
    "build_classifier": "linear",
    "evaluate_knn": "knn",
    "evaluate_linear": "linear",
    "evaluate_run": "commands",
    "extract": "features",
    "fuse_scores": "scores",
    "knn_accuracy": "knn",
    "load_heads": "heads",
    "load_scores": "scores",
    "save_heads": "heads",
    "train_heads": "linear",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    # Imported on first use, so that the command line shows its help without loading torch.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
