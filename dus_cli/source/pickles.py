"""`pytorch_model*.bin`, the pickled checkpoints of torch.save: where each tensor's bytes are. No
weights are read.

A storage's bytes are in the file as they are (see `pickled_files`), so a contiguous tensor is a
range of the file, as in safetensors, and the same code copies it.

A pickle is a program, which must not run. So its imports are read first and checked against the few
that plain weights need; then torch unpickles it with `weights_only`, onto the meta device, which
holds no data. torch receives an archive made here, with an empty member for each storage: the
offset that torch records for a storage (`_checkpoint_offset`, see `torch.load` under FakeTensorMode
in its notes on serialization) then gives its key, and no other part of a hostile file reaches
torch.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from dus_cli.common.libraries import require
from dus_cli.errors import CheckpointError, reason_of, shown, shown_list
from dus_cli.source.headers import Header, TensorInfo
from dus_cli.source.pickled_files import (
    REMEDY,
    PickledFile,
    Places,
    legacy_places,
    read_pickled_file,
)
from dus_cli.source.reading import open_regular, reading
from dus_cli.source.strided import is_row_major, span

if TYPE_CHECKING:
    from torch import Tensor

# safetensors counts with 64-bit machine words, torch with signed ones.
_MAX_COUNT = 2**63 - 1

# https://docs.pytorch.org/docs/stable/tensor_attributes.html to safetensors' names (its torch.py,
# _TYPES).
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

# Everything that a pickled state dict of plain tensors imports, besides torch's storage classes and
# dtypes.
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

# The objection in an error of torch's weights_only. The rest of that message says how to run the
# file nevertheless (`_get_wo_message` in torch/serialization.py).
_OBJECTION = re.compile(r"WeightsUnpickler error:\s*(.+?)(?:\. |\n|$)")


class _Described(NamedTuple):
    """A tensor as the pickle describes it, on the meta device, and the key of its storage."""

    name: str
    tensor: Tensor
    key: str


def read_pickled(path: Path, where: str) -> Header:
    """Where each tensor of a torch.save file is, without reading the data.

    Raises:
        CheckpointError: the file is not sound, not a plain state dict, or hostile.
        MissingExtraError: torch is not installed.
    """
    with reading(where), open_regular(path) as file:
        return parse_pickled(file, where)


def parse_pickled(file: IO[bytes], where: str, *, at_hand: bool = True) -> Header:
    """The same for an open file.

    Args:
        file: opened for reading; it must be seekable.
        where: the file's name in messages.
        at_hand: read where each storage starts. If False, the start is computed as torch.save does
            it, which saves a request per storage for a file on the Hub.

    Raises:
        CheckpointError: as `read_pickled`.
        OSError: the file cannot be read.
    """
    # torch and Python may warn of odd text in a hostile pickle; only errors matter
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        saved = read_pickled_file(file, where, at_hand=at_hand)
        _check_imports(saved.pickle, where)
        described = _unpickle(saved, where)
    places = saved.places
    if places is None:
        sizes = {key: tensor.untyped_storage().nbytes() for _, tensor, key in described}
        places = legacy_places(file if at_hand else None, saved, sizes, where)
    tensors = [_tensor_info(one, places, where) for one in described]
    return Header(
        0, saved.num_bytes, {}, tuple(sorted(tensors, key=lambda t: (t.start, t.end, t.name)))
    )


def _check_imports(raw: bytes, where: str) -> None:
    """Check that a pickle imports only what plain tensors need. It is read, not run.

    Raises:
        CheckpointError: it imports more, is not a pickle, or has a protocol that hides its imports.
    """
    try:
        for opcode, argument, _ in pickletools.genops(raw):
            if opcode.name in ("GLOBAL", "INST"):
                module, _, name = str(argument).partition(" ")
                if not _is_plain(module, name):
                    raise _foreign(module, name, where)
            elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
                raise CheckpointError(
                    f"{where} is a pickle of a protocol that torch's weights_only does not read "
                    f"({opcode.name}); {REMEDY}"
                )
    except (ValueError, IndexError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: data.pkl is not a pickle ({shown(error)}); the file is damaged, fetch it "
            "again"
        ) from None


def _is_plain(module: str, name: str) -> bool:
    if (module, name) in _NAMES:
        return True
    # A storage class such as FloatStorage, which torch replaces with its dtype; or a dtype, which
    # is checked later for each tensor.
    return module == "torch" and (
        name in _DTYPES or name.endswith("Storage") or name.startswith(("float", "complex"))
    )


def _foreign(module: str, name: str, where: str) -> CheckpointError:
    import_name = shown(f"{module}.{name}")
    if module.split(".", maxsplit=1)[0] == "torch":
        return CheckpointError(
            f"{where} holds more than plain tensors ({import_name}), which safetensors cannot "
            f"store; {REMEDY}"
        )
    return CheckpointError(
        f"{where} is a pickle that imports {import_name}, which weights do not need: refused, and "
        "none of it was run; do not load this file elsewhere unless you trust its author"
    )


def _unpickle(saved: PickledFile, where: str) -> list[_Described]:
    require(f"{where}, a pickle and not safetensors,", "torch")
    import torch

    copy = io.BytesIO()
    keys: dict[int, str] = {}
    with zipfile.ZipFile(copy, "w") as archive:
        archive.writestr("archive/data.pkl", saved.pickle)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
        for key in dict.fromkeys(saved.keys):
            if not (key.isascii() and key.isdigit()):
                raise CheckpointError(
                    f"{where} names a storage {shown(key)}, which torch numbers; refusing it"
                )
            archive.writestr(f"archive/data/{key}", b"")
            keys[copy.tell()] = key
    copy.seek(0)
    try:
        state = torch.load(copy, map_location="meta", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{where} cannot be unpickled by torch's weights_only ({_objection(error)}); it is "
            f"damaged, or not a plain state dict: fetch it again, or {REMEDY}"
        ) from error
    return [
        _Described(name, tensor, _storage_key(name, tensor, keys, where))
        for name, tensor in _state_dict(state, where).items()
    ]


def _objection(error: Exception) -> str:
    """The first sentence of weights_only's objection; the whole message of any other error."""
    match = _OBJECTION.search(str(error))
    return reason_of(error) if match is None else shown(match[1])


