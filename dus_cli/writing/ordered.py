"""Write a file from its first byte to its last, and compute its SHA-256 meanwhile."""

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

# Bytes of a buffer: larger ones were not faster, and each open file has two.
_BUFFER = 1 << 20


class OrderedFile:
    """A new file, open for writing until the context ends. A second thread hashes what is written.

    Two buffers alternate: one is filled and written while the other is hashed.
    """

    def __init__(self, path: Path, *, direct: bool) -> None:
        """Create the file. If `direct` is set and the file system allows, it is written with direct
        I/O.

        Raises:
            OSError: it exists, or cannot be created.
        """
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        self._file = os.open(path, flags, 0o666)
        self._direct: int | None = None
        if direct:
            # fails on tmpfs, on some network file systems and on macOS
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
        os.close(self._file)  # errors are raised: a store may report a failed write only here

    def write(self, piece: bytes | memoryview) -> None:
        """Add bytes to the file's end.

        Raises:
            OSError: the disk is full, or failed.
        """
        num_taken = 0
        while num_taken < len(piece):
            size = min(len(piece) - num_taken, _BUFFER - self._filled)
            self._buffers[0][self._filled : self._filled + size] = piece[
                num_taken : num_taken + size
            ]
            self._filled += size
            num_taken += size
            if self._filled == _BUFFER:
                self._flush()

    def finish(self) -> str:
        """Flush the file to the disk; return its SHA-256, hexadecimal.

        Raises:
            OSError: as `write`.
        """
        self._flush()
        if self._summed is not None:
            self._summed.result()
        sync(self._file)
        return self._digest.hexdigest()

    def _flush(self) -> None:
        buffered = self._buffers[0][: self._filled]
        before, self._summed = self._summed, self._summer.submit(self._digest.update, buffered)
        num_written = 0
        while num_written < len(buffered):
            # Direct I/O writes whole blocks; the end of the file is not one.
            size = (len(buffered) - num_written) // BLOCK * BLOCK
            file, part = self._file, buffered[num_written:]
            if (
                self._direct is not None
                and size > 0
                and (self._position + num_written) % BLOCK == 0
            ):
                file, part = self._direct, buffered[num_written : num_written + size]
            try:
                num_written += os.pwrite(file, part, self._position + num_written)
            except OSError as error:
                if file == self._file or error.errno != errno.EINVAL:
                    raise
                os.close(file)  # it could be opened, but refuses blocks of this size
                self._direct = None
        self._position += len(buffered)
        self._filled = 0
        if before is not None:
            before.result()  # the other buffer is free now
        self._buffers.reverse()
