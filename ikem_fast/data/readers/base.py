"""What a reader of a dataset's recordings consists of. A new dataset is one file beside this and one line in
``readers/__init__.py``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ikem_fast.layouts import Layout


class DataError(ValueError):
    """Recordings, lists or prepared folders that cannot be used; the message names the file and the reason."""


@dataclass(frozen=True)
class Sample:
    """What the name of a recording says. ``None`` where the dataset has no such thing."""

    name: str
    label: int
    subject: int
    camera: int | None = None
    setup: int | None = None
    replication: int | None = None


@dataclass(frozen=True)
class Protocol:
    """How a dataset is divided into training and test samples.

    Attributes:
        description: one line for the help text.
        class_names: one name per label.
        is_training: whether a sample is in the training split; all others are in the test split.
        is_included: whether a sample belongs to the protocol at all.
    """

    description: str
    class_names: tuple[str, ...]
    is_training: Callable[[Sample], bool]
    is_included: Callable[[Sample], bool] = lambda sample: True


@dataclass(frozen=True)
class Reader:
    """One dataset's recordings.

    Attributes:
        kind: the name of the dataset in commands.
        layout: name of the layout its recordings have.
        num_persons: M, the persons kept of a recording.
        protocols: by name; the first is the default.
        suffix: what its file names end with.
        name_pattern: what a file name looks like, for messages.
        parse_name: the sample a file name stands for, ``None`` where it is no such name.
        read: (3, F, V, M) float64 in metres, zero where a person is absent; raises ValueError or OSError on a file
            that cannot be used, with the line number where there is one.
    """

    kind: str
    layout: str
    num_persons: int
    protocols: dict[str, Protocol]
    suffix: str
    name_pattern: str
    parse_name: Callable[[str], Sample | None]
    read: Callable[[Path, Layout], np.ndarray]

    @property
    def default_protocol(self) -> str:
        return next(iter(self.protocols))


def check_recording(xyz: np.ndarray) -> np.ndarray:
    """A recording of (3, F, V, M) with at least one frame and finite coordinates."""
    if xyz.shape[1] == 0:
        raise ValueError("no frames")
    finite = np.isfinite(xyz)
    if not finite.all():
        axis, frame, joint, _ = (int(indices[0]) for indices in np.nonzero(~finite))
        raise ValueError(
            f"coordinate {'xyz'[axis]} of joint {joint + 1} in frame {frame + 1} must be finite, "
            f"got {xyz[axis, frame, joint].tolist()[0]}"
        )
    return xyz
