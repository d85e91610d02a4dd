"""Move tensor bytes from source shards to output shards: clone blocks where possible, else copy
them.

What was measured, and what lost, is in docs/benchmarks.md. In short: cloning costs no time and no
space; where it cannot be, direct I/O takes a tenth of the CPU time of a read/write loop and at
least its speed, and bytes that stand twice in the output are read once. Both ask that positions in
source and output agree modulo the block, which is what `planning.layout` arranges.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path

from dus_cli.common.files import CLEARED, sync_file
from dus_cli.common.workers import PIECE, workers
from dus_cli.errors import CheckpointError, OutputError, shown
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.treatment import Making
from dus_cli.source.checkpoint import Shard, fingerprint
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import unreadable
from dus_cli.source.strided import tensor_pieces
from dus_cli.writing.moves import Move, moves
from dus_cli.writing.outputs import Outputs, Tally, create_shards, open_twice

# Four readers keep a disk busy; more changed nothing on two cores (docs/benchmarks.md).
DEFAULT_JOBS = 4

# Bytes that a thread reads at a time where a start scales: numpy takes 20 MB, these give back 8.
_SCALED_PIECE = PIECE // 2

# Longer moves are cut, so that one long run of layers is shared among the workers.
_MOVE = 64 << 20

# Linux's FICLONERANGE (ioctl_ficlonerange(2)): source fd, source offset, length, target offset.
_FICLONERANGE = 0x4020940D

# A file system answers with these where it cannot clone at all, or not these two files or blocks.
_CANNOT_CLONE = frozenset(
    [
        errno.EOPNOTSUPP,
        errno.EXDEV,
        errno.EINVAL,
        errno.ENOTTY,
        errno.ENOSYS,
        errno.EPERM,
        errno.ETXTBSY,
    ]
)


class CopyMode(str, Enum):
    """How bytes move: `auto` clones where the file system can, `clone` fails where it cannot."""

    auto = "auto"
    clone = "clone"
    copy = "copy"


def clone_range(source: int, source_start: int, target: int, start: int, length: int) -> None:
    """Let the target's blocks share the source's. All positions are multiples of the block.

    Raises:
        OSError: the file system cannot; see _CANNOT_CLONE.
    """
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, source_start, length, start))


def can_clone(source: Path, folder: Path, *, may_create: bool) -> bool:
    """Whether files in `folder` can share blocks of `source`: asked of the file system, not
    guessed.

    The file it tries with has no name. Where a file system has no nameless files and `may_create`
    is set, it has one for a moment.
    """
    with contextlib.ExitStack() as closing:
        try:
            reader = os.open(source, os.O_RDONLY)
            closing.callback(os.close, reader)
            probe = _nameless_file(folder, closing, may_create=may_create)
            clone_range(reader, 0, probe, 0, BLOCK)
        except (OSError, AttributeError):
            return False
    return True


def _nameless_file(folder: Path, closing: contextlib.ExitStack, *, may_create: bool) -> int:
    try:
        file = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError:
        if not may_create:
            raise
        name = folder / ".dus-probe"
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        closing.callback(os.unlink, name)
    closing.callback(os.close, file)
    return file


def transfer(
    plan: UpscalePlan,
    folder: Path,
    *,
    clone: bool,
    must_clone: bool = False,
    jobs: int = DEFAULT_JOBS,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> Tally:
    """Write every shard of the plan into `folder` and see it on the disk (fsync).

    Memory is `jobs` pieces of 4 MiB (2 MiB where a start scales), a few for each job where it
    casts, whatever the size of the model. One source shard is open at a time.

    Args:
        plan: what to write.
        folder: where; the files must not exist.
        clone: share blocks with the source where positions agree.
        must_clone: fail where the file system refuses, instead of copying.
        jobs: threads that move bytes.
        on_bytes: told the number of bytes of tensor data done, from several threads.

    Raises:
        CheckpointError: a source shard is unreadable, or changed since its header was read; a
            finite number is beyond the dtype that it is cast to.
        MissingExtraError: a cast needs torch, and it is not installed.
        OutputError: writing failed.
    """
    plan.check_libraries()
    create_shards(plan, folder)
    tally = Tally()
    piece = _SCALED_PIECE if plan.treatment.scaled else PIECE
    for shard, shard_moves in moves(plan):
        if shard_moves:
            worker = ShardMover(shard, folder, clone, must_clone, on_bytes, tally, piece=piece)
            worker.run(shard_moves, jobs)
        check_unchanged(shard)
    tally.zeros = sum(p.num_bytes for p in plan.placements if p.making is Making.zeros)
    on_bytes(tally.zeros)
    with workers(jobs) as (pool, _):
        list(pool.map(lambda name: sync_file(folder / name), plan.shards))
    return tally


def check_unchanged(shard: Shard) -> None:
    """Check that a source shard is still the one whose header was read.

    Raises:
        CheckpointError: it was written to or replaced.
    """
    if fingerprint(shard.path) != shard.fingerprint:
        raise CheckpointError(
            f"{shown(shard.name)} changed while it was read; start again when nobody writes to it"
        )


class ShardMover:
    """Moves the bytes of one source shard, with several threads."""

    def __init__(
        self,
        shard: Shard,
        folder: Path,
        clone: bool,
        must_clone: bool,
        on_bytes: Callable[[int], object],
        tally: Tally,
        *,
        piece: int = PIECE,
    ) -> None:
        self.shard, self.folder, self.piece = shard, folder, piece
        self.clone, self.must_clone = clone, must_clone
        self.on_bytes, self.tally = on_bytes, tally
        self.lock = threading.Lock()

    def run(self, shard_moves: Sequence[Move], jobs: int) -> None:
        with contextlib.ExitStack() as closing:
            try:
                self.source = open_twice(self.shard.path, os.O_RDONLY, closing)
            except OSError as error:
                raise unreadable(self.shard.name, error) from error
            names = (name for move in shard_moves for name, _ in move.targets)
            self.outputs = Outputs(self.folder, names, closing, self.on_bytes, self.tally)
            # Cloning is work for the file system's metadata alone: threads only contend for it.
            casts = any(move.is_changed for move in shard_moves)
            pieces = [
                p for move in shard_moves for p in ([move] if self._clones(move) else _cut(move))
            ]
            queue = iter(pieces)
            num_threads = 1 if self.clone and not casts else jobs
            with workers(num_threads) as (pool, self.stop):
                list(pool.map(lambda _: self._work(queue), range(num_threads)))

    def _clones(self, move: Move) -> bool:
        return self.clone and move.cast is None and move.strided is None

    def _work(self, queue: Iterator[Move]) -> None:
        # Page-aligned, for direct I/O. Never closed by hand: the traceback of an error still holds
        # views of it. A piece, and room for what a cast makes of it; pages that nobody touches take
        # no memory.
        buffer = memoryview(mmap.mmap(-1, 3 * PIECE))
        while not self.stop.is_set():
            with self.lock:
                move = next(queue, None)
            if move is None:
                return
            if move.strided is not None:
                self._gather(move, move.strided, buffer)
                continue
            if self._clones(move):
                move = self._clone(move, buffer)
            self._copy(move, buffer)

    def _clone(self, move: Move, view: memoryview) -> Move:
        """Clone to every target that agrees with the source; return what is left to copy."""
        left: list[tuple[str, int]] = []
        for name, start in move.by_scale().pop(None, []):
            head = -start % BLOCK
            body = (move.length - head) // BLOCK * BLOCK
            if (move.source_start - start) % BLOCK or body <= 0:
                left.append((name, start))
                continue
            try:
                target = self.outputs.files[name].buffered
                clone_range(
                    self.source.buffered, move.source_start + head, target, start + head, body
                )
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    raise self._not_cloned(name, error) from error
                if self.must_clone:
                    raise OutputError(
                        f"--copy-mode clone: cannot clone into {shown(name)} ({error.strerror}); "
                        "use --copy-mode auto"
                    ) from error
                left.append((name, start))
                continue
            tail = move.length - head - body
            self._copy(Move(move.source_start, head, ((name, start),)), view)
            self._copy(
                Move(move.source_start + head + body, tail, ((name, start + head + body),)), view
            )
            self.outputs.done(cloned=body)
        return move.to(left)

    def _not_cloned(self, name: str, error: OSError) -> OutputError:
        """Of an error that may be the source's or the output's."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space or choose another place" if full else "check the disk"
        return OutputError(
            f"cannot clone {shown(self.shard.name)} into {shown(name)}: "
            f"{error.strerror or error}; {advice}, {CLEARED}"
        )

    def _copy(self, move: Move, view: memoryview) -> None:
        """Read each piece once, write it, or what a cast makes of it, to every target."""
        if not move.targets:
            return
        position = 0
        while position < move.length and not self.stop.is_set():
            start = move.source_start + position
            # Up to the next whole block first: from there on direct I/O is possible.
            head = move.to_block(position)
            size = min(head or self.piece, move.length - position)
            whole_blocks = start % BLOCK == 0 and size >= BLOCK
            if whole_blocks:
                size -= size % BLOCK
            piece = view[:size]
            self._read(start, piece, direct=whole_blocks)
            self.outputs.deliver(move, position, piece, view[PIECE:], direct=whole_blocks)
            position += size

    def _gather(self, move: Move, tensor: TensorInfo, view: memoryview) -> None:
        """Write a tensor whose bytes do not lie in order, or what a cast makes of it, piece by
        piece to every target.
        """
        position, move = 0, move._replace(blocks=None)  # the pieces are made of them already
        try:
            for piece in tensor_pieces(self.source.buffered, tensor):
                if self.stop.is_set():
                    return
                gathered = view[: len(piece)]
                gathered[:] = piece
                self.outputs.deliver(move, position, gathered, view[PIECE:])
                position += len(piece)
        except OSError as error:  # of reading: writing has its own
            raise unreadable(self.shard.name, error) from error

    def _read(self, start: int, piece: memoryview, *, direct: bool) -> None:
        filled = 0
        while filled < len(piece):
            file = (
                self.source.direct
                if direct and self.source.direct is not None
                else self.source.buffered
            )
            try:
                count = os.preadv(file, [piece[filled:]], start + filled)
            except OSError as error:
                if error.errno == errno.EINVAL and file == self.source.direct:
                    # opened, but not for blocks of 4096
                    self.source = replace(self.source, direct=None)
                    continue
                raise unreadable(self.shard.name, error) from error
            if count == 0:
                raise CheckpointError(
                    f"{shown(self.shard.name)} became shorter while it was read; copy or download "
                    "it again"
                )
            filled += count
            direct = direct and filled % BLOCK == 0


def _cut(move: Move) -> Iterator[Move]:
    """Pieces of at most _MOVE bytes that start at whole blocks of the source, but for the first."""
    if move.strided is not None:
        yield move
        return
    position = 0
    while position < move.length:
        size = min(_MOVE - (-move.to_block(position) % BLOCK), move.length - position)
        yield move.part(position, size)
        position += size
