"""A file written from its first byte to its last, and summed while it is written."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.common.storage import sync
from dus_cli.planning.layout import BLOCK

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# Larger ones changed nothing, and each file that is open has two.
_BUFFER = 1 << 20


class OrderedFile:
    """A new file, open for writing until the context ends. A second thread sums what the first has
    written.

    Two buffers take turns: one is filled and written while the other is summed.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        """Make the file, to be written past the page cache if `direct` and the file system allow.

        Raises:
            OSError: it is there already, or cannot be made.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        self._direct: int | None = None
        if direct:
            # tmpfs, some network file systems, macOS
            with contextlib.suppress(OSError, AttributeError):
                self._direct = os.open(path, os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
        self._buffers = [memoryview(mmap.mmap(-1, _BUFFER)) for _ in range(2)]
        self._summed: Future[None] | None = None
        self._filled = self._position = 0
        self._digest = hashlib.sha256()
        self._summer = ThreadPoolExecutor(1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._summer.shutdown(wait=True, cancel_futures=True)
        if self._direct is not None:
            os.close(self._direct)
        os.close(self._file)  # what it says is heard: it may be a store's last word

    def write(self, piece: bytes | memoryview) -> None:
        """Add bytes to the file's end.

        Raises:
            OSError: the disk is full, or failed.
        """
        done = 0
        while done < len(piece):
            size = min(len(piece) - done, _BUFFER - self._filled)
            self._buffers[0][self._filled : self._filled + size] = piece[done : done + size]
            self._filled += size
            done += size
            if self._filled == _BUFFER:
                self._flush()

    def finish(self) -> str:
        """See all of it on the disk; returns the sha256 of the file, hexadecimal.

        Raises:
            OSError: as `write`.
        """
        self._flush()
        if self._summed is not None:
            self._summed.result()
        sync(self._file)
        return self._digest.hexdigest()

    def _flush(self) -> None:
        whole = self._buffers[0][: self._filled]
        before, self._summed = self._summed, self._summer.submit(self._digest.update, whole)
        done = 0
        while done < len(whole):
            # Whole blocks can go past the page cache; the file's end is none.
            size = (len(whole) - done) // BLOCK * BLOCK
            file, part = self._file, whole[done:]
            if self._direct is not None and size > 0 and (self._position + done) % BLOCK == 0:
                file, part = self._direct, whole[done : done + size]
            try:
                done += os.pwrite(file, part, self._position + done)
            except OSError as error:
                if file == self._file or error.errno != errno.EINVAL:
                    raise
                os.close(file)  # opened, but not for blocks of this size
                self._direct = None
        self._position += len(whole)
        self._filled = 0
        if before is not None:
            before.result()  # the other buffer is free now
        self._buffers.reverse()
