"""``python -m ikem_fast.predict``: the actions in recordings, as a trained model sees them."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ikem_fast.command_line import report_errors

if TYPE_CHECKING:
    from ikem_fast.inference import Classification, Embeddings


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a mistake of the user is one line on stderr and exit status 2."""
    arguments = _build_parser().parse_args(argv)
    return report_errors(lambda: _predict(arguments))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ikem_fast.predict",
        description="Name the actions in recordings: NTU .skeleton, NW-UCLA .json, UTD-MHAD .mat files, or folders of "
        "them. They are prepared as the model's data set was, and must have its skeleton.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="recording, or folder of recordings")
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--run", type=Path, metavar="RUN", help="folder of a run that `evaluate linear` was run on")
    model.add_argument("--model", type=Path, metavar="FILE", help="model.safetensors of `python -m ikem_fast.export`")
    parser.add_argument("--part", metavar="PART", help="of a distillation run: student (default) or teacher")
    parser.add_argument("--view", help="the modality, or combination of modalities, that judges (default: the fullest)")
    parser.add_argument("--top", type=int, default=2, metavar="K", help="classes to show a file (default: %(default)s)")
    parser.add_argument("--embed", type=Path, metavar="OUT.npz", help="also write the features of the recordings")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print JSON in place of a table")
    output.add_argument("--csv", action="store_true", help="print CSV in place of a table")
    parser.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a recording that cannot be used, stop, or leave it out and name it on stderr (default: fail)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data set that says how to prepare, if asked")
    parser.add_argument("--kind", metavar="KIND", help="how files are read, a dataset's name (default: by suffix)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:N, or auto (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="recordings at a time")
    return parser


def _predict(arguments: argparse.Namespace) -> int:
    from ikem_fast.inference import load

    if arguments.top < 1:
        raise ValueError(f"--top must be at least 1, got {arguments.top}")
    model = load(arguments.run or arguments.model, part=arguments.part, data=arguments.data, device=arguments.device)
    # The file of features holds all modalities; the classes need those of their view alone.
    modalities = None if arguments.embed else model.modalities_of(arguments.view)
    embeddings = model.embed(
        arguments.files,
        modalities=modalities,
        batch_size=arguments.batch_size,
        reader=arguments.kind,
        on_error=arguments.on_error,
    )
    for bad in embeddings.skipped:
        print(f"left out: {bad}", file=sys.stderr)
    if arguments.embed is not None:
        _write_embeddings(arguments.embed, embeddings)
        print(f"features of {len(embeddings)} recordings written to {arguments.embed}", file=sys.stderr)
    if model.heads is not None:
        _print_classes(arguments, model.classify(embeddings, view=arguments.view))
    return 0


def _print_classes(arguments: argparse.Namespace, result: Classification) -> None:
    from ikem_fast.evaluation.tables import Table, format_table

    best = result.top(arguments.top)
    if arguments.json:
        files = [
            {
                "file": source,
                "name": name,
                "classes": [{"name": action, "probability": probability} for action, probability in classes],
            }
            for source, name, classes in zip(result.sources, result.sample_names, best, strict=True)
        ]
        skipped = [{"file": bad.file, "line": bad.line, "reason": bad.reason} for bad in result.skipped]
        print(json.dumps({"view": result.view, "files": files, "skipped": skipped}, indent=2, ensure_ascii=False))
        return
    places = range(1, len(best[0]) + 1)
    rows = [
        (source, *(cell for pair in classes for cell in pair))
        for source, classes in zip(result.sources, best, strict=True)
    ]
    if arguments.csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        numbers = ["" if place == 1 else f" {place}" for place in places]
        writer.writerow(["file", *(name for number in numbers for name in (f"class{number}", f"probability{number}"))])
        writer.writerows(rows)
        return
    headings = ["class" if place == 1 else "next best" if place == 2 else f"{place}." for place in places]
    columns = ("file", *(name for heading in headings for name in (heading, "probability %")))
    print(format_table(Table(columns, tuple(rows), f"judged by {result.view}")))


def _write_embeddings(path: Path, embeddings: Embeddings) -> None:
    import numpy as np

    from ikem_fast.atomic import atomic_open

    with atomic_open(path, "wb") as file:
        np.savez_compressed(
            file,
            sample_names=np.array(embeddings.sample_names),
            files=np.array(embeddings.sources),
            modalities=np.array(embeddings.names),
            features=embeddings.features.numpy(),
            fused=embeddings.fused.numpy(),
        )


if __name__ == "__main__":
    sys.exit(main())
