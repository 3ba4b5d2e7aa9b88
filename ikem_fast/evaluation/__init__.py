"""Evaluation of learned encoders: features, linear heads, nearest neighbours, finetuning, retrieval, fused scores."""

from __future__ import annotations

import importlib

_NAMES = {
    "Evaluation": "registry",
    "Features": "features",
    "KnnRow": "knn",
    "LinearClassifier": "linear_classifier",
    "LinearEvaluation": "linear",
    "LinearHeads": "heads",
    "Scores": "scores",
    "Subject": "subjects",
    "build_classifier": "linear",
    "evaluate_knn": "knn",
    "evaluate_linear": "linear",
    "evaluate_linear_of_seeds": "linear",
    "evaluate_retrieval": "retrieval",
    "evaluate_run": "running",
    "extract": "features",
    "finetune": "finetuning",
    "fuse_scores": "scores",
    "knn_accuracy": "knn",
    "load_heads": "heads",
    "load_scores": "scores",
    "register": "registry",
    "retrieve": "retrieval",
    "save_heads": "heads",
    "train_heads": "linear",
    "train_heads_of_seeds": "linear",
}

__all__ = list(_NAMES)


def __getattr__(name: str):
    # Imported on first use, so that the command line shows its help without loading torch.
    if name in _NAMES:
        return getattr(importlib.import_module(f"{__name__}.{_NAMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
