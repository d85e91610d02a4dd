"""Open a checkpoint: its config, its headers, and where each tensor's bytes are. No weights are
read.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from dus_cli.common.memory import collector_paused
from dus_cli.common.storage import mount_of
from dus_cli.common.workers import ahead, workers
from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import split_name
from dus_cli.source.files import inside
from dus_cli.source.headers import DTYPE_BITS, Header, TensorInfo, header_bytes, parse_header
from dus_cli.source.incomplete import check_whole
from dus_cli.source.json_objects import limit_nesting, parse_json_object
from dus_cli.source.mistaken import is_answer
from dus_cli.source.pickles import read_pickled
from dus_cli.source.reading import read_small_file
from dus_cli.source.weights import (
    INDEX_NAME,
    PICKLED_INDEX_NAME,
    PICKLED_NAME,
    SINGLE_NAME,
    Index,
    choose_weights,
    files_below,
    find_weights,
    is_index,
    is_pickled,
    read_index,
    regular_files,
    rivals,
    weight_files,
)

CONFIG_NAME = "config.json"

# Names of the output embedding in architectures that can tie it to the input embedding
# (`_tied_weights_keys` in transformers).
_TIED_HEADS = ("lm_head.weight", "embed_out.weight", "output_projection.weight", "proj_out.weight")

# A hundred times any real config: a limit, so that a hostile file cannot fill the memory.
_MAX_CONFIG_BYTES = 16_000_000

# Shards whose headers are read at once: a disk, and even more a network, answers several requests
# in the time of one.
_HEADERS_AT_ONCE = 16

# Device, inode, size in bytes, and time of the last modification in nanoseconds.
Fingerprint = tuple[int, int, int, int]


def fingerprint(path: Path) -> Fingerprint | None:
    """Values of stat(2) that change if a file is replaced or written to; None if it does not exist.

    On FUSE these are only the size and the second of the last modification: object stores may
    change a file's inode number at any time (Mountpoint for Amazon S3, gcsfuse), and give finer
    times in a list of objects than for one of them.
    """
    try:
        status = path.stat()
    except OSError:
        return None
    mount = mount_of(status.st_dev)
    if mount is not None and mount.is_fuse:
        return status.st_dev, 0, status.st_size, status.st_mtime_ns // 10**9 * 10**9
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@dataclass(frozen=True)
class Shard:
    """One file of weights, safetensors or pickled.

    `name` is its path in the folder, with "/". `fingerprint` was taken before the header was read;
    it is None if the file is not on this machine.
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
    """A decoder checkpoint whose headers are checked, also against the index.

    Attributes:
        folder: its directory.
        config: config.json.
        shards: the files of weights; tensor names are distinct over all of them.
        config_sha256: SHA-256 of config.json, hexadecimal.
        index_sha256: SHA-256 of the index; None if the weights are one file.
        index_name: the index that was read; None if the weights are one file.
        unread: paths of other weights in the folder.
        warnings: differences between index and headers.
    """

    folder: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    config_sha256: str
    index_sha256: str | None
    index_name: str | None = None
    unread: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def weight_files(self) -> list[str]:
        """The files of weights that are read, and their index."""
        return [
            *([] if self.index_name is None else [self.index_name]),
            *(shard.name for shard in self.shards),
        ]

    @property
    def rivals(self) -> list[str]:
        """Other files from which the model could be loaded; transformers does not read them."""
        return rivals(self.unread, self.shards[0].name)

    @property
    def is_pickled(self) -> bool:
        return any(shard.is_pickled for shard in self.shards)

    @property
    def format(self) -> str:
        """The format of the weights, as in lineage and reports: "safetensors" or "pickle"."""
        return "pickle" if self.is_pickled else "safetensors"

    @property
    def num_tensors(self) -> int:
        return sum(len(shard.header.tensors) for shard in self.shards)

    @property
    def num_parameters(self) -> int:
        num_bytes: Counter[str] = Counter()
        for _, tensor in self.tensors():
            num_bytes[tensor.dtype] += tensor.end - tensor.start
        return sum(size * 8 // DTYPE_BITS[dtype] for dtype, size in num_bytes.items())

    @property
    def num_bytes(self) -> int:
        """Bytes of tensor data, without headers."""
        return sum(tensor.num_bytes for shard in self.shards for tensor in shard.header.tensors)

    def tensors(self) -> Iterable[tuple[Shard, TensorInfo]]:
        for shard in self.shards:
            for tensor in shard.header.tensors:
                yield shard, tensor


class Elsewhere(Protocol):
    """Files that are not in the folder: a repo on the Hub whose weights are not fetched yet."""

    @property
    def names(self) -> Iterable[str]:
        """Paths of all its files, with "/"."""

    def header(self, name: str) -> Header | None:
        """The header of a file of weights; None if there is no such file."""


@collector_paused()
def open_checkpoint(folder: Path, elsewhere: Elsewhere | None = None) -> Checkpoint:
    """Open a folder as a decoder checkpoint, with the weights that transformers would load from it.

    Args:
        folder: the directory.
        elsewhere: a source of files that are not in the folder; without it, every shard must be in
            the folder.

    Raises:
        CheckpointError: the folder does not exist, is not a decoder checkpoint, or is not sound.
        ConfigError: config.json does not give the number of layers.
    """
    if not folder.is_dir():
        problem = "is not a directory" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{shown(folder)} {problem}; give a checkpoint's directory, or a Hub id of the form "
            "org/name"
        )
    check_whole(folder)
    config, config_sha256 = read_config(folder)
    if elsewhere is None:
        chosen = find_weights(folder, config)
        all_files = files_below(folder)
    else:
        all_files = files_below(folder) | set(elsewhere.names)
        chosen = choose_weights(regular_files(folder) | set(elsewhere.names), config)
    if chosen is None:
        raise CheckpointError(_no_weights(folder))
    index = read_index(folder, chosen) if is_index(chosen) else None
    names = [chosen] if index is None else index.shard_names
    differences = None if index is None else _Differences(index)
    shards = _open_shards(folder, names, chosen, elsewhere, differences)
    warnings = [] if differences is None else differences.warnings(shards, config)
    return Checkpoint(
        folder,
        config,
        _without_tied_heads(shards, config),
        config_sha256=config_sha256,
        index_sha256=None if index is None else index.sha256,
        index_name=None if index is None else index.name,
        unread=tuple(name for name in weight_files(all_files) if name not in {chosen, *names}),
        warnings=tuple(warnings),
    )


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """config.json of a decoder, and its SHA-256, hexadecimal.

    Raises:
        CheckpointError: it is missing or damaged, or is not a decoder's.
    """
    path = inside(folder, CONFIG_NAME)
    if not os.path.lexists(path):
        raise CheckpointError(_no_config(folder))
    raw = read_small_file(path, CONFIG_NAME, _MAX_CONFIG_BYTES)
    config = parse_json_object(raw, CONFIG_NAME)
    limit_nesting(config, CONFIG_NAME)
    if is_answer(raw) and "model_type" not in config:
        answer = shown(" ".join(raw.decode("utf-8").split()))
        raise CheckpointError(
            f"{CONFIG_NAME} is a server's answer ({answer}), not a config; download it again"
        )
    architectures = config.get("architectures")
    heads = (
        [a for a in architectures if isinstance(a, str)] if isinstance(architectures, list) else []
    )
    if config.get("is_encoder_decoder") is True:
        raise CheckpointError(
            f"{shown(folder)} holds an encoder-decoder model ({shown_list(heads)}); "
            "dus deepens decoder-only language models"
        )
    if any(head.endswith(arch.ENCODER_HEADS) for head in heads):
        raise CheckpointError(
            f"{shown(folder)} holds an encoder ({shown_list(heads)}); dus deepens decoder-only "
            "language models"
        )
    return config, hashlib.sha256(raw).hexdigest()


