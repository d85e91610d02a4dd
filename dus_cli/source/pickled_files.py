"""The files that torch.save writes: a pickle that describes tensors, and where their storages are.

Since torch 1.6 (torch/serialization.py, `_save`) a zip archive whose members are in one folder,
stored and not compressed:

- `data.pkl`: the pickle; it names a tensor's storage by a key
- `data/KEY`: the bytes of that storage
- `byteorder`: little or big (since torch 2.1)

Before that, and with `_use_new_zipfile_serialization=False` (`_legacy_save`), five pickles in a
row: a magic number, a version, the machine's byte order, the pickle, the storages' keys; then for
each key, in that order, its number of elements in 8 bytes, and its bytes.

Nothing is unpickled here: `pickletools` reads the opcodes of a pickle without running it.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO, NamedTuple, cast

from dus_cli.errors import CheckpointError, shown
from dus_cli.source.headers import MAX_HEADER_BYTES
from dus_cli.source.mistaken import NUM_BYTES, not_weights

# Limit of the zip's directory, and of a pickle: each has about 150 bytes per tensor, and reading
# takes about 30 times that.
_MAX_BYTES = 16_000_000

# torch/serialization.py, MAGIC_NUMBER, pickled.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

REMEDY = "load the model in transformers and save_pretrained it"

# From a storage's key to (position in the file, bytes).
Places = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class PickledFile:
    """The content of a file around its tensor data.

    Attributes:
        pickle: the pickle, in the form that torch writes today.
        keys: the storages' keys.
        num_bytes: the file's size.
        places: where the storages are; None in the older format, where that follows from the
            storages' sizes in the pickle (`legacy_places`).
        data_start: in the older format, where the first record starts.
    """

    pickle: bytes
    keys: tuple[str, ...]
    num_bytes: int
    places: Places | None
    data_start: int


def read_pickled_file(file: IO[bytes], where: str, *, at_hand: bool) -> PickledFile:
    """Read everything but the tensor data of an open file. `at_hand` as in `parse_pickled`.

    Raises:
        CheckpointError: the file is not one that torch.save wrote, or is damaged or hostile.
        OSError: the file cannot be read.
    """
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(NUM_BYTES)
    if head.startswith(_LEGACY_START):
        return _read_legacy(file, where, num_bytes)
    if (
        not head.startswith((b"PK", b"\x80"))
        and (problem := not_weights(head, num_bytes)) is not None
    ):
        raise CheckpointError(f"{where} {problem}")
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{where} is a safetensors file under the name of a pickled one; name it *.safetensors"
        )
    return _read_archive(file, where, num_bytes, at_hand=at_hand)


class _Bounded:
    """A file that returns at most `_MAX_BYTES` at once: zipfile and pickletools trust the sizes in
    a file.
    """

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_BYTES:
            raise CheckpointError(
                f"{self._where} claims {size} bytes around its data; it is damaged, copy or "
                "download it again"
            )
        return self._file.read(size if size >= 0 else _MAX_BYTES)

    def readline(self) -> bytes:
        """Read a line, at most 4096 bytes of it: pickletools reads names so, and fsspec's files
        have no limit.
        """
        start = self.tell()
        raw = self._file.read(4096)
        length = raw.find(b"\n") + 1 or len(raw)
        self.seek(start + length)
        return raw[:length]


# --- the zip archive ----------------------------------------------------------------------------


def _read_archive(file: IO[bytes], where: str, num_bytes: int, *, at_hand: bool) -> PickledFile:
    members, directory_start = _members(file, where)
    folders = {member.filename.partition("/")[0] for member in members}
    if len(folders) != 1:
        raise CheckpointError(
            f"{where} is a zip archive, but not one that torch.save wrote; {REMEDY}"
        )
    extents: dict[str, tuple[int, int]] = {}
    for member in members:
        name = member.filename.partition("/")[2]
        if name == "constants.pkl":
            raise CheckpointError(
                f"{where} is a TorchScript archive, a program; dus reads state dicts; {REMEDY}"
            )
        if name not in ("data.pkl", "byteorder") and not name.startswith("data/"):
            continue
        if name in extents:
            raise CheckpointError(
                f"{where} holds {shown(name)} twice, and readers may use either; refusing it"
            )
        extents[name] = _extent(file, member, directory_start, where, at_hand=at_hand)
    _check_apart(extents, where)
    if "data.pkl" not in extents:
        raise CheckpointError(
            f"{where} is a zip archive without data.pkl, not what torch.save writes; {REMEDY}"
        )
    order = _content(file, extents, "byteorder", where) if "byteorder" in extents else b"little"
    if order != b"little":
        raise CheckpointError(
            f"{where} was saved on a machine of other byte order ({shown(order)}); {REMEDY}"
        )
    storages = {
        name.removeprefix("data/"): place
        for name, place in extents.items()
        if name.startswith("data/")
    }
    return PickledFile(
        _content(file, extents, "data.pkl", where), tuple(storages), num_bytes, storages, 0
    )


def _members(file: IO[bytes], where: str) -> tuple[list[zipfile.ZipInfo], int]:
    """The members of the archive, and where its directory starts."""
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Bounded(file, where))) as archive:
            return archive.infolist(), archive.start_dir
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        IndexError,
    ) as error:
        raise CheckpointError(
            f"{where} is not a zip archive as torch.save writes it ({shown(error)}); it is "
            "truncated or damaged, copy or download it again"
        ) from None


def _extent(
    file: IO[bytes], member: zipfile.ZipInfo, directory_start: int, where: str, *, at_hand: bool
) -> tuple[int, int]:
    """(position, bytes) of a member's content."""
    label = f"{where}: {shown(member.filename)}"
    is_encrypted = member.flag_bits & 1
    if (
        member.compress_type != zipfile.ZIP_STORED
        or is_encrypted
        or member.compress_size != member.file_size
    ):
        raise CheckpointError(
            f"{label} is compressed or encrypted, which torch.save never does; refusing it"
        )
    position = member.header_offset
    size = member.file_size
    start = _usual_start(member)
    if 0 <= position < directory_start and at_hand:
        file.seek(position)
        # a local file header; it ends with the lengths of the name and the extra field
        local = file.read(30)
        if len(local) < 30 or not local.startswith(b"PK\3\4"):
            raise CheckpointError(
                f"{label} is not where the directory says; the file is damaged, fetch it again"
            )
        start = position + 30 + sum(struct.unpack("<HH", local[26:30]))
    if not 0 <= position <= start <= start + size <= directory_start:
        raise CheckpointError(
            f"{label} reaches beyond the data; the file is truncated or damaged, fetch it again"
        )
    return start, size


