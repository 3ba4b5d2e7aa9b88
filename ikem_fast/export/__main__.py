"""``python -m ikem_fast.export``: a trained model for use elsewhere."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ikem_fast.command_line import report_errors
from ikem_fast.export import FORMATS, export_model


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a mistake of the user is one line on stderr and exit status 2."""
    arguments = _build_parser().parse_args(argv)
    return report_errors(lambda: _export(arguments))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ikem_fast.export",
        description="Write the encoders of a run, and the linear heads of `evaluate linear` where there are any, for "
        "use elsewhere. Every form is compared with the model before it is written.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run, or a model.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder to write to, made if need be")
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=FORMATS,
        default=["safetensors", "plain"],
        help="safetensors: for ikem_fast.load; plain: a Python file and weights that need torch and numpy alone; onnx "
        "(pip install 'ikem_fast[export]'). Default: safetensors plain",
    )
    parser.add_argument("--part", metavar="PART", help="of a distillation run: student (default) or teacher")
    parser.add_argument("--view", help="whose logits the ONNX file gives (default: the fullest)")
    parser.add_argument(
        "--check", nargs="+", type=Path, metavar="FILE", help="recordings or folders to compare on, too (the first 64)"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="prepared data set that says how to prepare, if asked")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    from ikem_fast.inference import load

    model = load(arguments.run, part=arguments.part, data=arguments.data)
    result = export_model(model, arguments.out, arguments.formats, view=arguments.view, clips=arguments.check)
    if model.heads is None:
        print(f"note: features alone are exported, for {model.headless}", file=sys.stderr)
    for path, difference in result.values():
        print(f"{path}  largest relative difference from the model {difference:.1e}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
