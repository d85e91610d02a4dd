"""Compare tensors of two files byte by byte. Bytes in shared blocks of the disk are not read."""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dus_cli.common.workers import PIECE, Workers, workers
from dus_cli.errors import CheckpointError, shown
from dus_cli.planning.scaling import Scale
from dus_cli.planning.treatment import Making, made_pieces
from dus_cli.source.direct import DirectFile, aligned_room
from dus_cli.source.extents import FileBlocks
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import open_regular


class Place(NamedTuple):
    """A tensor in a file."""

    path: Path
    tensor: TensorInfo


class Comparison(NamedTuple):
    """A tensor and its source, to be compared.

    Attributes:
        left: the tensor.
        right: its source.
        right_name: the source's name in messages.
        making: how the tensor was made from the source: copied, cast, scaled or zeros.
        dtype: the tensor's dtype if it is not the source's, else None.
        scale: the factor that it was multiplied by, or None.
    """

    left: Place
    right: Place
    right_name: str
    making: Making = Making.copied
    dtype: str | None = None
    scale: Scale | None = None

    @property
    def other_kind(self) -> str | None:
        """The problem if the two have different dtypes or shapes; else None."""
        left, right, dtype = (
            self.left.tensor,
            self.right.tensor,
            self.dtype or self.right.tensor.dtype,
        )
        if (left.dtype, left.shape) == (dtype, right.shape):
            return None
        theirs = f"{self.right_name} {dtype} {list(right.shape)}"
        return f"tensor {shown(left.name)} is {left.dtype} {list(left.shape)}, {theirs}"

    def differs(self, position: int, remark: str = "") -> str:
        """The problem of a difference at this byte of the tensor."""
        return (
            f"tensor {shown(self.left.tensor.name)} differs from {self.right_name} at byte "
            f"{position}{remark}"
        )


@dataclass
class Compared:
    """How many bytes were compared by reading them, and how many are in shared blocks of the
    disk.
    """

    read: int = 0
    shared: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, *, read: int = 0, shared: int = 0) -> None:
        with self._lock:
            self.read += read
            self.shared += shared


def compare(
    pairs: Iterable[Comparison],
    jobs: int,
    on_bytes: Callable[[int], object],
    tally: Compared | None = None,
    *,
    reads_all: bool = False,
) -> Iterator[str]:
    """Compare tensors byte by byte.

    A source is read once for all tensors that are compared with it. Memory grows only with the
    number of pairs.

    Args:
        pairs: what to compare.
        jobs: number of threads.
        on_bytes: called with numbers of bytes of the left tensors that were compared.
        tally: counts the bytes.
        reads_all: also read bytes in shared blocks.

    Yields:
        A problem, in one line, for each pair that differs.
    """
    groups: dict[tuple[object, ...], list[Comparison]] = {}
    for pair in pairs:
        key = pair.right.path, pair.right.tensor.name, pair.making, pair.dtype, pair.scale
        groups.setdefault(key, []).append(pair)
    blocks = None if reads_all else FileBlocks()
    with workers(jobs) as team:
        comparer = _Comparer(on_bytes, tally or Compared(), blocks, team)
        # The largest first, so that no thread is left with much at the end; one thread alone reads
        # in the files' order.
        order = list(groups.values())
        if jobs > 1:
            order.sort(key=_bytes_to_read, reverse=True)
        found = {id(group): team.pool.submit(comparer.problems, group) for group in order}
        for group in groups.values():
            yield from found.pop(id(group)).result()


def _bytes_to_read(group: Sequence[Comparison]) -> int:
    right = group[0].right.tensor.num_bytes
    return right + sum(pair.left.tensor.num_bytes for pair in group)


