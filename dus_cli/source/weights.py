"""Which files of a folder hold its weights: the choice that transformers makes, and the files that
it does not read.

By `_get_resolved_checkpoint_files` in transformers' modeling_utils.py: the file that config.json's
`transformers_weights` names; else the first that exists of a single safetensors file, a safetensors
index, a single torch.save file and its index.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from dus_cli.errors import CheckpointError, shown, shown_list
from dus_cli.source.files import LEFT_BEHIND, WEIGHT_PATTERNS, inside
from dus_cli.source.json_objects import parse_json_object
from dus_cli.source.mistaken import is_answer
from dus_cli.source.reading import read_small_file, unreadable

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
PICKLED_NAME = "pytorch_model.bin"
PICKLED_INDEX_NAME = "pytorch_model.bin.index.json"

# In the order in which transformers looks for them.
IN_ORDER = (SINGLE_NAME, INDEX_NAME, PICKLED_NAME, PICKLED_INDEX_NAME)

# The field of config.json that names the file of weights, or their index. The output does not have
# it, as with save_pretrained.
EXPLICIT_KEY = "transformers_weights"

_MAX_INDEX_BYTES = 256_000_000

_WEIGHT_MAP = b'"weight_map"'

# Bytes of an index that are parsed at once.
_PIECE = 1 << 20

# The parts of a distributed checkpoint of transformers, one per worker (is_sharded_checkpoint in
# its distributed/checkpoint.py).
_WORKER_PART = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors", re.ASCII)


def is_pickled(name: str) -> bool:
    """Whether a file of weights, or an index, is in torch.save's format, by its name."""
    return name.endswith((".bin", ".bin.index.json"))


def is_index(name: str) -> bool:
    return name.endswith(".index.json")


def choose_weights(names: Collection[str], config: dict[str, Any]) -> str | None:
    """The file among `names` that transformers loads, weights or their index; None if there is
    none.

    Raises:
        CheckpointError: config.json names a file that does not exist or is not safetensors, or the
            weights are the parts of a distributed checkpoint.
    """
    if parts := sorted(name for name in names if _WORKER_PART.fullmatch(name)):
        raise CheckpointError(
            f"{shown_list(parts)}: each worker of a distributed run wrote its own part; join "
            "them first, with "
            "transformers' consolidate_distributed_checkpoint, in a folder of their own"
        )
    explicit = config.get(EXPLICIT_KEY)
    if explicit is None:
        return next((name for name in IN_ORDER if name in names), None)
    if not isinstance(explicit, str) or not explicit.endswith(
        (".safetensors", ".safetensors.index.json")
    ):
        raise CheckpointError(
            f"config.json: {EXPLICIT_KEY} is {shown(explicit)}; transformers takes a *.safetensors "
            "or *.safetensors.index.json file there"
        )
    if explicit not in names:
        raise CheckpointError(
            f"config.json: {EXPLICIT_KEY} names {shown(explicit)}, which does not exist; download "
            "it, or remove the field"
        )
    return explicit


def rivals(names: Collection[str], chosen: str) -> list[str]:
    """Other files of the same format from which the model could be loaded; transformers does not
    read them.
    """
    return [
        name
        for name in IN_ORDER
        if name in names and name != chosen and is_pickled(name) == is_pickled(chosen)
    ]


