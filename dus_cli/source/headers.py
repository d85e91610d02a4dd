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
from functools import lru_cache
from json.encoder import encode_basestring
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple, TypeGuard

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
    metadata, tensors = _usual_entries(raw, where) or _any_entries(raw, where)
    position = tensors[-1].end if tensors else data_start
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


_Entries = tuple[Mapping[str, str], list[TensorInfo]]

_KEYS = {"dtype", "shape", "data_offsets"}

_CONTROLS = bytes(range(32))


def _usual_entries(raw: bytes, where: str) -> _Entries | None:
    """The metadata and tensors of a sound header as the library writes it: without spaces, in the
    order of the data, names without escapes. None for any other.

    A header may have 100,000 entries: this takes half the time of a JSON parser, and less memory.
    """
    try:
        text = raw.decode("utf-8").rstrip(" ")
    except UnicodeDecodeError:
        return None
    begin = text.rfind('"', 0, max(0, text.find('":{"dtype":"')))
    if begin < 0 or not text.endswith("]}}") or text.find("\\", begin) >= 0:
        return None
    metadata = _usual_metadata(text[:begin], where)
    if metadata is None or len(raw.translate(None, _CONTROLS)) != len(raw):
        return None
    tensors: list[TensorInfo] = []
    data_start, offset = 8 + len(raw), 0
    end = data_start
    for entry in text[begin:-3].split("]},"):
        quoted, _, rest = entry.partition('":{')
        described, _, offsets = rest.partition(',"data_offsets":[')
        kind = _usual_kind(described)
        if kind is None or quoted[:1] != '"' or quoted.count('"') != 1:
            return None
        start, before = end, offset
        offset += kind.num_bytes
        end = data_start + offset
        if offsets != f"{before},{offset}":
            return None
        fields = (quoted[1:], kind.dtype, kind.shape, start, end, None, None)
        tensors.append(tuple.__new__(TensorInfo, fields))  # half the time of the constructor
    names = set(map(itemgetter(0), tensors))
    if len(names) != len(tensors) or "__metadata__" in names or offset > _MAX_COUNT:
        return None
    return metadata, tensors


def _usual_metadata(text: str, where: str) -> Mapping[str, str] | None:
    """The metadata of a header that begins with this text, up to its first tensor; None if the text
    is anything else.
    """
    if text == "{":
        return {}
    try:
        value = parse_json_object(f"{text.removesuffix(',')}}}".encode(), where, is_header=True)
    except CheckpointError:
        return None
    metadata = value.pop("__metadata__", None)
    return metadata if not value and text.endswith(",") and _is_metadata(metadata) else None


@lru_cache(maxsize=1 << 12)
def _usual_kind(described: str) -> _Kind | None:
    """The kind of an entry, from the text of its dtype and shape; None if it is not sound."""
    try:
        pairs = json.loads(f"{{{described}}}", object_pairs_hook=tuple)
    except (ValueError, RecursionError):
        return None
    if [key for key, _ in pairs] != ["dtype", "shape"]:
        return None
    (_, dtype), (_, shape) = pairs
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        return None
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        return None
    total_bits = _total_bits(shape, DTYPE_BITS[dtype])
    if total_bits is None or total_bits % 8:
        return None
    return _Kind(dtype, tuple(shape), total_bits // 8)


def _is_metadata(value: object) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def _any_entries(raw: bytes, where: str) -> _Entries:
    """The metadata and tensors of a header in any layout.

    Raises:
        CheckpointError: the header is not sound.
    """
    entries = parse_json_object(raw, f"{where}: the header", is_header=True)
    metadata = entries.pop("__metadata__", None) or {}
    if not _is_metadata(metadata):
        raise CheckpointError(f"{where}: __metadata__ must map text to text")
    data_start = 8 + len(raw)
    tensors = [_checked(name, entry, data_start, where) for name, entry in entries.items()]
    tensors.sort(key=itemgetter(3, 4))
    position = data_start
    for name, _, _, start, end, *_ in tensors:
        if start != position:
            problem = "overlaps the one before it" if start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: tensor {shown(name)} {problem} (starts at {start - data_start}, "
                f"expected {position - data_start}); the file is damaged, fetch it again"
            )
        position = end
    return metadata, tensors


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _checked(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    label = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != _KEYS:
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
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


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
    name_bytes: int,
    kinds: Iterable[tuple[str, tuple[int, ...], int]],
    sizes: Iterable[int],
    *,
    block: int = 8,
    phase: int = 0,
) -> int:
    """The length of `encode_header`'s result, without its tensors' entries one by one.

    Args:
        metadata: text to text.
        name_bytes: the sum of `encoded_bytes` of the names.
        kinds: (dtype, shape, number of tensors that have both).
        sizes: the number of bytes of each tensor, in the order of their data.
        block: as for `encode_header`.
        phase: likewise.
    """
    length = len(_metadata_text(metadata).encode("utf-8")) + name_bytes + 1
    for dtype, shape, number in kinds:
        # with a comma before it, the name's quotes, a comma between the offsets, and two brackets
        length += (len(_kind_text(dtype, shape)) + 6) * number
    end, num_digits, power = 0, 1, 10
    for size in sizes:
        length += num_digits
        end += size
        while end >= power:
            num_digits, power = num_digits + 1, 10 * power
        length += num_digits
    return 8 + length + _padding(length, block, phase)


def encoded_bytes(text: str) -> int:
    """The bytes of a text in the JSON of a header, without quotes."""
    return len(encode_basestring(text).encode("utf-8")) - 2


def _padding(num_bytes: int, block: int, phase: int) -> int:
    assert block % 8 == phase % 8 == 0
    return (phase - 8 - num_bytes) % block


def _header_text(
    metadata: Mapping[str, str], tensors: Iterable[tuple[str, str, tuple[int, ...], int]]
) -> Iterator[str]:
    """The JSON piece by piece, as json.dumps would write it without spaces."""
    yield _metadata_text(metadata)
    kinds: dict[tuple[str, tuple[int, ...]], str] = {}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        kind = kinds.get((dtype, shape))
        if kind is None:
            kind = kinds[dtype, shape] = _kind_text(dtype, shape)
        yield f",{encode_basestring(name)}{kind}{offset},{offset + num_bytes}]}}"
        offset += num_bytes
    yield "}"


def _metadata_text(metadata: Mapping[str, str]) -> str:
    return '{"__metadata__":' + json.dumps(
        dict(metadata), separators=(",", ":"), ensure_ascii=False
    )


def _kind_text(dtype: str, shape: tuple[int, ...]) -> str:
    """An entry's text from its name to its offsets."""
    sizes = ",".join(map(str, shape))
    return f':{{"dtype":{encode_basestring(dtype)},"shape":[{sizes}],"data_offsets":['


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
