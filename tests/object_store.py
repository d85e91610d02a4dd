"""A FUSE mount that refuses what mounted object stores refuse: a server in pure Python, in a
process of its own.

It speaks the kernel's protocol over /dev/fuse (linux/fuse.h, version 7.31) and passes everything
through to a backing directory except what its `Refusals` name. Run as a program it serves one mount
until its stdin ends, so that no mount outlives the tests. It needs root (mount(2)) and /dev/fuse,
but neither libfuse nor fusermount.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import select
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from typing_extensions import Self

# Opcodes (linux/fuse.h, enum fuse_opcode).
LOOKUP, FORGET, GETATTR, SETATTR, SYMLINK, MKDIR, UNLINK, RMDIR, RENAME, LINK = (
    1,
    2,
    3,
    4,
    6,
    9,
    10,
    11,
    12,
    13,
)
OPEN, READ, WRITE, STATFS, RELEASE, FSYNC, FLUSH, INIT, OPENDIR, READDIR, RELEASEDIR = 14, 15, 16, 17, 18, 20, 25, *(
    26, 27, 28, 29
)  # fmt: skip
FSYNCDIR, CREATE, INTERRUPT, DESTROY, BATCH_FORGET, RENAME2 = 30, 35, 36, 38, 42, 45

_ASYNC_READ, _ATOMIC_O_TRUNC, _BIG_WRITES, _MAX_PAGES = 1, 1 << 3, 1 << 5, 1 << 22
_FATTR_SIZE, _FATTR_MTIME, _FATTR_MTIME_NOW = 1 << 3, 1 << 5, 1 << 8
_MAX_WRITE = 1 << 20
_MNT_DETACH = 2

_IN_HEADER = struct.Struct("<IIQQIIIHH")
_OUT_HEADER = struct.Struct("<IiQ")
_ATTR = struct.Struct("<6Q10I")


@dataclass(frozen=True)
class Refusals:
    """What the mount refuses or does differently; by default nothing. Errors are names of errno.

    Attributes:
        kind: the mount's type; with "fuse" the source is "mountpoint-s3", as for that program.
        rename_folder: the error of renaming a folder.
        rename_full_folder: the error of renaming a folder that is not empty (goofys).
        fsync: the error of syncing files whose names end in `fsync_of`.
        sequential: a file can only be written once, from its first byte to its last, and cannot
            be read or removed before it is closed (Mountpoint for Amazon S3).
        unstable_inodes: every answer has a new inode number.
        vague_times: every other mtime lacks its fraction of a second (a list and a HEAD request).
        space: free blocks, and blocks in all.
        close: the error of close(2), by the end of a file's name, if more than `close_beyond`
            bytes of the file were written.
        read: the error of reading beyond the first bytes, by the end of a file's name.
        delay: seconds that each write takes.
        journal: a file that gets a line for each file that is written or removed.
    """

    kind: str = "fuse.other"
    rename_folder: str | None = None
    rename_full_folder: str | None = None
    unlink: str | None = None
    fsync: str | None = None
    fsync_of: str = ""
    direct: str | None = None
    sequential: bool = False
    vanishing_folders: bool = False
    unstable_inodes: bool = False
    vague_times: bool = False
    space: tuple[int, int] | None = None
    close: dict[str, str] = field(default_factory=dict)
    close_beyond: int = -1
    read: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    journal: str | None = None


class Mount:
    """A context in which `backing` is mounted at `point`.

    Raises:
        PermissionError: it cannot be mounted here; the text says why.
    """

    def __init__(self, backing: Path, point: Path, refusals: Refusals) -> None:
        self.backing, self.point = backing, point
        point.mkdir(exist_ok=True)
        backing.mkdir(exist_ok=True)
        command = [
            sys.executable,
            "-S",
            __file__,
            str(backing),
            str(point),
            json.dumps(asdict(refusals)),
        ]
        path = os.pathsep.join(sys.path)  # typing_extensions, without the wait for site
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self._process.stdout is not None
        said = self._process.stdout.readline().strip()
        if said != "ready":
            self.__exit__()
            raise PermissionError(said)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        _libc().umount2(os.fsencode(self.point), _MNT_DETACH)
        with self._process:  # closes its stdin, which ends it
            pass


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


# --- the server -----------------------------------------------------------------------------------


class RefusedError(OSError):
    def __init__(self, code: str | int) -> None:
        super().__init__(code if isinstance(code, int) else getattr(errno, code), "refused")


@dataclass
class _Open:
    """An open file of the backing directory; `written` is the offset at which the next byte must be
    written.
    """

    file: int
    node: int
    writes: bool
    written: int = 0


class Server:
    """Answers requests one at a time. It must not touch its own mount, which would wait for it."""

    def __init__(self, backing: Path, refusals: Refusals) -> None:
        self.backing, self.refusals = backing, refusals
        self.paths: dict[int, str] = {1: ""}  # node → path below the backing directory
        self.nodes: dict[str, int] = {"": 1}
        self.files: dict[int, _Open] = {}
        self.count = 1  # for nodes, handles and inode numbers: no number is used twice
        self.answers = 0

    def serve(self, device: int) -> None:
        """Serve until the mount or stdin ends."""
        while True:
            ready, _, _ = select.select([device, 0], [], [])
            if device not in ready:
                return
            try:
                request = os.read(device, _MAX_WRITE + 4096)
            except OSError as error:
                if error.errno == errno.ENODEV:  # unmounted
                    return
                # the request was interrupted
                if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                    continue
                raise
            length, opcode, unique, node, _, _, _, _, _ = _IN_HEADER.unpack_from(request)
            if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
                continue
            code, answer = 0, b""
            try:
                answer = self.answer(opcode, node, request[_IN_HEADER.size : length])
            except OSError as error:
                code = error.errno or errno.EIO
            # Gone meanwhile where the caller was killed or the mount ended.
            with contextlib.suppress(FileNotFoundError):
                os.write(
                    device, _OUT_HEADER.pack(_OUT_HEADER.size + len(answer), -code, unique) + answer
                )

    def answer(self, opcode: int, node: int, body: bytes) -> bytes:
        handlers = {
            INIT: self.init, LOOKUP: self.lookup, GETATTR: self.getattr, SETATTR: self.setattr, MKDIR: self.mkdir,
            UNLINK: self.unlink, RMDIR: self.rmdir, RENAME: self.rename, RENAME2: self.rename2, OPEN: self.open,
            CREATE: self.create, READ: self.read, WRITE: self.write, STATFS: self.statfs, FLUSH: self.flush,
            RELEASE: self.release, FSYNC: self.fsync, FSYNCDIR: self.fsync, OPENDIR: self.opendir,
            READDIR: self.readdir,
        }  # fmt: skip
        if opcode in (RELEASEDIR, DESTROY):
            return b""
        if opcode in (LINK, SYMLINK):
            raise RefusedError("EPERM")
        if opcode not in handlers:  # locks, access, extended attributes, nameless files, ranges
            raise RefusedError("ENOSYS")
        return handlers[opcode](node, body)

    def path(self, node: int) -> Path:
        if node not in self.paths:
            raise RefusedError("ENOENT")
        return self.backing / self.paths[node]

    def child(self, node: int, name: bytes) -> str:
        parent = self.paths[node]
        return f"{parent}/{os.fsdecode(name)}" if parent else os.fsdecode(name)

    def number(self) -> int:
        self.count += 1
        return self.count

    def node(self, path: str) -> int:
        if path not in self.nodes:
            self.nodes[path] = self.number()
            self.paths[self.nodes[path]] = path
        return self.nodes[path]

    def note(self, what: str, path: str) -> None:
        if self.refusals.journal:
            with open(self.refusals.journal, "a", encoding="utf-8") as journal:
                journal.write(f"{what} {path}\n")

    def forget(self, path: str) -> None:
        self.paths.pop(self.nodes.pop(path, 0), None)

    # --- what there is ----------------------------------------------------------------------------

    def init(self, _node: int, body: bytes) -> bytes:
        _, _, readahead, flags = struct.unpack_from("<4I", body)
        flags &= _ASYNC_READ | _ATOMIC_O_TRUNC | _BIG_WRITES | _MAX_PAGES
        pages = _MAX_WRITE // 4096
        return struct.pack(
            "<4I2H2I2HI7I", 7, 31, readahead, flags, 12, 9, _MAX_WRITE, 1, pages, 0, 0, *[0] * 7
        )

    def attributes(self, node: int) -> bytes:
        status = self.path(node).lstat()
        inode = self.number() + 1_000_000 if self.refusals.unstable_inodes else node
        self.answers += 1
        nanoseconds = status.st_mtime_ns
        if self.refusals.vague_times and self.answers % 2:
            nanoseconds -= nanoseconds % 10**9
        seconds, fraction = divmod(nanoseconds, 10**9)
        return _ATTR.pack(
            inode, status.st_size, -(-status.st_size // 512), seconds, seconds, seconds, fraction, fraction, fraction,
            status.st_mode, 1, os.getuid(), os.getgid(), 0, 4096, 0,
        )  # fmt: skip

    def entry(self, path: str) -> bytes:
        """fuse_entry_out, with a validity of 0, so that the kernel caches nothing."""
        (self.backing / path).lstat()
        node = self.node(path)
        return struct.pack("<4Q2I", node, 0, 0, 0, 0, 0) + self.attributes(node)

    def lookup(self, node: int, body: bytes) -> bytes:
        return self.entry(self.child(node, body.rstrip(b"\0")))

    def getattr(self, node: int, _body: bytes) -> bytes:
        return struct.pack("<Q2I", 0, 0, 0) + self.attributes(node)

    def setattr(self, node: int, body: bytes) -> bytes:
        valid, _, _, size, _, _, mtime, _, _, fraction = struct.unpack_from("<2I6Q2I", body)
        path = self.path(node)
        if valid & _FATTR_SIZE:
            if self.refusals.sequential and size:
                raise RefusedError("EPERM")
            os.truncate(path, size)
        if valid & _FATTR_MTIME:
            nanoseconds = time.time_ns() if valid & _FATTR_MTIME_NOW else mtime * 10**9 + fraction
            os.utime(path, ns=(nanoseconds, nanoseconds))
        return self.getattr(node, b"")

    def statfs(self, _node: int, _body: bytes) -> bytes:
        real = os.statvfs(self.backing)
        available, blocks = self.refusals.space or (real.f_bavail, real.f_blocks)
        return struct.pack(
            "<5Q4I6I", blocks, available, available, 0, 0, 4096, 255, 4096, 0, *[0] * 6
        )

    # --- folders ----------------------------------------------------------------------------------

    def mkdir(self, node: int, body: bytes) -> bytes:
        path = self.child(node, body[8:].rstrip(b"\0"))
        (self.backing / path).mkdir()
        return self.entry(path)

    def unlink(self, node: int, body: bytes) -> bytes:
        path = self.child(node, body.rstrip(b"\0"))
        if self.refusals.unlink:
            raise RefusedError(self.refusals.unlink)
        (self.backing / path).unlink()
        self.forget(path)
        self.note("removed", path)
        parent = self.paths[node]
        if (
            self.refusals.vanishing_folders
            and parent
            and not any((self.backing / parent).iterdir())
        ):
            (self.backing / parent).rmdir()
        return b""

    def rmdir(self, node: int, body: bytes) -> bytes:
        path = self.child(node, body.rstrip(b"\0"))
        (self.backing / path).rmdir()
        self.forget(path)
        return b""

    def rename(self, node: int, body: bytes, start: int = 8) -> bytes:
        target = struct.unpack_from("<Q", body)[0]
        old_name, new_name = body[start:].split(b"\0")[:2]
        old, new = self.child(node, old_name), self.child(target, new_name)
        if (self.backing / old).is_dir():
            if self.refusals.rename_folder:
                raise RefusedError(self.refusals.rename_folder)
            if self.refusals.rename_full_folder and any((self.backing / old).iterdir()):
                raise RefusedError(self.refusals.rename_full_folder)
        (self.backing / old).rename(self.backing / new)
        self.forget(new)
        for path in [path for path in self.nodes if path == old or path.startswith(f"{old}/")]:
            moved = self.nodes.pop(path)
            self.nodes[new + path[len(old) :]] = moved
            self.paths[moved] = new + path[len(old) :]
        return b""

    def rename2(self, node: int, body: bytes) -> bytes:
        if struct.unpack_from("<QI", body)[1]:  # exchange, no replace
            raise RefusedError("EINVAL")
        return self.rename(node, body, 16)

    def opendir(self, node: int, _body: bytes) -> bytes:
        if not self.path(node).is_dir():
            raise RefusedError("ENOTDIR")
        return struct.pack("<Q2I", 0, 0, 0)

    def readdir(self, node: int, body: bytes) -> bytes:
        _, offset, size = struct.unpack_from("<2QI", body)
        answer = b""
        for position, entry in enumerate(sorted(os.scandir(self.path(node)), key=lambda e: e.name)):
            if position < offset:
                continue
            name = os.fsencode(entry.name)
            kind = stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode) >> 12
            record = struct.pack("<2Q2I", position + 2, position + 1, len(name), kind) + name
            record += bytes(-len(record) % 8)
            if len(answer) + len(record) > size:
                break
            answer += record
        return answer

    # --- files ------------------------------------------------------------------------------------

    def _opened(self, node: int, flags: int, *, new: bool) -> bytes:
        writes = flags & os.O_ACCMODE != os.O_RDONLY
        if flags & os.O_DIRECT and self.refusals.direct:
            raise RefusedError(self.refusals.direct)
        if self.refusals.sequential:
            if any(other.writes and other.node == node for other in self.files.values()):
                raise RefusedError("EPERM")  # not there before it is closed
            if writes and not new and not flags & os.O_TRUNC:
                raise RefusedError("EPERM")
        file = os.open(
            self.path(node), flags & ~(os.O_EXCL | os.O_CREAT | os.O_DIRECT | os.O_NOFOLLOW)
        )
        handle = self.number()
        self.files[handle] = _Open(file, node, writes)
        return struct.pack("<Q2I", handle, 0, 0)

    def open(self, node: int, body: bytes) -> bytes:
        return self._opened(node, struct.unpack_from("<I", body)[0], new=False)

    def create(self, node: int, body: bytes) -> bytes:
        flags, mode, umask, _ = struct.unpack_from("<4I", body)
        path = self.child(node, body[16:].rstrip(b"\0"))
        os.close(
            os.open(
                self.backing / path, os.O_WRONLY | os.O_CREAT | flags & os.O_EXCL, mode & ~umask
            )
        )
        return self.entry(path) + self._opened(self.node(path), flags, new=True)

    def read(self, node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        for ending, code in self.refusals.read.items():
            if offset and self.paths.get(node, "").endswith(ending):
                raise RefusedError(code)
        return os.pread(self.files[handle].file, size, offset)

    def write(self, _node: int, body: bytes) -> bytes:
        handle, offset, size = struct.unpack_from("<2QI", body)
        opened = self.files[handle]
        time.sleep(self.refusals.delay)
        if self.refusals.sequential and offset != opened.written:
            raise RefusedError("EINVAL")
        written = os.pwrite(opened.file, memoryview(body)[40 : 40 + size], offset)
        opened.written = offset + written
        return struct.pack("<2I", written, 0)

    def flush(self, node: int, body: bytes) -> bytes:
        opened = self.files[struct.unpack_from("<Q", body)[0]]
        for ending, code in self.refusals.close.items():
            if (
                opened.written > self.refusals.close_beyond
                and opened.writes
                and self.paths.get(node, "").endswith(ending)
            ):
                raise RefusedError(code)
        return b""

    def release(self, node: int, body: bytes) -> bytes:
        opened = self.files.pop(struct.unpack_from("<Q", body)[0])
        os.close(opened.file)
        if opened.writes:
            self.note("written", self.paths.get(node, ""))
        return b""

    def fsync(self, node: int, _body: bytes) -> bytes:
        if self.refusals.fsync and self.paths.get(node, "").endswith(self.refusals.fsync_of):
            raise RefusedError(self.refusals.fsync)
        return b""


def _mounted(point: str, kind: str) -> int:
    """Mount at `point`; return the device to serve.

    Raises:
        OSError: no /dev/fuse, or no right to mount.
    """
    device = os.open("/dev/fuse", os.O_RDWR)
    options = f"fd={device},rootmode=40755,user_id={os.getuid()},group_id={os.getgid()},allow_other"
    name = b"mountpoint-s3" if kind == "fuse" else b"bucket"
    # 6: nosuid, nodev
    if _libc().mount(name, os.fsencode(point), kind.encode(), 6, options.encode()):
        code = ctypes.get_errno()
        raise OSError(code, f"mount(2): {os.strerror(code)}")
    return device


@contextlib.contextmanager
def _unmounted_at_the_end(point: str) -> Iterator[None]:
    try:
        yield
    finally:
        _libc().umount2(os.fsencode(point), _MNT_DETACH)


def main() -> None:
    backing, point, refusals = sys.argv[1:]
    settings = Refusals(**json.loads(refusals))
    try:
        device = _mounted(point, settings.kind)
    except OSError as error:
        print(error.strerror, flush=True)
        return
    with _unmounted_at_the_end(point):
        print("ready", flush=True)
        Server(Path(backing), settings).serve(device)


if __name__ == "__main__":
    main()
