"""The command ``python -m ikem_fast.data``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ikem_fast._extension import ExtensionError
from ikem_fast.data import DataError, pipeline, readers, synthetic
from ikem_fast.layouts import LayoutError

_DESCRIPTION = "Prepares recordings for training."
_PREPARE_DESCRIPTION = (
    "Makes a folder of clips for training from a dataset's recordings. Interrupted, the same command goes on where it "
    "was; finished, it does nothing."
)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m ikem_fast.data", description=_DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help=_DESCRIPTION, description=_PREPARE_DESCRIPTION)
    kinds = prepare.add_subparsers(dest="kind", required=True, metavar="KIND")
    for kind, reader in readers.READERS.items():
        if kind == synthetic.KIND:
            continue
        options = kinds.add_parser(kind, help=f"files {reader.name_pattern}", description=_PREPARE_DESCRIPTION)
        options.add_argument("source", metavar="SRC", help="folder of recordings, searched with its subfolders")
        _add_common_options(options, reader)
        options.add_argument("--missing", metavar="FILE", help="names of samples to leave out, one per line")
        options.add_argument(
            "--layout", metavar="FILE", help="skeleton of the recordings, a YAML file (default: the dataset's own)"
        )
    options = kinds.add_parser(
        synthetic.KIND,
        help="recordings of a made-up moving body, written by this command in NTU's text format",
        description=_PREPARE_DESCRIPTION,
    )
    _add_common_options(options, readers.get(synthetic.KIND))
    options.add_argument("--raw", metavar="DIR", help="folder for the text files (default: OUT/raw)")
    options.add_argument("--subjects", type=int, default=10, metavar="N", help="performers (default: 10)")
    options.add_argument(
        "--repetitions", type=int, default=2, metavar="N", help="times each performer acts (default: 2)"
    )
    options.add_argument("--cameras", type=int, default=3, metavar="N", help="1 to 3 (default: 3)")
    options.add_argument("--actions", type=int, default=None, metavar="N", help="the first N actions (default: all)")
    options.add_argument("--seed", type=int, default=0, help="the same seed gives the same files (default: 0)")
    return parser


def _add_common_options(options: argparse.ArgumentParser, reader: readers.Reader) -> None:
    options.add_argument("out", metavar="OUT", help="folder to make; new, empty, or begun by this command")
    protocols = "; ".join(f"{name}: {protocol.description}" for name, protocol in reader.protocols.items())
    options.add_argument(
        "--protocol",
        choices=tuple(reader.protocols),
        default=reader.default_protocol,
        help=f"{protocols} (default: {reader.default_protocol})",
    )
    options.add_argument("--frames", type=int, default=50, metavar="T", help="frames per clip (default: 50)")
    options.add_argument("--no-centre", action="store_true", help="do not subtract the centre joint")
    options.add_argument("--no-rotate", action="store_true", help="do not turn the shoulder line parallel to x")
    options.add_argument("--workers", type=int, metavar="N", help="threads (default: one per CPU)")
    options.add_argument(
        "--on-error",
        choices=("fail", "skip"),
        default="fail",
        help="at a bad file, stop, or leave it out and list it at the end (default: fail)",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; 0 when the folder is prepared, 1 with a message on standard error when it is not."""
    options = build_parser().parse_args(arguments)
    common = {
        "protocol": options.protocol,
        "num_frames": options.frames,
        "centre": not options.no_centre,
        "rotate": not options.no_rotate,
        "workers": options.workers,
        "on_error": options.on_error,
        "progress": True,
    }
    try:
        if options.kind == synthetic.KIND:
            summary = synthetic.prepare_synthetic(
                options.out,
                raw=options.raw,
                num_subjects=options.subjects,
                num_repetitions=options.repetitions,
                num_cameras=options.cameras,
                num_actions=options.actions,
                seed=options.seed,
                **common,
            )
        else:
            summary = pipeline.prepare(
                options.kind, options.source, options.out, missing=options.missing, layout=options.layout, **common
            )
    except (DataError, LayoutError, ExtensionError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    print(summary)
    return 0


if __name__ == "__main__":
    sys.exit(main())
