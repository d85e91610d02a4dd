"""What a file system can do, tried before gigabytes are written.

Mounted object stores lack operations that a disk has, each of them others: docs/storage.md has the
table and its sources.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dus_cli.errors import OutputError, shown

# Errors of fsync(2) on a file system that does not have it. Any other error is a failure of the
# disk or the store.
_CANNOT_SYNC = frozenset([errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP])

# Errors after which nothing can be written at all, in any order.
_UNWRITABLE = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])

# Object stores by the names of their mounts. They refuse to rename a folder, or rename it object by
# object, which can take as long as writing it again, with half of it under each name meanwhile.
_STORES = frozenset(["s3fs", "gcsfuse", "goofys", "rclone", "blobfuse2", "mountpoint-s3"])

# Length of the file that `_writes_anywhere` tries, in bytes.
_TRIAL_BYTES = 8192


class Mount(NamedTuple):
    """The type and the source of a mount, such as "ext4" and "/dev/sda1"."""

    kind: str
    source: str

    @property
    def is_fuse(self) -> bool:
        return self.kind == "fuse" or self.kind.startswith("fuse.")

    @property
    def store(self) -> str | None:
        """The name of the object store, or None if this is not a known one.

        It is part of the mount's type, or the source if the type is only "fuse".
        """
        name = self.source if self.kind == "fuse" else self.kind.removeprefix("fuse.")
        return name if self.is_fuse and name in _STORES else None


def mount_of(device: int) -> Mount | None:
    """The mount whose files have this `st_dev` (proc_pid_mountinfo(5)); None if not listed."""
    number = f"{os.major(device)}:{os.minor(device)}"
    with (
        contextlib.suppress(OSError, ValueError, IndexError),
        open("/proc/self/mountinfo", encoding="utf-8") as lines,
    ):
        for line in lines:
            if f" {number} " in line:
                fields = line.split()
                after = fields.index("-")
                if fields[2] == number:
                    return Mount(fields[after + 1], fields[after + 2])
    return None


def is_mount_point(folder: Path) -> bool:
    """Whether something is mounted at a folder, even another folder of the same file system
    (mount --bind).
    """
    if os.path.ismount(folder):
        return True
    # mountinfo writes the spaces and backslashes of a path in octal (proc_pid_mountinfo(5)).
    name = re.sub(
        rb"[ \t\n\\]", lambda match: b"\\%03o" % ord(match[0]), os.fsencode(folder.resolve())
    )
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as lines:
        return any(line.split()[4] == name for line in lines)
    return False


@dataclass(frozen=True)
class Storage:
    """What a file system can do.

    Attributes:
        no_rename: why a folder cannot be renamed in one step; None if it can.
        writes_anywhere: a file can be lengthened first and written in any order. False if a folder
            cannot be renamed: files are objects there, uploaded while they are written.
    """

    no_rename: str | None = None
    writes_anywhere: bool = True


def known(folder: Path) -> Storage | None:
    """What a folder's file system can do, without trying: known for mounted object stores, else
    None.
    """
    mount = mount_of(folder.stat().st_dev)
    if mount is None or mount.store is None:
        return None
    return Storage(f"{mount.store} cannot rename a folder in one step", writes_anywhere=False)


def try_storage(folder: Path) -> Storage:
    """Try what writing an output takes, in a folder below this one that is removed afterwards.

    The folder that is renamed holds a file, because goofys renames empty folders only.

    Raises:
        OutputError: nothing can be written or removed there.
    """
    probe, renamed = folder / "probe", folder / "renamed"
    storage = known(folder) or Storage(writes_anywhere=True)
    if probe.exists():  # an earlier run could not remove it
        raise not_removed(probe, errno.EPERM)
    try:
        probe.mkdir()
        with (probe / "in-order").open("xb") as file:
            file.write(b"x")
        if storage.no_rename is None:
            storage = Storage(writes_anywhere=_writes_anywhere(probe / "anywhere"))
            try:
                probe.rename(renamed)
            except OSError as error:
                storage = Storage(
                    f"folders cannot be renamed there ({error.strerror})", writes_anywhere=False
                )
    except OSError as error:
        raise OutputError(
            f"{shown(folder.parent)} cannot be written to ({error.strerror or error}); choose "
            "another place for -o"
        ) from error
    finally:
        codes = [code for code in map(_remove_probe, (probe, renamed)) if code is not None]
    if codes:
        raise not_removed(probe, codes[0])
    return storage


def not_removed(path: Path, code: int) -> OutputError:
    """The error if what dus wrote cannot be removed again. `code` is the system's errno."""
    return OutputError(
        f"{shown(path)} cannot be removed ({os.strerror(code)}), and a run that fails must take "
        "away what it wrote; mount the store with deletion allowed (mount-s3 --allow-delete), or "
        "write to a disk and copy"
    )


def _writes_anywhere(path: Path) -> bool:
    """Whether a file can be lengthened and then written in the middle."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(file, _TRIAL_BYTES)
            os.pwrite(file, b"x", _TRIAL_BYTES // 2)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in _UNWRITABLE:
            raise
        return False
    return True


def _remove_probe(folder: Path) -> int | None:
    """Remove a folder that dus made; return the errno if that fails.

    In some object stores a folder vanishes with its last file.
    """
    try:
        for path in folder.iterdir() if folder.exists() else ():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            folder.rmdir()
    except OSError as error:
        return error.errno or errno.EIO
    return None


def remove(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as possible.

    shutil.rmtree stops if a folder's inode number changes, and gcsfuse may report two. Then a plain
    walk removes the rest; it follows no links either.
    """
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    shutil.rmtree(path, ignore_errors=True)
    for root, folders, files in os.walk(path, topdown=False):
        for name in files:
            with contextlib.suppress(OSError):
                Path(root, name).unlink()
        for name in folders:
            with contextlib.suppress(OSError):
                Path(root, name).rmdir()
    with contextlib.suppress(OSError):
        path.rmdir()


def sync(file: int) -> None:
    """fsync(2), if the file system has it.

    Raises:
        OSError: the disk or the store failed.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_refusal(folder: Path) -> str | None:
    """Try to sync a file below this folder, and remove it; return why that fails, or None."""
    path = folder / "synced"
    try:
        with path.open("xb") as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.strerror or str(error)
    finally:
        path.unlink(missing_ok=True)
    return None


def free_bytes(folder: Path) -> int | None:
    """Bytes that an ordinary user may still write to a folder's file system; None if not known."""
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize if status.f_blocks else None
