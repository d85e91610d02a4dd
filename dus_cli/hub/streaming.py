"""Write tensor bytes from the Hub straight into the output, by range requests, without a copy in
the cache.

A source shard is cut into pieces, which threads fetch in the file's order. Each piece is one
request, with parts of any number of tensors, and is written to all its places in the output. If all
of a file is fetched, the pieces are hashed in the file's order and the SHA-256 is compared with the
Hub's: a thread waits with its piece until those before it are hashed, so each thread holds one
piece in memory.

About every second, the bytes that have arrived are synced and recorded in the journal. The next run
reads them back from the output, for the SHA-256, and fetches the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from dus_cli.common.files import sync_file, writing
from dus_cli.common.reference import ModelRef
from dus_cli.common.workers import PIECE, workers
from dus_cli.errors import (
    CheckpointError,
    ModelNotFoundError,
    OutputError,
    VerificationError,
    shown,
)
from dus_cli.hub.remote import HubFile
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.treatment import Making
from dus_cli.source.checkpoint import Shard
from dus_cli.source.headers import Blocks
from dus_cli.source.strided import rows_from_blocks
from dus_cli.writing.journal import Journal
from dus_cli.writing.moves import Move, moves
from dus_cli.writing.outputs import KEPT, ByteCounts, Outputs
from dus_cli.writing.transfer import ShardMover, check_unchanged

# Largest request in bytes, of which each thread holds one. Larger ones spend less time waiting for
# answers; all threads together hold at most `_HELD` bytes.
REQUEST = 8 << 20
_HELD = 32 << 20

# Seconds between two syncs of what has arrived; a kill loses at most these.
SYNC_EVERY = 1.0


@dataclass
class Streamed:
    """What was fetched, and which files of the base were compared with the Hub's SHA-256.

    Attributes:
        fetched: bytes that this run fetched.
        resumed: bytes that were on the disk when it began.
        checked: the files whose SHA-256 is the Hub's.
        unchecked: the other files, each with the reason.
    """

    fetched: int = 0
    resumed: int = 0
    checked: list[str] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)


class Piece(NamedTuple):
    """The bytes of a source shard from `start` to `end`, and the moves that they are parts of; a
    header has none.
    """

    start: int
    end: int
    parts: tuple[Move, ...]


def pieces(shard_moves: Sequence[Move], limit: int) -> Iterator[Piece]:
    """Cut moves, in their order, into pieces of at most `limit` contiguous bytes, without cutting
    a number that is cast or scaled.
    """
    parts: list[Move] = []
    start = end = 0
    for move in shard_moves:
        position = 0
        while position < move.length:
            if parts and (move.source_start + position != end or end - start >= limit):
                yield Piece(start, end, tuple(parts))
                parts = []
            if not parts:
                start = end = move.source_start + position
            size = min(limit - (end - start), move.length - position)
            size -= size % move.number_size
            if size == 0:  # not even one whole number fits
                yield Piece(start, end, tuple(parts))
                parts = []
                continue
            parts.append(move.part(position, size))
            position += size
            end += size
    if parts:
        yield Piece(start, end, tuple(parts))


def stream_weights(
    plan: UpscalePlan,
    ref: ModelRef,
    folder: Path,
    journal: Journal,
    *,
    jobs: int,
    on_bytes: Callable[[int], object] = lambda _: None,
) -> tuple[ByteCounts, Streamed]:
    """Write every shard of the plan into `folder` from the Hub, and flush it to the disk (fsync).

    Each job takes 8 MiB of memory, all together at most 32 MiB, or a few times that for a cast,
    whatever the size of the model.

    Args:
        plan: what to write. Shards of its base that are in the cache are copied from there.
        ref: the base on the Hub, for the other shards.
        folder: where to write; it may hold files of a killed run, if `journal` describes them.
        journal: the journal of this plan.
        jobs: number of threads, each with one request at a time.
        on_bytes: called with numbers of bytes of tensor data written, from several threads.

    Raises:
        ModelNotFoundError: the Hub does not provide the bytes, after several attempts, or a file's
            SHA-256 is not the Hub's.
        CheckpointError: a finite number is out of the range of the dtype that it is cast to.
        MissingExtraError: a cast needs torch, and it is not installed.
        OutputError: writing failed.
    """
    plan.check_libraries()
    _make_shards(plan, folder)
    tally, streamed = ByteCounts(), Streamed()
    for shard, shard_moves in moves(plan):
        if not shard_moves:
            continue
        if shard.fingerprint is not None:
            ShardMover(shard, folder, False, False, on_bytes, tally).run(shard_moves, jobs)
            check_unchanged(shard)
            continue
        try:
            one = _ShardStreamer(
                plan,
                ref,
                shard,
                folder=folder,
                journal=journal,
                on_bytes=on_bytes,
                tally=tally,
                streamed=streamed,
            )
            is_the_hubs = one.run(shard_moves, jobs)
        except ModelNotFoundError as error:
            raise ModelNotFoundError(f"{error}; {KEPT}") from error
        if not is_the_hubs:
            journal.forget(shard.name)
            raise ModelNotFoundError(
                f"{shown(shard.name)} arrived with another sha256 than the Hub gives: a bit "
                f"changed on the way or on this disk; {KEPT}, fetching that file again"
            )
    tally.zeros = sum(p.num_bytes for p in plan.placements if p.making is Making.zeros)
    on_bytes(tally.zeros)
    for name in plan.shards:
        sync_file(folder / name)
    return tally, streamed


def check_against_hub(plan: UpscalePlan, ref: ModelRef, folder: Path, *, jobs: int) -> None:
    """Compare the bytes in the output with the Hub's SHA-256, for each file of the base that is in
    it completely and not cast.

    Only headers of the base's weights are fetched.

    Raises:
        ModelNotFoundError: the Hub cannot be reached.
        VerificationError: a file's SHA-256 is not the Hub's.
    """
    for shard, shard_moves in moves(plan):
        if shard_moves and shard.fingerprint is None:
            one = _ShardStreamer(
                plan,
                ref,
                shard,
                folder=folder,
                journal=_WholeOutput(),
                on_bytes=lambda _: None,
                tally=ByteCounts(),
                streamed=Streamed(),
            )
            if not one.run(shard_moves, jobs):
                raise VerificationError(
                    f"the output holds {shown(shard.name)} with another sha256 than the Hub "
                    "gives; the disk or its driver failed, nothing was published"
                )


def _make_shards(plan: UpscalePlan, folder: Path) -> None:
    """Create each shard's file in its full length, with its header; existing bytes stay."""
    for name, layout in plan.shards.items():
        with writing(name, KEPT):
            (folder / name).touch()
            with open(folder / name, "r+b") as file:
                file.write(layout.header)
                file.truncate(layout.num_bytes)


