"""A checkpoint opened for reading: config, headers, and where each tensor's bytes lie. No weights are read."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.source.files import inside
from dus_cli.source.headers import Header, TensorInfo, limit_nesting, parse_json_object, read_header
from dus_cli.source.incomplete import check_whole
from dus_cli.source.pickles import read_pickled
from dus_cli.storage import mount_of

CONFIG_NAME = "config.json"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

# The output embedding in architectures that can tie it to the input's (`_tied_weights_keys` in transformers).
_TIED_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "proj_out.weight")

# Larger than any real one by a factor of a hundred: a spike of memory is a denial of service.
_MAX_CONFIG_BYTES = 16_000_000
_MAX_INDEX_BYTES = 256_000_000


# Device, inode, bytes, and nanoseconds of the last modification.
Fingerprint = tuple[int, int, int, int]


def fingerprint(path: Path) -> Fingerprint | None:
    """What changes when a file is replaced or written to; None where there is no such file.

    On FUSE that is its size and the second of its last modification: object stores give a file another inode number
    whenever they like (Mountpoint for Amazon S3, gcsfuse), and a list of objects tells times finer than a request for
    one of them does. What is written to an object later than a second after its last change has another second.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    mount = mount_of(status.st_dev)
    if mount is not None and mount.is_fuse:
        return status.st_dev, 0, status.st_size, status.st_mtime_ns // 10**9 * 10**9
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def is_pickled(name: str) -> bool:
    """Whether a file of weights is one of torch.save's, by its name."""
    return name.endswith(".bin")


@dataclass(frozen=True)
class Shard:
    """One file of weights, safetensors or pickled. `name` is its path in the folder, with "/".

    `fingerprint` was taken before the header was read: see the function.
    """

    name: str
    path: Path
    header: Header
    fingerprint: Fingerprint | None = None

    @property
    def is_pickled(self) -> bool:
        return is_pickled(self.name)


@dataclass(frozen=True)
class Checkpoint:
    """A decoder checkpoint, all headers checked and held against the index.

    Tensors have distinct names over all shards. `config_sha256` and `index_sha256` are hexadecimal;
    the latter is None where the weights are one file.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    config_sha256: str
    index_sha256: str | None

    @property
    def is_pickled(self) -> bool:
        return any(shard.is_pickled for shard in self.shards)

    @property
    def format(self) -> str:
        """Of the weights, as lineage and reports call it: "safetensors" or "pickle"."""
        return "pickle" if self.is_pickled else "safetensors"

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


# From a shard's name to its header; None where there is no such file.
HeaderReader = Callable[[str], "Header | None"]


def open_checkpoint(folder: Path, absent: HeaderReader | None = None) -> Checkpoint:
    """Open a folder as a decoder checkpoint: in safetensors, or where it has none in torch.save's files.

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
    check_whole(folder)
    config, config_sha256 = read_config(folder)
    weights = find_weights(folder)
    if isinstance(weights, Index):
        shards = _open_shards(folder, weights, absent)
    elif weights is not None:
        shards = (_open_shard(weights, inside(folder, weights), absent),)
    else:
        shards = _open_absent(folder, absent)
    index_sha256 = weights.sha256 if isinstance(weights, Index) else None
    return Checkpoint(folder, config, _without_tied_heads(shards, config), config_sha256, index_sha256)


def find_weights(folder: Path) -> Index | str | None:
    """The index of a folder's weights, or the name of the one file that holds them; None where it has neither.

    safetensors come first, as in transformers.

    Raises:
        CheckpointError: the index is damaged.
    """
    for index_name, single_name in ((INDEX_NAME, SINGLE_NAME), (PICKLED_INDEX_NAME, PICKLED_NAME)):
        if inside(folder, index_name).exists():
            return read_index(folder, index_name)
        if inside(folder, single_name).exists():
            return single_name
    return None


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
    """An index file, by `name`: tensor name to shard name; what it says of the size; its own sha256."""

    name: str
    weight_map: dict[str, str]
    total_size: object
    sha256: str

    @property
    def shard_names(self) -> list[str]:
        return sorted(set(self.weight_map.values()))


