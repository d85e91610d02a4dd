"""How a worker ends when it is asked to: at once while there is nothing to keep, else as a team,
with a checkpoint.
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

# Seconds in which a worker that was asked to stop has to come to a place where its team can.
# Kubernetes and Slurm kill after 30, and what there is to keep wants to be written in them.
_GRACE = 8.0
_POLL = 0.1

# Seconds in which signals count as one. A launcher that is killed sends SIGTERM more than once: the
# kernel does so as each of its threads ends, and torchrun passes on what it got.
_SAME = 2.0

# FLOPs between two questions of a team to itself: some tenths of a second, against a fraction of a
# millisecond.
_WORK = {"cpu": 2e10}
_WORK_ELSEWHERE = 1e14

# What passes a brake between two questions, at most: in small layers the FLOPs are not what takes
# the time.
_PASSES = 100

_HEARD = (signal.SIGTERM, signal.SIGINT)

_PR_SET_PDEATHSIG = 1


class StopRequested(BaseException):
    """A signal came, to this worker or to another of its team; all of them raise it at the same
    place.
    """


class Signals:
    """SIGTERM and SIGINT of this process, heard by a thread, so also while a library is at work for
    long.

    The first one ends the process at once, unless it is `cooperating`; then the work has to come to
    a `Brake` soon. A later one ends it whatever it does, from two seconds after the first on.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._cooperates = self._is_held = False
        self._ear, mouth = os.pipe()
        os.set_blocking(mouth, False)
        for signum in _HEARD:
            # Python's handlers wait for the library, the thread does not
            signal.signal(signum, lambda *_: None)
        signal.set_wakeup_fd(mouth, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_be_deaf)
        threading.Thread(target=self._listen, daemon=True).start()

    @property
    def is_asked(self) -> bool:
        """Whether a signal came."""
        return self.signum is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as a shell has it; 0 under torchrun, which would start the worker
        again.
        """
        return 0 if "TORCHELASTIC_RUN_ID" in os.environ else 128 + (self.signum or signal.SIGTERM)

    def cooperate(self) -> None:
        """From here on there is something to keep."""
        self._cooperates = True

    @contextmanager
    def held(self) -> Iterator[None]:
        """The time to come to a brake does not run: what is under way ends soon, or is what is to
        be kept.

        One within another ends with the outer one.
        """
        before, self._is_held = self._is_held, True
        try:
            yield
        finally:
            self._is_held = before

    def _listen(self) -> None:
        self.signum = os.read(self._ear, 1)[0]
        heard = time.monotonic()
        deadline = heard + _GRACE
        while self._cooperates and time.monotonic() < deadline:
            if select.select([self._ear], [], [], _POLL)[0]:
                os.read(self._ear, 1)
                if time.monotonic() > heard + _SAME:
                    break
            if self._is_held:
                deadline = time.monotonic() + _GRACE
        # whoever waits for a lost worker in a collective would wait for long
        os._exit(self.exit_code)


def _be_deaf() -> None:
    """In a process that a library forks: what ends that one is not meant for this one, whose
    pipe it has too.
    """
    signal.set_wakeup_fd(-1)
    for signum in _HEARD:
        signal.signal(signum, signal.SIG_DFL)


class Brake:
    """Where a team stops: all of its workers at the same place, or none."""

    def __init__(self, team: Team, is_asked: Callable[[], bool]) -> None:
        self._team, self._is_asked = team, is_asked
        self._between = 0.0 if team.size == 1 else _WORK.get(team.device.type, _WORK_ELSEWHERE)
        self._work = 0.0

    def passed(self, flops: float) -> None:
        """Note work that every worker does, in the same order; after enough of it they ask each
        other.

        Raises:
            StopRequested: one of them was asked to stop.
        """
        self._work += max(flops, self._between / _PASSES)
        if self._work >= self._between:
            self.check()

    def check(self) -> None:
        """Ask the team now.

        Raises:
            StopRequested: one of them was asked to stop.
        """
        self._work = 0.0
        if self._team.any(self._is_asked()):
            raise StopRequested

    def alone(self) -> None:
        """Ask where the workers' ways differ: a team of one only.

        Raises:
            StopRequested: it was asked to stop.
        """
        if self._team.size == 1:
            self.check()


def end_with_torchrun() -> None:
    """Have the kernel send SIGTERM when torchrun is gone: its workers, in sessions of their own,
    outlive its kill -9.

    Only there: the kernel means the thread that started this process, and torchrun does so from its
    main one.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    parent = os.getppid()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it went in between
        os.kill(os.getpid(), signal.SIGTERM)
