"""What a file system can do, asked of it before gigabytes are written.

Object stores that are mounted refuse what a disk does, each something else: docs/storage.md has the
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

# fsync(2) where there is nothing to sync with. Any other error is the disk's, or the store's.
_CANNOT_SYNC = frozenset([errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP])

# Then nothing can be written at all, in whatever order.
_NO_PLACE = frozenset([errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES])

# Object stores by the names of their mounts. They refuse to rename a folder, or do it object by
# object: for some that is as slow as writing it again, and it is half there for as long.
_STORES = frozenset(["s3fs", "gcsfuse", "goofys", "rclone", "blobfuse2", "mountpoint-s3"])

_TRIED = 8192


class Mount(NamedTuple):
    """The type and the source of a mount, such as "ext4" and "/dev/sda1"."""

    kind: str
    source: str

    @property
    def is_fuse(self) -> bool:
        return self.kind == "fuse" or self.kind.startswith("fuse.")

    @property
    def store(self) -> str | None:
        """The object store's name, where it is known as one: the type's, or the source's where
        that is only "fuse".
        """
        name = self.source if self.kind == "fuse" else self.kind.removeprefix("fuse.")
        return name if self.is_fuse and name in _STORES else None


def mount_of(device: int) -> Mount | None:
    """The mount whose files have this `st_dev`; None where the system does not tell
    (proc_pid_mountinfo(5)).
    """
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
    """Whether something is mounted at a folder, also another folder of the same file system
    (mount --bind).
    """
    if os.path.ismount(folder):
        return True
    # The spaces and backslashes of a path stand there in octal (proc_pid_mountinfo(5)).
    name = re.sub(
        rb"[ \t\n\\]", lambda match: b"\\%03o" % ord(match[0]), os.fsencode(folder.resolve())
    )
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", "rb") as lines:
        return any(line.split()[4] == name for line in lines)
    return False


@dataclass(frozen=True)
class Storage:
    """What a file system can do. `no_rename` says why a folder cannot be renamed in one step; None
    where it can.

    `writes_anywhere`: a file may be lengthened first and written in any order. Nobody should, where
    no folder can be renamed: files are objects there, and uploaded while they are written.
    """

    no_rename: str | None = None
    writes_anywhere: bool = True


def known(folder: Path) -> Storage | None:
    """What is known of a folder's file system without touching it: None but for a mounted object
    store.
    """
    mount = mount_of(folder.stat().st_dev)
    if mount is None or mount.store is None:
        return None
    return Storage(f"{mount.store} cannot rename a folder in one step", writes_anywhere=False)


def ask(folder: Path) -> Storage:
    """Try what writing an output takes, in a folder below this one that is gone afterwards.

    A folder with a file in it is renamed: goofys renames empty ones.

    Raises:
        OutputError: nothing can be written there, or nothing removed.
    """
    probe, renamed = folder / "probe", folder / "renamed"
    found = known(folder) or Storage(writes_anywhere=True)
    if probe.exists():  # of a run before, and it could not be removed
        raise not_removed(probe, errno.EPERM)
    try:
        probe.mkdir()
        with (probe / "in-order").open("xb") as file:
            file.write(b"x")
        if found.no_rename is None:
            found = Storage(writes_anywhere=_writes_anywhere(probe / "anywhere"))
            try:
                probe.rename(renamed)
            except OSError as error:
                found = Storage(
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
    return found


def not_removed(path: Path, code: int) -> OutputError:
    """The error where what dus wrote cannot be removed again. `code` is the system's errno."""
    return OutputError(
        f"{shown(path)} cannot be removed ({os.strerror(code)}), and a run that fails must take "
        "away what it wrote; mount the store with deletion allowed (mount-s3 --allow-delete), or "
        "write to a disk and copy"
    )


def _writes_anywhere(path: Path) -> bool:
    """Whether a file can be lengthened and then written from its middle on."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.ftruncate(file, _TRIED)
            os.pwrite(file, b"x", _TRIED // 2)
        finally:
            os.close(file)
    except OSError as error:
        if error.errno in _NO_PLACE:
            raise
        return False
    return True


def _remove_probe(folder: Path) -> int | None:
    """The error for which a folder of ours cannot be removed. Where folders vanish with their
    last file it is gone.
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
    """Remove a file or a folder with all that is in it, as far as that can be done.

    shutil.rmtree holds a folder's inode number against what it opened, and gcsfuse may tell two.
    Then a plain walk does it, which follows no links either.
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
    """fsync(2), where the file system has it.

    Raises:
        OSError: the disk or the store failed.
    """
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise


def sync_refusal(folder: Path) -> str | None:
    """Why a file below this folder cannot be synced; None where it can. The file is removed
    again.
    """
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
    """Bytes that an ordinary user may still write to this folder's file system; None where it
    does not say.
    """
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize if status.f_blocks else None
