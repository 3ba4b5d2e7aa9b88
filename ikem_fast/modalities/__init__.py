"""The modalities a clip can be seen through: one file each, one line each in the registry below.

A modality is a function ``derive(clips, num_frames, layout, *, chest_normal=True)`` from joint coordinates
``(N, 3, T, V, M)`` to a tensor of the same shape (docs/method.md section 3). To add one: write its file, add its line.
Those of ``MODALITIES`` also have compiled kernels (``ikem_fast.ops.derive_modalities``); any other is derived by its
function.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import Tensor

from ikem_fast.modalities import acceleration, angular_velocity, bone, joint, motion, rotation_axis

MODALITIES = ("joint", "motion", "bone", "acceleration", "rotation_axis", "angular_velocity")
"""The method's six modalities, in the order in which losses, features and scores list them."""

Modality = Callable[..., Tensor]

_REGISTRY: dict[str, Modality] = {
    "joint": joint.derive,
    "motion": motion.derive,
    "bone": bone.derive,
    "acceleration": acceleration.derive,
    "rotation_axis": rotation_axis.derive,
    "angular_velocity": angular_velocity.derive,
}


def names() -> tuple[str, ...]:
    """Names of all registered modalities."""
    return tuple(_REGISTRY)


def get(name: str) -> Modality:
    """The function that derives a modality.

    Raises:
        ValueError: no modality has that name; the message names the nearest one.
    """
    if name in _REGISTRY:
        return _REGISTRY[name]
    close = difflib.get_close_matches(str(name), _REGISTRY, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    raise ValueError(f"modality must be one of {', '.join(_REGISTRY)}, got '{name}'{hint}")


def check(names: Iterable[str], what: str = "modalities") -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: there is none, one that is not registered, or one twice; the message calls them ``what``.
    """
    if isinstance(names, str) or not (given := tuple(names)):
        raise ValueError(f"{what} must be a non-empty sequence of names, got {names!r}")
    for name in given:
        get(name)
    if len(set(given)) != len(given):
        raise ValueError(f"{what} must be distinct, got {', '.join(given)}")
    return given


def register(name: str, derive: Modality) -> None:
    """Adds a modality for this process, so that it can be named wherever the built-in ones can.

    Raises:
        ValueError: the name is taken.
    """
    if name in _REGISTRY:
        raise ValueError(f"modality '{name}' is registered already; choose another name")
    _REGISTRY[name] = derive


__all__ = ["MODALITIES", "Modality", "check", "get", "names", "register"]
