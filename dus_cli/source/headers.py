"""The safetensors file format: read a header strictly, and write one that lets the data be cloned.

Format (https://huggingface.co/docs/safetensors, and `validate` in the library's tensor.rs):

- 8 bytes: N, the header's length, little-endian
- N bytes: a JSON object, name -> {dtype, shape, data_offsets}; `__metadata__` maps text to text;
  it may be padded at its end with spaces
- the rest: the tensors' data, without holes or overlaps, `data_offsets` counting from its start

Whatever this reader accepts, the library accepts; the tests check that on thousands of mutants.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.json_objects import parse_json_object
from dus_cli.source.mistaken import NUM_BYTES, not_weights
from dus_cli.source.reading import open_regular, reading

# The library's own limit, MAX_HEADER_SIZE.
MAX_HEADER_BYTES = 100_000_000

# The library counts with 64-bit machine words and refuses what overflows them.
_MAX_COUNT = 2**64 - 1

# Bits per element. F4 and F6 are packed: two or four elements share bytes.
DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}


class Blocks(NamedTuple):
    """The blocks of a stored tensor that make up an output tensor, row by row.

    A stored row has `num_stored` blocks of `num_bytes` bytes each. A row of the output has one
    block for each entry of `order`, the number of a block in the same stored row. A tensor whose
    blocks lie along its first axis is one row.
    """

    num_rows: int
    num_stored: int
    num_bytes: int
    order: tuple[int, ...]

    @property
    def stored_row(self) -> int:
        """Bytes of a row in the file."""
        return self.num_stored * self.num_bytes

    @property
    def row(self) -> int:
        """Bytes of a row of the output."""
        return len(self.order) * self.num_bytes

    def runs(self) -> list[tuple[int, int]]:
        """The ranges of a stored row, as (start, end) in bytes, that make up a row of the output.

        Blocks that are neighbours in both are one range.

        >>> Blocks(1, 4, 10, (0, 1, 2, 1, 2, 3)).runs()
        [(0, 30), (10, 40)]
        """
        runs: list[tuple[int, int]] = []
        for block in self.order:
            start = block * self.num_bytes
            if runs and runs[-1][1] == start:
                runs[-1] = (runs[-1][0], start + self.num_bytes)
            else:
                runs.append((start, start + self.num_bytes))
        return runs


class TensorInfo(NamedTuple):
    """A tensor as its header describes it. `start` and `end` are byte positions in the file.

    `strides`, in elements, are None for a tensor in row-major order. Only a pickled checkpoint has
    others (see `strided`): then the first element is at `start`, and `end` is where the tensor
    would end in row-major order. The same holds with `blocks`: this tensor then consists of blocks
    of the stored one.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None
    blocks: Blocks | None = None

    @property
    def lies_in_order(self) -> bool:
        """Whether the tensor is the bytes of the file from `start` to `end`, unchanged."""
        return self.strides is None and self.blocks is None

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        return self.num_bytes * 8 // DTYPE_BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A header: where the data starts, the file's size (`end`), and the tensors in file order."""

    data_start: int
    end: int
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path, where: str | None = None) -> Header:
    """Read and check the header of a safetensors file, without touching the data.

    Args:
        path: the file.
        where: the file's name in messages; by default its own.

    Raises:
        CheckpointError: the file is not sound; each kind of damage has its own message.
    """
    where = where or shown(path.name)
    return parse_header(*header_bytes(path, where), where)


def header_bytes(path: Path, where: str) -> tuple[bytes, int]:
    """The JSON of a safetensors file's header, and the file's size in bytes.

    Raises:
        CheckpointError: the file cannot be read, or is too short for a header.
    """
    with reading(where), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(NUM_BYTES)
        length = header_length(head, size, where)
        file.seek(8)
        raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(
            f"{where} became shorter while it was read; copy or download it again"
        )
    return raw, size


