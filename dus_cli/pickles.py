"""`pytorch_model*.bin`, the pickled checkpoints of torch.save: where each tensor's bytes lie. No weights are read.

Format (torch/serialization.py, `_save`, since torch 1.6): a zip archive whose members lie in one folder,
stored and not compressed:

- `data.pkl`: a pickle of the state dict; it describes a tensor by its storage's key, dtype, shape,
  strides and offset
- `data/KEY`: the bytes of a storage; tensors may share one, or see only a part of it
- `byteorder`: little or big (since torch 2.1)

So a contiguous tensor is a range of the file, like in safetensors, and is moved by the same code.

A pickle is a program. This one is never run: its imports are read first and held against the few that
plain weights need, then torch unpickles it `weights_only`, onto the meta device, which holds no data.
What torch gets is an archive made here, with an empty member for each storage; the offset that torch
notes for a storage (`_checkpoint_offset`, torch 2.6's "Layout Control" in its notes on serialization)
then tells its key, and nothing of a hostile zip file reaches torch.
"""

from __future__ import annotations

import io
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.headers import Header, TensorInfo
from dus_cli.strided import is_row_major, span

if TYPE_CHECKING:
    from torch import Tensor

# Of the zip's directory and of data.pkl: each holds some 150 bytes a tensor. Reading takes about 30 times that.
_MAX_BYTES = 16_000_000

# safetensors counts with 64-bit machine words, torch with signed ones.
_MAX_COUNT = 2**63 - 1

# torch/serialization.py, MAGIC_NUMBER, as the first pickle of a file from before torch 1.6.
_LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."

# https://docs.pytorch.org/docs/stable/tensor_attributes.html to safetensors' names (its torch.py, _TYPES).
_DTYPES = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "int16": "I16",
    "uint16": "U16",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "uint32": "U32",
    "float32": "F32",
    "complex64": "C64",
    "float64": "F64",
    "int64": "I64",
    "uint64": "U64",
}

# All that a pickled state dict of plain tensors imports, storage classes and dtypes of torch aside.
_NAMES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch._utils", "_rebuild_tensor"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_tensor_v3"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.storage", "UntypedStorage"),
    }
)

_REMEDY = "load the model in transformers and save_pretrained it"


@dataclass(frozen=True)
class _Archive:
    """The members that matter: `pickle` is data.pkl, `storages` maps keys to (position in the file, bytes)."""

    pickle: bytes
    storages: Mapping[str, tuple[int, int]]
    num_bytes: int


def read_pickled(path: Path, where: str) -> Header:
    """Where each tensor of a torch.save file lies, without touching the data.

    Raises:
        CheckpointError: the file is not sound, not a plain state dict or hostile, or torch is not installed.
    """
    try:
        with path.open("rb") as file:
            return parse_pickled(file, where)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read: {error.strerror or error}") from error


def parse_pickled(file: IO[bytes], where: str, *, at_hand: bool = True) -> Header:
    """The same of an open file.

    Args:
        file: opened for reading; it must seek.
        where: what to call it in messages.
        at_hand: look where each storage starts. Without, its start is taken to be where torch.save puts
            it, which saves a request for each storage of a file on the Hub.

    Raises:
        CheckpointError: as `read_pickled`.
        OSError: the file cannot be read.
    """
    archive = _read_archive(file, where, at_hand=at_hand)
    _check_imports(archive.pickle, where)
    tensors = _unpickle(archive, where)
    return Header(0, archive.num_bytes, {}, tuple(sorted(tensors, key=lambda t: (t.start, t.end, t.name))))


# --- the zip archive ----------------------------------------------------------------------------


class _Bounded:
    """A file that refuses to give more than `_MAX_BYTES` at once: zipfile believes any size it is told."""

    def __init__(self, file: IO[bytes], where: str) -> None:
        self._file, self._where = file, where
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        if size > _MAX_BYTES:
            raise CheckpointError(
                f"{self._where} claims a directory of {size} bytes; it is damaged, copy or download it again"
            )
        return self._file.read(size if size >= 0 else _MAX_BYTES)