def _open_shards(
    folder: Path,
    names: list[str],
    chosen: str,
    elsewhere: Elsewhere | None,
    differences: _Differences | None,
) -> tuple[Shard, ...]:
    """Read the headers of the files of weights; `chosen` is the file that names them.

    `differences` are those between the headers and the index, if that is the file.
    """
    paths = {name: inside(folder, name) for name in names}
    missing = [name for name, path in paths.items() if not os.path.lexists(path)]
    if missing and elsewhere is None:
        raise CheckpointError(
            f"{chosen} names {shown_list(missing)}, missing from {shown(folder)}; download the "
            "checkpoint again"
        )
    shards: list[Shard] = []
    with workers(_HEADERS_AT_ONCE) as (pool, _):
        read = ahead(
            pool, lambda file: _read(*file, is_elsewhere=elsewhere is not None), paths.items()
        )
        for (name, path), (before, raw) in zip(paths.items(), read, strict=True):
            shard = Shard(
                name, path, _header(name, path, raw, None if before else elsewhere), before
            )
            if differences is not None:
                differences.add(shard)
            shards.append(shard)
    if differences is not None and differences.unnamed:  # a name's second tensor is among them
        _refuse_twice(shards)
    return tuple(shards)


def _read(
    name: str, path: Path, *, is_elsewhere: bool
) -> tuple[Fingerprint | None, tuple[bytes, int] | None]:
    """A shard's fingerprint, and its raw header if it is a safetensors file on this machine.

    Several threads do this at once, because it waits for a disk or a network. One thread parses.
    """
    before = fingerprint(path)
    if is_pickled(name) or (before is None and is_elsewhere):
        return before, None
    return before, header_bytes(path, shown(name))