def _usual_start(member: zipfile.ZipInfo) -> int:
    """Where torch.save makes a member's content start: at a multiple of 64 (`getPadding` in
    caffe2/serialize).
    """
    start = member.header_offset + 30 + len(member.filename.encode()) + 4
    limit = 0xFFFFFFFF  # from here on zip needs 64-bit fields, which come before the padding
    if member.file_size >= limit or member.header_offset >= limit:
        start += 4 + 16 * (member.file_size >= limit) + 8 * (member.header_offset >= limit)
    return -(-start // 64) * 64


def _check_apart(extents: Places, where: str) -> None:
    end = 0
    for name, (start, size) in sorted(extents.items(), key=lambda item: (item[1], item[0])):
        if start < end:
            raise CheckpointError(
                f"{where}: {shown(name)} overlaps the member before it; refusing it"
            )
        end = start + size


def _content(file: IO[bytes], extents: Places, name: str, where: str) -> bytes:
    start, size = extents[name]
    if size > _MAX_BYTES:
        raise CheckpointError(
            f"{where}: {name} has {size} bytes, more than any state dict needs; refusing it"
        )
    file.seek(start)
    raw = file.read(size)
    if len(raw) != size:
        raise CheckpointError(
            f"{where} became shorter while it was read; copy or download it again"
        )
    return raw


# --- the format of before torch 1.6 --------------------------------------------------------------


class _Skipped(NamedTuple):
    """A pickle whose opcodes were read: its place, the opcodes' names, and the texts in it."""

    start: int
    end: int
    opcodes: frozenset[str]
    texts: tuple[str, ...]


def _read_legacy(file: IO[bytes], where: str, num_bytes: int) -> PickledFile:
    file.seek(0)
    _magic, _version, machine, described, keys = [
        _skip_pickle(_Bounded(file, where), where) for _ in range(5)
    ]
    if "NEWFALSE" in machine.opcodes:  # {"little_endian": False, …}
        raise CheckpointError(f"{where} was saved on a machine of other byte order; {REMEDY}")
    file.seek(described.start)
    raw = _as_today(file.read(described.end - described.start), where)
    return PickledFile(raw, keys.texts, num_bytes, None, keys.end)


def _skip_pickle(file: _Bounded, where: str) -> _Skipped:
    start = file.tell()
    opcodes: set[str] = set()
    texts: list[str] = []
    try:
        for opcode, argument, position in pickletools.genops(cast("IO[bytes]", file)):
            opcodes.add(opcode.name)
            if isinstance(argument, str):
                texts.append(argument)
            if position is not None and position - start > _MAX_BYTES:
                raise CheckpointError(
                    f"{where} holds a pickle of more than {_MAX_BYTES} bytes; refusing it"
                )
    except (ValueError, IndexError, struct.error, OverflowError) as error:
        raise CheckpointError(
            f"{where} is damaged ({shown(error)}); copy or download it again"
        ) from None
    return _Skipped(start, file.tell(), frozenset(opcodes), tuple(texts))


def _as_today(raw: bytes, where: str) -> bytes:
    """The pickle in the form that torch writes today: without the last item of the tuple that
    names a storage.

    That item was for views of storages, and has been None since torch 0.4.
    """
    kept, position = [], 0
    # the last two opcodes and their positions, without those that only memoise
    last: list[tuple[str, int]] = []
    for opcode, _, at in pickletools.genops(raw):
        assert at is not None
        if opcode.name == "BINPERSID":
            if [name for name, _ in last] != ["NONE", "TUPLE"]:
                raise CheckpointError(
                    f"{where} names its storages in a way that torch does not; {REMEDY}"
                )
            kept.append(raw[position : last[0][1]])
            position = last[0][1] + 1
        if opcode.name not in ("BINPUT", "LONG_BINPUT"):
            last = [*last[-1:], (opcode.name, at)]
    return b"".join([*kept, raw[position:]])


def legacy_places(
    file: IO[bytes] | None, saved: PickledFile, sizes: Mapping[str, int], where: str
) -> Places:
    """Where the storages of a file in the older format are.

    Args:
        file: the file, to check each record's length against the pickle; None to skip the check.
        saved: the file's content around the data.
        sizes: bytes of each storage, by the pickle.
        where: the file's name in messages.

    Raises:
        CheckpointError: the records are not those that the pickle describes.
        OSError: the file cannot be read.
    """
    places: dict[str, tuple[int, int]] = {}
    position = saved.data_start
    for key in saved.keys:
        if key in places or key not in sizes:
            raise CheckpointError(
                f"{where} holds data that belongs to no tensor of its own; {REMEDY}"
            )
        size = sizes[key]
        if file is not None:
            file.seek(position)
            (num_elements,) = struct.unpack("<Q", file.read(8).ljust(8, b"\xff"))
            is_whole = size % num_elements == 0 if num_elements else size == 0
            if not is_whole:
                raise CheckpointError(f"{where} is truncated or damaged, copy or download it again")
        places[key] = (position + 8, size)
        position += 8 + size
    if position != saved.num_bytes:
        state = "truncated" if position > saved.num_bytes else "followed by other data"
        raise CheckpointError(
            f"{where} has {saved.num_bytes} bytes and its pickle describes {position}: it is "
            f"{state}; copy or download it again"
        )
    return places