class _Journal(Protocol):
    """The part of a journal that a streamer uses."""

    def holds(self, shard: str, start: int, end: int) -> bool: ...

    def add(self, shard: str, ranges: list[tuple[int, int]]) -> None: ...


class _WholeOutput:
    """The journal of an output that is whole."""

    def holds(self, shard: str, start: int, end: int) -> bool:  # noqa: ARG002  (the protocol's names)
        return True

    def add(self, shard: str, ranges: list[tuple[int, int]]) -> None:
        pass


class _ShardStreamer:
    """Fetches the bytes of one source shard that the output needs, with several threads."""

    def __init__(
        self,
        plan: UpscalePlan,
        ref: ModelRef,
        shard: Shard,
        folder: Path,
        journal: _Journal,
        on_bytes: Callable[[int], object],
        tally: ByteCounts,
        streamed: Streamed,
    ) -> None:
        self.shard, self.folder, self.journal = shard, folder, journal
        self.on_bytes, self.tally, self.streamed = on_bytes, tally, streamed
        # a snapshot's folder is its commit
        remote = HubFile.open(ref, plan.checkpoint.folder.name, shard.name)
        if remote is None or remote.size != shard.header.end:
            raise CheckpointError(f"{shown(shard.name)} changed on the Hub meanwhile; start again")
        self.remote = remote
        self.lock = threading.Lock()
        self.arrived: list[tuple[int, int]] = []  # written, and not yet in the journal
        self.synced = time.monotonic()
        self.syncing = threading.Lock()

    def run(self, shard_moves: Sequence[Move], jobs: int) -> bool:
        """Fetch and write; False if the whole file was fetched and its SHA-256 is not the Hub's."""
        self.request = min(REQUEST, _HELD // jobs // BLOCK * BLOCK)
        to_fetch = list(pieces(shard_moves, self.request))
        unchecked = self._why_unchecked(to_fetch)
        self.digest = _Digest() if unchecked is None else None
        if self.digest is not None:
            start = shard_moves[0].source_start
            head = [
                Piece(at, min(at + self.request, start), ()) for at in range(0, start, self.request)
            ]
            to_fetch = [*head, *to_fetch]
        queue = iter(to_fetch)
        with contextlib.ExitStack() as closing:
            closing.callback(self.remote.close)
            names = (name for move in shard_moves for name, _ in move.targets)
            self.outputs = Outputs(self.folder, names, closing, self.on_bytes, self.tally, KEPT)
            try:
                with workers(jobs) as (pool, self.stop):
                    list(pool.map(lambda _: self._work(queue), range(jobs)))
            finally:
                self._sync(at_once=True)
        if self.digest is None:
            self.streamed.unchecked[self.shard.name] = unchecked or ""
            return True
        self.streamed.checked.append(self.shard.name)
        return self.digest.hexdigest() == self.remote.sha256

    def _why_unchecked(self, to_fetch: Sequence[Piece]) -> str | None:
        """Why the file's SHA-256 cannot be computed; None if it can."""
        header = self.shard.header
        if self.remote.sha256 is None:
            return "the Hub has no sha256 of it"
        if sum(piece.end - piece.start for piece in to_fetch) != header.end - header.data_start:
            return "parts of it are not in the output, and were not fetched"
        if any(
            self._is_here(piece) and any(part.is_changed for part in piece.parts)
            for piece in to_fetch
        ):
            return "parts of it were fetched by an earlier run and changed on the way"
        return None

    def _is_here(self, piece: Piece) -> bool:
        return bool(piece.parts) and self.journal.holds(self.shard.name, piece.start, piece.end)

    def _work(self, queue: Iterator[Piece]) -> None:
        # A piece, and room for a copy of a part and for the result of a cast; page-aligned, for
        # direct I/O.
        buffer = memoryview(mmap.mmap(-1, BLOCK + 4 * self.request))
        try:
            while not self.stop.is_set():
                with self.lock:
                    piece = next(queue, None)
                if piece is None:
                    return
                self._move(piece, buffer)
        except BaseException:
            self.stop.set()
            raise
        finally:
            if self.stop.is_set() and self.digest is not None:
                self.digest.abandon()

    def _move(self, piece: Piece, buffer: memoryview) -> None:
        # The piece is placed so that blocks of the source are pages of memory, as direct I/O needs:
        # positions of source and output agree modulo a block.
        at = piece.start % BLOCK
        view = buffer[at : at + piece.end - piece.start]
        is_here = self._is_here(piece)
        if is_here:
            self._read_back(piece, view)
        else:
            self.remote.read_into(piece.start, view, self.stop)
            if self.stop.is_set():
                return
            for part in piece.parts:
                self._deliver(
                    part,
                    view[part.source_start - piece.start :][: part.length],
                    buffer[BLOCK + self.request :],
                )
        with self.lock:
            count = piece.end - piece.start
            self.streamed.resumed += count if is_here else 0
            self.streamed.fetched += 0 if is_here else count
            if piece.parts and not is_here:
                self.arrived.append((piece.start, piece.end))
        if self.digest is not None:
            self.digest.update(piece.start, view)
        self._sync()

    def _deliver(self, part: Move, view: memoryview, room: memoryview) -> None:
        if part.blocks is not None:
            self._deliver_rows(part, view, part.blocks, room)
            return
        # a copy, because numbers must start at multiples of their size in memory
        if part.cast is not None:
            numbers = room[: len(view)]
            numbers[:] = view
            self.outputs.deliver(part, 0, numbers, room[self.request :])
            return
        head = min(part.to_block(0), part.length)
        body = (part.length - head) // BLOCK * BLOCK
        for start, end in ((0, head), (head, head + body), (head + body, part.length)):
            if end > start:
                self.outputs.deliver(part, start, view[start:end], room, direct=start == head)

    def _deliver_rows(self, part: Move, view: memoryview, blocks: Blocks, room: memoryview) -> None:
        row_part = part._replace(blocks=None)
        step = max(PIECE // blocks.row, 1) * blocks.stored_row
        position = 0
        for at in range(0, len(view), step):
            rows = rows_from_blocks(view[at : at + step], blocks)
            self.outputs.deliver(row_part, position, rows, room)
            position += len(rows)

    def _read_back(self, piece: Piece, view: memoryview) -> None:
        """Read what an earlier run wrote from the output, for the file's SHA-256."""
        for part in piece.parts:
            for scale, targets in part.by_scale().items():
                way = "scaled" if scale is not None else "copied" if part.cast is None else "cast"
                self.outputs.count(**{way: part.written(part.length) * len(targets)})
            if self.digest is None:
                continue
            at = part.source_start - piece.start
            (name, start), *_ = part.targets
            try:
                is_complete = self.outputs.read(name, start, view[at : at + part.length])
            except OSError as error:
                raise OutputError(
                    f"cannot read {shown(name)}: {error.strerror}; check the disk"
                ) from error
            assert is_complete  # the file was created in its full length

    def _sync(self, *, at_once: bool = False) -> None:
        """Flush what has arrived to the disk, and record it; one thread at a time does this while
        the others continue.
        """
        if not self.syncing.acquire(blocking=at_once):
            return
        try:
            if at_once or time.monotonic() - self.synced > SYNC_EVERY:
                with self.lock:
                    arrived, self.arrived = self.arrived, []
                if arrived:
                    self.outputs.sync()
                    self.journal.add(self.shard.name, arrived)
                self.synced = time.monotonic()
        finally:
            self.syncing.release()


class _Digest:
    """SHA-256 of pieces that arrive in any order, hashed in the file's."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._position = 0
        self._abandoned = False
        self._lock = threading.Lock()
        # By where their pieces start: each is woken at its turn, and no other.
        self._waiting: dict[int, threading.Event] = {}

    def update(self, start: int, view: memoryview) -> None:
        """Hash a piece, once all before it are hashed."""
        with self._lock:
            turn = None
            if self._position != start and not self._abandoned:
                turn = self._waiting[start] = threading.Event()
        if turn is not None:
            turn.wait()
        if self._abandoned:
            return
        # outside: nobody else's turn is before this one ends, and it takes no lock of Python's
        self._hash.update(view)
        with self._lock:
            self._position += len(view)
            following = self._waiting.pop(self._position, None)
        if following is not None:
            following.set()

    def abandon(self) -> None:
        """Let nobody wait any longer: the pieces before theirs will not come."""
        with self._lock:
            self._abandoned = True
            turns = list(self._waiting.values())
        for turn in turns:
            turn.set()

    def hexdigest(self) -> str:
        return self._hash.hexdigest()
