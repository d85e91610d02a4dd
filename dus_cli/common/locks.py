"""Who holds a lock: flock(2) itself tells only that somebody does. It ends with its process,
however that ends.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

from dus_cli.errors import shown


def this_process() -> str:
    """What whoever finds a lock of this process is to read: its number, its host, and since
    when.
    """
    return _described(os.getpid())


def holder(descriptor: int) -> str:
    """Who holds the flock of an open file or folder, in words; what to say where the system does
    not tell.
    """
    status = os.fstat(descriptor)
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}"
    found: dict[str, int] = {}
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines():
            # proc_locks(5): number, FLOCK, ADVISORY, WRITE, pid, major:minor:inode, …
            fields = line.split()
            place, _, inode = fields[5].rpartition(":")
            if fields[1] == "FLOCK" and inode == str(status.st_ino):
                found[place] = int(fields[4])
    # Some file systems tell stat(2) another device; a lock of the only file with this number is
    # meant then.
    pid = found.get(device, next(iter(found.values())) if len(found) == 1 else 0)
    return _described(pid) if pid > 0 else "on another machine, or in another container"


def _described(pid: int) -> str:
    since = _started(pid)
    return f"process {pid} on {shown(socket.gethostname())}" + (
        "" if since is None else f", since {since}"
    )


def _started(pid: int) -> str | None:
    """When a process began, by the clock of the wall; None where the system does not tell."""
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
