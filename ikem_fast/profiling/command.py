"""The command line of ``python -m ikem_fast.profile``."""

from __future__ import annotations

import argparse
import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ikem_fast.command_line import report_errors

if TYPE_CHECKING:
    from ikem_fast.engine import Config
    from ikem_fast.profiling.running import Profile

TRACE_NAME, TABLE_NAME, VALUES_NAME = "trace.json.gz", "table.md", "table.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; a mistake of the user is one line on stderr and exit status 2."""
    parser = _build_parser()
    # key=value settings may stand anywhere among the options, which argparse alone does not allow.
    arguments, rest = parser.parse_known_args(argv)
    strangers = [text for text in rest if text.startswith("-") or "=" not in text]
    if strangers:
        parser.error(f"unrecognized arguments: {' '.join(strangers)}")
    arguments.overrides = [*arguments.overrides, *rest]
    return report_errors(lambda: _profile(arguments))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ikem_fast.profile",
        description="Train a few steps under torch's profiler, and show of each phase its time, its share of the step, "
        f"and its work against the floor. Writes {TRACE_NAME} (for Perfetto), {TABLE_NAME} and {VALUES_NAME}. Nothing "
        "of what is trained is kept.",
    )
    parser.add_argument("command", choices=("pretrain", "distill"), help="what to train")
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="prepared data set (default: the teacher's; without one, synthetic clips)",
    )
    parser.add_argument(
        "--config",
        metavar="NAME|FILE",
        help="preset or YAML file (default: the teacher's where one is given, else ntu60-xsub, the published recipe)",
    )
    parser.add_argument(
        "--teacher", type=Path, metavar="RUN", help="of distill: a pretraining run (default: an untrained teacher)"
    )
    parser.add_argument("--stage", help="of pretrain: single or cross (default: the configuration's last)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="steps to record (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("ikem_fast_profile"), metavar="DIR", help="default: %(default)s"
    )
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--capture", action="store_true", help="on CUDA: run steps as a graph, which hides their phases")
    how.add_argument("--nvtx", action="store_true", help="on CUDA: record nothing, for Nsight Systems to do it")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as batch_size=64")
    return parser


def _profile(arguments: argparse.Namespace) -> int:
    from ikem_fast.engine.world import refuse_several
    from ikem_fast.profiling.running import profile_training
    from ikem_fast.profiling.table import as_markdown, as_values

    refuse_several("profile")
    if arguments.teacher is not None and arguments.command != "distill":
        raise ValueError(f"--teacher is for distill, got it for {arguments.command}")
    config = _load_config(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    result = profile_training(
        arguments.command,
        config,
        scratch=arguments.out,
        data=arguments.data,
        teacher_run=arguments.teacher,
        stage=arguments.stage,
        steps=arguments.steps,
        capture=arguments.capture,
        nvtx=arguments.nvtx,
    )
    if isinstance(result, float):
        print(f"a step takes {1e3 * result:.2f} ms; {arguments.steps} steps were there for Nsight to see")
        return 0
    values = as_values(result)
    text = as_markdown(values)
    _write(arguments.out, result, values, text)
    print(text)
    print(f"written to {arguments.out}: {TABLE_NAME}, {VALUES_NAME}, and {TRACE_NAME} for https://ui.perfetto.dev")
    return 0


def _load_config(arguments: argparse.Namespace) -> Config:
    from ikem_fast.engine import checkpoints, load_config

    source = arguments.config
    if source is None and arguments.teacher is not None:
        source = checkpoints.load_of_run(arguments.teacher)["config"]
    return load_config(source, arguments.overrides, arguments.command)


def _write(out: Path, profile: Profile, values: dict, text: str) -> None:
    from ikem_fast.atomic import atomic_open, write_json

    with atomic_open(out / TRACE_NAME, "wb") as file:
        file.write(gzip.compress(profile.trace))
    write_json(out / VALUES_NAME, values)
    with atomic_open(out / TABLE_NAME) as file:
        file.write(text)
