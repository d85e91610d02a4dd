"""Read files with direct I/O if the file system allows: data that is read only once should not
evict other data from the page cache.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path

from dus_cli.source.reading import open_descriptor

# Direct I/O needs addresses, positions and lengths that are multiples of this. A device with larger
# sectors refuses, and is read through the page cache.
_BLOCK = 4096


class DirectFile:
    """A file that is open for reading, for one thread."""

    def __init__(self, path: Path, room: memoryview) -> None:
        """Open the file. `room` is the page-aligned buffer (`aligned_room`) that reads go into.

        Raises:
            OSError: it cannot be opened, or is not a regular file.
        """
        self._room = room
        self._buffered = open_descriptor(path, os.O_RDONLY)
        self._direct: int | None = None
        # tmpfs, some network file systems, macOS
        with contextlib.suppress(OSError, AttributeError):
            self._direct = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def read(self, start: int, length: int) -> memoryview:
        """`length` bytes from `start`, fewer at the file's end. They are valid until the next call.

        Raises:
            OSError: they cannot be read.
        """
        first = start - start % _BLOCK
        blocks = self._room[: -(-(start + length - first) // _BLOCK) * _BLOCK]
        filled = 0
        while filled < len(blocks):
            file = self._buffered if self._direct is None or filled % _BLOCK else self._direct
            try:
                count = os.preadv(file, [blocks[filled:]], first + filled)
            except OSError as error:
                if file == self._buffered or error.errno != errno.EINVAL:
                    raise
                self.close_direct()  # it could be opened, but refuses blocks of this size
                continue
            if count == 0:
                break
            filled += count
        return blocks[start - first : max(start - first, min(filled, start + length - first))]

    def close_direct(self) -> None:
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None

    def close(self) -> None:
        self.close_direct()
        os.close(self._buffered)


def aligned_room(num_bytes: int) -> memoryview:
    """A page-aligned buffer for any `num_bytes` of a file, with the rest of the blocks at both
    ends.
    """
    return memoryview(mmap.mmap(-1, -(-num_bytes // _BLOCK) * _BLOCK + _BLOCK))
