"""Open and read regular files only, with errors that name the file.

Opening a named pipe blocks until another process writes to it, and a device has no end. So every
file of a checkpoint, and every file that a user names, is opened here.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dus_cli.common.workers import PIECE
from dus_cli.errors import CheckpointError, shown

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFDIR: "a directory",
}

_DISK_FAILURES = frozenset(
    [errno.EIO, errno.ESTALE, errno.ENXIO, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENODATA]
)


def open_regular(path: Path, buffering: int = -1) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is not a regular file; `strerror` says which.
    """
    return open(path, "rb", buffering, opener=open_descriptor)


def open_descriptor(path: str | Path, flags: int) -> int:
    """The same, but returns a file descriptor.

    Raises:
        OSError: as `open_regular`.
    """
    # checked before the open too: opening a device may have an effect
    _check_regular(Path(path).stat(), path)
    file = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        _check_regular(os.fstat(file), path)
    except BaseException:
        os.close(file)
        raise
    return file


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "something else")
        raise OSError(errno.EINVAL, f"it is {kind}, not a regular file", str(path))


def unreadable(name: str, error: OSError) -> CheckpointError:
    """The error for a file that the operating system cannot read, called `name`."""
    if error.errno in (errno.EACCES, errno.EPERM):
        advice = "; check its owner and its mode"
    elif error.errno in _DISK_FAILURES:
        advice = "; check the disk or the network mount"
    elif error.errno == errno.EINVAL:
        advice = "; put the file itself in its place"
    else:
        advice = ""
    return CheckpointError(f"cannot read {shown(name)}: {error.strerror or error}{advice}")


@contextmanager
def reading(name: str) -> Iterator[None]:
    """Turn an OSError while reading `name` into one line.

    Raises:
        CheckpointError: in place of it.
    """
    try:
        yield
    except OSError as error:
        raise unreadable(name, error) from error


def file_pieces(path: Path, name: str) -> Iterator[bytes]:
    """A file's content, piece by piece. An error says that the read failed, not the write.

    Raises:
        CheckpointError: it cannot be read.
    """
    with reading(name), open_regular(path, 0) as file:
        while piece := file.read(PIECE):
            yield piece


def read_small_file(path: Path, name: str, limit: int) -> bytes:
    """A file of at most `limit` bytes.

    Raises:
        CheckpointError: it cannot be read, is not a regular file, or is larger.
    """
    with reading(name), open_regular(path) as file:
        raw = file.read(limit + 1)
    if len(raw) > limit:
        raise CheckpointError(
            f"{name} is larger than {limit} bytes; it is damaged, or not a {name}"
        )
    return raw