def _header(
    name: str, path: Path, raw: tuple[bytes, int] | None, elsewhere: Elsewhere | None
) -> Header:
    if raw is not None:
        return parse_header(*raw, shown(name))
    header = read_pickled(path, shown(name)) if elsewhere is None else elsewhere.header(name)
    if header is None:
        raise CheckpointError(f"{shown(name)} is missing; download the checkpoint again")
    return header


def _refuse_twice(shards: Iterable[Shard]) -> None:
    holder: dict[str, str] = {}
    for shard in shards:
        for tensor in shard.header.tensors:
            other = holder.setdefault(tensor.name, shard.name)
            if other != shard.name:
                raise CheckpointError(
                    f"tensor {shown(tensor.name)} is in two shards, {shown(other)} and "
                    f"{shown(shard.name)}; "
                    "loaders differ in which one they use, download the checkpoint again"
                )


class _Differences:
    """What an index and the headers say differently. The headers count: loaders use only the shard
    names of an index.

    A name is taken out of the index once a shard has it, so that memory holds each name once.

    Attributes:
        unnamed: tensors that shards hold and the index does not name, or not once more.
        moved: tensors in other shards than those that the index names.
        absent: tensors that the index names and no shard that was added holds, with their shards.
    """

    def __init__(self, index: Index) -> None:
        self._name = index.name
        self.unnamed: list[str] = []
        self.moved: list[str] = []
        self.absent = index.weight_map

    def add(self, shard: Shard) -> None:
        """Compare a shard's header."""
        for tensor in shard.header.tensors:
            indexed_shard = self.absent.pop(tensor.name, None)
            if indexed_shard is None:
                self.unnamed.append(tensor.name)
            elif indexed_shard != shard.name:
                self.moved.append(tensor.name)

    def warnings(self, shards: Iterable[Shard], config: dict[str, Any]) -> list[str]:
        """The differences in words, after all shards were added.

        Raises:
            CheckpointError: the index names a tensor that the model needs, and no shard holds it.
        """
        absent, unnamed = list(self.absent), self.unnamed
        if absent:
            held = [tensor.name for shard in shards for tensor in shard.header.tensors]
            named = [*absent, *(set(held) - set(unnamed))]
            if needed := _needed(absent, named, held, config):
                raise CheckpointError(
                    f"{self._name} names {shown_list(needed)}, which no shard holds and the model "
                    "needs (transformers would fill it with random numbers); download the "
                    "checkpoint again"
                )
        reasons = {
            "which no shard holds: transformers loads the model without": absent,
            "in other shards than those that hold them: the shards' headers count": self.moved,
        }
        warnings = [
            f"{self._name} names {shown_list(names)}, {reason}"
            for reason, names in reasons.items()
            if names
        ]
        if unnamed:
            warnings.append(
                f"{self._name} does not name {shown_list(unnamed)}, which the shards hold: read "
                "all the same"
            )
        return warnings


# Names of embeddings and norms, which every decoder has beside its layers.
_ESSENTIAL = re.compile(r"embed|norm|^(?:wte|wpe|ln_\w+)$")