def read_index(folder: Path, name: str = INDEX_NAME) -> Index:
    """The index of a sharded checkpoint.

    Raises:
        CheckpointError: damaged, empty, or naming a file outside the folder.
    """
    raw = read_small_file(inside(folder, name), name, _MAX_INDEX_BYTES)
    index = parse_json_object(raw, name)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{name} has no weight_map; fetch it again")
    kind, suffix = ("pickled", ".bin") if name == PICKLED_INDEX_NAME else ("safetensors", ".safetensors")
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if not shard.endswith(suffix):
            raise CheckpointError(f"{name} names {shown(shard)}, which is no {kind} file; fetch it again")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{name}: weight_map must map text to text; fetch it again")
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(name, weight_map, total_size, hashlib.sha256(raw).hexdigest())


def _open_shards(folder: Path, index: Index, absent: HeaderReader | None) -> tuple[Shard, ...]:
    weight_map = index.weight_map
    paths = {name: inside(folder, name) for name in index.shard_names}
    if absent is None:
        missing = [name for name, path in paths.items() if not path.is_file()]
        if missing:
            raise CheckpointError(
                f"{index.name} names {shown_list(missing)}, missing from {shown(folder)}; download the checkpoint again"
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
                    f"{shown(name)} holds tensor {shown(tensor.name)}, which {index.name} {said}; "
                    "index and shards are of different checkpoints"
                )
        shards.append(shard)
    if len(holder) != len(weight_map):
        missing = [tensor for tensor in weight_map if tensor not in holder]
        raise CheckpointError(
            f"{index.name} places {shown_list(missing)} in shards that do not hold them; "
            "index and shards are of different checkpoints"
        )
    return tuple(shards)


def _open_shard(name: str, path: Path, absent: HeaderReader | None) -> Shard:
    before = fingerprint(path)
    if absent is None or before is not None:
        header: Header | None = (read_pickled if is_pickled(name) else read_header)(path, shown(name))
    else:
        header = absent(name)
    if header is None:
        raise CheckpointError(f"{shown(name)} is missing; download the checkpoint again")
    return Shard(name, path, header, before)


def _open_absent(folder: Path, absent: HeaderReader | None) -> tuple[Shard, ...]:
    """The one shard of a checkpoint whose weights are elsewhere."""
    if absent is not None:
        for name in (SINGLE_NAME, PICKLED_NAME):
            if (header := absent(name)) is not None:
                return (Shard(name, folder / name, header),)
    raise CheckpointError(_no_weights(folder))


def _without_tied_heads(shards: tuple[Shard, ...], config: dict[str, Any]) -> tuple[Shard, ...]:
    """Leave out an output embedding that is the input's, where config.json ties the two.

    torch.save keeps such a tensor under both names, with one storage; safetensors has no way to say so, and
    transformers' save_pretrained leaves the output's out. Where the config is silent both are written.
    """
    sections = [config, config.get("text_config")]
    if not any(isinstance(section, dict) and section.get("tie_word_embeddings") is True for section in sections):
        return shards
    return tuple(_without_tied_head(shard) if shard.is_pickled else shard for shard in shards)


def _without_tied_head(shard: Shard) -> Shard:
    tensors = shard.header.tensors
    others = {_place(t) for t in tensors if not t.name.endswith(_TIED_HEADS)}
    kept = tuple(t for t in tensors if not (t.name.endswith(_TIED_HEADS) and _place(t) in others))
    return replace(shard, header=replace(shard.header, tensors=kept))


def _place(tensor: TensorInfo) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.start, tensor.strides


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
        return f"{shown(folder)} holds {found} and no config.json; dus reads Hugging Face checkpoints"
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
    if any(folder.glob("pytorch_model*.bin")):
        names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        return (
            f"{shown(folder)} holds {shown_list(names)} but neither {PICKLED_NAME} nor {PICKLED_INDEX_NAME}; "
            "the index is missing, download the checkpoint again"
        )
    found = _other_weights(folder)
    advice = "dus reads safetensors and pytorch_model*.bin; load the model in transformers and save_pretrained it"
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