def regular_files(folder: Path) -> set[str]:
    """The names of the regular files at the top level of a folder, and of links to such files.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            return {entry.name for entry in entries if entry.is_file()}
    except OSError as error:
        raise unreadable(str(folder), error) from error


def find_weights(folder: Path, config: dict[str, Any]) -> str | None:
    """`choose_weights` among the files of a folder.

    Raises:
        CheckpointError: as `choose_weights`; or an entry with a name of weights is not a file.
    """
    names = regular_files(folder)
    explicit = config.get(EXPLICIT_KEY)
    if isinstance(explicit, str) and "/" in explicit and inside(folder, explicit).is_file():
        names.add(explicit)
    chosen = choose_weights(names, config)
    if chosen is None:
        for name in IN_ORDER:
            if os.path.lexists(folder / name):
                raise CheckpointError(f"{name} is not a readable file{_why(inside(folder, name))}")
    return chosen


def _why(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f" (a link to {shown(path.readlink())}, which does not exist); download it again"
    return " (a directory, pipe, socket or device); put the file itself in its place"


def weight_files(names: Iterable[str]) -> list[str]:
    """The paths that are weights in any format, or their indices, sorted."""
    return sorted(name for name in names if _is_weights(name))


def _is_weights(relative: str) -> bool:
    *folders, name = relative.split("/")
    if any(fnmatch(folder, pattern) for folder in folders for pattern in LEFT_BEHIND):
        return False
    return any(fnmatch(name.lower(), pattern) for pattern in WEIGHT_PATTERNS)


def files_below(folder: Path) -> set[str]:
    """Paths, with "/", of all files below a folder."""
    paths = set()
    for root, folders, names in os.walk(folder):
        folders[:] = [
            name for name in folders if not any(fnmatch(name, pattern) for pattern in LEFT_BEHIND)
        ]
        paths |= {(Path(root) / name).relative_to(folder).as_posix() for name in names}
    return paths


@dataclass(frozen=True)
class Index:
    """The index of a sharded checkpoint.

    Attributes:
        name: its file name.
        weight_map: tensor name to shard name.
        total_size: its `total_size`, unchecked; None if it has none.
        sha256: SHA-256 of the file, hexadecimal.
    """

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
        CheckpointError: it is damaged or empty, or names a file outside the folder.
    """
    raw = read_small_file(inside(folder, name), name, _MAX_INDEX_BYTES)
    index = _usual_index(raw, name) or parse_json_object(raw, name)
    weight_map, metadata = index.get("weight_map"), index.get("metadata")
    if not isinstance(weight_map, dict) or not weight_map:
        problem = "is a server's answer, not an index" if is_answer(raw) else "has no weight_map"
        raise CheckpointError(f"{name} {problem}; download it again")
    kind, suffix = ("pickled", ".bin") if is_pickled(name) else ("safetensors", ".safetensors")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{name}: weight_map must map text to text; download it again")
    for shard in dict.fromkeys(weight_map.values()):
        if not shard.endswith(suffix):
            raise CheckpointError(
                f"{name} names {shown(shard)}, which is not a {kind} file; download it again"
            )
    total_size = metadata.get("total_size") if isinstance(metadata, dict) else None
    return Index(name, weight_map, total_size, hashlib.sha256(raw).hexdigest())


def _usual_index(raw: bytes, name: str) -> dict[str, Any] | None:
    """A sound index whose weight_map has no escapes; None for any other.

    An index may name 200,000 tensors. The map is parsed in pieces, and the name of a shard is kept
    once: this takes half the memory of parsing the whole text.
    """
    begin = raw.find(b"{", raw.find(_WEIGHT_MAP)) + 1
    end = raw.find(b"}", begin)
    if raw.count(_WEIGHT_MAP) != 1 or begin == 0 or end < 0 or b"\\" in raw:
        return None
    weight_map: dict[str, str] = {}
    shards: dict[str, str] = {}
    num_pairs, stop = 0, begin - 1
    try:
        index = parse_json_object(raw[:begin] + raw[end:], name)
        if index.get("weight_map") != {}:
            return None
        while stop < end:
            position = stop + 1
            quote = raw.find(b'",', position + _PIECE, end)  # it should end a pair
            stop = end if quote < 0 else quote + 1
            text = raw[position:stop].decode("utf-8")
            pairs = json.loads(f"{{{text}}}")
            # four quotes a pair: no name occurs twice
            if not pairs or text.count('"') != 4 * len(pairs):
                return None
            num_pairs += len(pairs)
            for tensor, shard in pairs.items():
                weight_map[tensor] = shards.setdefault(shard, shard)
    except (CheckpointError, ValueError, TypeError, RecursionError):
        return None
    return {**index, "weight_map": weight_map} if len(weight_map) == num_pairs else None
