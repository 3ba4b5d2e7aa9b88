"""The processes that train a run together, as each of them sees them; without ``torchrun`` there is one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

import torch

from ikem_fast.engine.config import Config, resolve_device

if TYPE_CHECKING:
    from ikem_fast.engine.distributed import SharedSteps

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another process of the run ended, or the processes do not fit together; the message names the rank."""


@dataclass(frozen=True)
class World:
    """A run's processes. This class is a single one; ``ikem_fast.engine.distributed`` has the one for several.

    All ranks call the methods in the same order, but for ``show_error``.

    Attributes:
        rank: number of this process.
        size: number of processes.
        local_size: number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_size: int = 1
    # How often ranks agree on whether to stop.
    steps_between_agreements: ClassVar[int] = 1

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the run folder and shows progress."""
        return self.rank == 0

    def device(self, config: Config) -> torch.device:
        """The device of this process. Raises ConfigError for one that is not there."""
        return resolve_device(config)

    def from_writer(self, make: Callable[[], Result]) -> Result:
        """What ``make`` gives on the writer, on every rank; also what it raises."""
        return make()

    def on_writer(self, work: Callable[[], Result]) -> Result | None:
        """The result of ``work`` on the writer, None elsewhere; what it raises on every rank."""
        return work()

    def gather(self, value: Result) -> list[Result] | None:
        """The values of all ranks in order on the writer, None elsewhere."""
        return [value]

    def gather_all(self, value: Result) -> list[Result]:
        """The values of all ranks in order, on every rank."""
        return [value]

    def agree(self, number: int | None) -> int | None:
        """The largest number that any rank gives; None if no rank gives one."""
        return number

    def share_steps(self, device: torch.device, config: Config) -> SharedSteps | None:
        """What it takes to train by steps that ranks take together; None for a single process."""
        return None

    def when_another_ends(self, describe: Callable[[], str]) -> None:
        """Gives what to add to the message with which this process ends if another one does before its time."""

    def show(self, text: str) -> None:
        """Writes a line that all ranks agree on to stderr."""
        print(text, file=sys.stderr, flush=True)

    def show_error(self, error: BaseException, text: str) -> None:
        """Writes an error to stderr: with its rank, if there are several, and once if all have the same."""
        print(f"error: {text}", file=sys.stderr, flush=True)


ALONE = World()


def several_processes() -> bool:
    """Whether ``torchrun``, or whoever set the same variables, started more than one process."""
    return os.environ.get("WORLD_SIZE", "1").strip() not in ("", "1")


def is_restart() -> bool:
    """Whether ``torchrun`` starts this process again, in place of one that ended before its time."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0").strip() not in ("", "0")


@contextmanager
def joined() -> Iterator[World]:
    """The run's processes, connected for the time of the block; within another such block, as they are there.

    Leaving the block by an exception ends the others, too: each with a ``RankError`` wherever it is.

    Raises:
        RankError: another process ended before its time, or cannot be reached.
    """
    if not several_processes():
        yield ALONE
        return
    from ikem_fast.engine import distributed

    with distributed.joined() as world:
        yield world


def refuse_several(command: str) -> None:
    """Ends a command that runs on one process under ``torchrun`` with more, and says why once."""
    if several_processes():
        if os.environ.get("RANK", "0") != "0":
            raise SystemExit(2)
        size = os.environ["WORLD_SIZE"]
        raise RankError(f"{command} runs on one process, got WORLD_SIZE={size}: start it without torchrun")