def _read_archive(file: IO[bytes], where: str, *, at_hand: bool) -> _Archive:
    members, directory_start, num_bytes = _members(file, where)
    folders = {member.filename.partition("/")[0] for member in members}
    if len(folders) != 1:
        raise CheckpointError(f"{where} is a zip archive, but not one that torch.save wrote; {_REMEDY}")
    found: dict[str, tuple[int, int]] = {}
    for member in members:
        name = member.filename.partition("/")[2]
        if name == "constants.pkl":
            raise CheckpointError(f"{where} is a TorchScript archive, a program; dus reads state dicts; {_REMEDY}")
        if name not in ("data.pkl", "byteorder") and not name.startswith("data/"):
            continue
        if name in found:
            raise CheckpointError(f"{where} holds {shown(name)} twice; which one counts is not defined, refusing it")
        found[name] = _extent(file, member, directory_start, where, at_hand=at_hand)
    _check_apart(found, where)
    if "data.pkl" not in found:
        raise CheckpointError(f"{where} is a zip archive without data.pkl, not what torch.save writes; {_REMEDY}")
    order = _content(file, found, "byteorder", where) if "byteorder" in found else b"little"
    if order != b"little":
        raise CheckpointError(f"{where} was saved on a machine of other byte order ({shown(order)}); {_REMEDY}")
    storages = {name.removeprefix("data/"): place for name, place in found.items() if name.startswith("data/")}
    return _Archive(_content(file, found, "data.pkl", where), storages, num_bytes)


def _members(file: IO[bytes], where: str) -> tuple[list[zipfile.ZipInfo], int, int]:
    """The members, where the directory starts, and the file's size."""
    num_bytes = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(cast("IO[bytes]", _Bounded(file, where))) as archive:
            return archive.infolist(), archive.start_dir, num_bytes
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error, IndexError) as error:
        file.seek(0)
        if file.read(len(_LEGACY_START)) == _LEGACY_START:
            raise CheckpointError(
                f"{where} is in the format of torch before 1.6, which cannot be read in pieces; load it with "
                "torch.load(…, weights_only=True) and torch.save it again"
            ) from None
        raise CheckpointError(
            f"{where} is no zip archive as torch.save writes it ({shown(error)}); it is truncated or damaged, copy "
            "or download it again"
        ) from None


def _extent(
    file: IO[bytes], member: zipfile.ZipInfo, directory_start: int, where: str, *, at_hand: bool
) -> tuple[int, int]:
    """(position, bytes) of a member's content."""
    label = f"{where}: {shown(member.filename)}"
    is_encrypted = member.flag_bits & 1
    if member.compress_type != zipfile.ZIP_STORED or is_encrypted or member.compress_size != member.file_size:
        raise CheckpointError(f"{label} is compressed or encrypted, which torch.save never does; refusing it")
    position = member.header_offset
    size = member.file_size
    start = _usual_start(member)
    if 0 <= position < directory_start and at_hand:
        file.seek(position)
        local = file.read(30)  # a local file header; it ends with the lengths of the name and the extra field
        if len(local) < 30 or not local.startswith(b"PK\3\4"):
            raise CheckpointError(f"{label} is not where the directory says; the file is damaged, fetch it again")
        start = position + 30 + sum(struct.unpack("<HH", local[26:30]))
    if not 0 <= position <= start <= start + size <= directory_start:
        raise CheckpointError(f"{label} reaches beyond the data; the file is truncated or damaged, fetch it again")
    return start, size


