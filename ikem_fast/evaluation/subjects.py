"""What is judged: the encoders of runs, part by part, and untrained ones of the same shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ikem_fast import methods
from ikem_fast.engine import checkpoints
from ikem_fast.engine.config import differences
from ikem_fast.evaluation.views import views_of
from ikem_fast.methods import IKEM, RelationalDistillation
from ikem_fast.nn import MultiStreamSTGCN

PARTS = ("student", "teacher")
_UNTRAINED = "untrained"
_IDENTITY = ("kind", "epoch", "step")  # what runs whose results are averaged have in common beside the method


class SubjectError(ValueError):
    """Runs that cannot be judged as asked, or not together; the message says what differs."""


@dataclass(frozen=True)
class Subject:
    """A set of encoders that is judged.

    Attributes:
        name: "pretrained", "student", "teacher", or "untrained" with a part's name.
        method: the module they belong to.
        part: of a distillation "student" or "teacher"; None for methods with one set of encoders.
        untrained: whether they are freshly initialised.
    """

    name: str
    method: IKEM | RelationalDistillation
    part: str | None = None
    untrained: bool = False

    @property
    def encoders(self) -> MultiStreamSTGCN:
        return methods.evaluated_encoders(self.method, self.part)[0]

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the encoders' streams, in order."""
        return methods.evaluated_encoders(self.method, self.part)[1]


@dataclass(frozen=True)
class Run:
    """A run that is judged.

    Attributes:
        folder: the run's.
        method: its trained module.
        checkpoint: everything else that its last checkpoint holds.
    """

    folder: Path
    method: IKEM | RelationalDistillation
    checkpoint: dict[str, Any]

    @classmethod
    def load(cls, folder: str | Path) -> Run:
        """Raises CheckpointError for a folder that holds no run, or an unusable one."""
        return cls(Path(folder), *checkpoints.load_run(folder))

    def facts(self) -> dict[str, Any]:
        """What is written down of it beside results."""
        progress = {key: self.checkpoint[key] for key in _IDENTITY}
        return {"folder": str(self.folder), **progress, "seed": self.checkpoint["config"].get("seed")}


def check_together(first: Run, other: Run) -> None:
    """Raises SubjectError unless two runs differ in nothing but their seed, so that a mean over them has a meaning."""
    of_first, of_other = first.method.config(), other.method.config()
    wrong = [
        f"{key} is {_shown(of_first.get(key))} and {_shown(of_other.get(key))}"
        for key in (*of_first, *(key for key in of_other if key not in of_first))
        if of_first.get(key) != of_other.get(key)
    ]
    recipes = differences(first.checkpoint["config"], other.checkpoint["config"])
    wrong += [
        f"{key} is {old} and {new}"
        for key, (old, new) in recipes.items()
        if key.startswith((f"{first.checkpoint['kind']}.", "augmentation."))
    ]
    wrong += [
        f"{key} is {first.checkpoint[key]} and {other.checkpoint[key]}"
        for key in _IDENTITY
        if first.checkpoint[key] != other.checkpoint[key]
    ]
    if wrong:
        raise SubjectError(
            f"runs that are judged together must differ in their seed alone; of {first.folder} and {other.folder} "
            f"{'; '.join(wrong)}"
        )


def _shown(value: Any) -> Any:
    return value.get("name", value) if isinstance(value, Mapping) else value


def parts_of(run: Run, part: str | None = None) -> dict[str, str | None]:
    """Names of a run's sets of encoders, and the part of the module that each is.

    Args:
        run: the run.
        part: "student" or "teacher" to have that one alone.

    Raises:
        SubjectError: a part of a run that has none.
    """
    if part is not None and part not in PARTS:
        raise SubjectError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    if isinstance(run.method, RelationalDistillation):
        return {name: name for name in PARTS if part in (None, name)}
    if part is not None:
        raise SubjectError(
            f"part is {part!r}, but {run.folder} is a run of {run.checkpoint['kind']!r}, which has no {part}: "
            "give the folder of a run of 'distill'"
        )
    return {"pretrained": None}


def trained_subjects(run: Run, part: str | None = None) -> Iterator[Subject]:
    """A run's own sets of encoders."""
    for name, of_part in parts_of(run, part).items():
        yield Subject(name, run.method, of_part)


def untrained_subjects(run: Run, seed: int, part: str | None = None) -> Iterator[Subject]:
    """Freshly initialised encoders of a run's shape.

    Those of a teacher's shape stand for those of its student too, where the student's modalities are one of the views
    they are judged in.
    """
    parts = parts_of(run, part)
    if "teacher" in parts and tuple(run.method.feature_names) in views_of(run.method.teacher_feature_names).values():
        parts = {"": "teacher"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh = methods.from_config(run.method.config()).eval()
    for name, of_part in parts.items():
        yield Subject(f"{_UNTRAINED} {name}".strip() if of_part else _UNTRAINED, fresh, of_part, untrained=True)


def digest(subject: Subject) -> str:
    """Tells encoders' weights apart."""
    total = hashlib.sha256()
    for name, tensor in subject.encoders.state_dict().items():
        total.update(name.encode())
        total.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()


def evaluation_seeds(seeds: int | Sequence[int], seed: int) -> list[int]:
    """The evaluation seeds that ``evaluation.seeds`` means: so many from ``seed`` on, or those of a list."""
    return list(range(seed, seed + seeds)) if isinstance(seeds, int) else list(seeds)
