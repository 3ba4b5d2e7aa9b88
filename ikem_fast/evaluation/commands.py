"""The commands ``evaluate …``: their arguments, what they print and write, and reading it again.

What each evaluation does is in its own file; ``registry`` lists them.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikem_fast.evaluation import registry
from ikem_fast.evaluation.registry import FOLDER

if TYPE_CHECKING:
    from ikem_fast.evaluation.tables import Table

TRANSFER_PROTOCOLS = ("linear", "finetune", "semi", "knn")


def add_evaluate_parser(subparsers: Any) -> None:
    """Adds ``evaluate`` to the commands of ``python -m ikem_fast.train``."""
    parser = subparsers.add_parser(
        "evaluate",
        help="judge runs' encoders: linear, knn, semi, finetune, retrieval, transfer; fuse scores",
        description="Judge the encoders of pretraining or distillation runs on the test clips of a data set. Prints a "
        "table and writes it, with all single values and settings, to RUN/evaluation.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True, metavar="KIND")
    for evaluation in registry.evaluations():
        kind = kinds.add_parser(
            evaluation.name,
            help=evaluation.help,
            description=f"Judge encoders: {evaluation.help}. Settings are those of section '{evaluation.section}' of "
            "the configuration, and seeds=N or seeds=[...] for as many results to take the mean of.",
        )
        _add_run_arguments(kind)
        kind.add_argument("--data", type=Path, metavar="DIR", help="prepared data set (default: the one of the run)")
        kind.set_defaults(run_command=_evaluate_command)
    transfer = kinds.add_parser(
        "transfer",
        help="judge on another data set, whose skeleton may be another one",
        description="Judge encoders on a data set that they were not pretrained on. Joints of another skeleton are "
        "taken by their names, or from those that stand in for them (stand_ins of a layout's file).",
    )
    _add_run_arguments(transfer)
    transfer.add_argument("--data", type=Path, required=True, metavar="DIR", help="prepared data set")
    transfer.add_argument(
        "--protocol", choices=TRANSFER_PROTOCOLS, default="linear", help="the evaluation (default: %(default)s)"
    )
    transfer.add_argument(
        "--persons", type=int, metavar="M", help="persons of the clips of pretraining (default: as the run remembers)"
    )
    transfer.set_defaults(run_command=_transfer_command)
    fuse = kinds.add_parser(
        "fuse",
        help="add up score files by sample name",
        description="Weighted sum of scores that evaluations wrote, clip by clip by their names.",
    )
    fuse.add_argument(
        "scores",
        nargs="+",
        metavar="FILE[:ENTRY][=WEIGHT]",
        help="a *_scores.npz, which of its scores (student/joint; not needed where it has one), and its weight (1)",
    )
    fuse.add_argument("--out", type=Path, metavar="DIR", help="write fused.json, fused.csv and fused_scores.npz there")
    fuse.set_defaults(run_command=_fuse_command)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        required=True,
        nargs="+",
        metavar="RUN",
        help="folder of the run; of several, which must differ in their seed alone, for their mean and spread",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: RUN/evaluation; needed for several runs)"
    )
    parser.add_argument(
        "--config", metavar="NAME|FILE", help="preset or file for the evaluation's settings (default: the run's own)"
    )
    parser.add_argument("--part", choices=("student", "teacher"), help="of a distillation this part alone")
    parser.add_argument(
        "--untrained", action="store_true", help="also judge freshly initialised encoders of the same shape"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as epochs=50 or seeds=3")


def _evaluate_command(arguments: argparse.Namespace) -> int:
    return _run_and_print(arguments.kind, arguments)


def _transfer_command(arguments: argparse.Namespace) -> int:
    return _run_and_print(arguments.protocol, arguments, transfer=True, persons=arguments.persons)


def _run_and_print(kind: str, arguments: argparse.Namespace, **options: Any) -> int:
    from ikem_fast.evaluation.running import evaluate_run
    from ikem_fast.evaluation.tables import format_table

    runs, overrides = _split_runs(arguments.run)
    table, folder = evaluate_run(
        kind,
        runs,
        data=arguments.data,
        config=arguments.config,
        overrides=[*overrides, *arguments.overrides],
        untrained=arguments.untrained,
        part=arguments.part,
        out=arguments.out,
        progress=not arguments.quiet,
        **options,
    )
    print(format_table(table))
    print(f"written to {folder}")
    return 0


def _split_runs(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """``--run`` takes all words that follow it; those that are settings and no folders are told from the runs."""
    overrides = [text for text in texts if re.match(r"[A-Za-z_][\w.]*=", text) and not Path(text).is_dir()]
    return [text for text in texts if text not in overrides], overrides


def _fuse_command(arguments: argparse.Namespace) -> int:
    from ikem_fast.evaluation.fusing import fuse_files
    from ikem_fast.evaluation.tables import format_table

    table = fuse_files(arguments.scores, arguments.out)
    print(format_table(table))
    if arguments.out is not None:
        print(f"written to {arguments.out / 'fused'}.json and .csv")
    return 0


def accuracy_table(linear: Iterable[Mapping[str, Any]], knn: Iterable[Mapping[str, Any]]) -> Table:
    """Linear and kNN accuracy side by side, from the "encoders" entries of both evaluations' JSON."""
    from ikem_fast.evaluation.outcomes import figure
    from ikem_fast.evaluation.tables import Table

    neighbours = {(entry["encoders"], row["name"]): row for entry in knn for row in entry["rows"]}
    ks = list(next(iter(neighbours.values()))["accuracy"]) if neighbours else []
    rows = []
    for entry in linear:
        for row in entry["rows"]:
            of_knn = neighbours.get((entry["encoders"], row["name"]), {})
            cells = [figure(row, (key,)) for key in ("top1", "top5", "best_top1", "best_epoch")]
            cells += [figure(of_knn, ("accuracy", k)) for k in ks]
            rows.append((entry["encoders"], row["name"].replace("_", " "), *cells))
    columns = ("encoders", "view", "linear top-1 %", "top-5 %", "best epoch on test %", "at epoch")
    return Table((*columns, *(f"kNN k={k} %" for k in ks)), tuple(rows))


def read_evaluation(run_folder: str | Path, kind: str) -> dict[str, Any] | None:
    """What ``evaluate_run`` wrote into a run's folder, or None where there is none."""
    path = Path(run_folder) / FOLDER / f"{kind}.json"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        return json.load(file)
