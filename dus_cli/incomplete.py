"""INCOMPLETE: the file that says of a folder that an output is being written in it, in place, and is not whole."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dus_cli.errors import CheckpointError, shown

NAME = "INCOMPLETE"

_ABOUT = (
    "This folder is not whole: a run of dus writes into it. If that run has ended, the same command starts over "
    "and removes this file at its end."
)
_MAX_BYTES = 100_000


@dataclass(frozen=True)
class Owner:
    """The run that writes. `key` is a digest of what it writes, `token` tells this run from any other."""

    key: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    about: str = _ABOUT

    def to_text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def is_of_this_host(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_running_here(self) -> bool:
        """Whether a process of that number runs on this host. Ours is not it: a restarted container counts anew."""
        if not self.is_of_this_host or self.pid == os.getpid() or self.pid <= 0:
            return False
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError, ValueError):
            return False
        except PermissionError:
            return True
        return True

    def __str__(self) -> str:
        return f"process {self.pid} on {shown(self.host)}"


def owner(folder: Path) -> Owner | None:
    """Who says that this folder is incomplete; None where nobody does. A damaged file is nobody's, of no key.

    Raises:
        CheckpointError: the file is there and cannot be read.
    """
    path = folder / NAME
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{shown(path)} cannot be read: {error.strerror or error}") from error
    with contextlib.suppress(ValueError, TypeError, KeyError):
        record = json.loads(raw)
        return Owner(str(record["key"]), str(record["host"]), int(record["pid"]), str(record["token"]))
    return Owner("", "an unknown host", 0, "")


def check_whole(folder: Path) -> None:
    """Hold that a folder is not one that a run writes into, or left half-written.

    Raises:
        CheckpointError: it is.
    """
    found = owner(folder)
    if found is not None:
        raise CheckpointError(
            f"{shown(folder)} is not whole: its file {NAME} names the run that writes it, or left it ({found}); run "
            "the same dus upscale again, which starts over, or remove the folder"
        )
