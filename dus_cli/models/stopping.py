"""How a worker stops on a signal: at once while there is nothing to save, else together with its
team, after a checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dus_cli.models.team import Team

# Seconds after a signal within which a worker must reach a point where its team can stop.
# Kubernetes and Slurm kill after 30, in which the checkpoint must be written too.
_GRACE = 8.0
_POLL = 0.1

# Seconds within which signals count as one. A launcher that is killed sends SIGTERM more than once:
# the kernel does so as each of its threads ends, and torchrun forwards the signal that it got.
_SAME = 2.0

# FLOPs between two checks of a team: some tenths of a second of work; a check takes less than a
# millisecond.
_WORK = {"cpu": 2e10}
_WORK_ELSEWHERE = 1e14

# Calls of `passed` between two checks, at most: small layers take more time than their FLOPs say.
_PASSES = 100

_HANDLED = (signal.SIGTERM, signal.SIGINT)

_PR_SET_PDEATHSIG = 1


class StopRequested(BaseException):
    """A worker of the team got a signal. All workers raise this at the same point."""


class Signals:
    """SIGTERM and SIGINT of this process, received by a thread, so that they work while a library
    call runs for long.

    The first signal ends the process at once unless `cooperate` was called; then the work must
    reach a `Brake` within a few seconds. A second signal, at least two seconds later, always ends
    the process.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._cooperates = self._is_extended = False
        self._receiver, sender = os.pipe()
        os.set_blocking(sender, False)
        for signum in _HANDLED:
            # Python's handlers wait until a library call returns; the thread does not
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_reset_signals)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def is_received(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as in a shell; 0 under torchrun, which would otherwise restart the
        worker.
        """
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + (self.signum or signal.SIGTERM)

    def cooperate(self) -> None:
        """From now on there is something to save: stop at a `Brake` instead of at once."""
        self._cooperates = True

    @contextmanager
    def grace_extended(self) -> Iterator[None]:
        """A context in which the time to reach a brake does not run: a checkpoint is being written,
        or the work ends soon. Contexts may be nested.
        """
        before, self._is_extended = self._is_extended, True
        try:
            yield
        finally:
            self._is_extended = before

    def _listen(self) -> None:
        self.signum = os.read(self._receiver, 1)[0]
        received = time.monotonic()
        deadline = received + _GRACE
        while self._cooperates and time.monotonic() < deadline:
            if select.select([self._receiver], [], [], _POLL)[0]:
                os.read(self._receiver, 1)
                if time.monotonic() > received + _SAME:
                    break
            if self._is_extended:
                deadline = time.monotonic() + _GRACE
        # not sys.exit: cleaning up would wait long for a lost worker in a collective
        os._exit(self.exit_code)


def _reset_signals() -> None:
    """Restore the default handlers in a process that a library forks: its signals must not be
    written to the pipe that it shares with this one.
    """
    signal.set_wakeup_fd(-1)
    for signum in _HANDLED:
        signal.signal(signum, signal.SIG_DFL)


class Brake:
    """The points at which a team may stop: all of its workers at the same point, or none."""

    def __init__(self, team: Team, stop_requested: Callable[[], bool]) -> None:
        self._team, self._stop_requested = team, stop_requested
        self._between = 0.0 if team.size == 1 else _WORK.get(team.device.type, _WORK_ELSEWHERE)
        self._work = 0.0

    def passed(self, flops: float) -> None:
        """Count work that every worker does in the same order, and check after enough of it.

        Raises:
            StopRequested: a worker got a signal.
        """
        self._work += max(flops, self._between / _PASSES)
        if self._work >= self._between:
            self.check()

    def check(self) -> None:
        """Check the whole team now. Every worker must call this at the same point.

        Raises:
            StopRequested: a worker got a signal.
        """
        self._work = 0.0
        if self._team.any(self._stop_requested()):
            raise StopRequested

    def check_if_alone(self) -> None:
        """Check if the team is this worker only, at a point that other workers may not reach.

        Raises:
            StopRequested: it got a signal.
        """
        if self._team.size == 1:
            self.check()


def end_with_torchrun() -> None:
    """Have the kernel send SIGTERM to this worker when torchrun dies, because workers, in sessions
    of their own, outlive a kill -9 of torchrun.

    Only under torchrun: the kernel watches the thread that started this process, and torchrun
    starts workers from its main thread.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # torchrun died before prctl
        os.kill(os.getpid(), signal.SIGTERM)
