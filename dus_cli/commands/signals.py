"""Signals that end a command."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType


class Terminated(BaseException):
    """A signal that ends the run. It unwinds, so that context managers clean up; typer does not
    know it.
    """

    def __init__(self, signum: int) -> None:
        self.signum = signum


# Seconds that a clean-up has before another signal ends the process in the middle of it.
_CLEAN_UP = 5.0


class EndingSignals:
    """The signals that end a run: the first unwinds it, another one ends what does not unwind."""

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
        # an impatient Ctrl-C does not interrupt the clean-up
        if time.monotonic() - self._came > _CLEAN_UP:
            os._exit(128 + signum)


def ended_by(signum: int) -> tuple[int, str]:
    return 128 + signum, f"ended by {signal.Signals(signum).name}; nothing was left behind"
