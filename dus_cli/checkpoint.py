"""A checkpoint opened for reading: config, headers, and where each tensor's bytes lie. No weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dus_cli import architectures as arch
from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.headers import Header, TensorInfo, limit_nesting, parse_json_object, read_header
from dus_cli.source_files import inside

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"

# Larger than any real one by a factor of a hundred: a spike of memory is a denial of service.
_MAX_CONFIG_BYTES = 16_000_000
_MAX_INDEX_BYTES = 256_000_000


# Device, inode, bytes, and nanoseconds of the last modification.
Fingerprint = tuple[int, int, int, int]


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when a file is replaced or written to; None where there is no such file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """One safetensors file of a checkpoint. `name` is its path in the folder, with "/".

    `fingerprint` was taken before the header was read: see the function.
    """

    name: str
    path: Path
    header: Header
    fingerprint: Fingerprint | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A decoder checkpoint in safetensors, all headers checked and held against the index.

    Tensors have distinct names over all shards. `config_sha256` and `index_sha256` are hexadecimal;
    the latter is None where the weights are one file.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    config_sha256: str
    index_sha256: str | None

    @property
    def num_tensors(self) -> int:
        return sum(len(shard.header.tensors) for shard in self.shards)

    @property
    def num_parameters(self) -> int:
        return sum(tensor.num_elements for shard in self.shards for tensor in shard.header.tensors)

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard.header.tensors)

    def tensors(self) -> Iterable[tuple[Shard, TensorInfo]]:
        for shard in self.shards:
            for tensor in shard.header.tensors:
                yield shard, tensor


HeaderReader = Callable[[str], Header]


def open_checkpoint(folder: Path, absent: HeaderReader | None = None) -> Checkpoint:
    """Open a folder as a decoder checkpoint in safetensors.

    Args:
        folder: the directory.
        absent: how to get the header of a shard, by its name, that is not in the folder; without it every
            shard must be there. A model on the Hub is planned so, before its weights are fetched.

    Raises:
        CheckpointError: not a folder, not a decoder checkpoint, or not sound.
        ConfigError: config.json does not give the number of layers.
    """
    if not folder.is_dir():
        what = "is not a directory" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{shown(folder)} {what}; give a checkpoint's directory, or a Hub id of the form org/name"
        )
    config, config_sha256 = read_config(folder)
    index_path = inside(folder, INDEX_NAME)
    if index_path.exists():
        index = read_index(folder)
        index_sha256 = index.sha256
        shards = _open_shards(folder, index, absent)
    elif (single := inside(folder, SINGLE_NAME)).exists() or absent is not None:
        shards = (_open_shard(SINGLE_NAME, single, absent),)
        index_sha256 = None
    else:
        raise CheckpointError(_no_weights(folder))
    return Checkpoint(folder, config, shards, config_sha256, index_sha256)


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json of a decoder, and its sha256.

    Raises:
        CheckpointError: missing, damaged, or of something else than a decoder.
    """
    path = inside(folder, CONFIG_NAME)
    if not path.exists():
        raise CheckpointError(_no_config(folder))
    raw = read_small_file(path, CONFIG_NAME, _MAX_CONFIG_BYTES)
    config = parse_json_object(raw, CONFIG_NAME)
    limit_nesting(config, CONFIG_NAME)
    architectures = config.get("architectures")
    heads = [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    if config.get("is_encoder_decoder") is True:
        raise CheckpointError(
            f"{shown(folder)} holds an encoder-decoder model ({shown_list(heads)}); "
            "dus deepens decoder-only language models"
        )
    if any(head.endswith(arch.ENCODER_HEADS) for head in heads):
        raise CheckpointError(
            f"{shown(folder)} holds an encoder ({shown_list(heads)}); dus deepens decoder-only language models"
        )
    return config, hashlib.sha256(raw).hexdigest()


@dataclass(frozen=True)
class Index:
    """model.safetensors.index.json: tensor name to shard name; what it says of the size; its own sha256."""

    weight_map: dict[str, str]
    total_size: object
    sha256: str

    @property
    def shard_names(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def read_index(folder: Path) -> Index:
    """The index of a sharded checkpoint.

    Raises:
        CheckpointError: damaged, empty, or naming a file outside the folder.
    """
    raw = read_small_file(inside(folder, INDEX_NAME), INDEX_NAME, _MAX_INDEX_BYTES)
    index = parse_json_object(raw, INDEX_NAME)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{INDEX_NAME} has no weight_map; fetch it again")
    for name in dict.fromkeys(map(str, weight_map.values())):
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{INDEX_NAME} names {shown(name)}, which is no safetensors file; fetch it again")
    if not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"{INDEX_NAME}: weight_map must map text to text; fetch it again")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(weight_map, total_size, hashlib.sha256(raw).hexdigest())


def _open_shards(folder: Path, index: Index, absent: HeaderReader | None) -> tuple[Shard, ...]:
    weight_map = index.weight_map
    paths = {name: inside(folder, name) for name in index.shard_names}
    if absent is None:
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{INDEX_NAME} names {shown_list(missing)}, missing from {shown(folder)}; download the checkpoint again"
            )
    shards: list[Shard] = []
    holder: dict[str, str] = {}
    for name, path in paths.items():
        shard = _open_shard(name, path, absent)
        for tensor in shard.header.tensors:
            other = holder.setdefault(tensor.name, name)
            if other != name:
                raise CheckpointError(
                    f"tensor {shown(tensor.name)} stands in two shards, {shown(other)} and {shown(name)}; "
                    "which one counts is not defined, fetch the checkpoint again"
                )
            if weight_map.get(tensor.name) != name:
                where = weight_map.get(tensor.name)
                said = f"places in {shown(where)}" if where else "does not name"
                raise CheckpointError(
                    f"{shown(name)} holds tensor {shown(tensor.name)}, which {INDEX_NAME} {said}; "
                    "index and shards are of different checkpoints"
                )
        shards.append(shard)
    if len(holder) != len(weight_map):
        missing = [tensor for tensor in weight_map if tensor not in holder]
        raise CheckpointError(
            f"{INDEX_NAME} places {shown_list(missing)} in shards that do not hold them; "
            "index and shards are of different checkpoints"
        )
    return tuple(shards)


