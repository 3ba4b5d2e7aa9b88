"""SIGTERM and SIGINT during training: the step at hand is finished and a checkpoint written before the run ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")


class TrainingInterrupted(SystemExit):
    """Training stopped at a signal after writing a checkpoint; left uncaught it exits with 128 + the signal."""

    def __init__(self, signal_number: int, checkpoint: str) -> None:
        super().__init__(128 + signal_number)
        self.signal_number = signal_number
        self.checkpoint = checkpoint

    def __str__(self) -> str:
        return f"stopped by {signal.Signals(self.signal_number).name}; checkpoint written: {self.checkpoint}"


class _StopNow(BaseException):
    """Leaves ``StopRequest.unless_stopped`` at a signal."""


class StopRequest:
    """While entered, remembers the first SIGTERM or SIGINT in ``signal_number`` instead of ending the program.

    Job schedulers may send SIGTERM more than once; a second Ctrl-C however is a person who will not wait.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._at_once = False
        self._old_handlers: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the host program decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._old_handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)

    def _handle(self, signal_number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None:
            if signal_number == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self.signal_number = signal_number
        if self._at_once:
            raise _StopNow

    def unless_stopped(self, work: Callable[[], Result]) -> Result | None:
        """The result of work that changes no training state and so may be cut anywhere; None if a signal came."""
        try:
            self._at_once = True
            if self.signal_number is not None:
                return None
            result = work()
            self._at_once = False
            return result
        except _StopNow:
            return None
        finally:
            self._at_once = False
