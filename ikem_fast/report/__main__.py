"""``python -m ikem_fast.report``: a page about a run, or one that compares several."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ikem_fast.command_line import report_errors

PAGE_NAME = "report.html"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a mistake of the user is one line on stderr and exit status 2."""
    arguments = _build_parser().parse_args(argv)
    return report_errors(lambda: _report(arguments))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ikem_fast.report",
        description="Write one HTML page, with nothing outside it, about a run: curves, tables of its evaluations, "
        "embedding, clips. Several runs are compared.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"the page (default: RUN/{PAGE_NAME}, of several runs {PAGE_NAME} here)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data set (default: the one of each run)")
    parser.add_argument(
        "--sample",
        action="append",
        default=[],
        metavar="NAME",
        help="clip to draw; may be given several times (default: some lively test clips)",
    )
    parser.add_argument("--title", help="heading of the page")
    embedding = parser.add_mutually_exclusive_group()
    embedding.add_argument(
        "--no-embedding", action="store_true", help="leave out the t-SNE of the test clips' features (the slowest part)"
    )
    embedding.add_argument(
        "--modality-embeddings", action="store_true", help="a t-SNE of every modality too, to choose from on the page"
    )
    return parser


def _report(arguments: argparse.Namespace) -> int:
    from ikem_fast.report.writing import write_report

    embedding = "modalities" if arguments.modality_embeddings else None if arguments.no_embedding else "fused"
    out = arguments.out or (arguments.runs[0] / PAGE_NAME if len(arguments.runs) == 1 else Path(PAGE_NAME))
    written = write_report(
        arguments.runs,
        out,
        data=arguments.data,
        title=arguments.title,
        samples=arguments.sample,
        embedding=embedding,
    )
    print(f"written to {written} ({written.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
