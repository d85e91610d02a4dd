"""Move tensor bytes from source shards to output shards: clone blocks if possible, else copy them.

docs/benchmarks.md has the measurements. In short: cloning takes no time and no space; otherwise
direct I/O is at least as fast as a read/write loop and takes a tenth of its CPU time, and bytes
that are in the output twice are read once. Both need positions in source and output that agree
modulo the block, which `planning.layout` arranges.
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
from dus_cli.writing.outputs import ByteCounts, Outputs, create_shards, open_twice

# Four readers keep a disk busy; more were not faster on two cores (docs/benchmarks.md).
DEFAULT_JOBS = 4

# Bytes that a thread reads at a time if a start scales: numpy takes 20 MB of memory, and this saves
# 8 of them.
_SCALED_PIECE = PIECE // 2

# Longer moves are cut, so that the workers share a long run of layers.
_MOVE = 64 << 20

# Linux's FICLONERANGE (ioctl_ficlonerange(2)): source fd, source offset, length, target offset.
_FICLONERANGE = 0x4020940D

# Errors of a file system that cannot clone at all, or not these two files or blocks.
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
    """How bytes are written: `auto` clones if the file system can, `clone` fails if it cannot."""

    auto = "auto"
    clone = "clone"
    copy = "copy"


def clone_range(source: int, source_start: int, target: int, start: int, length: int) -> None:
    """Make the target share the source's blocks. All positions are multiples of the block.

    Raises:
        OSError: the file system cannot (_CANNOT_CLONE), or failed.
    """
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, source_start, length, start))


def can_clone(source: Path, folder: Path, *, may_create: bool) -> bool:
    """Whether files in `folder` can share blocks of `source`, found out by trying.

    The file that is tried has no name. If the file system has no unnamed files and `may_create` is
    set, it has a name for a moment.
    """
    with contextlib.ExitStack() as closing:
        try:
            reader = os.open(source, os.O_RDONLY)
            closing.callback(os.close, reader)
            probe = _unnamed_file(folder, closing, may_create=may_create)
            clone_range(reader, 0, probe, 0, BLOCK)
        except (OSError, AttributeError):
            return False
    return True


def _unnamed_file(folder: Path, closing: contextlib.ExitStack, *, may_create: bool) -> int:
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
) -> ByteCounts:
    """Write every shard of the plan into `folder`, and flush it to the disk (fsync).

    Each job takes 4 MiB of memory (2 MiB if a start scales), or a few times that for a cast,
    whatever the size of the model. One source shard is open at a time.

    Args:
        plan: what to write.
        folder: where to write; the files must not exist.
        clone: share blocks with the source if positions agree.
        must_clone: fail if the file system refuses a clone, instead of copying.
        jobs: number of threads.
        on_bytes: called with numbers of bytes of tensor data written, from several threads.

    Raises:
        CheckpointError: a source shard is unreadable, or changed since its header was read; or a
            finite number is out of the range of the dtype that it is cast to.
        MissingExtraError: a cast needs torch, and it is not installed.
        OutputError: writing failed.
    """
    plan.check_libraries()
    create_shards(plan, folder)
    tally = ByteCounts()
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
    """Check that a source shard has not changed since its header was read.

    Raises:
        CheckpointError: it was written to or replaced.
    """
    if fingerprint(shard.path) != shard.fingerprint:
        raise CheckpointError(
            f"{shown(shard.name)} changed while it was read; start again when no program writes to "
            "it"
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
        tally: ByteCounts,
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
            # Cloning only changes the file system's metadata: more threads would contend for it.
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
        # A piece, and room for the result of a cast; page-aligned, for direct I/O. Pages that are
        # not touched take no memory. Not closed explicitly: an error's traceback holds views of it.
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
        """Clone to every target whose position allows; return the move that is left to copy."""
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
            self.outputs.count(cloned=body)
        return move.to(left)

    def _not_cloned(self, name: str, error: OSError) -> OutputError:
        """The error of a failed clone; the source or the output may be the cause."""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = "free some space or choose another place" if full else "check the disk"
        return OutputError(
            f"cannot clone {shown(self.shard.name)} into {shown(name)}: "
            f"{error.strerror or error}; {advice}, {CLEARED}"
        )

    def _copy(self, move: Move, view: memoryview) -> None:
        """Read each piece once, and write it, cast or scaled as the move says, to every target."""
        if not move.targets:
            return
        position = 0
        while position < move.length and not self.stop.is_set():
            start = move.source_start + position
            # First up to the next block: from there on direct I/O is possible.
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
        """Write a tensor that is strided or made of blocks, cast or scaled as the move says, in
        row-major order.
        """
        position, move = 0, move._replace(blocks=None)  # the pieces are joined from blocks already
        try:
            for piece in tensor_pieces(self.source.buffered, tensor):
                if self.stop.is_set():
                    return
                gathered = view[: len(piece)]
                gathered[:] = piece
                self.outputs.deliver(move, position, gathered, view[PIECE:])
                position += len(piece)
        except OSError as error:  # of a read; failed writes raise OutputError
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
                    # it could be opened, but refuses blocks of 4096 bytes
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
    """Cut a move into parts of at most _MOVE bytes; all but the first start at a source block."""
    if move.strided is not None:
        yield move
        return
    position = 0
    while position < move.length:
        size = min(_MOVE - (-move.to_block(position) % BLOCK), move.length - position)
        yield move.part(position, size)
        position += size
