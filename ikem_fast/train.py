"""``python -m ikem_fast.train``: pretrain, distill, evaluate, demo, and the configurations they run with."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ikem_fast.command_line import report_errors
from ikem_fast.evaluation.commands import add_evaluate_parser

if TYPE_CHECKING:
    from ikem_fast.engine.world import World


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; a mistake of the user is one line on stderr and exit status 2."""
    parser = _build_parser()
    # key=value settings may stand anywhere among the options, which argparse alone does not allow.
    arguments, rest = parser.parse_known_args(argv)
    strangers = [text for text in rest if text.startswith("-") or "=" not in text]
    if strangers or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strangers or rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    from ikem_fast.engine import world as processes

    world = processes.ALONE

    def command() -> int:
        nonlocal world
        if not getattr(arguments, "on_several_processes", False):
            processes.refuse_several(arguments.command)
            return arguments.run_command(arguments)
        with processes.joined() as world:
            return arguments.run_command(arguments, world)

    return report_errors(command, lambda text: world.show(text), lambda error, text: world.show_error(error, text))


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ikem_fast.train",
        description="Self-supervised learning of human actions from skeletons: pretrain, distill, evaluate.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain encoders of several modalities",
        description="Pretrain encoders on the training split of a prepared folder. A RUN that was interrupted goes on "
        "where its last checkpoint left it when the same command is given again.",
    )
    pretrain.add_argument("--data", required=True, type=Path, metavar="DIR", help="prepared data set")
    _add_training_arguments(pretrain, "the run's own if RUN holds one, else ntu60-xsub, the published recipe")
    pretrain.set_defaults(run_command=_pretrain, on_several_processes=True)

    distill = commands.add_parser(
        "distill",
        help="distil a pretrained run into a student of fewer modalities",
        description="Train students of fewer modalities under the frozen encoders of a pretraining run.",
    )
    distill.add_argument("--teacher", required=True, type=Path, metavar="RUN", help="folder of the pretraining run")
    distill.add_argument("--data", type=Path, metavar="DIR", help="prepared data set (default: the teacher's)")
    _add_training_arguments(distill, "the run's own if RUN holds one, else the teacher's")
    distill.set_defaults(run_command=_distill, on_several_processes=True)

    add_evaluate_parser(commands)
    _add_demo_parser(commands)

    config = commands.add_parser(
        "config",
        help="print a configuration",
        description="Print the configuration that a preset or file and settings amount to.",
    )
    config.add_argument("--config", metavar="NAME|FILE", help="preset or YAML file (default: ntu60-xsub)")
    config.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as pretrain.epochs=100")
    config.set_defaults(run_command=_print_config)

    presets = commands.add_parser("presets", help="list the presets", description="List the presets and what for.")
    presets.set_defaults(run_command=_list_presets)
    return parser


def _add_demo_parser(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="everything once on made-up recordings, on the CPU, in a few minutes",
        description="Write synthetic recordings, prepare them, pretrain, distil and evaluate, and end with a table and "
        "a report page.",
    )
    demo.add_argument("--out", type=Path, default=Path("ikem_fast_demo"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--seed", type=int, default=0, help="of recordings, weights and orders (default: %(default)s)")
    demo.add_argument("--keep", action="store_true", help="keep the text recordings too")
    demo.add_argument("--quiet", action="store_true", help="no progress bars")
    demo.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the demo's preset")
    demo.set_defaults(run_command=_run_demo)


def _add_training_arguments(parser: argparse.ArgumentParser, default_config: str) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="RUN", help="folder of the run, made if need be")
    parser.add_argument("--config", metavar="NAME|FILE", help=f"preset or YAML file (default: {default_config})")
    parser.add_argument("--restart", action="store_true", help="delete the run that RUN holds and start over")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as batch_size=64")


def _pretrain(arguments: argparse.Namespace, world: World) -> int:
    from ikem_fast import engine

    config = world.from_writer(lambda: engine.load_config(_config_source(arguments), arguments.overrides, "pretrain"))
    engine.pretrain(arguments.data, arguments.out, config, restart=arguments.restart, progress=not arguments.quiet)
    return _report_end(arguments.out, world)


def _distill(arguments: argparse.Namespace, world: World) -> int:
    from ikem_fast import engine

    def load_config() -> engine.Config:
        source = _config_source(arguments)
        if source is None:
            source = engine.checkpoints.load_of_run(arguments.teacher)["config"]
        return engine.load_config(source, arguments.overrides, "distill")

    config = world.from_writer(load_config)
    engine.distill(
        arguments.data,
        arguments.teacher,
        arguments.out,
        config,
        restart=arguments.restart,
        progress=not arguments.quiet,
    )
    return _report_end(arguments.out, world)


def _run_demo(arguments: argparse.Namespace) -> int:
    from ikem_fast.demo import run_demo

    run_demo(
        arguments.out,
        seed=arguments.seed,
        keep=arguments.keep,
        overrides=arguments.overrides,
        progress=not arguments.quiet,
    )
    return 0


def _config_source(arguments: argparse.Namespace) -> Any:
    """What ``--config`` names; without it the configuration of the run that is to be continued, if there is one."""
    from ikem_fast.engine import checkpoints
    from ikem_fast.engine.world import is_restart

    last = arguments.out / checkpoints.FOLDER / checkpoints.LAST
    if arguments.config is None and last.is_file() and (not arguments.restart or is_restart()):
        return checkpoints.load(last)["config"]
    return arguments.config


def _report_end(run: Path, world: World) -> int:
    from ikem_fast.engine import checkpoints

    last = run / checkpoints.FOLDER / checkpoints.LAST
    described = world.on_writer(lambda: checkpoints.describe(last, checkpoints.load(last)))
    if world.is_writer:
        print(f"done: {described}")
    return 0


def _print_config(arguments: argparse.Namespace) -> int:
    from ikem_fast.engine import config

    print(config.to_yaml(config.load_config(arguments.config, arguments.overrides)), end="")
    return 0


def _list_presets(_arguments: argparse.Namespace) -> int:
    from ikem_fast.engine import config

    for name in config.preset_names():
        print(f"{name:12}  {config.preset_title(name)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
