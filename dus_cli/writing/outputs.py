"""The output's shards, open for writing: the base's bytes, or what a cast makes of them, to every
place for them.

Each file is open twice: through the page cache, and past it where the file system allows.
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

# Of a piece, bytes that are scaled at a time: whole blocks, and little room for what they become.
_SCALED_AT_ONCE = 512 << 10


@dataclass
class Tally:
    """Bytes of tensor data that were cloned, copied, cast, or scaled, and that are zeros."""

    cloned: int = 0
    copied: int = 0
    cast: int = 0
    zeros: int = 0
    scaled: int = 0


KEPT = "what was fetched is kept, and the same command goes on from there"


def create_shards(plan: UpscalePlan, folder: Path) -> None:
    """Make every shard's file, as long as planned and zeros behind its header.

    Raises:
        OutputError: writing failed.
    """
    for name, layout in plan.shards.items():
        with writing(name), open(folder / name, "xb") as file:
            file.write(layout.header)
            file.truncate(layout.num_bytes)


@dataclass
class Files:
    """A file opened twice: through the page cache, and past it where the file system allows."""

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
    with contextlib.suppress(OSError, AttributeError):  # tmpfs, some network file systems, macOS
        direct = os.open(path, flags | os.O_DIRECT)
        closing.callback(_close, direct, path.name)
    return Files(buffered, direct)


def _close(file: int, name: str) -> None:
    """A mount's last word on what was written to a file may come here."""
    with writing(name):
        os.close(file)


class Outputs:
    """Some of the output's shards. Threads share it; `on_bytes` is told of tensor data that was
    written.
    """

    def __init__(
        self,
        folder: Path,
        names: Iterable[str],
        closing: contextlib.ExitStack,
        on_bytes: Callable[[int], object],
        tally: Tally,
        left: str = CLEARED,
    ) -> None:
        """Open the files of these names until `closing` ends. `left` as in `writing`.

        Raises:
            OutputError: one cannot be opened.
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
        """Write the bytes of a move from `position` on, or what its cast makes of them in `room`,
        to every target.

        Args:
            move: what the bytes belong to.
            position: where in it they start; a multiple of the cast's numbers.
            piece: the bytes.
            room: as many bytes as the cast makes of them.
            direct: `piece` is whole blocks of memory, and may go past the page cache.

        Raises:
            CheckpointError: a finite number is beyond the dtype that it is cast to.
            OutputError: writing failed.
        """
        for scale, targets in move.by_scale().items():
            way = "scaled" if scale is not None else "copied" if move.cast is None else "cast"
            step = len(piece) if scale is None or move.cast is not None else _SCALED_AT_ONCE
            for at in range(0, len(piece), step or 1):
                made = _made(move, piece[at : at + step], room, scale)
                for name, start in targets:
                    target = start + move.written(position + at)
                    self.write(
                        name,
                        target,
                        made,
                        direct=direct and target % BLOCK == 0 and len(made) % BLOCK == 0,
                    )
                self.done(**{way: len(made) * len(targets)})

    def write(self, name: str, start: int, piece: memoryview, *, direct: bool) -> None:
        written = 0
        while written < len(piece):
            files = self.files[name]
            file = files.direct if direct and files.direct is not None else files.buffered
            try:
                written += os.pwrite(file, piece[written:], start + written)
            except OSError as error:
                if error.errno == errno.EINVAL and file == files.direct:
                    # opened, but not for blocks of 4096
                    self.files[name] = replace(files, direct=None)
                    continue
                with writing(name, self.left):
                    raise
            direct = direct and written % BLOCK == 0

    def read(self, name: str, start: int, view: memoryview) -> bool:
        """Fill `view` with what was written from `start` on; False where the file ends before."""
        filled = 0
        while filled < len(view):
            count = os.preadv(self.files[name].buffered, [view[filled:]], start + filled)
            if count == 0:
                return False
            filled += count
        return True

    def sync(self) -> None:
        """See what was written on the disk.

        Raises:
            OutputError: the disk failed, or was full after all.
        """
        for name, files in self.files.items():
            with writing(name, self.left):
                sync(files.buffered)

    def done(self, cloned: int = 0, copied: int = 0, cast: int = 0, scaled: int = 0) -> None:
        with self._lock:
            self.tally.cloned += cloned
            self.tally.copied += copied
            self.tally.cast += cast
            self.tally.scaled += scaled
        self.on_bytes(cloned + copied + cast + scaled)


def _made(move: Move, piece: memoryview, room: memoryview, scale: Scale | None) -> memoryview:
    """What a target gets for these bytes: themselves, or what a cast and a factor make of them, in
    `room`.

    Raises:
        CheckpointError: a finite number is beyond its dtype then.
    """
    if move.cast is None and scale is None:
        return piece
    made = room[: move.written(len(piece))]
    if move.cast is None:
        made[:] = piece
    elif move.cast(piece, made):
        raise overflow(move.name, move.cast)
    if scale is not None:
        scale.apply(made, move.name)
    return made