def _storage_key(name: str, tensor: Tensor, keys: Mapping[int, str], where: str) -> str:
    import torch

    offset = None
    if tensor.layout is torch.strided:
        offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None or offset not in keys:
        raise CheckpointError(
            f"{where}: tensor {shown(name)} has no data of its own in the file; {REMEDY}"
        )
    return keys[offset]


def _state_dict(state: object, where: str) -> dict[str, Tensor]:
    """Check that an unpickled object is a dict of names and tensors.

    Raises:
        CheckpointError: it is not.
    """
    import torch

    if not isinstance(state, dict):
        raise CheckpointError(
            f"{where} holds a {type(state).__name__}, not a dict of tensors; {REMEDY}"
        )
    if not state:
        raise CheckpointError(f"{where} holds no tensors; {REMEDY}")
    nested = [
        name for name, value in state.items() if isinstance(name, str) and isinstance(value, dict)
    ]
    if nested:
        raise CheckpointError(
            f"{where} holds dicts ({shown_list(nested)}), not the tensors themselves: it is a "
            f"training checkpoint; {REMEDY}"
        )
    for name, value in state.items():
        if not isinstance(name, str):  # not shown: a hostile one may be too long or too deep
            raise CheckpointError(
                f"{where} names a tensor with a {type(name).__name__}, not with text; {REMEDY}"
            )
        if not isinstance(value, torch.Tensor):
            raise CheckpointError(
                f"{where}: {shown(name)} is a {type(value).__name__}; dus reads a dict of names "
                f"and tensors; {REMEDY}"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raise CheckpointError(
                f"{where} has a tensor's name that is not Unicode: {shown(name)}"
            ) from None
        if name == "__metadata__":
            raise CheckpointError(
                f"{where} has a tensor named __metadata__, a name that safetensors reserves"
            )
    return state


def _tensor_info(described: _Described, places: Places, where: str) -> TensorInfo:
    name, tensor, key = described
    label = f"{where}: tensor {shown(name)}"
    dtype = _DTYPES.get(str(tensor.dtype).removeprefix("torch."))
    if tensor.is_quantized or dtype is None:
        raise CheckpointError(
            f"{label} is {tensor.dtype}, which safetensors has no name for; {REMEDY}"
        )
    if tensor.is_conj() or tensor.is_neg():
        raise CheckpointError(f"{label} is stored conjugated or negated; {REMEDY}")
    storage_start, storage_bytes = places[key]
    shape, strides, size = tuple(tensor.shape), tensor.stride(), tensor.element_size()
    num_bytes = prod(shape) * size
    if num_bytes > _MAX_COUNT:
        raise CheckpointError(f"{label}: the shape {shown(shape)} overflows 64 bits")
    first = int(tensor.storage_offset()) if num_bytes else 0
    if not 0 <= first * size <= (first + span(shape, strides)) * size <= storage_bytes:
        raise CheckpointError(
            f"{label} reaches beyond its storage of {storage_bytes} bytes; the file is damaged, "
            "fetch it again"
        )
    start = storage_start + first * size
    dense = is_row_major(shape, strides)
    return TensorInfo(
        name, dtype, shape, start, start + num_bytes, None if dense else tuple(strides)
    )
