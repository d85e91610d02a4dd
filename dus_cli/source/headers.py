"""The safetensors file format: read a header strictly, write one that lets the data be cloned.

Format (https://huggingface.co/docs/safetensors, and `validate` in the library's tensor.rs):

- 8 bytes: N, the header's length, little-endian
- N bytes: a JSON object, name -> {dtype, shape, data_offsets}; `__metadata__` maps text to text;
  it may be padded at its end with spaces
- the rest: the tensors' data, without holes or overlaps, `data_offsets` counting from its start

Whatever this reader accepts, the library accepts; the tests hold that on thousands of mutants.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.json_objects import parse_json_object
from dus_cli.source.mistaken import NUM_BYTES, not_weights
from dus_cli.source.reading import open_regular, reading

# The library's own limit, MAX_HEADER_SIZE.
MAX_HEADER_BYTES = 100_000_000

# The library counts with 64-bit machine words and refuses what overflows them.
_MAX_COUNT = 2**64 - 1

# Bits per element. F4 and F6 are packed: two, or four, elements share bytes.
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


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its header describes it. `start` and `end` are byte positions in the file.

    `strides`, in elements, are those of a tensor whose bytes do not lie in row-major order, which only
    a pickled checkpoint has (see `strided`): its first element is at `start`, and `end` is where it
    would end if they did.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None

    @property
    def num_bytes(self) -> int:
        return self.end - self.start

    @property
    def num_elements(self) -> int:
        return self.num_bytes * 8 // DTYPE_BITS[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """A header: where the data starts, the file's size and, in file order, which tensors lie there."""

    data_start: int
    end: int
    metadata: Mapping[str, str]
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path, where: str | None = None) -> Header:
    """Read and check the header of a safetensors file, without touching the data.

    Args:
        path: the file.
        where: what to call it in messages; its name by default.

    Raises:
        CheckpointError: the file is not sound; one message for each way it can be unsound.
    """
    where = where or shown(path.name)
    with reading(where), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(NUM_BYTES)
        length = header_length(head, size, where)
        file.seek(8)
        raw = file.read(length)
    if len(raw) != length:
        raise CheckpointError(f"{where} became shorter while it was read; copy or download it again")
    return parse_header(raw, size, where)


def header_length(head: bytes, file_size: int, where: str) -> int:
    """N of a file of `file_size` bytes that starts with `head`: its first `mistaken.NUM_BYTES`, or more.

    Raises:
        CheckpointError: something else than safetensors; no room for a header; or a length beyond the file or the
            format's limit.
    """
    if head[8:9] != b"{" and (what := not_weights(head[:NUM_BYTES], file_size)) is not None:
        raise CheckpointError(f"{where} {what}")
    if len(head) < 8:
        raise CheckpointError(
            f"{where} has {file_size} bytes, too few for a safetensors file; copy or download it again"
        )
    (length,) = struct.unpack("<Q", head[:8])
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes, over the format's limit of {MAX_HEADER_BYTES}; "
            "it is damaged or no safetensors file"
        )
    if length > file_size - 8:
        raise CheckpointError(
            f"{where} claims a header of {length} bytes but has only {file_size} bytes in all; "
            "it is truncated, copy or download it again"
        )
    return int(length)


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the JSON of a header against the file's size: see the module's text for what must hold."""
    data_start = 8 + len(raw)
    if not raw.startswith(b"{"):
        raise CheckpointError(f"{where}: its header does not start with '{{'; it is no safetensors file")
    entries = parse_json_object(raw, f"{where}: the header", is_header=True)
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(f"{where}: __metadata__ must map text to text")
    tensors = sorted(
        (_tensor(name, entry, data_start, where) for name, entry in entries.items()),
        key=lambda tensor: (tensor.start, tensor.end),
    )
    position = data_start
    for tensor in tensors:
        if tensor.start != position:
            kind = "overlaps the one before it" if tensor.start < position else "leaves a gap before it"
            raise CheckpointError(
                f"{where}: tensor {shown(tensor.name)} {kind} (starts at {tensor.start - data_start}, "
                f"expected {position - data_start}); the file is damaged, fetch it again"
            )
        position = tensor.end
    if position != file_size:
        state = "truncated" if file_size < position else "followed by other data"
        raise CheckpointError(
            f"{where} has {file_size} bytes but its header accounts for {position}: it is {state}; "
            "copy or download it again"
        )
    return Header(data_start, position, metadata, tuple(tensors))


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_COUNT


def _tensor(name: str, entry: object, data_start: int, where: str) -> TensorInfo:
    label = f"{where}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{label} must have just dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = DTYPE_BITS.get(dtype) if isinstance(dtype, str) else None
    if bits is None:
        raise CheckpointError(
            f"{label} has the dtype {shown(dtype)}, which safetensors does not define (as far as this dus "
            f"knows); known are {', '.join(DTYPE_BITS)}"
        )
    if not isinstance(shape, list) or not all(map(_is_count, shape)):
        raise CheckpointError(f"{label} has the shape {shown(shape)}, not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise CheckpointError(f"{label} has the data_offsets {shown(offsets)}, not [start, end]")
    total_bits = bits
    num_elements = 1
    for size in shape:
        num_elements *= size
        total_bits = num_elements * bits
        if total_bits > _MAX_COUNT:
            raise CheckpointError(f"{label}: the shape {shown(shape)} overflows 64 bits")
    start, end = offsets
    if total_bits % 8 or end - start != total_bits // 8:
        raise CheckpointError(
            f"{label}: data_offsets hold {end - start} bytes but shape {shown(shape)} of {dtype} needs "
            f"{total_bits / 8:g}; the file is damaged, fetch it again"
        )
    return TensorInfo(name, dtype, tuple(shape), data_start + start, data_start + end)


def encode_header(
    metadata: Mapping[str, str],
    tensors: Iterable[tuple[str, str, tuple[int, ...], int]],
    block: int = 8,
    phase: int = 0,
) -> bytes:
    """The bytes before the data: length, JSON, and spaces up to a data start of `phase` modulo `block`.

    Tensors are (name, dtype, shape, number of bytes) in the order of their data. A data start that
    agrees with the source's modulo the file system's block is what lets the data be cloned.
    `block` and `phase` must be multiples of 8, the alignment that the format asks for.
    """
    assert block % 8 == phase % 8 == 0
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape, num_bytes in tensors:
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + num_bytes)}
        offset += num_bytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    padding = (phase - 8 - len(text)) % block
    return struct.pack("<Q", len(text) + padding) + text + b" " * padding


def is_aligned(tensors: Iterable[tuple[str, int]]) -> bool:
    """Whether each of these (dtype, number of bytes), laid end to end, starts at a multiple of its element.

    The library sorts by falling element size so that this holds; torch cannot view a tensor otherwise.
    """
    offset = 0
    for dtype, num_bytes in tensors:
        if offset % max(1, DTYPE_BITS[dtype] // 8):
            return False
        offset += num_bytes
    return True
