"""The method's two trainers: IKEM pretraining and relational cross-modality distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ikem_fast.methods.common import Groups, StepLosses
from ikem_fast.methods.distillation import RelationalDistillation
from ikem_fast.methods.ikem import IKEM
from ikem_fast.nn import MultiStreamSTGCN

METHODS = {method.method: method for method in (IKEM, RelationalDistillation)}


def from_config(config: Mapping[str, Any]) -> IKEM | RelationalDistillation:
    """A freshly initialised trainer of the kind and sizes that ``module.config()`` gave."""
    if config.get("method") not in METHODS:
        raise ValueError(f"config['method'] must be one of {sorted(METHODS)}, got {config.get('method')!r}")
    return METHODS[config["method"]].from_config(config)


def evaluated_encoders(
    method: IKEM | RelationalDistillation, part: str | None = None
) -> tuple[MultiStreamSTGCN, tuple[str, ...]]:
    """The encoders that are evaluated and used, and the names of their streams.

    Args:
        method: a trainer.
        part: of a distillation ``"student"`` (the default) or ``"teacher"``.
    """
    if isinstance(method, IKEM):
        return method.query_encoders, tuple(method.feature_names)
    if part == "teacher":
        return method.teacher_encoders, tuple(method.teacher_feature_names)
    return method.student_encoders, tuple(method.feature_names)


__all__ = ["IKEM", "METHODS", "Groups", "RelationalDistillation", "StepLosses", "evaluated_encoders", "from_config"]
