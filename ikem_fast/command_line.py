"""How the commands end: with their result, or with one line that says what is wrong."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

_PACKAGE_FOLDER = Path(__file__).parent


def _show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def report_errors(
    command: Callable[[], int],
    show: Callable[[str], None] = _show,
    show_error: Callable[[BaseException, str], None] = lambda _error, text: _show(f"error: {text}"),
) -> int:
    """Runs a command; a mistake of the user is one line on stderr and exit status 2.

    Args:
        command: gives the exit status.
        show: writes a line, such as that training was stopped.
        show_error: writes the line of an error.
    """
    try:
        return command()
    except SystemExit as stop:
        if str(stop) != str(stop.code):
            show(str(stop))
        return stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:
        show("interrupted")
        return 130
    except Exception as error:
        if not _is_explained(error):
            raise
        show_error(error, " ".join(str(error).split()))
        return 2


def _is_explained(error: Exception) -> bool:
    """Whether the message is for users: raised by this package's own checks, or by the system about a file."""
    if type(error).__module__.startswith("ikem_fast") or isinstance(error, OSError):
        return True
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, ValueError) and _PACKAGE_FOLDER in Path(raised_in).parents
