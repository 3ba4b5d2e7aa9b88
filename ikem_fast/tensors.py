"""Named tensors compared with those that a module has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

_SHOWN = 20


def list_differences(expected: Mapping[str, Tensor], found: Mapping[str, Any]) -> list[str]:
    """What keeps tensors from taking the place of a module's: names, shapes and types that are not the same.

    Args:
        expected: the module's tensors by name.
        found: what was read from a file.
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    for name, tensor in expected.items():
        if name not in found:
            continue
        value = found[name]
        if not isinstance(value, Tensor):
            problems.append(f"{name} must be a tensor, got {type(value).__name__}")
        elif value.shape != tensor.shape:
            problems.append(f"{name} must be {tuple(tensor.shape)}, got {tuple(value.shape)}")
        elif (
            value.is_floating_point() != tensor.is_floating_point()
            or value.is_complex()
            or value.layout != tensor.layout
        ):
            problems.append(f"{name} must be {tensor.dtype}, got {value.dtype} {value.layout}")
    return problems


def listed(problems: Sequence[str]) -> str:
    """Problems in one line, the first of them if they are many."""
    shown = "; ".join(problems[:_SHOWN])
    return shown if len(problems) <= _SHOWN else f"{shown}; and {len(problems) - _SHOWN} more"
