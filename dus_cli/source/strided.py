"""The bytes of a tensor in row-major order, whatever their order in the file.

safetensors stores tensors in row-major order. A pickled checkpoint may hold a view of a storage
instead: transposed, strided, expanded (stride 0). Such a tensor is gathered in pieces, so that
memory does not grow with it; elements that are far apart are read in windows, some several times.
A tensor may also be made of blocks of one in the file: a few rows at a time are read and joined.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from dus_cli.common.workers import PIECE
from dus_cli.errors import CheckpointError, shown
from dus_cli.source.headers import DTYPE_BITS, Blocks, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# (offset, shape, strides) of a box of elements, all counted in elements.
Box = tuple[int, tuple[int, ...], tuple[int, ...]]


def is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether elements are contiguous with the last axis fastest. Strides count elements.

    >>> is_row_major((2, 3), (3, 1)), is_row_major((3, 2), (1, 3)), is_row_major((1, 3), (99, 1))
    (True, False, True)
    """
    expected = 1
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size != 1 and stride != expected:
            return 0 in shape
        expected *= size
    return True


def span(shape: Sequence[int], strides: Sequence[int]) -> int:
    """Elements of storage from the first to the last one, both included; 0 if there are none.

    >>> span((3, 2), (1, 3)), span((5, 5), (0, 0)), span((0, 3), (3, 1))
    (6, 1, 0)
    """
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def tensor_pieces(file: int, tensor: TensorInfo) -> Iterator[bytes | memoryview]:
    """The tensor's bytes in row-major order, at most 4 MiB at a time. A piece is valid until the
    next one.

    The pieces of a dense tensor end early if the file does.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: a tensor whose bytes do not lie in order lies beyond the end of the file.
    """
    if tensor.blocks is not None:
        yield from _pieces_of_blocks(file, tensor, tensor.blocks)
        return
    if tensor.strides is not None:
        yield from _gathered_pieces(file, tensor, tensor.strides)
        return
    position = 0
    while position < tensor.num_bytes:
        start, length = tensor.start + position, min(PIECE, tensor.num_bytes - position)
        piece = os.pread(file, length, start)
        # A mount may return less than requested, and a cast needs whole numbers.
        while len(piece) < length and (
            more := os.pread(file, length - len(piece), start + len(piece))
        ):
            piece += more
        if not piece:
            return
        yield piece
        position += len(piece)


def _pieces_of_blocks(file: int, tensor: TensorInfo, blocks: Blocks) -> Iterator[memoryview]:
    """A few rows at a time; if a row is longer than a piece, a part of a block at a time."""
    if max(blocks.row, blocks.stored_row) > PIECE:
        for row in range(blocks.num_rows):
            start = tensor.start + row * blocks.stored_row
            for first, end in blocks.runs():
                for at in range(first, end, PIECE):
                    yield memoryview(_read(file, start + at, min(PIECE, end - at), tensor.name))
        return
    step = PIECE // max(blocks.row, blocks.stored_row)
    for row in range(0, blocks.num_rows, step):
        count = min(step, blocks.num_rows - row)
        start = tensor.start + row * blocks.stored_row
        rows = _read(file, start, count * blocks.stored_row, tensor.name)
        yield rows_from_blocks(memoryview(rows), blocks)


def rows_from_blocks(rows: memoryview, blocks: Blocks) -> memoryview:
    """The output's rows that whole stored rows become.

    >>> bytes(rows_from_blocks(memoryview(b"abcd" b"ABCD"), Blocks(2, 4, 1, (0, 1, 2, 1, 2, 3))))
    b'abcbcdABCBCD'
    """
    runs, count = blocks.runs(), len(rows) // blocks.stored_row
    output = memoryview(bytearray(count * blocks.row))
    for row in range(count):
        source, at = row * blocks.stored_row, row * blocks.row
        for start, end in runs:
            output[at : at + end - start] = rows[source + start : source + end]
            at += end - start
    return output


def _gathered_pieces(
    file: int, tensor: TensorInfo, strides: tuple[int, ...]
) -> Iterator[memoryview]:
    import torch

    size = DTYPE_BITS[tensor.dtype] // 8
    # Elements are copied as integers of their size, which keeps every bit, also of NaNs.
    dtype = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    buffer = bytearray(PIECE)
    for offset, shape, box_strides in _boxes((0, tensor.shape, strides), PIECE // size):
        count = prod(shape)
        piece = torch.frombuffer(buffer, dtype=dtype, count=count).view(shape)
        _fill(piece, box_strides, file, tensor.start + offset * size, tensor.name)
        yield memoryview(buffer)[: count * size]


def _boxes(box: Box, limit: int) -> Iterator[Box]:
    """Cut a box into boxes of at most `limit` elements, in row-major order.

    >>> list(_boxes((0, (3, 2), (1, 3)), limit=4))
    [(0, (2, 2), (1, 3)), (2, (1, 2), (1, 3))]
    """
    offset, shape, strides = box
    if prod(shape) <= limit:
        yield box
        return
    row = prod(shape[1:])
    if row > limit:
        for index in range(shape[0]):
            yield from _boxes((offset + index * strides[0], shape[1:], strides[1:]), limit)
        return
    step = limit // row
    for index in range(0, shape[0], step):
        yield offset + index * strides[0], (min(step, shape[0] - index), *shape[1:]), strides


def _fill(piece: Tensor, strides: tuple[int, ...], file: int, start: int, name: str) -> None:
    """Fill a tensor with elements that are `strides` apart, from byte `start`.

    The window that holds them all is read at once; if it is wider than a piece, each half
    separately.
    """
    import torch

    shape, size = tuple(piece.shape), piece.element_size()
    window = span(shape, strides)
    if window * size <= PIECE:
        raw = _read(file, start, window * size, name)
        piece.copy_(torch.frombuffer(raw, dtype=piece.dtype).as_strided(shape, strides))
        return
    axis = max(range(len(shape)), key=lambda a: (shape[a] - 1) * strides[a])
    half = shape[axis] // 2
    for first, length in ((0, half), (half, shape[axis] - half)):
        _fill(
            piece.narrow(axis, first, length),
            strides,
            file,
            start + first * strides[axis] * size,
            name,
        )


def _read(file: int, start: int, length: int, name: str) -> bytearray:
    raw = bytearray(length)
    view = memoryview(raw)
    filled = 0
    while filled < length:
        count = os.preadv(file, [view[filled:]], start + filled)
        if count == 0:
            raise CheckpointError(
                f"the file of tensor {shown(name)} became shorter while it was read; copy or "
                "download it again"
            )
        filled += count
    return raw
