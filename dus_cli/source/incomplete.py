"""INCOMPLETE: the file that marks a folder in which an output is written in place, until it is
whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field
from pathlib import Path

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.reading import open_regular, unreadable

NAME = "INCOMPLETE"

_ABOUT = (
    "This folder is not whole: a run of dus writes into it. If that run has ended, the same "
    "command starts over and removes this file at its end."
)
_MAX_BYTES = 100_000


@dataclass(frozen=True)
class Owner:
    """The run that writes the output.

    Attributes:
        key: digest of what it writes.
        host: its host name.
        pid: its process id.
        started: when its process started, in clock ticks after boot, to tell it from a later
            process with the same id; "" if not known.
        token: random, to tell this run from any other.
        about: an explanation for a person who finds the file.
        files: names of the files that it writes; None if an older dus did not list them.
    """

    key: str
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    started: str = field(default_factory=lambda: _started(os.getpid()))
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    about: str = _ABOUT
    files: tuple[str, ...] | None = None

    def to_text(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    @property
    def is_of_this_host(self) -> bool:
        return self.host == socket.gethostname()

    @property
    def is_running_here(self) -> bool:
        """Whether that process runs on this host; False if its start time is not known."""
        return self.is_of_this_host and bool(self.started) and _started(self.pid) == self.started

    def __str__(self) -> str:
        return f"process {self.pid} on {shown(self.host)}"


def is_unfinished_healing(folder: Path) -> bool:
    """Whether a run of `dus heal` has started in this folder and not written its model yet."""
    return (folder / "run.json").is_file() and not (folder / "config.json").exists()


def _started(pid: int) -> str:
    """When a process started: field 22 of proc_pid_stat(5); "" if there is none, or no /proc."""
    with contextlib.suppress(OSError, IndexError):
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
    return ""


def owner(folder: Path) -> Owner | None:
    """The run that marked a folder as incomplete; None if it is not marked.

    If the mark is damaged, the owner is one with an empty `key` and `token`.

    Raises:
        CheckpointError: the mark cannot be read.
    """
    path = folder / NAME
    try:
        with open_regular(path) as file:
            raw = file.read(_MAX_BYTES)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise unreadable(str(path), error) from error
    with contextlib.suppress(ValueError, TypeError, KeyError):
        record = json.loads(raw)
        texts = {name: str(record[name]) for name in ("key", "host", "started", "token")}
        files = record.get("files")
        return Owner(
            pid=int(record["pid"]), **texts, files=None if files is None else tuple(map(str, files))
        )
    return Owner("", "an unknown host", 0, "", "")


def check_whole(folder: Path) -> None:
    """Check that no run is writing a folder, or left it half-written.

    Raises:
        CheckpointError: one is, or did.
    """
    run = owner(folder)
    if run is not None:
        raise CheckpointError(
            f"{shown(folder)} is not whole: its file {NAME} names the run that writes it, or left "
            f"it ({run}); run the same dus upscale again, which starts over, or remove the folder"
        )
