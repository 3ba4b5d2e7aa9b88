"""The evaluations that ``python -m ikem_fast.train evaluate`` knows: one line each; the rest is in their own files."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ikem_fast.evaluation.outcomes import Judgement

FOLDER = "evaluation"  # in a run's folder, where results go


@dataclass(frozen=True)
class Evaluation:
    """One way of judging encoders.

    Attributes:
        name: the command's, and that of the files it writes.
        help: what it does, in a line.
        section: of the configuration, its settings and what short overrides refer to.
        judge: ``judge(subject, train_set, test_set, settings, seeds, device, progress)`` gives the
            :class:`~ikem_fast.evaluation.outcomes.Judgement` of one set of encoders
            (:class:`~ikem_fast.evaluation.subjects.Subject`), with an outcome for each seed. A function, or
            ``module:function``, which is imported on first use.
        seeded: whether results depend on the seed; otherwise ``judge`` is called with one seed only.
        keep: ``keep(folder, results, recipe=, seed=, step=, data=)`` writes what else shall stay of a single run's
            evaluation, from the ``result`` of the first outcome of each trained encoders by their names; a function or
            its name as ``judge``, or None.
    """

    name: str
    help: str
    section: str
    judge: Callable[..., Judgement] | str
    seeded: bool = True
    keep: Callable[..., None] | str | None = None

    @property
    def judge_function(self) -> Callable[..., Judgement]:
        return _resolve(self.judge)

    @property
    def keep_function(self) -> Callable[..., None] | None:
        return None if self.keep is None else _resolve(self.keep)


def _resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


_HERE = __name__.rpartition(".")[0]
_EVALUATIONS: dict[str, Evaluation] = {}


def register(evaluation: Evaluation) -> Evaluation:
    """Adds an evaluation to the commands.

    Raises:
        ValueError: there is one of that name, or it is none of a name.
    """
    if not evaluation.name.isidentifier() or evaluation.name in ("fuse", "transfer"):
        raise ValueError(f"name must be a word other than fuse and transfer, got {evaluation.name!r}")
    if evaluation.name in _EVALUATIONS:
        raise ValueError(f"an evaluation named '{evaluation.name}' is there already")
    _EVALUATIONS[evaluation.name] = evaluation
    return evaluation


def unregister(name: str) -> None:
    """Takes an evaluation out again."""
    del _EVALUATIONS[name]


def evaluations() -> tuple[Evaluation, ...]:
    """All of them, in the order they were registered."""
    return tuple(_EVALUATIONS.values())


def get(name: str) -> Evaluation:
    """An evaluation by its name. Raises ValueError for one that is not there."""
    if name not in _EVALUATIONS:
        raise ValueError(f"kind must be one of {', '.join(_EVALUATIONS)}, got {name!r}")
    return _EVALUATIONS[name]


_linear = f"{_HERE}.linear:judge", True, f"{_HERE}.linear:keep"
register(Evaluation("linear", "train linear heads on frozen features", "linear", *_linear))
register(Evaluation("knn", "let nearest neighbours vote", "knn", f"{_HERE}.knn:judge", seeded=False))
register(Evaluation("semi", "train on a few labels", "semi", f"{_HERE}.semi:judge"))
register(Evaluation("finetune", "train encoders and heads on all labels", "finetune", f"{_HERE}.finetuning:judge"))
register(Evaluation("retrieval", "look for like clips", "retrieval", f"{_HERE}.retrieval:judge", seeded=False))
