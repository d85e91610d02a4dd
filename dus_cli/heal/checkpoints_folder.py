"""The folder of a run's checkpoints, for those who have no team: which are complete, and who is using them."""

from __future__ import annotations

import fcntl
import os
import re
from pathlib import Path

from dus_cli.errors import HealError, shown


def name(step: int) -> str:
    """A checkpoint's folder."""
    return f"step-{step:08}"


def complete(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    if not folder.is_dir():
        return []
    matches = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def newest(folder: Path) -> int | None:
    """The step of the newest complete checkpoint."""
    steps = complete(folder)
    return steps[-1] if steps else None


def lock(folder: Path) -> int:
    """Take the folder for this process; the file descriptor that holds the lock until it is closed.

    Raises:
        HealError: another run has it.
    """
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise HealError(f"another run is healing into {shown(folder.parent)} at this moment; wait for it") from None
    except OSError:
        pass  # no locks on this file system
    return file


def is_locked(folder: Path) -> bool:
    """Whether a run is using these checkpoints at this moment."""
    if not folder.is_dir():
        return False
    try:
        os.close(lock(folder))
    except HealError:
        return True
    return False
