"""Move tensor bytes from source shards to output shards: clone blocks where possible, else copy them.

What was measured, and what lost, is in docs/benchmarks.md. In short: cloning costs no time and no
space; where it cannot be, direct I/O takes a tenth of the CPU time of a read/write loop and at least
its speed, and bytes that stand twice in the output are read once. Both ask that positions in source
and output agree modulo the block, which is what `layout` arranges.
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
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from dus_cli.checkpoint import Shard, fingerprint
from dus_cli.dtypes import Cast, overflow, require_torch
from dus_cli.errors import CheckpointError, OutputError, shown
from dus_cli.headers import TensorInfo
from dus_cli.layout import BLOCK
from dus_cli.planning import UpscalePlan
from dus_cli.storage import sync
from dus_cli.strided import tensor_pieces
from dus_cli.treatment import Making
from dus_cli.workers import PIECE, workers

# Four readers keep a disk busy; more changed nothing on two cores (docs/benchmarks.md).
DEFAULT_JOBS = 4

# Longer moves are cut, so that one long run of layers is shared among the workers.
_MOVE = 64 << 20

# Linux's FICLONERANGE (ioctl_ficlonerange(2)): source fd, source offset, length, target offset.
_FICLONERANGE = 0x4020940D

# A file system answers with these where it cannot clone at all, or not these two files or blocks.
_CANNOT_CLONE = frozenset(
    [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM, errno.ETXTBSY]
)


class CopyMode(str, Enum):
    """How bytes move: `auto` clones where the file system can, `clone` fails where it cannot."""

    auto = "auto"
    clone = "clone"
    copy = "copy"


class Move(NamedTuple):
    """`length` bytes at `source_start`, wanted at each of `targets`: (output file's name, position).

    They are copied as they are, or with `cast` as other numbers; then they are those of the tensor `name`.
    `strided` is the tensor whose bytes they are where these do not lie in order.
    """

    source_start: int
    length: int
    targets: tuple[tuple[str, int], ...]
    cast: Cast | None = None
    name: str = ""
    strided: TensorInfo | None = None

    def written(self, length: int) -> int:
        """How many bytes the first `length` ones are in the output."""
        return length if self.cast is None else length // self.cast.source_size * self.cast.target_size

    def part(self, position: int, length: int) -> Move:
        """The move of `length` of its bytes from `position` on."""
        targets = tuple((name, start + self.written(position)) for name, start in self.targets)
        return self._replace(source_start=self.source_start + position, length=length, targets=targets)

    def to_block(self, position: int) -> int:
        """Bytes from `position` on up to the next whole block of the source, where direct I/O is possible.

        0 also where numbers do not start at multiples of their size: no block begins with a whole one then.
        """
        if self.cast is not None and self.source_start % self.cast.source_size:
            return 0
        return -(self.source_start + position) % BLOCK


@dataclass
class Tally:
    """Bytes of tensor data that were cloned, that were copied, that were cast, and that are zeros."""

    cloned: int = 0
    copied: int = 0
    cast: int = 0
    zeros: int = 0


def moves(plan: UpscalePlan) -> Iterator[tuple[Shard, list[Move]]]:
    """What each source shard has to give, in its own order; neighbours that stay neighbours are one move.

    Zeros need no move: a file is as long as planned, and zeros, before anything is moved into it.
    """
    wanted: dict[str, list[tuple[str, int]]] = {}
    casts: dict[str, Cast] = {}
    for file_name, layout in plan.shards.items():
        for placement, start in layout.positions():
            if placement.making is Making.zeros:
                continue
            wanted.setdefault(placement.tensor.name, []).append((file_name, start))
            if placement.making is Making.cast:
                casts[placement.tensor.name] = Cast(placement.tensor.dtype, placement.dtype)
    for shard in plan.checkpoint.shards:
        joined: list[Move] = []
        for tensor in shard.header.tensors:
            targets = tuple(wanted.get(tensor.name, ()))
            if not targets or not tensor.num_bytes:
                continue
            cast, strided = casts.get(tensor.name), tensor if tensor.strides is not None else None
            if cast is not None or strided is not None:
                joined.append(Move(tensor.start, tensor.num_bytes, targets, cast, tensor.name, strided))
                continue
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.cast is None
                and last.strided is None
                and last.source_start + last.length == tensor.start
                and targets == tuple((name, start + last.length) for name, start in last.targets)
            ):
                joined[-1] = last._replace(length=last.length + tensor.num_bytes)
            else:
                joined.append(Move(tensor.start, tensor.num_bytes, targets))
        yield shard, joined


def clone_range(source: int, source_start: int, target: int, start: int, length: int) -> None:
    """Let the target's blocks share the source's. All positions are multiples of the block.

    Raises:
        OSError: the file system cannot; see _CANNOT_CLONE.
    """
    fcntl.ioctl(target, _FICLONERANGE, struct.pack("qQQQ", source, source_start, length, start))


def can_clone(source: Path, folder: Path, *, may_create: bool) -> bool:
    """Whether files in `folder` can share blocks of `source`: asked of the file system, not guessed.

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

    Memory is `jobs` pieces of 4 MiB, a few for each job where it casts, whatever the size of the model. One source
    shard is open at a time.

    Args:
        plan: what to write.
        folder: where; the files must not exist.
        clone: share blocks with the source where positions agree.
        must_clone: fail where the file system refuses, instead of copying.
        jobs: threads that move bytes.
        on_bytes: told the number of bytes of tensor data done, from several threads.

    Raises:
        CheckpointError: a source shard is unreadable, or changed since its header was read; a finite number is
            beyond the dtype that it is cast to.
        MissingExtraError: a cast needs torch, and it is not installed.
        OutputError: writing failed.
    """
    if any(placement.making is Making.cast for placement in plan.placements):
        require_torch("--dtype")
    for name, layout in plan.shards.items():
        with writing(name), open(folder / name, "xb") as file:
            file.write(layout.header)
            file.truncate(layout.num_bytes)
    tally = Tally()
    for shard, shard_moves in moves(plan):
        if shard_moves:
            worker = _ShardMover(shard, folder, clone, must_clone, on_bytes, tally)
            worker.run(shard_moves, jobs)
        check_unchanged(shard)
    tally.zeros = sum(p.num_bytes for p in plan.placements if p.making is Making.zeros)
    on_bytes(tally.zeros)
    with workers(jobs) as (pool, _):
        list(pool.map(lambda name: sync_file(folder / name), plan.shards))
    return tally


def check_unchanged(shard: Shard) -> None:
    """Hold that a source shard is still the one whose header was read.

    Raises:
        CheckpointError: it was written to or replaced.
    """
    if fingerprint(shard.path) != shard.fingerprint:
        raise CheckpointError(f"{shown(shard.name)} changed while it was read; start again when nobody writes to it")


def sync_file(path: Path) -> None:
    """See a file's content on the disk.

    Raises:
        OutputError: the disk failed, or was full after all.
    """
    with writing(path.name):
        file = os.open(path, os.O_RDONLY)
        try:
            sync(file)
        finally:
            os.close(file)


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Turn a failure to write into one line."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "; free some space or choose another place, nothing was left behind",
            errno.EDQUOT: "; raise the quota or choose another place, nothing was left behind",
        }.get(error.errno or 0, "; nothing was left behind")
        raise OutputError(f"cannot write {shown(name)}: {error.strerror or error}{advice}") from error


@dataclass
class _Files:
    """A file opened twice: through the page cache, and past it where the file system allows."""

    buffered: int
    direct: int | None


class _ShardMover:
    """Moves the bytes of one source shard, with several threads."""

    def __init__(
        self,
        shard: Shard,
        folder: Path,
        clone: bool,
        must_clone: bool,
        on_bytes: Callable[[int], object],
        tally: Tally,
    ) -> None:
        self.shard, self.folder = shard, folder
        self.clone, self.must_clone = clone, must_clone
        self.on_bytes, self.tally = on_bytes, tally
        self.lock = threading.Lock()

    def run(self, shard_moves: Sequence[Move], jobs: int) -> None:
        with contextlib.ExitStack() as closing:
            self.source = self._open(self.shard.path, os.O_RDONLY, closing)
            names = dict.fromkeys(name for move in shard_moves for name, _ in move.targets)
            self.targets = {name: self._open(self.folder / name, os.O_RDWR, closing) for name in names}
            # Cloning is work for the file system's metadata alone: threads only contend for it.
            casts = any(move.cast is not None for move in shard_moves)
            pieces = [p for move in shard_moves for p in ([move] if self._clones(move) else _cut(move))]
            queue = iter(pieces)
            num_threads = 1 if self.clone and not casts else jobs
            with workers(num_threads) as (pool, self.stop):
                list(pool.map(lambda _: self._work(queue), range(num_threads)))

    def _open(self, path: Path, flags: int, closing: contextlib.ExitStack) -> _Files:
        try:
            buffered = os.open(path, flags)
        except OSError as error:
            raise (
                unreadable(self.shard, error)
                if flags == os.O_RDONLY
                else OutputError(f"cannot write {shown(path.name)}: {error.strerror}")
            ) from error
        closing.callback(_close, buffered, path.name)
        direct = None
        with contextlib.suppress(OSError, AttributeError):  # tmpfs, some network file systems, macOS
            direct = os.open(path, flags | os.O_DIRECT)
            closing.callback(_close, direct, path.name)
        return _Files(buffered, direct)

    def _clones(self, move: Move) -> bool:
        return self.clone and move.cast is None and move.strided is None

    def _work(self, queue: Iterator[Move]) -> None:
        # Page-aligned, for direct I/O. Never closed by hand: the traceback of an error still holds views of it.
        # A piece, and room for what a cast makes of it; pages that nobody touches take no memory.
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
        for name, start in move.targets:
            head = -start % BLOCK
            body = (move.length - head) // BLOCK * BLOCK
            if (move.source_start - start) % BLOCK or body <= 0:
                left.append((name, start))
                continue
            try:
                clone_range(
                    self.source.buffered, move.source_start + head, self.targets[name].buffered, start + head, body
                )
            except OSError as error:
                if error.errno not in _CANNOT_CLONE:
                    with writing(name):
                        raise
                if self.must_clone:
                    raise OutputError(
                        f"--copy-mode clone: cannot clone into {shown(name)} ({error.strerror}); use --copy-mode auto"
                    ) from error
                left.append((name, start))
                continue
            tail = move.length - head - body
            self._copy(Move(move.source_start, head, ((name, start),)), view)
            self._copy(Move(move.source_start + head + body, tail, ((name, start + head + body),)), view)
            self._done(cloned=body)
        return move._replace(targets=tuple(left))

    def _copy(self, move: Move, view: memoryview) -> None:
        """Read each piece once, write it, or what a cast makes of it, to every target."""
        if not move.targets:
            return
        position = 0
        while position < move.length and not self.stop.is_set():
            start = move.source_start + position
            # Up to the next whole block first: from there on direct I/O is possible.
            head = move.to_block(position)
            size = min(head or PIECE, move.length - position)
            whole_blocks = start % BLOCK == 0 and size >= BLOCK
            if whole_blocks:
                size -= size % BLOCK
            piece = view[:size]
            self._read(start, piece, direct=whole_blocks)
            made = piece if move.cast is None else self._cast(move, piece, view[PIECE:])
            for name, target_start in move.targets:
                target = target_start + move.written(position)
                direct = whole_blocks and target % BLOCK == 0 and len(made) % BLOCK == 0
                self._write(name, target, made, direct=direct)
            position += size
            num_bytes = len(made) * len(move.targets)
            self._done(**{"copied" if move.cast is None else "cast": num_bytes})

    def _cast(self, move: Move, piece: memoryview, room: memoryview) -> memoryview:
        assert move.cast is not None
        made = room[: move.written(len(piece))]
        if move.cast(piece, made):
            raise overflow(move.name, move.cast)
        return made

    def _gather(self, move: Move, tensor: TensorInfo, view: memoryview) -> None:
        """Write a strided tensor, or what a cast makes of it, row by row to every target."""
        position = 0
        try:
            for piece in tensor_pieces(self.source.buffered, tensor):
                if self.stop.is_set():
                    return
                gathered = view[: len(piece)]
                gathered[:] = piece
                made = gathered if move.cast is None else self._cast(move, gathered, view[PIECE:])
                for name, start in move.targets:
                    self._write(name, start + move.written(position), made, direct=False)
                position += len(piece)
                num_bytes = len(made) * len(move.targets)
                self._done(**{"copied" if move.cast is None else "cast": num_bytes})
        except OSError as error:  # of reading: `_write` has its own
            raise unreadable(self.shard, error) from error

    def _read(self, start: int, piece: memoryview, *, direct: bool) -> None:
        filled = 0
        while filled < len(piece):
            file = self.source.direct if direct and self.source.direct is not None else self.source.buffered
            try:
                count = os.preadv(file, [piece[filled:]], start + filled)
            except OSError as error:
                if error.errno == errno.EINVAL and file == self.source.direct:
                    self.source = replace(self.source, direct=None)  # opened, but not for blocks of 4096
                    continue
                raise unreadable(self.shard, error) from error
            if count == 0:
                raise CheckpointError(
                    f"{shown(self.shard.name)} became shorter while it was read; copy or download it again"
                )
            filled += count
            direct = direct and filled % BLOCK == 0

    def _write(self, name: str, start: int, piece: memoryview, *, direct: bool) -> None:
        written = 0
        while written < len(piece):
            files = self.targets[name]
            file = files.direct if direct and files.direct is not None else files.buffered
            try:
                written += os.pwrite(file, piece[written:], start + written)
            except OSError as error:
                if error.errno == errno.EINVAL and file == files.direct:
                    self.targets[name] = replace(files, direct=None)
                    continue
                with writing(name):
                    raise
            direct = direct and written % BLOCK == 0

    def _done(self, cloned: int = 0, copied: int = 0, cast: int = 0) -> None:
        with self.lock:
            self.tally.cloned += cloned
            self.tally.copied += copied
            self.tally.cast += cast
        self.on_bytes(cloned + copied + cast)


def _close(file: int, name: str) -> None:
    """A mount's last word on what was written to a file may come here."""
    with writing(name):
        os.close(file)


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


def unreadable(shard: Shard, error: OSError) -> CheckpointError:
    """The error for a source shard that the operating system cannot read."""
    return CheckpointError(
        f"cannot read {shown(shard.name)}: {error.strerror or error}; check the disk or the network mount"
    )