class _Comparer:
    """Compares groups of pairs that have the source in common."""

    def __init__(
        self,
        on_bytes: Callable[[int], object],
        tally: Compared,
        blocks: FileBlocks | None,
        team: Workers,
    ) -> None:
        self.on_bytes, self.tally, self.blocks, self.stop = on_bytes, tally, blocks, team.stop
        self._rooms = threading.local()

    def problems(self, pairs: Sequence[Comparison]) -> list[str]:
        problem_of = {id(pair): pair.other_kind for pair in pairs}
        alike = [pair for pair in pairs if problem_of[id(pair)] is None]
        if alike:
            first = alike[0]
            is_plain = first.making is Making.copied and first.right.tensor.lies_in_order
            step = self._read_plain if is_plain else self._read_made
            try:
                step(alike, problem_of)
            except OSError as error:
                problem_of[id(first)] = (
                    f"tensor {shown(first.left.tensor.name)} cannot be read: "
                    f"{error.strerror or error}"
                )
            except CheckpointError as error:
                problem_of[id(first)] = str(error)
        return [problem for problem in problem_of.values() if problem is not None]

    def _read_plain(self, pairs: Sequence[Comparison], problem_of: dict[int, str | None]) -> None:
        right = pairs[0].right
        to_read = {id(pair): self._to_read(pair) for pair in pairs}
        if not any(to_read.values()):
            return
        ours, theirs = self._buffers()
        with contextlib.ExitStack() as closing:
            right_file = _opened(right.path, theirs, closing)
            left_files = {
                path: _opened(path, ours, closing) for path in {pair.left.path for pair in pairs}
            }
            for start, length in _pieces(to_read.values()):
                if self.stop.is_set():
                    return
                expected = right_file.read(right.tensor.start + start, length)
                for pair in pairs:
                    parts = to_read[id(pair)]
                    if problem_of[id(pair)] is None and _overlap(parts, start, length):
                        piece = left_files[pair.left.path].read(
                            pair.left.tensor.start + start, length
                        )
                        problem_of[id(pair)] = _difference(pair, start, length, piece, expected)
                        self.tally.add(read=length)
                        self.on_bytes(length)

    def _to_read(self, pair: Comparison) -> list[tuple[int, int]]:
        """The parts of a pair that are not in shared blocks of the disk, as (offset, length)."""
        left, right = pair.left, pair.right
        num_bytes = right.tensor.num_bytes
        if self.blocks is None:
            return [(0, num_bytes)] if num_bytes else []
        parts = list(
            self.blocks.not_shared(
                left.path, left.tensor.start, right.path, right.tensor.start, num_bytes
            )
        )
        shared = num_bytes - sum(length for _, length in parts)
        self.tally.add(shared=shared)
        self.on_bytes(shared)
        return parts

    def _read_made(self, pairs: Sequence[Comparison], problem_of: dict[int, str | None]) -> None:
        first = pairs[0]
        dtype = first.dtype or first.right.tensor.dtype
        position = 0
        with contextlib.ExitStack() as closing:
            right_file = closing.enter_context(open_regular(first.right.path, 0))
            left_files = {
                path: closing.enter_context(open_regular(path, 0))
                for path in {pair.left.path for pair in pairs}
            }
            for expected in made_pieces(
                right_file.fileno(), first.right.tensor, first.making, dtype, first.scale
            ):
                if self.stop.is_set():
                    return
                for pair in pairs:
                    if problem_of[id(pair)] is None:
                        file = left_files[pair.left.path].fileno()
                        piece = os.pread(file, len(expected), pair.left.tensor.start + position)
                        problem_of[id(pair)] = _difference(
                            pair, position, len(expected), piece, expected
                        )
                        self.tally.add(read=len(expected))
                        self.on_bytes(len(expected))
                position += len(expected)
        for pair in pairs:
            if problem_of[id(pair)] is None and position != pair.left.tensor.num_bytes:
                problem_of[id(pair)] = pair.differs(position, _SHORTER)

    def _buffers(self) -> tuple[memoryview, memoryview]:
        """The calling thread's two buffers, each for one piece."""
        if not hasattr(self._rooms, "pair"):
            self._rooms.pair = aligned_room(PIECE), aligned_room(PIECE)
        pair: tuple[memoryview, memoryview] = self._rooms.pair
        return pair


_SHORTER = ": the file became shorter"


def _opened(path: Path, room: memoryview, closing: contextlib.ExitStack) -> DirectFile:
    file = DirectFile(path, room)
    closing.callback(file.close)
    return file


def _pieces(parts: Iterable[Sequence[tuple[int, int]]]) -> Iterator[tuple[int, int]]:
    """The union of these parts, in order, cut into pieces of at most PIECE bytes."""
    position = 0
    for start, length in sorted(part for of_one in parts for part in of_one):
        position = max(position, start)
        while position < start + length:
            size = min(PIECE, start + length - position)
            yield position, size
            position += size


def _overlap(parts: Sequence[tuple[int, int]], start: int, length: int) -> bool:
    return any(first < start + length and start < first + size for first, size in parts)


def _difference(
    pair: Comparison,
    start: int,
    length: int,
    piece: bytes | memoryview,
    expected: bytes | memoryview,
) -> str | None:
    """The problem of a piece that begins at `start` in the tensor and should have `length` bytes;
    None if it is equal.
    """
    if len(piece) == len(expected) == length and _are_same(piece, expected):
        return None
    at = next((i for i, (a, b) in enumerate(zip(piece, expected, strict=False)) if a != b), None)
    if at is not None:
        return pair.differs(start + at)
    return pair.differs(start + min(len(piece), len(expected)), _SHORTER)


_memcmp = ctypes.CDLL(None).memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


def _are_same(left: bytes | memoryview, right: bytes | memoryview) -> bool:
    """Whether two buffers of the same length are equal. Comparing memoryviews directly is slow:
    Python compares their items one by one.
    """
    if isinstance(left, bytes) and isinstance(right, bytes):
        return left == right
    if isinstance(left, bytes) or isinstance(right, bytes):
        return bytes(left) == bytes(right)
    first, second = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (left, right))
    return int(_memcmp(first, second, len(left))) == 0
