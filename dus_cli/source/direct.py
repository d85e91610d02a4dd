"""Files read past the page cache, where the file system allows: what is read once need not push
out what others use.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

from dus_cli.source.reading import open_descriptor

# What direct I/O asks of addresses, positions and lengths. Devices of larger sectors refuse, and
# are read otherwise.
_BLOCK = 4096


class DirectFile:
    """A file that is open for reading, for one thread."""

    def __init__(self, path: Path, room: memoryview) -> None:
        """Open it. `room` is page-aligned (`aligned_room`), and takes what is read.

        Raises:
            OSError: it cannot be opened, or is no regular file.
        """
        self._room = room
        self._buffered = open_descriptor(path, os.O_RDONLY)
        self._direct: int | None = None
        # tmpfs, some network file systems, macOS
        with contextlib.suppress(OSError, AttributeError):
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> memoryview:
        """Bytes from `start` on, fewer where the file ends before. They are valid until the next
        call.

        Raises:
            OSError: they cannot be read.
        """
        first = start - start % _BLOCK
        wanted = self._room[: -(-(start + length - first) // _BLOCK) * _BLOCK]
        filled = 0
        while filled < len(wanted):
            file = self._buffered if self._direct is None or filled % _BLOCK else self._direct
            try:
                count = os.preadv(file, [wanted[filled:]], first + filled)
            except OSError as error:
                if file == self._buffered or error.errno != errno.EINVAL:
                    raise
                self.close_direct()  # opened, but not for blocks of this size
                continue
            if count == 0:
                break
            filled += count
        return wanted[start - first : max(start - first, min(filled, start + length - first))]

    def close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def close(self) -> None:
        self.close_direct()
        os.close(self._buffered)


def aligned_room(num_bytes: int) -> memoryview:
    """Room for any `num_bytes` of a file, with the blocks at both ends that are only partly
    wanted.
    """
    return memoryview(mmap.mmap(-1, -(-num_bytes // _BLOCK) * _BLOCK + _BLOCK))
