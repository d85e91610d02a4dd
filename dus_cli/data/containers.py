"""Files as streams of bytes, decompressed by their suffix, in memory that does not grow with the
file.

`.gz`, `.zst`, `.xz` and `.bz2`, also with several members in a row. A truncated file is an error,
not the end of the text.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from dus_cli.common.libraries import require
from dus_cli.data.remote import StoreFile

BUFFER = 1 << 20

# The first bytes of a compressed file, by suffix.
_MAGIC = {".gz": b"\x1f\x8b", ".zst": b"\x28\xb5\x2f\xfd", ".xz": b"\xfd7zXZ\x00", ".bz2": b"BZh"}
COMPRESSIONS = tuple(_MAGIC)

# The first bytes of files that are not text, whatever their names are.
_NOT_TEXT = _MAGIC | {
    ".parquet": b"PAR1",
    ".arrow": b"ARROW1",
    ".zip": b"PK\x03\x04",
}
_POINTER = b"version https://git-lfs"

# Compressed bytes read at a time. Repetitive text grows up to 1,000-fold, so this bounds what a
# hostile file takes to megabytes.
_COMPRESSED_PIECE = 16 << 10


class UnreadableError(Exception):
    """A file that cannot be read as a whole. The message says what is wrong and what to do."""


def import_library(module: str, suffix: str) -> Any:
    """Import a library that only files with this suffix need.

    Raises:
        UnreadableError: this Python was built without the library.
        MissingExtraError: the library is not installed.
    """
    if module not in {"lzma", "bz2"}:
        require(f"reading {suffix}", module.partition(".")[0])
        return importlib.import_module(module)
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UnreadableError(
            f"{suffix} files need {module}, which this Python was built without; unpack them"
        ) from error


@contextmanager
def opened(path: Path | StoreFile) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """Open a file: the stream of its stored bytes, and the stream of its decompressed content.

    Raises:
        UnreadableError: it is truncated or damaged, or its content does not fit its suffix.
        OSError: the disk fails.
    """
    try:
        with path.open("rb", buffering=BUFFER) as raw, _unpacked(path, raw) as stream:
            yield raw, stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UnreadableError(f"{error}; copy or download it again") from error
    except OSError as error:
        if error.errno is not None:
            raise
        # bz2 reports damage as an OSError without a number
        raise UnreadableError(f"{error}; copy or download it again") from error


def check_is_text(head: bytes) -> None:
    """Check by a file's first bytes that it is UTF-8 text.

    Raises:
        UnreadableError: it is a Git LFS pointer, UTF-16 or another known format.
    """
    if head.startswith(_POINTER):
        raise UnreadableError(
            "it is a Git LFS pointer, not the file; fetch the file (git lfs pull)"
        )
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise UnreadableError("it is UTF-16; convert it: iconv -f UTF-16 -t UTF-8")
    for suffix, magic in _NOT_TEXT.items():
        if head.startswith(magic):
            raise UnreadableError(
                f"its content is that of a {suffix} file; rename it to {suffix}, or unpack it"
            )


@contextmanager
def _unpacked(path: Path | StoreFile, raw: BinaryIO) -> Iterator[BinaryIO]:
    suffix = path.suffix.lower()
    if suffix not in COMPRESSIONS:
        yield raw
        return
    damage: tuple[type[Exception], ...] = ()
    if suffix == ".gz":
        inner: Any = gzip.GzipFile(fileobj=raw)
    elif suffix == ".zst":
        inner = _ZstdFile(raw)
    elif suffix == ".xz":
        lzma = import_library("lzma", suffix)
        inner, damage = lzma.LZMAFile(raw), (lzma.LZMAError,)
    else:
        inner = import_library("bz2", suffix).BZ2File(raw)
    try:
        with inner, io.BufferedReader(inner, BUFFER) as stream:
            yield cast("BinaryIO", stream)
    except damage as error:
        raise UnreadableError(f"{error}; copy or download it again") from error


class _ZstdFile(io.RawIOBase):
    """Decompressed Zstandard frames. zstandard's own stream_reader does not report a truncated
    file.
    """

    def __init__(self, raw: BinaryIO) -> None:
        self._zstd = import_library("zstandard", ".zst")
        self._raw = raw
        # Windows up to 2 GiB, as `zstd --long=31` writes them.
        self._decompressor = self._zstd.ZstdDecompressor(max_window_size=1 << 31)
        self._frame: Any = None
        self._input = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, target: Any) -> int:
        while not self._output:
            if not self._input:
                self._input = self._raw.read(_COMPRESSED_PIECE)
                if not self._input:
                    if self._frame is not None:
                        raise EOFError("Compressed file ended before the end of a frame")
                    return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(self._input))
            except self._zstd.ZstdError as error:
                raise EOFError(str(error)) from error
            self._input = self._frame.unused_data if self._frame.eof else b""
            if self._frame.eof:
                self._frame = None
        size = min(len(target), len(self._output))
        target[:size] = self._output[:size]
        self._output = self._output[size:]
        return size
