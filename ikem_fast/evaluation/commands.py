"""The commands ``evaluate linear``, ``evaluate knn`` and ``demo``: their arguments, and what they print and write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ikem_fast.data import ClipSet
    from ikem_fast.engine.config import Config
    from ikem_fast.evaluation.knn import KnnRow
    from ikem_fast.evaluation.linear import LinearEvaluation
    from ikem_fast.evaluation.tables import Table
    from ikem_fast.methods import IKEM, RelationalDistillation

KINDS = ("linear", "knn")
_UNTRAINED = "untrained"


def add_evaluate_parser(subparsers: Any) -> None:
    """Adds ``evaluate`` to the commands of ``python -m ikem_fast.train``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="judge a run's encoders by a linear classifier or by nearest neighbours",
        description="Judge the encoders of a pretraining or distillation run on the test clips of its data set. Prints "
        "a table and writes it with all details to RUN/evaluation.",
    )
    parser.add_argument("kind", choices=KINDS, help="linear: train a linear head; knn: nearest neighbours")
    parser.add_argument("--run", required=True, type=Path, metavar="RUN", help="folder of the run")
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data set (default: the one of the run)")
    parser.add_argument(
        "--config", metavar="NAME|FILE", help="preset or file for the evaluation's settings (default: the run's own)"
    )
    parser.add_argument(
        "--untrained", action="store_true", help="also judge freshly initialised encoders of the same shape"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as epochs=50 or k=[1,5]")
    parser.set_defaults(run_command=evaluate_command)


def add_demo_parser(subparsers: Any) -> None:
    """Adds ``demo`` to the commands of ``python -m ikem_fast.train``."""
    parser = subparsers.add_parser(
        "demo",
        help="everything once on made-up recordings, on the CPU, in a few minutes",
        description="Write synthetic recordings, prepare them, pretrain, distil and evaluate, and end with a table and "
        "a report page.",
    )
    parser.add_argument("--out", type=Path, default=Path("ikem_fast_demo"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of recordings, weights and orders (default: %(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the text recordings too")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the demo's preset")
    parser.set_defaults(run_command=demo_command)


def demo_command(arguments: argparse.Namespace) -> int:
    from ikem_fast.demo import run_demo

    run_demo(
        arguments.out,
        seed=arguments.seed,
        keep=arguments.keep,
        overrides=arguments.overrides,
        progress=not arguments.quiet,
    )
    return 0


def evaluate_command(arguments: argparse.Namespace) -> int:
    from ikem_fast.evaluation.tables import format_table

    table, folder = evaluate_run(
        arguments.kind,
        arguments.run,
        data=arguments.data,
        config=arguments.config,
        overrides=arguments.overrides,
        untrained=arguments.untrained,
        progress=not arguments.quiet,
    )
    print(format_table(table))
    print(f"written to {folder / arguments.kind}.json and .csv")
    return 0


def evaluate_run(
    kind: str,
    run_folder: str | Path,
    *,
    data: str | Path | None = None,
    config: str | Path | None = None,
    overrides: list[str] | tuple[str, ...] = (),
    untrained: bool = False,
    progress: bool = True,
) -> tuple[Table, Path]:
    """Evaluates a run and writes RUN/evaluation/<kind>.json and .csv, for ``linear`` also scores and heads.

    Args:
        kind: "linear" or "knn".
        run_folder: a pretraining or distillation run.
        data: prepared data set; None is the one the run was trained on.
        config: preset or file with the settings; None is the run's own configuration.
        overrides: ``key=value`` texts, short keys being those of the section ``kind``.
        untrained: also evaluate freshly initialised encoders of the same shape.
        progress: show bars.

    Returns:
        the table and the folder that was written to.

    Raises:
        CheckpointError, ConfigError, DataError: the run, the settings or the data set cannot be used.
        ValueError: the data set's skeleton or classes do not fit.
    """
    import torch

    from ikem_fast.atomic import write_json
    from ikem_fast.data import ClipSet
    from ikem_fast.engine import checkpoints
    from ikem_fast.engine.config import load_config, resolve_device
    from ikem_fast.evaluation.tables import write_csv

    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    run_folder = Path(run_folder)
    method, checkpoint = checkpoints.load_run(run_folder)
    settings = load_config(checkpoint["config"] if config is None else config, overrides, kind)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    clip_set = ClipSet.open(checkpoint["data"]["folder"] if data is None else data)
    if clip_set.layout != method.layout:
        raise ValueError(
            f"data set {clip_set.folder} must have the run's skeleton '{method.layout.name}', "
            f"got '{clip_set.layout.name}'"
        )
    sets = clip_set.split("train"), clip_set.split("test")
    folder = run_folder / "evaluation"
    folder.mkdir(exist_ok=True)
    subjects = _subjects(method, settings.seed, untrained)
    evaluate = partial(_evaluate_linear, step=checkpoint["step"]) if kind == "linear" else _evaluate_knn
    entries, table = evaluate(subjects, sets, settings, resolve_device(settings), folder, progress)
    write_json(
        folder / f"{kind}.json",
        {
            "kind": kind,
            "run": {key: checkpoint[key] for key in ("kind", "epoch", "step")},
            "data": {
                "folder": str(clip_set.folder),
                "num_train": len(sets[0]),
                "num_test": len(sets[1]),
                "class_names": list(clip_set.class_names),
            },
            "settings": vars(getattr(settings, kind)),
            "seed": settings.seed,
            "versions": checkpoints.versions(),
            "encoders": entries,
        },
    )
    write_csv(folder / f"{kind}.csv", table)
    return table, folder


def _subjects(
    method: IKEM | RelationalDistillation, seed: int, untrained: bool
) -> Iterator[tuple[str, IKEM | RelationalDistillation, str | None]]:
    """(name, module, part) of every set of encoders that is evaluated.

    Untrained encoders of a teacher's shape stand for those of its student too, where the student's modalities are one
    of the views they are judged in.
    """
    import torch

    from ikem_fast import methods
    from ikem_fast.evaluation.views import views_of

    if not isinstance(method, methods.RelationalDistillation):
        parts = fresh_parts = {"pretrained": None}
    else:
        parts = fresh_parts = {"student": "student", "teacher": "teacher"}
        if tuple(method.feature_names) in views_of(method.teacher_feature_names).values():
            fresh_parts = {"": "teacher"}
    for name, part in parts.items():
        yield name, method, part
    if untrained:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            fresh = methods.from_config(method.config())
        for name, part in fresh_parts.items():
            yield f"{_UNTRAINED} {name}".strip() if part else _UNTRAINED, fresh, part


def _evaluate_linear(
    subjects: Iterator[tuple[str, IKEM | RelationalDistillation, str | None]],
    sets: tuple[ClipSet, ClipSet],
    settings: Config,
    device: torch.device,
    folder: Path,
    progress: bool,
    step: int,
) -> tuple[list[dict[str, Any]], Table]:
    from ikem_fast.data.preparation import Preparation
    from ikem_fast.evaluation.heads import HEADS_FILE, save_heads
    from ikem_fast.evaluation.linear import evaluate_linear
    from ikem_fast.evaluation.scores import Scores, save_scores

    results = {
        name: evaluate_linear(
            module,
            *sets,
            settings.linear,
            part=part,
            rescale=name.startswith(_UNTRAINED),
            seed=settings.seed,
            device=device,
            progress=progress,
        )
        for name, module, part in subjects
    }
    first = next(iter(results.values()))
    logits = {
        f"{name}/{view}": scores.numpy() for name, result in results.items() for view, scores in result.scores.items()
    }
    save_scores(folder / "linear_scores.npz", Scores(first.sample_names, first.labels.numpy(), logits))
    save_heads(
        folder / HEADS_FILE,
        {name: result for name, result in results.items() if not name.startswith(_UNTRAINED)},
        recipe=vars(settings.linear),
        seed=settings.seed,
        step=step,
        data={"folder": str(sets[0].folder), "preparation": Preparation.of_clips(sets[0]).to_dict()},
    )
    entries = [
        {
            "encoders": name,
            "epochs": result.epochs,
            "reported": "best epoch on the test set" if result.best_epoch_on_test else "last epoch",
            "rows": [{**vars(row), "modalities": list(row.modalities)} for row in result.rows],
            "confusion": {"view": result.rows[-1].name, "counts": result.confusion.tolist()},
            "history": result.history,
        }
        for name, result in results.items()
    ]
    return entries, linear_table(results)


def linear_table(results: Mapping[str, LinearEvaluation]) -> Table:
    """One row per encoders and view; which epoch the headline is of stands in its heading."""
    from ikem_fast.evaluation.tables import Table

    best = next(iter(results.values())).best_epoch_on_test
    rows = [
        (name, row.name, row.top1, row.top5, row.best_top1, row.best_epoch)
        for name, result in results.items()
        for row in result.rows
    ]
    headline = "top-1 % (best on test)" if best else "top-1 %"
    columns = ("encoders", "view", headline, "top-5 %", "best epoch on test %", "at epoch")
    return Table(columns, tuple(rows), "linear evaluation, " + ("best epoch on the test set" if best else "last epoch"))


def _evaluate_knn(
    subjects: Iterator[tuple[str, IKEM | RelationalDistillation, str | None]],
    sets: tuple[ClipSet, ClipSet],
    settings: Config,
    device: torch.device,
    folder: Path,
    progress: bool,
) -> tuple[list[dict[str, Any]], Table]:
    from ikem_fast.evaluation.features import extract
    from ikem_fast.evaluation.knn import evaluate_knn

    results = {}
    for name, module, part in subjects:
        module.to(device)
        features = [
            extract(module, clips, part=part, batch_size=settings.knn.feature_batch_size, device=device)
            for clips in sets
        ]
        results[name] = evaluate_knn(*features, ks=settings.knn.k)
    entries = [
        {"encoders": name, "rows": [{"name": row.name, "accuracy": row.accuracy} for row in rows]}
        for name, rows in results.items()
    ]
    return entries, knn_table(results)


def knn_table(results: Mapping[str, list[KnnRow]]) -> Table:
    """One row per encoders and view, one column per number of neighbours."""
    from ikem_fast.evaluation.tables import Table

    ks = list(next(iter(results.values()))[0].accuracy)
    rows = [(name, row.name, *(row.accuracy[k] for k in ks)) for name, rows in results.items() for row in rows]
    return Table(("encoders", "view", *(f"k={k} %" for k in ks)), tuple(rows), "nearest neighbours, top-1")


def accuracy_table(linear: Iterable[Mapping[str, Any]], knn: Iterable[Mapping[str, Any]]) -> Table:
    """Linear and kNN accuracy side by side, from the "encoders" entries of both evaluations' JSON."""
    from ikem_fast.evaluation.tables import Table

    neighbours = {(entry["encoders"], row["name"]): row["accuracy"] for entry in knn for row in entry["rows"]}
    ks = list(next(iter(neighbours.values()))) if neighbours else []
    rows = []
    for entry in linear:
        for row in entry["rows"]:
            accuracy = neighbours.get((entry["encoders"], row["name"]), {})
            cells = (row["top1"], row["top5"], row["best_top1"], row["best_epoch"], *(accuracy.get(k) for k in ks))
            rows.append((entry["encoders"], row["name"].replace("_", " "), *cells))
    columns = ("encoders", "view", "linear top-1 %", "top-5 %", "best epoch on test %", "at epoch")
    return Table((*columns, *(f"kNN k={k} %" for k in ks)), tuple(rows))


def read_evaluation(run_folder: str | Path, kind: str) -> dict[str, Any] | None:
    """What ``evaluate_run`` wrote, or None where there is none."""
    path = Path(run_folder) / "evaluation" / f"{kind}.json"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
