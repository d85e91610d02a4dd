"""Which process holds a lock, for messages: flock(2) itself says only that one does. A lock ends
with its process, however that ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from dus_cli.errors import shown


def this_process() -> str:
    """The current process in words, for a lock file: its id, its host and its start time."""
    return _described(os.getpid())


def holder(descriptor: int) -> str:
    """The process that holds the flock of an open file or folder, in words.

    If /proc/locks does not list it, the holder is on another machine or in another container.
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    pids: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            # proc_locks(5): number, FLOCK, ADVISORY, WRITE, pid, major:minor:inode, …
            fields = line.split()
            place, _, inode = fields[5].rpartition(":")
            if fields[1] == "FLOCK" and inode == str(status.st_ino):
                pids[place] = int(fields[4])
    # On some file systems stat(2) gives another device than /proc/locks; then the only lock on this
    # inode number is taken.
    pid = pids.get(device, next(iter(pids.values())) if len(pids) == 1 else 0)
    return _described(pid) if pid > 0 else "on another machine, or in another container"


def _described(pid: int) -> str:
    since = _started(pid)
    return f"process {pid} on {shown(socket.gethostname())}" + (
        "" if since is None else f", since {since}"
    )


def _started(pid: int) -> str | None:
    """When a process started, in local time; None if /proc does not say."""
    with contextlib.suppress(OSError, ValueError, IndexError, StopIteration):
        ticks = (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()[19]
        )
        boot = next(
            line
            for line in Path("/proc/stat").read_text(encoding="ascii").splitlines()
            if "btime" in line
        )
        began = int(boot.split()[1]) + int(ticks) / os.sysconf("SC_CLK_TCK")
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
    return None
