"""The output's shards, open for writing: copy, cast or scale bytes of the base into them.

Each file is open twice: through the page cache, and for direct I/O if the file system allows.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from dus_cli.common.files import CLEARED, writing
from dus_cli.common.storage import sync
from dus_cli.planning.dtypes import overflow
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.scaling import Scale
from dus_cli.source.reading import open_descriptor
from dus_cli.writing.moves import Move

# Bytes of a piece that are scaled at a time: whole blocks, with a small buffer for the result.
_SCALED_AT_ONCE = 512 << 10


@dataclass
class ByteCounts:
    """Bytes of tensor data that were cloned, copied, cast or scaled, or are zeros."""

    cloned: int = 0
    copied: int = 0
    cast: int = 0
    zeros: int = 0
    scaled: int = 0


KEPT = "what was fetched is kept, and the same command continues from there"


def create_shards(plan: UpscalePlan, folder: Path) -> None:
    """Create every shard's file in its full length, with its header and then zeros.

    Raises:
        OutputError: writing failed.
    """
    for name, layout in plan.shards.items():
        with writing(name), open(folder / name, "xb") as file:
            file.write(layout.header)
            file.truncate(layout.num_bytes)


@dataclass
class Files:
    """Two descriptors of one file: through the page cache, and for direct I/O if possible."""

    buffered: int
    direct: int | None


def open_twice(path: Path, flags: int, closing: contextlib.ExitStack) -> Files:
    """Open a file for reading or writing until `closing` ends.

    Raises:
        OSError: it cannot be opened.
    """
    buffered = open_descriptor(path, flags)
    closing.callback(_close, buffered, path.name)
    direct = None
    # fails on tmpfs, on some network file systems and on macOS
    with contextlib.suppress(OSError, AttributeError):
        direct = os.open(path, flags | os.O_DIRECT)
        closing.callback(_close, direct, path.name)
    return Files(buffered, direct)


def _close(file: int, name: str) -> None:
    """Close a file, and raise its errors: a mount may report a failed write only here."""
    with writing(name):
        os.close(file)


class Outputs:
    """Some of the output's shards, shared by threads. `on_bytes` receives the number of bytes of
    tensor data after each write.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        closing: contextlib.ExitStack,
        on_bytes: Callable[[int], object],
        tally: ByteCounts,
        left: str = CLEARED,
    ) -> None:
        """Open these files until `closing` ends. `left` as in `common.files.writing`.

        Raises:
            OutputError: a file cannot be opened.
        """
        self.on_bytes, self.tally, self.left = on_bytes, tally, left
        self.files: dict[str, Files] = {}
        self._lock = threading.Lock()
        for name in dict.fromkeys(names):
            with writing(name, left):
                self.files[name] = open_twice(folder / name, os.O_RDWR, closing)

    def deliver(
        self,
        move: Move,
        position: int,
        piece: memoryview,
        room: memoryview,
        *,
        direct: bool = False,
    ) -> None:
        """Write a piece of a move to every target, cast and scaled as the move says.

        Args:
            move: the move that the bytes belong to.
            position: the piece's position in the move; a multiple of the size of its numbers.
            piece: the source's bytes.
            room: a buffer for the result of a cast or a factor.
            direct: `piece` is whole blocks of memory, and may be written with direct I/O.

        Raises:
            CheckpointError: a finite number is out of the range of the dtype that it is cast to.
            OutputError: writing failed.
        """
        for scale, targets in move.by_scale().items():
            way = "scaled" if scale is not None else "copied" if move.cast is None else "cast"
            step = len(piece) if scale is None or move.cast is not None else _SCALED_AT_ONCE
            for at in range(0, len(piece), step or 1):
                result = _converted(move, piece[at : at + step], room, scale)
                for name, start in targets:
                    target = start + move.written(position + at)
                    self.write(
                        name,
                        target,
                        result,
                        direct=direct and target % BLOCK == 0 and len(result) % BLOCK == 0,
                    )
                self.count(**{way: len(result) * len(targets)})

    def write(self, name: str, start: int, piece: memoryview, *, direct: bool) -> None:
        written = 0
        while written < len(piece):
            files = self.files[name]
            file = files.direct if direct and files.direct is not None else files.buffered
            try:
                written += os.pwrite(file, piece[written:], start + written)
            except OSError as error:
                if error.errno == errno.EINVAL and file == files.direct:
                    # it could be opened, but refuses blocks of 4096 bytes
                    self.files[name] = replace(files, direct=None)
                    continue
                with writing(name, self.left):
                    raise
            direct = direct and written % BLOCK == 0

    def read(self, name: str, start: int, view: memoryview) -> bool:
        """Fill `view` with the file's bytes from `start`; False if the file ends before."""
        filled = 0
        while filled < len(view):
            count = os.preadv(self.files[name].buffered, [view[filled:]], start + filled)
            if count == 0:
                return False
            filled += count
        return True

    def sync(self) -> None:
        """Flush all files to the disk.

        Raises:
            OutputError: the disk failed, or turned out to be full.
        """
        for name, files in self.files.items():
            with writing(name, self.left):
                sync(files.buffered)

    def count(self, cloned: int = 0, copied: int = 0, cast: int = 0, scaled: int = 0) -> None:
        """Add bytes that were written to the tally, and report them."""
        with self._lock:
            self.tally.cloned += cloned
            self.tally.copied += copied
            self.tally.cast += cast
            self.tally.scaled += scaled
        self.on_bytes(cloned + copied + cast + scaled)


def _converted(move: Move, piece: memoryview, room: memoryview, scale: Scale | None) -> memoryview:
    """The bytes for a target: `piece` itself, or its cast and scaled numbers, in `room`.

    Raises:
        CheckpointError: a finite number is out of its dtype's range.
    """
    if move.cast is None and scale is None:
        return piece
    result = room[: move.written(len(piece))]
    if move.cast is None:
        result[:] = piece
    elif move.cast(piece, result):
        raise overflow(move.name, move.cast)
    if scale is not None:
        scale.apply(result, move.name)
    return result
