"""The method's two trainers: IKEM pretraining and relational cross-modality distillation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ikem_fast.methods.common import StepLosses
from ikem_fast.methods.distillation import RelationalDistillation
from ikem_fast.methods.ikem import IKEM

METHODS = {method.method: method for method in (IKEM, RelationalDistillation)}


def from_config(config: Mapping[str, Any]) -> IKEM | RelationalDistillation:
    """A freshly initialised trainer of the kind and sizes that ``module.config()`` gave."""
    if config.get("method") not in METHODS:
        raise ValueError(f"config['method'] must be one of {sorted(METHODS)}, got {config.get('method')!r}")
    return METHODS[config["method"]].from_config(config)


__all__ = ["IKEM", "METHODS", "RelationalDistillation", "StepLosses", "from_config"]