def _open_shard(name: str, path: Path, absent: HeaderReader | None) -> Shard:
    before = fingerprint(path)
    header = read_header(path, shown(name)) if absent is None or before is not None else absent(name)
    return Shard(name, path, header, before)


def read_small_file(path: Path, name: str, limit: int) -> bytes:
    """A file of at most `limit` bytes.

    Raises:
        CheckpointError: unreadable, or larger.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{name} cannot be read: {error.strerror or error}") from error
    if len(raw) > limit:
        raise CheckpointError(f"{name} is larger than {limit} bytes; it is damaged or no {name}")
    return raw


def _no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"{shown(folder)} holds an adapter (LoRA), not a model; merge it into its base first, "
            "with PEFT's merge_and_unload"
        )
    if (folder / "model_index.json").exists():
        return f"{shown(folder)} holds a diffusion pipeline; dus deepens decoder-only language models"
    if found := _other_weights(folder):
        return f"{shown(folder)} holds {found} and no config.json; dus reads Hugging Face checkpoints in safetensors"
    return f"{shown(folder)} has no config.json; give the directory of a Hugging Face checkpoint"


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return _no_config(folder)
    if any(folder.glob("*.safetensors")):
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        return (
            f"{shown(folder)} holds {shown_list(names)} but neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "the index is missing, download the checkpoint again"
        )
    found = _other_weights(folder)
    advice = "dus reads safetensors only; load the model in transformers and save_pretrained it"
    return f"{shown(folder)} holds {found or 'no weights'}; {advice}"


def _other_weights(folder: Path) -> str | None:
    for what, patterns in {
        "GGUF weights": ("*.gguf", "*.ggml"),
        "pickled weights": ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "TensorFlow or Flax weights": ("*.h5", "*.msgpack"),
    }.items():
        for pattern in patterns:
            if any(folder.glob(pattern)):
                return f"{what} ({pattern})"
    return None