def header_length(head: bytes, file_size: int, where: str) -> int:
    """The length N of the header of a file of `file_size` bytes.

    `head` is the first `mistaken.NUM_BYTES` of the file, or more.

    Raises:
        CheckpointError: the file is not safetensors, or N is beyond the file or the format's limit.
    """
    if head[8:9] != b"{" and (problem := not_weights(head[:NUM_BYTES], file_size)) is not None:
        raise CheckpointError(f"{where} {problem}")
    if len(head) < 8:
        raise CheckpointError(
            f"{where} has {file_size} bytes, too few for a safetensors file; copy or download it "
            "again"
        )
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes, over the format's limit of "
            f"{MAX_HEADER_BYTES}; it is damaged or not a safetensors file"
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes but has only {file_size} bytes in all; "
            "it is truncated, copy or download it again"
        )
    return int(length)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Parse the JSON of a header, and check it against the format (see the module's docstring).

    Args:
        raw: the JSON, with its padding.
        file_size: in bytes.
        where: the file's name in messages.

    Raises:
        CheckpointError: the header is not sound, or does not fit the file's size.
    """
    data_start = 8 + len(raw)
    if not raw.startswith(b"{"):
        raise CheckpointError(
            f"{where}: its header does not start with '{{'; it is not a safetensors file"
        )
    entries = parse_json_object(raw, f"{where}: the header", is_header=True, on_object=_Entries())
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map text to text")
    described = sorted(
        ((*_checked(name, entry, where), name) for name, entry in entries.items()),
        key=itemgetter(0, 1),
    )
    del entries
    tensors: list[TensorInfo] = []
    position = data_start
    for start, end, kind, name in described:
        if data_start + start != position:
            problem = (
                "overlaps the one before it"
                if data_start + start < position
                else "leaves a gap before it"
            )
            raise CheckpointError(
                f"{where}: tensor {shown(name)} {problem} (starts at {start}, "
                f"expected {position - data_start}); the file is damaged, fetch it again"
            )
        first, position = position, data_start + end
        tensors.append(TensorInfo(name, kind.dtype, kind.shape, first, position))
    if position != file_size:
        state = "truncated" if file_size < position else "followed by other data"
        raise CheckpointError(
            f"{where} has {file_size} bytes but its header accounts for {position}: it is {state}; "
            "copy or download it again"
        )
    return Header(data_start, position, metadata, tuple(tensors))


class _Kind(NamedTuple):
    """A dtype and a shape, which many tensors share, and the size in bytes that follows."""

    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


# A sound entry: its start and end in the data, and its kind.
_Entry = tuple[int, int, _Kind]

_KEYS = ["dtype", "shape", "data_offsets"]


class _Entries:
    """Converts each entry of a header while the JSON is parsed, so that a kind is kept once.

    A header of 100,000 tensors has about a hundred kinds. An entry that is not in the form that the
    library writes is left as it is, for `_checked`.
    """

    def __init__(self) -> None:
        self._kinds: dict[tuple[str, tuple[int, ...]], _Kind] = {}

    def __call__(self, pairs: list[tuple[str, Any]]) -> _Entry | None:
        if len(pairs) != 3 or [key for key, _ in pairs] != _KEYS:
            return None
        (_, dtype), (_, shape), (_, offsets) = pairs
        if (
            type(dtype) is not str
            or type(shape) is not list
            or type(offsets) is not list
            or len(offsets) != 2
        ):
            return None
        start, end = offsets
        for number in (*shape, start, end):
            if type(number) is not int:
                return None
        kind = self._kinds.get((dtype, tuple(shape)))
        if kind is None:
            if dtype not in DTYPE_BITS or not all(map(_is_count, shape)):
                return None
            total_bits = _total_bits(shape, DTYPE_BITS[dtype])
            if total_bits is None or total_bits % 8:
                return None
            kind = self._kinds[dtype, tuple(shape)] = _Kind(dtype, tuple(shape), total_bits // 8)
        return (
            (start, end, kind)
            if start >= 0 and end - start == kind.num_bytes and end <= _MAX_COUNT
            else None
        )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _checked(name: str, entry: object, where: str) -> _Entry:
    if type(entry) is tuple:
        return entry
    label = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != set(_KEYS):
        raise CheckpointError(f"{label} must have just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise CheckpointError(
            f"{label} has the dtype {shown(dtype)}, which safetensors does not define (as far as "
            f"this dus knows); known are {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{label} has the shape {shown(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{label} has the data_offsets {shown(offsets)}, not [start, end]")
    start, end = offsets
    total_bits = _total_bits(shape, DTYPE_BITS[dtype])
    if total_bits is None:
        raise CheckpointError(f"{label}: the shape {shown(shape)} overflows 64 bits")
    if total_bits % 8 or end - start != total_bits // 8:
        raise CheckpointError(
            f"{label}: data_offsets hold {end - start} bytes but shape {shown(shape)} of {dtype} "
            f"needs {total_bits / 8:g}; the file is damaged, fetch it again"
        )
    return start, end, _Kind(dtype, tuple(shape), total_bits // 8)


def _total_bits(shape: list[int], bits: int) -> int | None:
    """The bits of a tensor; None if they are more than the library can count."""
    num_elements = 1
    for size in shape:
        num_elements *= size
        if num_elements * bits > _MAX_COUNT:
            return None
    return num_elements * bits


def encode_header(
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    block: int = 8,
    phase: int = 0,
) -> bytes:
    """The bytes before the data: the length, the JSON, and spaces up to the start of the data.

    The data starts at `phase` modulo `block`: it can be cloned only if this agrees with the source,
    modulo the file system's block.

    Args:
        metadata: text to text.
        tensors: (name, dtype, shape, number of bytes), in the order of their data.
        block: a multiple of 8, the alignment that the format requires.
        phase: likewise.
    """
    text = "".join(_header_text(metadata, tensors)).encode("utf-8")
    padding = _padding(len(text), block, phase)
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def header_size(
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    block: int = 8,
    phase: int = 0,
) -> int:
    """The length of `encode_header`'s result, in memory that does not grow with the tensors."""
    length = sum(
        len(t) if t.isascii() else len(t.encode("utf-8")) for t in _header_text(metadata, tensors)
    )
    return 8 + length + _padding(length, block, phase)


def _padding(num_bytes: int, block: int, phase: int) -> int:
    assert block % 8 == phase % 8 == 0
    return (phase - 8 - num_bytes) % block


def _header_text(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]
) -> Iterator[str]:
    """The JSON piece by piece, as json.dumps would write it without spaces."""
    yield '{"__metadata__":' + json.dumps(dict(metadata), separators=(",", ":"), ensure_ascii=False)
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        kind = kinds.get((dtype, shape))
        if kind is None:
            sizes = ",".join(map(str, shape))
            kind = kinds[dtype, shape] = (
                f':{{"dtype":{encode_basestring(dtype)},"shape":[{sizes}],"data_offsets":['
            )
        yield f",{encode_basestring(name)}{kind}{offset},{offset + num_bytes}]}}"
        offset += num_bytes
    yield "}"


def is_aligned(tensors: Iterable[tuple[str, int]]) -> bool:
    """Whether each tensor, (dtype, number of bytes), starts at a multiple of its element size if
    they are laid end to end.

    torch cannot view a tensor otherwise; the library sorts by falling element size for that reason.
    """
    offset = 0
    for dtype, num_bytes in tensors:
        if offset % max(1, DTYPE_BITS[dtype] // 8):
            return False
        offset += num_bytes
    return True
