"""The signals that end a command: SIGINT, SIGTERM and SIGHUP."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType


class Terminated(BaseException):
    """A signal ends the run. An exception, so that context managers clean up; one that typer does
    not catch.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum


# Seconds for the clean-up, before another signal ends the process at once.
_CLEAN_UP = 5.0


class EndingSignals:
    """Raises `Terminated` at the first signal, and ends the process at a later one."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came = 0.0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._came = signum, time.monotonic()
            raise Terminated(signum)
        # a second Ctrl-C right after the first does not interrupt the clean-up
        if time.monotonic() - self._came > _CLEAN_UP:
            os._exit(128 + signum)


def ended_by(signum: int) -> tuple[int, str]:
    """The exit code and the message of a run that a signal ended."""
    return 128 + signum, f"ended by {signal.Signals(signum).name}; nothing was left behind"
