"""Stopping a run from outside: signals to end are treated like Ctrl-C, so that nothing is left behind."""

from __future__ import annotations

import os
import signal
from types import FrameType


class Terminated(KeyboardInterrupt):
    """A signal asked the process to end.

    Attributes:
        code: The exit code for the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.code = 128 + number


def stop_cleanly() -> None:
    """Let SIGTERM and SIGHUP end the run as Ctrl-C does; a signal that was ignored stays ignored."""
    own = os.getpid()

    def end(number: int, _frame: FrameType | None) -> None:
        signal.signal(number, signal.SIG_IGN if os.getpid() == own else signal.SIG_DFL)  # once is enough
        if os.getpid() != own:  # a process that a script forked ends as it would without this handler
            os.kill(os.getpid(), number)
            return
        raise Terminated(number)

    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, end)


def exit_code(error: BaseException) -> int:
    """The exit code of a stopped run: 130 on Ctrl-C, 128 plus the number of another signal."""
    for cause in (error, error.__cause__):
        if isinstance(cause, Terminated):
            return cause.code
    return 130
