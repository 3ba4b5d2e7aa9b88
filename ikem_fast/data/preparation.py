"""How recordings were made into clips: what must be done again to the recordings a trained model is used on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ikem_fast.data.preprocess import fit_persons, prepare_clip
from ikem_fast.data.readers.base import DataError
from ikem_fast.layouts import Layout

if TYPE_CHECKING:
    from ikem_fast.data.clip_set import ClipSet


@dataclass(frozen=True)
class Preparation:
    """The parameters of docs/method.md section 1.

    Attributes:
        kind: the dataset, one of ``ikem_fast.data.readers.READERS`` or of a reader from outside.
        num_frames: T, frames of each clip.
        num_persons: M, persons of each clip, absent ones zero.
        centring: whether the centre joint was subtracted.
        rotation: whether the shoulder line was turned parallel to x.
    """

    kind: str
    num_frames: int
    num_persons: int
    centring: bool
    rotation: bool

    @classmethod
    def of_clips(cls, clip_set: ClipSet) -> Preparation:
        """That of a prepared folder."""
        named = {name: clip_set.metadata[name] for name in ("kind", "num_frames", "centring", "rotation")}
        return cls(num_persons=clip_set.num_persons, **named)

    @classmethod
    def of_run(cls, data: Mapping[str, Any]) -> Preparation | None:
        """That of the clips a run was trained on: as its checkpoint says, or else the data set; None if neither does.

        Args:
            data: the checkpoint's ``data``.

        Raises:
            ValueError: the checkpoint says something else than a preparation.
        """
        from ikem_fast.data.clip_set import ClipSet

        if "preparation" in data:
            return cls.from_dict(data["preparation"])
        try:
            return cls.of_clips(ClipSet.open(data["folder"]))
        except (DataError, KeyError, TypeError):
            return None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Preparation:
        """From what ``to_dict`` gave.

        Raises:
            ValueError: a value is missing, unknown or of the wrong type.
        """
        expected = {"kind": str, "num_frames": int, "num_persons": int, "centring": bool, "rotation": bool}
        if not isinstance(values, Mapping) or set(values) != set(expected):
            raise ValueError(f"a preparation must hold {', '.join(expected)}, got {values!r}")
        for name, kind in expected.items():
            if type(values[name]) is not kind or (kind is int and values[name] < 1):
                raise ValueError(f"a preparation's {name} must be a {kind.__name__}, got {values[name]!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def differences(self, other: Preparation) -> list[str]:
        """What makes clips of the other preparation other clips, in words."""
        return [
            f"{field.name} is {getattr(other, field.name)}, not {getattr(self, field.name)}"
            for field in fields(self)
            if field.name != "kind" and getattr(self, field.name) != getattr(other, field.name)
        ]

    def apply(self, xyz: np.ndarray, layout: Layout) -> tuple[np.ndarray, int]:
        """A recording (3, F, V, M or fewer) as a clip (3, T, V, M) float32, and the number of detected frames.

        Raises:
            ValueError: see ``ikem_fast.data.prepare_clip``; more than M persons.
        """
        return prepare_clip(
            fit_persons(xyz, self.num_persons),
            layout,
            self.num_frames,
            with_centre=self.centring,
            with_rotation=self.rotation,
        )
