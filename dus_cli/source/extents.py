"""Which bytes of two files are in the same blocks of the disk, by the FIEMAP ioctl.

Sources: Documentation/filesystems/fiemap.rst and include/uapi/linux/fiemap.h of Linux. Only XFS and
btrfs are supported: on them an address means the same for all files with the same device number,
except on XFS's realtime device. On other file systems that share blocks (overlayfs, bcachefs, NFS,
OCFS2) it does not, or that is not known.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import threading
from bisect import bisect_right
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dus_cli.source.reading import open_descriptor

# _IOWR('f', 11, struct fiemap) and _IOR('X', 31, struct fsxattr).
_FS_IOC_FIEMAP = 0xC020660B
_FS_IOC_FSGETXATTR = 0x801C581F

# struct fiemap: start, length, flags, mapped extents, room for extents, reserved; then struct
# fiemap_extent for each: logical, physical, length, 16 bytes reserved, flags, 12 bytes reserved.
_REQUEST = struct.Struct("=QQLLLL")
_EXTENT = struct.Struct("=QQQ16xL12x")
_EXTENTS_PER_CALL = 500

_SYNC = 1  # flush the page cache first, so that all data has blocks
_LAST = 0x1

# Flags of an extent whose bytes are in its blocks as they are: last, merged, shared. Any other flag
# means that they are not (yet) there, or in another form: unknown, delayed, compressed, encrypted,
# in the inode, in part of a block, or never written.
_PLAIN = _LAST | 0x1000 | 0x2000

_REALTIME = 1
# XFS_SUPER_MAGIC and BTRFS_SUPER_MAGIC (include/uapi/linux/magic.h).
_KINDS = frozenset([0x58465342, 0x9123683E])


class Extent(NamedTuple):
    """`length` bytes of a file from `start`, which are at `physical` on the disk."""

    start: int
    physical: int
    length: int


class FileBlocks:
    """The blocks of files, looked up once per file; safe to share between threads.

    A file that is written to afterwards may have other blocks.
    """

    def __init__(self) -> None:
        self._known: dict[Path, tuple[int, list[Extent]]] = {}
        self._lock = threading.Lock()

    def not_shared(
        self, left: Path, left_start: int, right: Path, right_start: int, length: int
    ) -> Iterator[tuple[int, int]]:
        """The parts of two ranges of `length` bytes that are not in the same blocks.

        Yields:
            (offset in the range, length), in order.
        """
        device, extents = self._extents(left)
        other_device, others = self._extents(right)
        position = 0
        if device == other_device:
            for start, end in _shared(extents, left_start, others, right_start, length):
                if start > position:
                    yield position, start - position
                position = end
        if position < length:
            yield position, length - position

    def _extents(self, path: Path) -> tuple[int, list[Extent]]:
        with self._lock:
            if path not in self._known:
                self._known[path] = _extents_of(path)
            return self._known[path]


def _shared(
    extents: list[Extent], left_start: int, others: list[Extent], right_start: int, length: int
) -> Iterator[tuple[int, int]]:
    """The parts of both ranges that have the same addresses, as (start, end) within them, in
    order.
    """
    i = max(0, bisect_right(extents, left_start, key=lambda extent: extent.start) - 1)
    j = max(0, bisect_right(others, right_start, key=lambda extent: extent.start) - 1)
    while i < len(extents) and j < len(others):
        left, right = extents[i], others[j]
        first, other = left.start - left_start, right.start - right_start
        start, end = max(first, other, 0), min(first + left.length, other + right.length, length)
        if start < end and left.physical - first == right.physical - other:
            yield start, end
        if min(first, other) >= length:
            return
        if first + left.length <= other + right.length:
            i += 1
        else:
            j += 1


def _extents_of(path: Path) -> tuple[int, list[Extent]]:
    """A file's device number, and its plain extents; none if the file system does not give them."""
    try:
        file = open_descriptor(path, os.O_RDONLY)
    except OSError:
        return 0, []  # the error is raised when the file is read
    try:
        device = os.fstat(file).st_dev
        if _kind_of(file) not in _KINDS or _is_realtime(file):
            return device, []
        return device, list(_mapped(file))
    except OSError:
        return 0, []
    finally:
        os.close(file)


def _kind_of(file: int) -> int:
    """The magic number of a file's file system: the first word of struct statfs.

    The table of mounts would not do: it lists btrfs with another device number than its files have.
    """
    status = (ctypes.c_long * 512)()  # more than any system's
    fstatfs = getattr(ctypes.CDLL(None), "fstatfs", None)
    return int(status[0]) if fstatfs is not None and fstatfs(file, status) == 0 else 0


def _is_realtime(file: int) -> bool:
    attributes = bytearray(28)  # struct fsxattr, which begins with its flags
    fcntl.ioctl(file, _FS_IOC_FSGETXATTR, attributes)
    return bool(int.from_bytes(attributes[:4], "little") & _REALTIME)


def _mapped(file: int) -> Iterator[Extent]:
    start, size = 0, os.fstat(file).st_size
    while start < size:
        request = bytearray(_REQUEST.size + _EXTENTS_PER_CALL * _EXTENT.size)
        _REQUEST.pack_into(request, 0, start, size - start, _SYNC, 0, _EXTENTS_PER_CALL, 0)
        fcntl.ioctl(file, _FS_IOC_FIEMAP, request)
        count = _REQUEST.unpack_from(request)[3]
        if count == 0:
            return
        for number in range(count):
            logical, physical, length, flags = _EXTENT.unpack_from(
                request, _REQUEST.size + number * _EXTENT.size
            )
            if not flags & ~_PLAIN:
                yield Extent(logical, physical, length)
            if flags & _LAST or logical + length <= start:
                return
            start = logical + length