def _usual_start(member: zipfile.ZipInfo) -> int:
    """Where torch.save lets a member's content start: at a multiple of 64 (`getPadding` in caffe2/serialize)."""
    start = member.header_offset + 30 + len(member.filename.encode()) + 4
    limit = 0xFFFFFFFF  # from here on zip needs 64-bit fields, which stand before the padding
    if member.file_size >= limit or member.header_offset >= limit:
        start += 4 + 16 * (member.file_size >= limit) + 8 * (member.header_offset >= limit)
    return -(-start // 64) * 64


def _check_apart(found: Mapping[str, tuple[int, int]], where: str) -> None:
    end = 0
    for name, (start, size) in sorted(found.items(), key=lambda item: (item[1], item[0])):
        if start < end:
            raise CheckpointError(f"{where}: {shown(name)} overlaps the member before it; refusing it")
        end = start + size


def _content(file: IO[bytes], found: Mapping[str, tuple[int, int]], name: str, where: str) -> bytes:
    start, size = found[name]
    if size > _MAX_BYTES:
        raise CheckpointError(f"{where}: {name} has {size} bytes, more than any state dict needs; refusing it")
    file.seek(start)
    raw = file.read(size)
    if len(raw) != size:
        raise CheckpointError(f"{where} became shorter while it was read; copy or download it again")
    return raw


# --- the pickle ---------------------------------------------------------------------------------


def _check_imports(raw: bytes, where: str) -> None:
    """Hold that the pickle imports nothing but what plain tensors need. It is read, not run.

    Raises:
        CheckpointError: it does, or it is no pickle, or of a protocol that hides what it imports.
    """
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                if not _is_plain(module, name):
                    raise _foreign(module, name, where)
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(
                    f"{where} is a pickle of a protocol that torch's weights_only does not read ({opcode.name}); "
                    f"{_REMEDY}"
                )
    except (ValueError, IndexError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: data.pkl is no pickle ({shown(error)}); the file is damaged, fetch it again"
        ) from None


def _is_plain(module: str, name: str) -> bool:
    if (module, name) in _NAMES:
        return True
    # A storage class such as FloatStorage, which torch replaces with its dtype; or a dtype, refused later by tensor.
    return module == "torch" and (name in _DTYPES or name.endswith("Storage") or name.startswith(("float", "complex")))


def _foreign(module: str, name: str, where: str) -> CheckpointError:
    what = shown(f"{module}.{name}")
    if module.split(".", maxsplit=1)[0] == "torch":
        return CheckpointError(
            f"{where} holds more than plain tensors ({what}), which safetensors has no place for; {_REMEDY}"
        )
    return CheckpointError(
        f"{where} is a pickle that imports {what}, which weights have no need of: refused, and none of it was run; "
        "do not load this file elsewhere unless you trust whoever made it"
    )


def _unpickle(archive: _Archive, where: str) -> Iterable[TensorInfo]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{where} is pickled, and reading it takes torch: pip install 'dus-cli[heal]', or use a checkpoint in "
            "safetensors"
        ) from None
    copy = io.BytesIO()
    keys: dict[int, str] = {}
    with zipfile.ZipFile(copy, "w") as empty:
        empty.writestr("archive/data.pkl", archive.pickle)
        empty.writestr("archive/version", "3\n")
        empty.writestr("archive/byteorder", "little")
        for key in archive.storages:
            empty.writestr(f"archive/data/{key}", b"")
            keys[copy.tell()] = key
    copy.seek(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(copy, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be unpickled by torch's weights_only ({_first_line(error)}); it is damaged, or no plain "
            f"state dict: fetch it again, or {_REMEDY}"
        ) from error
    return [_tensor_info(name, tensor, archive, keys, where) for name, tensor in _state_dict(state, where).items()]


def _first_line(error: Exception) -> str:
    return shown(str(error).split("\n", maxsplit=1)[0] or type(error).__name__)


def _state_dict(state: object, where: str) -> dict[str, Tensor]:
    """The dict of names and tensors, refused where it is anything else."""
    import torch

    if not isinstance(state, dict):
        raise CheckpointError(f"{where} holds a {type(state).__name__}, not a dict of tensors; {_REMEDY}")
    if not state:
        raise CheckpointError(f"{where} holds no tensors; {_REMEDY}")
    nested = [str(name) for name, value in state.items() if isinstance(value, dict)]
    if nested:
        raise CheckpointError(
            f"{where} holds dicts ({shown_list(nested)}), not the tensors themselves: it is a training checkpoint; "
            f"{_REMEDY}"
        )
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where}: {shown(name)} is a {type(value).__name__}; dus reads a dict of names and tensors; {_REMEDY}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(f"{where} has a tensor's name that is not Unicode: {shown(name)}") from None
        if name == "__metadata__":
            raise CheckpointError(f"{where} has a tensor named __metadata__, a name that safetensors keeps to itself")
    return state


def _tensor_info(name: str, tensor: Tensor, archive: _Archive, keys: Mapping[int, str], where: str) -> TensorInfo:
    import torch

    label = f"{where}: tensor {shown(name)}"
    torch_dtype = str(tensor.dtype).removeprefix("torch.")
    dtype = _DTYPES.get(torch_dtype)
    if tensor.layout is not torch.strided or tensor.is_quantized or dtype is None:
        kind = torch_dtype if tensor.layout is torch.strided else f"{tensor.layout}"
        raise CheckpointError(f"{label} is {kind}, which safetensors has no name for; {_REMEDY}")
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{label} is stored conjugated or negated; {_REMEDY}")
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    key = keys.get(offset) if offset is not None else None
    if key is None:
        raise CheckpointError(f"{label} has no data in the file; {_REMEDY}")
    storage_start, storage_bytes = archive.storages[key]
    shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    num_bytes = prod(shape) * size
    if num_bytes > _MAX_COUNT:
        raise CheckpointError(f"{label}: the shape {shown(shape)} overflows 64 bits")
    first = int(tensor.storage_offset()) if num_bytes else 0
    if not 0 <= first * size <= (first + span(shape, strides)) * size <= storage_bytes:
        raise CheckpointError(
            f"{label} reaches beyond its storage of {storage_bytes} bytes; the file is damaged, fetch it again"
        )
    start = storage_start + first * size
    dense = is_row_major(shape, strides)
    return TensorInfo(name, dtype, shape, start, start + num_bytes, None if dense else tuple(strides))