def _needed(
    absent: Sequence[str], named: Iterable[str], held: Iterable[str], config: dict[str, Any]
) -> list[str]:
    """The absent tensors without which the model would be incomplete.

    These are tensors that other layers have, or that the index lists for every layer; embeddings
    and norms; and the output embedding if config.json says that it is not tied to the input's (if
    it does not say, the model's class decides).
    """
    layers: dict[str, set[int]] = {}
    kinds: set[tuple[str, str]] = set()
    for split in filter(None, map(split_name, held)):
        layers.setdefault(split.prefix, set()).add(split.index)
        kinds.add((split.prefix, split.suffix))
    listed = Counter((split.prefix, split.suffix) for split in filter(None, map(split_name, named)))
    sections = [config, config.get("text_config")]
    unties = any(
        isinstance(section, dict) and section.get("tie_word_embeddings") is False
        for section in sections
    )

    def is_needed(name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        if name.endswith(_TIED_HEADS):
            return unties
        if (split := split_name(name)) is None:
            return (
                leaf in ("weight", "bias")
                and _ESSENTIAL.search(module.rpartition(".")[2]) is not None
            )
        kind = split.prefix, split.suffix
        is_in_every_layer = (
            leaf == "weight" and listed[kind] >= len(layers.get(split.prefix, ())) > 0
        )
        return kind in kinds or is_in_every_layer

    return [name for name in absent if is_needed(name)]


def _without_tied_heads(shards: tuple[Shard, ...], config: dict[str, Any]) -> tuple[Shard, ...]:
    """Leave out an output embedding that config.json ties to the input embedding.

    torch.save keeps such a tensor under both names, with one storage; safetensors cannot share
    storage, and transformers' save_pretrained leaves the output embedding out. If the config does
    not say, both are written.
    """
    sections = [config, config.get("text_config")]
    if not any(
        isinstance(section, dict) and section.get("tie_word_embeddings") is True
        for section in sections
    ):
        return shards
    return tuple(_without_tied_head(shard) if shard.is_pickled else shard for shard in shards)


def _without_tied_head(shard: Shard) -> Shard:
    tensors = shard.header.tensors
    untied_places = {_place(t) for t in tensors if not t.name.endswith(_TIED_HEADS)}
    kept = tuple(
        t for t in tensors if not (t.name.endswith(_TIED_HEADS) and _place(t) in untied_places)
    )
    return replace(shard, header=replace(shard.header, tensors=kept))


def _place(tensor: TensorInfo) -> tuple[object, ...]:
    return tensor.dtype, tensor.shape, tensor.start, tensor.strides


def _no_config(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return (
            f"{shown(folder)} holds an adapter (LoRA), not a model; merge it into its base first, "
            "with PEFT's merge_and_unload"
        )
    if (folder / "model_index.json").exists():
        return (
            f"{shown(folder)} holds a diffusion pipeline; dus deepens decoder-only language models"
        )
    if found := _other_weights(folder):
        return (
            f"{shown(folder)} holds {found} and no config.json; dus reads Hugging Face checkpoints"
        )
    return f"{shown(folder)} has no config.json; give the directory of a Hugging Face checkpoint"


# Names of the files of save_pretrained(variant="fp16").
_VARIANT = re.compile(r"model\.(\w+)(?:-\d{5}-of-\d{5})?\.safetensors")


def _no_weights(folder: Path) -> str:
    if (folder / "adapter_config.json").exists():
        return _no_config(folder)
    if any(folder.glob("*.safetensors")):
        names = sorted(path.name for path in folder.glob("*.safetensors"))
        if variants := {match[1] for match in map(_VARIANT.match, names) if match}:
            return (
                f"{shown(folder)} holds only weights of a variant "
                f"({shown_list(sorted(variants))}), which transformers loads only with variant=; "
                f"rename them to the names without it ({SINGLE_NAME})"
            )
        return (
            f"{shown(folder)} holds {shown_list(names)} but neither {SINGLE_NAME} nor "
            f"{INDEX_NAME}; the index is missing, download the checkpoint again"
        )
    if any(folder.glob("pytorch_model*.bin")):
        names = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        return (
            f"{shown(folder)} holds {shown_list(names)} but neither {PICKLED_NAME} nor "
            f"{PICKLED_INDEX_NAME}; the index is missing, download the checkpoint again"
        )
    other_weights = _other_weights(folder)
    advice = (
        "dus reads safetensors and pytorch_model*.bin; load the model in transformers and "
        "save_pretrained it"
    )
    return f"{shown(folder)} holds {other_weights or 'no weights'}; {advice}"


def _other_weights(folder: Path) -> str | None:
    for description, patterns in {
        "GGUF weights": ("*.gguf", "*.ggml"),
        "pickled weights": ("*.bin", "*.pt", "*.pth", "*.ckpt"),
        "TensorFlow or Flax weights": ("*.h5", "*.msgpack"),
    }.items():
        for pattern in patterns:
            if any(folder.glob(pattern)):
                return f"{description} ({pattern})"
    return None
