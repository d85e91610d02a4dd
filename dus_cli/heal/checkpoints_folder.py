"""The folder of a run's checkpoints: which are complete, and which process holds its lock."""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Sequence
from pathlib import Path

from dus_cli.common.locks import holder
from dus_cli.errors import HealError, shown


def name(step: int) -> str:
    """The name of a checkpoint's folder."""
    return f"step-{step:08}"


def complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def averaged(steps: Sequence[int], count: int, every: int) -> list[int]:
    """The steps of the `count` checkpoints to average: the last, and before it those saved every
    `every` steps, without those saved on a signal.

    >>> averaged([4, 8, 9, 12, 14], count=3, every=4)
    [8, 12, 14]
    """
    return [*(step for step in steps[:-1] if step % every == 0), *steps[-1:]][-count:]


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint; None if there is none."""
    steps = complete(folder)
    return steps[-1] if steps else None


def disk_failure(folder: Path, reason: str, sizes: str = "") -> str:
    """The message for a failure of a run's disk. `folder` has the checkpoints; `sizes` says how
    much space was needed.
    """
    step = newest(folder)
    kept = (
        "no checkpoint is saved yet, and the same command starts again"
        if step is None
        else f"the checkpoint of step {step} is whole, and the same command goes on from there"
    )
    return f"{reason}, in {shown(folder.parent)}{sizes}: {kept} once the disk has room or is mended"


def lock(folder: Path) -> int:
    """Lock the folder; returns the file descriptor that holds the lock until it is closed.

    Raises:
        HealError: another run holds the lock.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        who = holder(file)
        os.close(file)
        raise HealError(
            f"another run is healing into {shown(folder.parent)} at this moment ({who}); wait for "
            "it, or stop it"
        ) from None
    except OSError:
        pass  # this file system has no locks
    return file


def check_unlocked(folder: Path) -> None:
    """Check that no run holds the folder's lock.

    Raises:
        HealError: one does.
    """
    if folder.is_dir():
        os.close(lock(folder))
